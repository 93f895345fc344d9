"""The benchmark command, on the small sample set: what it prints and writes, not how fast it is."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from stvit_video import benchmark
from stvit_video.benchmarks.pipeline import advise
from stvit_video.benchmarks.rounds import measure_steps
from tests.conftest import REPOSITORY


def test_loader_is_timed_step_by_step(small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"DATA.ROOT {small_set} DATA.WORKERS 2 TEST.CLIPS 2 --clips 16 --rounds 2 --peer pytorchvideo"
    output = tmp_path / "figures.json"
    cfg = str(REPOSITORY / "configs" / "sample_stvit.yaml")
    assert benchmark.main(["loader", "--cfg", cfg, "DATA.GENERATE", "", *words.split(), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(output.read_text())
    steps = ["decord, bare", "decode", "decode in its process", "crop and augment", "bytes to floats"]
    loaders = ["loader, 1 worker(s)", "loader, 2 worker(s)"]
    assert [row["name"] for row in figures["train"]] == [*steps, *loaders, "pytorchvideo, 1 worker"]
    assert [row["name"] for row in figures["test"]] == [*steps, *loaders]
    for row in figures["train"] + figures["test"]:
        assert len(row["milliseconds"]) == 2
        assert min(row["milliseconds"]) > 0
        assert row["name"] in printed
    assert figures["train"][0]["ratio"] == 1
    assert "training: clips of 8 frames of 64x64" in printed
    assert "test: 2 x 1 views" in printed
    assert printed.splitlines()[-1].startswith("bound by")
    assert figures["environment"]["packages"]["torch"]


def test_engine_is_timed_against_a_bare_loop(small_set: Path, tmp_path: Path) -> None:
    cfg, output = str(REPOSITORY / "configs" / "sample_stvit.yaml"), tmp_path / "engine.json"
    words = f"DATA.ROOT {small_set} DATA.WORKERS 0 TRAIN.BATCH_SIZE 8 --steps 4 --rounds 2 --output {output}".split()
    assert benchmark.main(["engine", "--cfg", cfg, "DATA.GENERATE", "", *words]) == 0
    [bare, engine] = json.loads(output.read_text())["engine"]
    assert (bare["name"], engine["name"], bare["ratio"]) == ("bare loop", "engine", 1)
    assert engine["ratio"] > 0.5  # it cannot have left out most of the steps


def test_rounds_are_interleaved_after_one_to_warm_up(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[str] = []

    def timer(name: str, seconds: list[float]) -> Callable[[], float]:
        def run() -> float:
            calls.append(name)
            return seconds.pop(0)

        return run

    timers = {"a": timer("a", [9, 0.1, 0.2, 0.3]), "b": timer("b", [9, 0.4, 0.1, 0.5])}
    first, second = measure_steps("title", "clip", timers, 3)
    assert calls == ["a", "b"] * 4
    assert first == {"name": "a", "milliseconds": [100, 200, 300], "ratio": 1}
    assert second["milliseconds"] == [400, 100, 500]
    assert second["ratio"] == pytest.approx(2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "title"
    assert lines[2].split() == ["a", "200.0", "100.0", "to", "300.0", "5.0", "1.00"]


@pytest.mark.parametrize(
    ("times", "says"),
    [
        ((50, 50, 5, 1, 30), "bound by the 2 cores"),
        ((50, 50, 80, 1, 100), "bound by the transforms: DATA.TRANSFORM_ON device"),
        ((50, 50, 5, 1, 56), r"bound by 4 worker\(s\) \(1.0 of 2 cores busy\): raise DATA.WORKERS"),
    ],
)
def test_advice_names_the_bottleneck_and_the_remedy(times: tuple[float, ...], says: str) -> None:
    names = ["decode", "decode in its process", "crop and augment", "bytes to floats", "loader, 4 worker(s)"]
    steps = [{"name": name, "milliseconds": [time]} for name, time in zip(names, times, strict=True)]
    said = advise(steps, workers=4, cores=2, short_side=256)
    assert re.search(says, said)
    assert said.startswith(f"a clip costs {sum(times[:1]) + sum(times[2:4]):.0f} ms of one core")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["loader"], "arguments are required: --cfg"),
        (["speed", "--cfg", "x.yaml"], "invalid choice: 'speed'"),
        (["loader", "--cfg", "CFG", "--rounds", "0"], "--rounds 0 is out of range; give a number from 1 on"),
        (["loader", "--cfg", "CFG", "--output", "/nowhere/x.json"], "/nowhere is not a folder"),
        (["loader", "--cfg", "CFG", "--output", "/tmp"], "--output /tmp is a folder; name a file in it"),
        (["loader", "--cfg", "CFG", "DATA.ROOT", "/nowhere", "DATA.GENERATE", ""], "needs files that are missing"),
    ],
)
def test_wrong_use_is_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = str(REPOSITORY / "configs" / "sample_stvit.yaml")
    assert benchmark.main([cfg if word == "CFG" else word for word in words]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
