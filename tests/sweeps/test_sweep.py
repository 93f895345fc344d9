"""Sweeps: jobs that are stopped, killed and continued; what is written; what is refused."""

import csv
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
from safetensors.torch import load_file

from stvit_video import run, tradeoff
from stvit_video.common.cli import EXIT_STOPPED
from stvit_video.slurm.jobs import ENDED, ClusterJob, read_job
from stvit_video.sweeps import sweep
from tests.common.test_locks import held_elsewhere
from tests.sweeps.plans import ROWS, stub_jobs, write_plan

SMALL = {"MODEL.NAME": "vit_sample_patch8", "MODEL.INIT_DEPTH": None}
START_ROWS = {"full": {**SMALL, "TRAIN.MAX_STEPS": 4}, "still": {**SMALL, "OPTIM.LR": 0.0}}


def make(plan: Path, output: Path, *words: str) -> int:
    """Run the command, without measuring speeds unless ``words`` say so; return its exit code."""
    return tradeoff.main(["--plan", str(plan), "--output", str(output), "--rounds", "0", *words])


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    until = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture(scope="module")
def trained(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The output of a plan with a start, whose command got SIGTERM and SIGKILL; what the three commands printed.

    A row that learns nothing ends with the weights of the start.
    """
    folder = tmp_path_factory.mktemp("tradeoff")
    plan = write_plan(folder, small_set, start={**SMALL, "TRAIN.MAX_STEPS": 3}, seeds=[3], rows=START_ROWS)
    output, printed = folder / "out", []

    def start() -> subprocess.Popen:
        words = ["--plan", str(plan), "--output", str(output), "--jobs", "2", "--rounds", "0"]
        command = [sys.executable, "-m", "stvit_video.tradeoff", *words]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    process = start()
    wait_until(lambda: any(output.glob("start/seed3/checkpoints/step_*.pt")), process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == EXIT_STOPPED, (out, err)
    assert err == "stopped by SIGTERM after 0 of 3 runs; all of it is kept; the same command continues\n"
    job = read_job(output / "start" / "seed3")
    assert job is not None
    assert job.state()[0] in ENDED
    assert not (output / "full").exists()
    printed.append(out)

    process = start()
    wait_until(lambda: any(output.glob("full/seed3/checkpoints/step_*.pt")), process)
    process.kill()  # its jobs go on
    printed.append(process.communicate(timeout=300)[0])

    process = start()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, (out, err)
    return output, [*printed, out]


@pytest.mark.long
def test_interrupted_sweep_trains_as_if_undisturbed(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    output, printed = trained
    assert "2 of 2 runs are finished" in printed[2] or "full, seed 3: is still running" in printed[2]
    assert "continuing at step" in (output / "start" / "seed3.txt").read_text()
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))  # what each of two runs at a time had
    try:
        config = output / "full" / "seed3" / "config.yaml"
        assert run.main(["--cfg", str(config), "OUTPUT_DIR", str(tmp_path / "alone")]) == 0
    finally:
        torch.set_num_threads(threads)
    expected, found = (load_file(path / "model.safetensors") for path in (tmp_path / "alone", config.parent))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.long
def test_rows_begin_with_the_weights_of_the_start(trained: tuple[Path, list[str]]) -> None:
    output, printed = trained
    assert re.search("start, seed 3: [0-9].*, seed 3: starts", printed[1], re.DOTALL)
    start, still = (load_file(output / name / "seed3" / "model.safetensors") for name in ("start", "still"))
    assert start.keys() == still.keys()
    assert all(torch.equal(start[name], still[name]) for name in start)


@pytest.fixture(scope="module")
def made(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A plan and its output, speeds measured, of jobs that only leave files."""
    folder = tmp_path_factory.mktemp("made")
    plan, output = write_plan(folder, small_set), folder / "out"
    with stub_jobs():
        assert make(plan, output, "--jobs", "2", "--rounds", "1", "--largest-batch", "1") == 0
    return plan, output


def test_table_has_the_figures_of_the_runs(made: tuple[Path, Path]) -> None:
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


def test_accuracies_on_different_test_lists_are_not_compared(made: tuple[Path, Path], tmp_path: Path) -> None:
    plan, output = made
    shutil.copytree(output, tmp_path / "out", symlinks=True)
    for seed in (0, 1):
        file = tmp_path / "out" / "full" / f"seed{seed}" / "results.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "test_list_sha256": f"{seed}"}))
    assert make(plan, tmp_path / "out", "--no-train") == 0
    says = "the test list has changed between the runs full, seed 0 and full, seed 1"
    assert says in (tmp_path / "out" / "tradeoff.md").read_text()


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
        assert row["points"] == pytest.approx(row["mean"] - twin["mean"], abs=1e-8)
        assert line["row"] == row["row"] == cells[0].strip()
        assert all(float(line[name]) == row[name] for name in ("gflops", "mean", "spread", "points"))
        assert cells[9].strip() == f"{row['mean']:.2f}"
    assert [row["tokens"] for row in content["rows"]] == [256, 64, 128]  # 4x8x8, 4x4x4, 2x8x8
    assert all(verdict in text for verdict in content["verdicts"])


def test_finished_table_is_neither_trained_nor_measured_again(
    made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plan, output = made
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    assert make(plan, output, "--rounds", "5") == 0
    assert "6 of 6 runs are finished" in capsys.readouterr().out
    changed = [path.name for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert set(changed) <= {"tradeoff.json", "tradeoff.csv", "tradeoff.md", "tradeoff.png", ".tradeoff.lock"}
    assert make(plan, output, "--list") == 0
    printed = capsys.readouterr().out
    assert printed.count("2 of 2") == 3
    assert "0 runs left" in printed


def test_failed_row_is_in_the_table_and_the_others_stay(
    made: tuple[Path, Path], small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    shutil.copytree(made[1], output, symlinks=True)
    rows = {"broken": {"OPTIM.LR": 1.0, "neighbour_of": "paper"}, **ROWS}
    plan = write_plan(tmp_path, small_set, seeds=[0], rows=rows)
    with stub_jobs(failing=["broken"]):
        assert make(plan, output) == 1
    printed = capsys.readouterr().out
    log = output / "broken" / "seed0.txt"
    assert log.read_text().splitlines()[-1] == "error: no_such_weight"
    assert f"broken, seed 0: failed: error: no_such_weight; log {log}" in printed
    assert "not compared, no seed being trained for both: broken" in printed
    found = {row["row"]: row for row in json.loads((output / "tradeoff.json").read_text())["rows"]}
    assert found["broken"]["failures"] == {"0": "error: no_such_weight"}
    assert found["broken"]["mean"] is None
    assert found["paper"]["mean"] is not None
    assert found["paper"]["clips_per_second"] is None  # the speeds that are there are not of all these rows
    assert make(plan, output, "--no-train") == 0
    assert "error: no_such_weight" in capsys.readouterr().out


def test_run_of_other_settings_is_refused(
    made: tuple[Path, Path], small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = {**ROWS, "paper": {"MODEL.PRESET": "paper", "OPTIM.LR": 1e-4}}
    plan = write_plan(tmp_path, small_set, rows=changed)
    assert make(plan, made[1]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "Row paper: " in said
    assert "OPTIM.LR 0.0005 (now 0.0001). Delete that folder" in said


def test_run_without_a_configuration_is_refused(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, output = made
    shutil.copytree(output, tmp_path / "out", symlinks=True)
    config = tmp_path / "out" / "paper" / "seed1" / "config.yaml"
    recorded = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**recorded, "MODEL": None}))
    assert make(plan, tmp_path / "out", "--no-train") == 2
    assert "holds a run with other settings than the plan's" in capsys.readouterr().err
    config.unlink()
    assert make(plan, tmp_path / "out", "--no-train") == 2
    assert "holds a run without a config.yaml that can be read" in capsys.readouterr().err
    assert make(plan, plan, "--list") == 2
    assert f"--output {plan} is a file; give a folder" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": [{"row": 1}]}'])
def test_damaged_table_is_named(
    content: str, small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tradeoff.json").write_text(content)
    assert make(write_plan(tmp_path, small_set), tmp_path, "--no-train") == 2
    assert "tradeoff.json is not what this command wrote" in capsys.readouterr().err


def test_two_commands_do_not_share_a_folder(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "LOCK_S", 0.0)
    plan = write_plan(tmp_path, small_set)
    with held_elsewhere(tmp_path / ".tradeoff.lock"):
        assert make(plan, tmp_path, "--no-train") == 2
        assert "is in use by another tradeoff command" in capsys.readouterr().err
    assert make(plan, tmp_path, "--no-train") == 0


def test_start_is_trained_first_and_must_stay(
    small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"full": SMALL, "paper": {"MODEL.INIT_DEPTH": None}}
    plan, output = write_plan(tmp_path, small_set, start=SMALL, seeds=[3, 1], rows=rows), tmp_path / "out"
    assert make(plan, output, "--list", "--rows", "full") == 0
    assert "all start from start, seed 3, which is trained first\n3 runs left" in capsys.readouterr().out
    with stub_jobs() as submitted:
        assert make(plan, output, "--rows", "full", "--jobs", "2") == 0
    weights = output / "start" / "seed3" / "model.safetensors"
    assert [(cfg.SEED, cfg.MODEL.INIT) for cfg in submitted] == [(3, ""), (3, str(weights)), (1, str(weights))]
    top1 = json.loads(weights.with_name("results.json").read_text())["top1"]
    sentence = f"every row starts from the weights of start, seed 3, a vit_sample_patch8 ({top1:.2f} % top-1)"
    assert sentence in capsys.readouterr().out
    assert sentence in (output / "tradeoff.md").read_text()

    moved = tmp_path / "moved"
    shutil.move(output, moved)
    assert make(plan, moved, "--no-train") == 0
    assert sentence in capsys.readouterr().out
    (moved / "start" / "seed3" / "model.safetensors").unlink()
    with stub_jobs() as submitted:
        assert make(plan, moved, "--rows", "full") == 0  # there is nothing to train
        assert make(plan, moved, "--rows", "paper") == 2
        said = capsys.readouterr().err
        assert re.search("model.safetensors is not there, .* put it back, or delete .*start/seed3, .*full[.]$", said)
        shutil.rmtree(moved / "start")
        assert make(plan, moved, "--rows", "paper") == 2
        assert "would not have the start of the rest" in capsys.readouterr().err
    assert not submitted


def test_failed_start_is_named_and_nothing_follows(
    small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = write_plan(tmp_path, small_set, start=SMALL, rows={"full": SMALL})
    with stub_jobs(failing=["start"]):
        assert make(plan, tmp_path / "out", "--jobs", "2") == 1
    assert "failed: start, seed 0, from which all rows start: error: no_such_weight" in capsys.readouterr().out
    assert not (tmp_path / "out" / "full").exists()


@pytest.mark.parametrize(
    ("code", "problem", "said"),
    [
        (137, "", "ended by SIGKILL"),
        (1, "node n1 cannot use DATA.ROOT", "node n1 cannot use DATA.ROOT"),
        (2, "", "error: no such key"),  # as the log says
        (None, "", "its job 0 ended as FAILED"),
    ],
)
def test_failed_job_says_why(code: int | None, problem: str, said: str, tmp_path: Path) -> None:
    job = ClusterJob(tmp_path, "local", "0", tmp_path, "key")
    job.path.mkdir()
    job.log().write_text("begins\nerror: no such key\n\n")
    if code is not None:
        job.add_failure(0, 0, "n1", code, problem)
    assert sweep.describe_failure(job) == said


def test_signal_while_the_last_run_ends_is_not_lost(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    describe = sweep.describe_failure
    monkeypatch.setattr(sweep, "describe_failure", lambda job: (signal.raise_signal(signal.SIGTERM), describe(job))[1])
    plan = write_plan(tmp_path, small_set, seeds=[0])
    with stub_jobs(failing=["paper-fewer-frames"]):
        assert make(plan, tmp_path / "out") == EXIT_STOPPED
    assert "stopped by SIGTERM after 2 of 3 runs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--jobs", "0"], "--jobs 0 is out of range"),
        (["--gpus-per-node", "-1"], "--gpus-per-node -1 is out of range"),
        (["--cluster", "slurm", "--profile", "none.yaml"], "Profile none.yaml cannot be read"),
        (["--profile", "none.yaml"], "--profile is for --cluster slurm"),
        (["--within", "nan"], "--within nan"),
        (["--rounds", "0", "--measure"], "leave one of them out"),
        (["--rows", "fast*"], "--rows fast* matches no row"),
        (["DATA.FRAME", "4"], "Key DATA.FRAME in the command line is unknown"),
    ],
)
def test_wrong_options_are_refused(
    words: list[str], said: str, small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = write_plan(tmp_path, small_set)
    assert tradeoff.main([*words[2:], "--plan", str(plan), "--output", str(tmp_path / "out"), *words[:2]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "out").exists()
