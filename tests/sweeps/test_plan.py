"""Plans: what they are read as, and which are refused."""

import re
from pathlib import Path

import pytest

from stvit_video.sweeps.plan import open_plan
from stvit_video.sweeps.sweep import build_timed
from tests.conftest import refusal
from tests.sweeps.plans import ROWS, write_plan

SMALL = {"MODEL.NAME": "vit_sample_patch8"}
START_ROWS = {"full": SMALL, "paper": {}}
START = {**SMALL, "TRAIN.MAX_STEPS": 1}
WHOLE = ["MODEL.INIT_DEPTH", "null"]  # the sample's configuration takes the first blocks only


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": {**ROWS, "paper": {"MODEL.PRESTE": "paper"}}}, "Key MODEL.PRESTE in row paper of .* Did you mean"),
        ({"rows": {**ROWS, "paper": {"DATA.FRAMES": "many"}}}, "DATA.FRAMES in row paper of .* takes an int"),
        ({"rows": {**ROWS, "paper": {"MODEL.PRESET": "papr"}}}, "row paper of .*allowed: paper.* Did you mean paper"),
        ({"rows": {**ROWS, "paper": {"SEED": 3}}}, "SEED in row paper of .* leave it out"),
        ({"rows": {**ROWS, "paper": {"MODE": "test"}}}, "MODE in row paper"),
        ({"rows": {**ROWS, "more": {"DATA.FRAMES": 2, "control_of": "papre"}}}, "Did you mean paper"),
        ({"rows": {**ROWS, "more": {"DATA.FRAMES": 2, "control_of": "full"}}}, "control of 'full', which is no row"),
        (
            {"rows": {**ROWS, "more": {"DATA.FRAMES": 2, "control_of": "paper", "neighbour_of": "paper"}}},
            "Remove neighbour_of",
        ),
        ({"rows": {**ROWS, "more": {"DATA.FRAMES": 2, "control_of": None}}}, "control of None, which is no row"),
        ({"rows": {**ROWS, "more": {"DATA.FRAMES": 2, "control_of": ["paper", "x"]}}}, "control of 'x', which is no"),
        ({"rows": {**ROWS, "more": {"DATA.FRAMES": 2, "control_of": []}}}, "control of 'nothing', which is no row"),
        ({"rows": {**ROWS, "more": {"PRECISION": "bf16"}}}, "row more has PRECISION 'bf16' and full 'fp32'"),
        ({"rows": {**ROWS, "more": {"TEST.CLIPS": 3}}}, "row more has TEST.CLIPS 3 and full 1"),
        ({"rows": {**ROWS, "more": {"TRAIN.RESUME": "never"}}}, "TRAIN.RESUME in row more .* leave it out"),
        (
            {"rows": {**ROWS, "more": {"MODEL": {"PRESET": "fast"}, "MODEL.PRESET": "paper"}}},
            "MODEL.PRESET stands twice in row more",
        ),
        ({"rows": {**ROWS, "more": False}}, "rows is not a mapping of mappings"),
        ({"rows": {**ROWS, "more": {"MODEL.PRESET": "paper"}}}, "more and paper|paper and more"),
        ({"rows": {**ROWS, "a/b": {}}}, "row 'a/b' cannot name a folder"),
        ({"rows": {**ROWS, "..": {}}}, "cannot name a folder"),
        ({"rows": {**ROWS, 8: {}}}, "row 8 cannot name a folder.* quote"),
        ({"rows": [1]}, "rows is not a mapping"),
        ({"rows": {}}, "twin 'full' is no row"),
        ({"twin": "ful"}, "twin 'ful' is no row.* Did you mean full"),
        ({"seeds": [0, 0]}, "seeds is .*different"),
        ({"seeds": []}, "seeds is"),
        ({"seeds": [0, -1]}, "seeds is"),
        ({"cfg": "none.yaml"}, "none.yaml is not there"),
        ({"seed": [0]}, "seed is no part of a plan.* Did you mean seeds"),
    ],
)
def test_wrong_plans_are_refused(changes: dict[str, object], said: str, small_set: Path, tmp_path: Path) -> None:
    error = refusal(open_plan, write_plan(tmp_path, small_set, **changes))
    assert re.search(said, error), error


def test_a_row_given_twice_is_refused(small_set: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, small_set)
    plan.write_text(plan.read_text() + "  paper: {MODEL.PRESET: fast}\n")
    assert "paper is given twice" in refusal(open_plan, plan)
    plan.write_text(plan.read_text().replace("MODEL.PRESET: fast", "LOG.WANDB: 2024-13-45"))
    assert "is not YAML that can be used" in refusal(open_plan, plan)
    plan.unlink()
    assert "is not there; give a .yaml file" in refusal(open_plan, plan)


def test_models_that_cannot_be_built_are_refused_by_name(small_set: Path, tmp_path: Path) -> None:
    plan = open_plan(write_plan(tmp_path, small_set, rows={**ROWS, "odd": {"DATA.SIZE": 60}}))
    assert refusal(build_timed, plan.rows[-1]).startswith("Row odd: ")


def test_the_command_line_holds_for_all_rows_or_is_refused(small_set: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, small_set)
    assert {row.cfg.OPTIM.LR for row in open_plan(plan, ["OPTIM.LR", "2e-3"]).rows} == {0.002}
    assert "DATA.FRAMES on the command line" in refusal(open_plan, plan, ["DATA.FRAMES=4"])
    assert "SEED in the command line" in refusal(open_plan, plan, ["SEED", "1"])
    assert "Key OPTIM.L in the command line is unknown" in refusal(open_plan, plan, ["OPTIM.L", "1"])


@pytest.mark.parametrize(
    ("changes", "words", "said"),
    [
        ({"start": None}, WHOLE, "start is None; give KEY: VALUE pairs"),
        ({"start": {"MODEL.PRESTE": "paper"}}, WHOLE, "Key MODEL.PRESTE in row start of .* Did you mean"),
        ({"start": {"DATA.FRAMES": 4, "control_of": "paper"}}, WHOLE, "row start is the start; .* Remove control_of"),
        ({"rows": {**START_ROWS, "start": {"DATA.FRAMES": 2}}}, WHOLE, "a row is named start, .* rename it"),
        ({"rows": {**START_ROWS, "more": {"MODEL.INIT": "a.pth"}}}, WHOLE, "row more has a MODEL.INIT, and start"),
        (
            {},
            [],
            "row full has MODEL.INIT_DEPTH 4, and would take the start's weights up to there only; set it to null",
        ),
    ],
)
def test_wrong_starts_are_refused(
    changes: dict[str, object], words: list[str], said: str, small_set: Path, tmp_path: Path
) -> None:
    plan = write_plan(tmp_path, small_set, **{"start": START, "rows": START_ROWS, **changes})
    assert re.search(said, refusal(open_plan, plan, words))
