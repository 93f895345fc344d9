"""Accuracy beside speed: plans that are refused, runs that are killed and continued, the table and what it says."""

import csv
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors.torch import load_file

from stvit_video import run, tradeoff
from stvit_video.runtime.stopping import EXIT_STOPPED
from stvit_video.sweeps.plan import measure_row, read_plan
from stvit_video.sweeps.runs import Lock
from stvit_video.sweeps.table import Line, Table, markdown, plot_tradeoff, records, verdicts
from tests.conftest import REPOSITORY, refusal

ROWS = {
    "full": {"MODEL.NAME": "vit_sample_patch8"},
    "paper": {"MODEL.PRESET": "paper"},
    "paper-fewer-frames": {"MODEL": {"NAME": "vit_sample_patch8"}, "DATA.FRAMES": 4, "control_of": "paper"},
}
PLAN = {"cfg": "../base.yaml", "seeds": [0, 1], "twin": "full", "rows": ROWS}


def write_plan(folder: Path, root: Path, **changes: object) -> Path:
    """Write PLAN with changes, and the configuration that it starts from: two steps on the set in ``root``."""
    base = {
        "_BASE_": str(REPOSITORY / "configs" / "sample_stvit.yaml"),
        "DATA": {"ROOT": str(root), "GENERATE": "", "WORKERS": 0, "VAL_LIST": ""},
        "TRAIN": {"MAX_STEPS": 2, "BATCH_SIZE": 8},
        "CHECKPOINT": {"EVERY_STEPS": 1},
        "DEVICE": "cpu",
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    (folder / "plans").mkdir(exist_ok=True)
    plan = folder / "plans" / "small.yaml"
    plan.write_text(yaml.safe_dump({**PLAN, **changes}, sort_keys=False))
    return plan


def start(plan: Path, output: Path) -> subprocess.Popen:
    words = ["--plan", str(plan), "--output", str(output), "--jobs", "2", "--rounds", "1", "--largest-batch", "1"]
    command = [sys.executable, "-m", "stvit_video.tradeoff", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture(scope="module")
def made(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A plan and its output, by a command that SIGTERM and SIGKILL met while runs were under way."""
    folder = tmp_path_factory.mktemp("tradeoff")
    plan, output = write_plan(folder, small_set), folder / "out"

    process = start(plan, output)
    wait_until(lambda: any(output.glob("full/seed*/checkpoints/step_*.pt")), process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED, said
    assert "stopped by SIGTERM after " in said[1]
    assert said[1].count("\n") == 1
    with open(output / ".tradeoff.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # no run is left that holds it

    process = start(plan, output)
    wait_until(lambda: any(output.glob("paper/seed*/checkpoints/step_*.pt")), process)
    process.kill()
    process.communicate(timeout=120)

    process = start(plan, output)
    said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return plan, output


def test_killed_and_continued_as_if_nothing_had_happened(made: tuple[Path, Path], tmp_path: Path) -> None:
    plan, output = made
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))  # what each of two runs at once had
    try:
        for row in read_plan(plan).rows[:2]:  # those that were under way
            alone = tmp_path / row.name
            words = [*row.words, "OUTPUT_DIR", str(alone), "SEED", "0"]
            assert run.main(["--cfg", str(plan.parent / "../base.yaml"), *words]) == 0
            expected, found = (
                load_file(folder / "model.safetensors") for folder in (alone, output / row.name / "seed0")
            )
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    finally:
        torch.set_num_threads(threads)


def test_figures_are_those_of_the_runs(made: tuple[Path, Path]) -> None:
    _, output = made
    rows = json.loads((output / "tradeoff.json").read_text())["rows"]
    assert [row["row"] for row in rows] == list(ROWS)
    for row in rows:
        first, second = (
            json.loads((output / row["row"] / f"seed{seed}" / "results.json").read_text()) for seed in (0, 1)
        )
        assert [row["top1_seed0"], row["top1_seed1"]] == [first["top1"], second["top1"]]
        assert row["gflops"] == first["gflops"]
        assert row["parameters"] == first["parameters"]
        assert row["mean"] == pytest.approx((first["top1"] + second["top1"]) / 2)
        assert row["spread"] == pytest.approx(abs(first["top1"] - second["top1"]))


def test_files_of_the_table_agree(made: tuple[Path, Path]) -> None:
    _, output = made
    content = json.loads((output / "tradeoff.json").read_text())
    speeds = json.loads((output / "speed.json").read_text())
    assert speeds["models"][0]["name"] == "full"
    assert speeds["environment"]["packages"]["torch"]
    assert (output / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    text = (output / "tradeoff.md").read_text()
    table = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("|")]
    with open(output / "tradeoff.csv", newline="") as file:
        found = list(csv.DictReader(file))
    twin = content["rows"][0]
    for row, line, cells in zip(content["rows"], found, table[2:], strict=True):
        assert row["clips_per_second"] == speeds["clips_per_second"][row["row"]]
        assert row["speed_of_twin"] == row["clips_per_second"] / twin["clips_per_second"]
        assert row["gflops_of_twin"] == row["gflops"] / twin["gflops"]
        assert row["points"] == row["mean"] - twin["mean"]
        assert line["row"] == row["row"] == cells[0].strip()
        assert all(float(line[name]) == row[name] for name in ("gflops", "mean", "spread", "points"))
        assert cells[9].strip() == f"{row['mean']:.2f}"
    assert [row["tokens"] for row in content["rows"]] == [256, 64, 128]  # 4x8x8, 4x4x4, 2x8x8
    assert all(verdict in text for verdict in content["verdicts"])


def test_a_finished_table_is_neither_trained_nor_measured_again(
    made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plan, output = made
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    assert tradeoff.main(["--plan", str(plan), "--output", str(output)]) == 0
    assert "6 of 6 runs are finished" in capsys.readouterr().out
    changed = [path.name for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert set(changed) <= {"tradeoff.json", "tradeoff.csv", "tradeoff.md", "tradeoff.png", ".tradeoff.lock"}
    assert tradeoff.main(["--plan", str(plan), "--output", str(output), "--list"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("2 of 2") == 3
    assert "0 runs left" in printed


def test_a_row_that_fails_is_in_the_table_and_the_others_stay(
    made: tuple[Path, Path], small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made[1], tmp_path / "out")
    broken = {"TRAIN.FREEZE": ["no_such_weight"], "neighbour_of": "paper"}
    words = [
        "--plan",
        str(write_plan(tmp_path, small_set, seeds=[0], rows={"broken": broken, **ROWS})),
        *("--output", str(tmp_path / "out"), "--rounds", "0"),
    ]
    assert tradeoff.main(words) == 1
    printed = capsys.readouterr().out
    last_error = (tmp_path / "out" / "broken" / "seed0.txt").read_text().splitlines()[-1]
    assert last_error.startswith("error: ")
    assert f"broken, seed 0: failed: {last_error}" in printed
    assert "not compared, no seed being trained for both: broken" in printed
    rows = {row["row"]: row for row in json.loads((tmp_path / "out" / "tradeoff.json").read_text())["rows"]}
    assert rows["broken"]["failures"] == {"0": last_error}
    assert rows["broken"]["mean"] is None
    assert rows["paper"]["mean"] is not None
    assert rows["paper"]["clips_per_second"] is None  # the figures that there are were not of all these rows
    assert tradeoff.main([*words, "--no-train"]) == 0
    assert last_error in capsys.readouterr().out


def test_a_run_of_other_settings_is_refused(
    made: tuple[Path, Path], small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = {**ROWS, "paper": {"MODEL.PRESET": "paper", "OPTIM.LR": 1e-4}}
    plan = write_plan(tmp_path, small_set, rows=changed)
    assert tradeoff.main(["--plan", str(plan), "--output", str(made[1])]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "Row paper: " in said
    assert "OPTIM.LR 0.0005 (now 0.0001). Delete that folder" in said


def test_a_run_that_nobody_knows_is_refused(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, output = made
    shutil.copytree(output, tmp_path / "out")
    (tmp_path / "out" / "paper" / "seed1" / "config.yaml").unlink()
    assert tradeoff.main(["--plan", str(plan), "--output", str(tmp_path / "out"), "--no-train"]) == 2
    assert "holds a run without a config.yaml that can be read" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": [{"row": 1}]}'])
def test_a_damaged_table_is_named(
    content: str, small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = write_plan(tmp_path, small_set)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tradeoff.json").write_text(content)
    assert tradeoff.main(["--plan", str(plan), "--output", str(tmp_path / "out"), "--no-train"]) == 2
    said = capsys.readouterr().err
    assert "tradeoff.json is not what this command wrote" in said
    assert said.count("\n") == 1


def test_two_commands_do_not_share_a_folder(tmp_path: Path) -> None:
    with Lock(tmp_path):
        assert "is in use by another tradeoff command" in refusal(Lock(tmp_path, patience=0).__enter__)
    with Lock(tmp_path, patience=0):
        pass


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": {**ROWS, "paper": {"MODEL.PRESTE": "paper"}}}, "Key MODEL.PRESTE in row paper of .* Did you mean"),
        ({"rows": {**ROWS, "paper": {"DATA.FRAMES": "many"}}}, "DATA.FRAMES in row paper of .* takes a int"),
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
        ({"rows": {**ROWS, "more": {"TRAIN.RESUME": "never"}}}, "TRAIN.RESUME never in row more .* leave it at auto"),
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
        ({"cfg": "none.yaml"}, "none.yaml is not a file"),
        ({"seed": [0]}, "seed is no part of a plan.* Did you mean seeds"),
    ],
)
def test_wrong_plans_are_refused(
    changes: dict[str, object], said: str, small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = write_plan(tmp_path, small_set, **changes)
    assert tradeoff.main(["--plan", str(plan), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(said, error), error
    assert not (tmp_path / "out").exists()


def test_a_row_given_twice_is_refused(small_set: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, small_set)
    plan.write_text(plan.read_text() + "  paper: {MODEL.PRESET: fast}\n")
    assert "paper is given twice" in refusal(read_plan, plan)
    plan.write_text(plan.read_text().replace("MODEL.PRESET: fast", "LOG.WANDB: 2024-13-45"))
    assert "is not YAML that can be used" in refusal(read_plan, plan)
    plan.unlink()
    assert "cannot be read" in refusal(read_plan, plan)


def test_models_that_cannot_be_built_are_refused_by_name(small_set: Path, tmp_path: Path) -> None:
    plan = read_plan(write_plan(tmp_path, small_set, rows={**ROWS, "odd": {"DATA.SIZE": 60}}))
    assert refusal(measure_row, plan.rows[-1], 8).startswith("Row odd: ")


def test_the_command_line_holds_for_all_rows_or_is_refused(small_set: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, small_set)
    assert {row.cfg.OPTIM.LR for row in read_plan(plan, ["OPTIM.LR", "2e-3"]).rows} == {0.002}
    assert "DATA.FRAMES on the command line" in refusal(read_plan, plan, ["DATA.FRAMES=4"])
    assert "SEED in the command line" in refusal(read_plan, plan, ["SEED", "1"])
    assert "Key OPTIM.L in the command line is unknown" in refusal(read_plan, plan, ["OPTIM.L", "1"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--jobs", "0"], "--jobs 0 is out of range"),
        (["--within", "nan"], "--within nan"),
        (["--rounds", "0", "--measure"], "leave one of them out"),
        (["--rows", "fast*"], "--rows fast\\* matches no row"),
    ],
)
def test_wrong_options_are_refused(
    words: list[str], said: str, small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = write_plan(tmp_path, small_set)
    assert tradeoff.main(["--plan", str(plan), "--output", str(tmp_path / "out"), *words]) == 2
    assert said.replace("\\", "") in capsys.readouterr().err


def line(name: str, *top1: float | None, kind: str = "control", of: str = "fast", gflops: float = 1.0) -> Line:
    kind, of = {"full": ("twin", ""), "fast": ("preset", "")}.get(name, (kind, of))
    return Line(name, kind, tuple(of.split()), 1, 1, gflops, dict(enumerate(top1)))


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (
            [line("full", 98.0, 99.0), line("fast", 98.5, 97.9)],
            "0.30 points below full, within the 0.5 asked (spread 0.60; full: spread 1.00)",
        ),
        (
            [line("full", 98.9, 98.9), line("fast", 98.4, 98.4)],  # half a point, whatever floats make of it
            "0.50 points below full, within the 0.5 asked (spread 0.00; full: spread 0.00)",
        ),
        (
            [line("full", 98.9, 98.9), line("fast", 98.4, 98.3)],
            "0.55 points below full, NOT within the 0.5 asked (spread 0.10; full: spread 0.00)",
        ),
        (
            [line("full", 90.0, 90.0), line("fast", 90.0, 92.0)],
            "1.00 points above full, within the 0.5 asked (spread 2.00; full: spread 0.00)",
        ),
        (
            [line("full", 90.0, 91.0), line("fast", 91.0, 90.0)],
            "equal to full, within the 0.5 asked (spread 1.00; full: spread 1.00)",
        ),
        (
            [line("full", 90.0, None), line("fast", None, 89.0)],
            "89.00 % (one seed only), and full has none of these seeds trained",
        ),
        (
            [line("full", 90.0, 90.0, 90.0), line("fast", 90.0, 89.8, None)],
            "0.10 points below full, within the 0.5 asked (2 of 3 seeds; full: spread 0.00)",
        ),
        (
            [line("full", None, None), line("fast", 89.0, 89.5)],
            "89.25 % (spread 0.50), and full has none of these seeds trained",
        ),
        ([line("full", 90.0, 90.0), line("fast", None, None)], "no seed is trained, so nothing can be said"),
        (
            [
                *(line("full", 90.0, 90.0), line("fast", 90.0, 90.0), line("fast-random", 70.0, 71.0)),
                *(
                    line("fast-mean", 90.25, 90.25),
                    line("few", 90.0, 90.0, of="other fast"),
                    line("fast-late", None, None),
                ),
                *(line("fast-half", 89.0, None), line("tome", 91.0, 90.0, kind="neighbour")),
                line("other-random", 95.0, 95.0, of="other"),
            ],
            "equal to full, within the 0.5 asked (spread 0.00; full: spread 0.00); above random (by 19.50), half "
            "(by 1.00, one seed only); NOT above mean (by 0.25), few (by 0.00, less than the spread); neighbours: "
            "tome (+0.50, less than the spread); not compared, no seed being trained for both: late",
        ),
    ],
)
def test_what_is_said_of_a_preset(lines: list[Line], sentence: str) -> None:
    assert verdicts(Table(tuple(lines), 0.5)) == [f"fast: {sentence}"]


def test_figures_that_are_not_there_are_no_figures() -> None:
    table = Table((line("full", 90.0, None, gflops=2.0), line("fast", None, None)), 0.5)
    full, fast = records(table)
    assert (full["mean"], full["spread"], full["points"]) == (90.0, None, 0.0)
    assert (fast["mean"], fast["points"], fast["speed_of_twin"], fast["gflops_of_twin"]) == (None, None, None, 0.5)
    assert "None" not in markdown(table)


def test_no_two_names_of_a_plot_lie_on_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    assert not plot_tradeoff(Table((line("full", None),), 0.5), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    rows = [line(f"paper-control-{i}", 90 + i % 3 / 10, 90.5, gflops=0.3 + i / 100) for i in range(18)]
    table = Table((line("full", 97.0, 98.0, gflops=1.3), line("fast", 96.0, gflops=0.3), *rows), 0.5)
    assert plot_tradeoff(table, tmp_path / "plot.png")
    (axes,) = drawn[0].axes
    FigureCanvasAgg(drawn[0]).draw()  # at the size on the screen, no longer that of the file
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert len(boxes) == 20
    for i, box in enumerate(boxes):
        assert axes.bbox.contains(*box.min)
        assert axes.bbox.contains(*box.max)
        assert not any(box.overlaps(other) for other in boxes[:i])
