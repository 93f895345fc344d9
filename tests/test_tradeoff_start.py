"""A plan's start: trained once and first, its weights what all rows begin from, also after what happens to folders."""

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stvit_video import tradeoff
from stvit_video.runtime.stopping import EXIT_STOPPED
from stvit_video.sweeps import runs as tradeoff_runs
from stvit_video.sweeps.plan import read_plan
from tests.conftest import refusal
from tests.test_tradeoff import start as launch
from tests.test_tradeoff import wait_until, write_plan

SMALL = {"MODEL.NAME": "vit_sample_patch8"}
# A row that learns nothing ends with the weights that it started from.
ROWS = {"full": {**SMALL, "OPTIM.LR": 0.0}, "paper": {"OPTIM.LR": 0.0}, "odd": {**SMALL, "OPTIM.LR": 1.0}}
START = {**SMALL, "TRAIN.MAX_STEPS": 1}
WHOLE = ["MODEL.INIT_DEPTH", "null"]  # the sample's configuration takes the first blocks only

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def plan(small_set: Path, tmp_path: Path) -> Path:
    return write_plan(tmp_path, small_set, start=START, seeds=[3, 1], rows=ROWS)


@pytest.fixture
def command(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Give the command with words in ``tmp_path / "out"``; return its exit code and what it said."""

    def give(*words: str, output: str = "out") -> tuple[int, str]:
        common = ["--plan", str(plan), "--output", str(tmp_path / output), "--rounds", "0"]
        code = tradeoff.main([*common, *WHOLE, *words])
        said = capsys.readouterr()
        assert said.err.count("\n") <= 1
        return code, said.out + said.err

    return give


def test_all_rows_start_from_one_run(command: Command, tmp_path: Path) -> None:
    assert "all start from start, seed 3, which is trained first\n3 runs left" in command("--list", "--rows", "full")[1]
    code, said = command("--rows", "full")
    assert code == 0
    assert "0 of 3 runs are finished" in said
    assert re.search("start, seed 3: starts.*start, seed 3: [0-9].*full, seed 3: starts", said, re.DOTALL)
    first = load_file(tmp_path / "out" / "start" / "seed3" / "model.safetensors")
    for seed in (3, 1):
        weights = load_file(tmp_path / "out" / "full" / f"seed{seed}" / "model.safetensors")
        assert weights.keys() == first.keys()
        assert all(torch.equal(weights[name], first[name]) for name in first)

    top1 = json.loads((tmp_path / "out" / "start" / "seed3" / "results.json").read_text())["top1"]
    sentence = f"every row starts from the weights of start, seed 3, a vit_sample_patch8 ({top1:.2f} % top-1)"
    assert sentence in said
    assert sentence in (tmp_path / "out" / "tradeoff.md").read_text()
    again = command("--rows", "full")[1]
    assert "2 of 2 runs are finished" in again
    assert "start, seed 3: starts" not in again
    assert "all start from start, seed 3\n4 runs left" in command("--list")[1]

    shutil.move(tmp_path / "out", tmp_path / "moved")
    code, said = command("--no-train", output="moved")
    assert code == 0
    assert sentence in said

    (tmp_path / "moved" / "start" / "seed3" / "model.safetensors").unlink()
    assert command("--rows", "full", output="moved")[0] == 0  # there is nothing to train
    code, said = command("--rows", "paper", output="moved")
    assert code == 2
    assert re.search("model.safetensors is not there, .* put it back, or delete .*start/seed3, .*full[.]\n", said)
    shutil.rmtree(tmp_path / "moved" / "start")
    code, said = command("--rows", "paper", output="moved")
    assert code == 2
    assert "would not have the start of the rest" in said


@pytest.mark.long
def test_a_stopped_start_goes_on(plan: Path, tmp_path: Path, command: Command) -> None:
    """Nothing of a row is begun before it has ended."""
    text = plan.read_text().replace("TRAIN.MAX_STEPS: 1", "TRAIN.MAX_STEPS: 4")
    assert text != plan.read_text()
    base = plan.parent.parent / "base.yaml"
    base.write_text(base.read_text() + "MODEL:\n  INIT_DEPTH: null\n")
    plan.write_text(text)
    process = launch(plan, tmp_path / "out")
    wait_until(lambda: any((tmp_path / "out" / "start" / "seed3" / "checkpoints").glob("step_*.pt")), process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED, said
    assert not (tmp_path / "out" / "full").exists()
    code, printed = command("--rows", "full")
    assert code == 0, printed
    assert "continuing at step" in (tmp_path / "out" / "start" / "seed3.txt").read_text()


def test_a_start_that_fails_is_named(plan: Path, tmp_path: Path, command: Command) -> None:
    plan.write_text(plan.read_text().replace("TRAIN.MAX_STEPS: 1", "TRAIN.FREEZE: [no_such_weight]"))
    code, said = command("--jobs", "2")
    assert code == 1
    assert re.search("failed: start, seed 3, from which all rows start: .*no_such_weight", said)
    assert not (tmp_path / "out" / "full").exists()


def test_a_signal_as_the_last_run_ends_is_not_lost(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops this command before the next thing, not nothing."""
    monkeypatch.setattr(tradeoff_runs, "_read_top1", lambda run: signal.raise_signal(signal.SIGTERM) or "done")
    code, said = command("--rows", "full")
    assert code == EXIT_STOPPED
    assert "stopped by SIGTERM after 1 of 3 runs; the same command continues" in said
    assert not (tmp_path / "out" / "full").exists()


@pytest.mark.parametrize(
    ("changes", "words", "said"),
    [
        ({"start": None}, WHOLE, "start is None; give KEY: VALUE pairs"),
        ({"start": {"MODEL.PRESTE": "paper"}}, WHOLE, "Key MODEL.PRESTE in row start of .* Did you mean"),
        ({"start": {"DATA.FRAMES": 4, "control_of": "paper"}}, WHOLE, "row start is the start; .* Remove control_of"),
        ({"rows": {**ROWS, "start": {"DATA.FRAMES": 2}}}, WHOLE, "a row is named start, .* rename the row"),
        ({"rows": {**ROWS, "more": {"MODEL.INIT": "a.pth"}}}, WHOLE, "row more has a MODEL.INIT, and start"),
        (
            {},
            [],
            "row full has MODEL.INIT_DEPTH 4, and would take the start's weights up to there only; set it to null",
        ),
    ],
)
def test_wrong_plans_are_refused(
    changes: dict[str, object], words: list[str], said: str, small_set: Path, tmp_path: Path
) -> None:
    plan = write_plan(tmp_path, small_set, **{"start": START, "rows": ROWS, **changes})
    assert re.search(said, refusal(read_plan, plan, words))
