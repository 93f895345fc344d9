"""The benchmark of streams: what it compares, prints and refuses, not how fast anything is."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stvit_video import benchmark
from tests.conftest import REPOSITORY

WORDS = ["stream", "--cfg", str(REPOSITORY / "configs/sample_stvit.yaml"), "--rounds", "2", "DEVICE", "cpu"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stream_beside_windows(
    precision: str, write_clip: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = write_clip(np.random.default_rng(0).integers(0, 256, (40, 72, 96, 3), np.uint8))
    output = tmp_path / "speed.json"
    words = ["--video", str(video), "--output", str(output), "PRECISION", precision, "MODEL.STREAMING", "True"]
    assert benchmark.main([*WORDS, *words]) == 0
    printed, figures = capsys.readouterr().out, json.loads(output.read_text())
    assert "a decision every 2 frames" in printed
    assert list(figures["sources"]) == ["frames in memory", "frames of clip.mp4"]
    for source, rows in figures["sources"].items():
        assert source in printed
        assert [row["name"] for row in rows] == ["stream", "windows", "windows of vit_sample_patch8"]
        for row in rows:
            assert row["p50_ms"] <= row["p95_ms"]
            assert row["ratio"] == row["decisions_per_second"] / rows[-1]["decisions_per_second"]
            assert row["difference"] <= (1e-5 if precision == "fp32" else 0.03)


def test_what_it_refuses(write_clip: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    video = str(write_clip(np.zeros((9, 72, 96, 3), np.uint8)))
    for words, line in (
        (WORDS, "add MODEL.STREAMING True"),
        ([*WORDS, "MODEL.STREAMING", "True", "--video", video], "has 9 frames; give one of 20 or more"),
        ([*WORDS, "--video", "none.mp4"], "stream takes it, and it has to be a file"),
        (["model", *WORDS[1:], "--video", video], "of model; stream takes it"),
        ([*WORDS, "--plot", "x.png"], "no --plot"),
    ):
        assert benchmark.main(words) == 2
        error = capsys.readouterr().err
        assert line in error
        assert error.count("\n") == 1
