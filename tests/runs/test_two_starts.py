"""Two processes that are started in one folder: one run, or one run and a refusal."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stvit_video.runs.log import read_metrics
from tests.conftest import REPOSITORY, small_arguments

# Imports once; then each line starts processes, which end as Python does, and is answered by their exit codes. Pictures
# would take half of the time.
SERVER = """
import json, os, sys, time
from stvit_video.common import charts
charts.png_of_confusion = charts.plot_curves = charts.plot_transfer = lambda *given, **named: b""
from stvit_video import run
from stvit_video.data import workers
from stvit_video.evaluation import evaluate
from stvit_video.runs import folder
from stvit_video.training import loop, transfer
for line in sys.stdin:
    starts = []
    for arguments, log, delay, patience in json.loads(line):
        child = os.fork()
        if child == 0:
            time.sleep(delay)
            file = os.open(log, os.O_CREAT | os.O_WRONLY, 0o644)
            os.dup2(file, 1), os.dup2(file, 2)
            folder.LOCK_S = patience
            sys.exit(run.main(arguments))
        starts.append(child)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in starts]), flush=True)
"""
LONG = pytest.mark.long
Start = Callable[..., list[tuple[int, str]]]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Start processes with the same arguments, each after a delay, and return exit codes and output."""
    command = [sys.executable, "-c", SERVER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, cwd=REPOSITORY, **pipes) as server:  # type: ignore[call-overload]

        def start(arguments: list[str], logs: Path, delays: list[float], patience: float = 60) -> list[tuple[int, str]]:
            files = [logs / f"{number}.log" for number in range(len(delays))]
            starts = [[arguments, str(log), delay, patience] for log, delay in zip(files, delays, strict=True)]
            print(json.dumps(starts), file=server.stdin, flush=True)
            codes = json.loads(server.stdout.readline())
            return [(code, log.read_text()) for code, log in zip(codes, files, strict=True)]

        yield start


SMALLEST = [
    *("TRAIN.MAX_STEPS", "1", "DATA.VAL_LIST", "", "TEST.CLIPS", "1", "TEST.CROPS", "1", "TEST.BATCH_SIZE", "16"),
    *("TRANSFER.RANDOM_BASELINE", "False",),
]  # fmt: skip
AFTER = {  # what the process that comes second may say
    "train": ("is finished (OVERWRITE True runs it again)", "is being written by process"),
    "test": ("holds results (results.json, ", "is being written by process"),
    "transfer": ("holds results (transfer.json, ", "is being written by process"),
}


def check(folder: Path, mode: str, ended: list[tuple[int, str]]) -> int:
    """Check that one process alone did the work, and return the exit code of the other."""
    name = "transfer" if mode == "transfer" else "results"
    done = [code for code, said in ended if f"results in {folder}/{name}.json" in said]
    said = "\n".join(said for _, said in ended)
    assert done == [0], said
    (code, other), *_ = [end for end in ended if f"results in {folder}/{name}.json" not in end[1]]
    assert "Traceback" not in said
    (sentence,) = [number for number, words in enumerate(AFTER[mode]) if words in other]
    assert code == (0 if (mode, sentence) == ("train", 0) else 2), said
    if mode == "train":
        assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [1]
    return code


def start_often(start: Start, small_set: Path, trained: Path, tmp_path: Path, mode: str, times: int) -> set[int]:
    rng = random.Random(mode)
    codes = set()
    for number in range(times):
        folder = tmp_path / str(number)
        folder.mkdir()
        arguments = small_arguments(small_set, folder / "run", *SMALLEST, "MODE", mode)
        arguments += ["MODEL.INIT", str(trained)] * (mode != "train")
        delays = [0.0, rng.choice([0.0, rng.uniform(0, 0.02), rng.uniform(0, 2)])]
        ended = start(arguments, folder, delays, rng.choice([0.0, 60.0]))
        codes.add(check(folder / "run", mode, ended))
    return codes


@pytest.mark.parametrize("mode", ["train", *(pytest.param(mode, marks=LONG) for mode in ("test", "transfer"))])
def test_two_starts_are_one_run(start: Start, small_set: Path, trained: Path, tmp_path: Path, mode: str) -> None:
    start_often(start, small_set, trained, tmp_path, mode, 1)


@LONG
def test_of_two_that_overwrite_the_second_is_refused(start: Start, small_set: Path, tmp_path: Path) -> None:
    """Later it may overwrite what is there by then."""
    arguments = small_arguments(small_set, tmp_path / "run", *SMALLEST, "OVERWRITE", "True")
    (done, _), (refused, said) = sorted(start(arguments, tmp_path, [0.0, 0.0]))
    assert (done, refused) == (0, 2)
    assert "was finished by another process that this one waited for" in said
    assert [code for code, _ in start(arguments, tmp_path, [0.0])] == [0]


@pytest.mark.parametrize("times", [pytest.param(20, marks=LONG), pytest.param(200, marks=pytest.mark.slow)])
def test_many_starts_are_never_two_runs(
    start: Start, small_set: Path, trained: Path, tmp_path: Path, times: int
) -> None:
    assert start_often(start, small_set, trained, tmp_path, "train", times) == {0, 2}
