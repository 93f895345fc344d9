"""Smoothed timelines and their segments, against scores and times made by hand."""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from stvit_video import predict
from stvit_video.data.windows import Span
from stvit_video.inference.prediction import Window
from stvit_video.inference.segments import find_segments, smooth


def make_windows(scores: Sequence[Sequence[float]], length: float, step: float, segments: str) -> list[Window]:
    """Return windows of ``length`` seconds, one every ``step``; ``segments`` has the segment's digit of each."""
    return [
        Window(torch.tensor(row), Span(i * step, i * step + length), 0.0, 0.0, segment=int(segment))
        for i, (row, segment) in enumerate(zip(scores, segments, strict=True))
    ]


ONE = [[0.9, 0.1], [0.7, 0.3], [0.4, 0.6], [0.2, 0.8], [0.55, 0.45]]


@pytest.mark.parametrize(
    ("length", "step", "threshold", "segments", "expected"),
    [
        # Side by side, windows are their own time.
        (2, 2, 0.5, "00000", [(0, 4, 0, 0.8), (4, 8, 1, 0.7), (8, 10, 0, 0.55)]),
        (2, 2, 0.65, "00000", [(0, 4, 0, 0.8), (6, 8, 1, 0.8)]),
        # Of windows [0, 4], [1, 5], ..., the middles are 2, 3, ...
        (4, 1, 0.5, "00000", [(0, 3.5, 0, 0.8), (3.5, 5.5, 1, 0.7), (5.5, 8, 0, 0.55)]),
        # Nothing is said of the time between windows.
        (1, 3, 0.5, "00000", [(0, 4, 0, 0.8), (6, 10, 1, 0.7), (12, 13, 0, 0.55)]),
        # A gap in time ends a segment.
        (2, 2, 0.5, "01111", [(0, 2, 0, 0.9), (2, 4, 0, 0.7), (4, 8, 1, 0.7), (8, 10, 0, 0.55)]),
        (2, 2, 0.95, "00000", []),
    ],
)
def test_segments_of_one_label(
    length: float, step: float, threshold: float, segments: str, expected: list[tuple[float, ...]]
) -> None:
    found = find_segments(make_windows(ONE, length, step, segments), threshold, multi_label=False)
    assert [tuple(segment) for segment in found] == [pytest.approx(segment, abs=1e-6) for segment in expected]


def test_segments_of_several_labels_overlap() -> None:
    scores = [[0.9, 0.1], [0.7, 0.6], [0.4, 0.8]]
    found = find_segments(make_windows(scores, 2, 2, "000"), 0.5, multi_label=True)
    assert [tuple(segment) for segment in found] == [
        pytest.approx((0, 4, 0, 0.8)),
        pytest.approx((2, 6, 1, 0.7)),
    ]
    least = find_segments(make_windows([[0.4, 0.6]], 2, 2, "0"), 0.5, multi_label=False)
    assert [tuple(segment) for segment in least] == [pytest.approx((0, 2, 1, 0.6))]


def test_scores_are_smoothed_inside_segments() -> None:
    windows = make_windows([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]], 2, 2, "0001")
    assert [window.scores[0].item() for window in smooth(windows, 2)] == [1.0, 0.5, 0.0, 1.0]
    assert [window.scores[0].item() for window in smooth(windows, 9)] == [1.0, 0.5, pytest.approx(1 / 3), 1.0]
    assert [window.span for window in smooth(windows, 2)] == [window.span for window in windows]
    assert all(map(torch.equal, *([w.scores for w in each] for each in (smooth(windows, 1), windows))))


def test_the_command_writes_them(trained: Path, write_clip: Callable[..., Path], tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (60, 72, 96, 3), np.uint8)
    words = [str(write_clip(frames)), "--checkpoint", str(trained), "--window", "0.8", "--step", "0.4"]
    found = []
    for more in ([], ["--smooth", "3", "--threshold", "0"]):
        output = tmp_path / f"{len(more)}.json"
        assert predict.main([*words, *more, "--output", str(output), "--top", "8"]) == 0
        found += json.loads(output.read_text())
    plain, smoothed = ([{each["class"]: each["score"] for each in row["top"]} for row in f["timeline"]] for f in found)
    for i, row in enumerate(smoothed):
        last = plain[max(0, i - 2) : i + 1]
        assert row == {name: pytest.approx(sum(each[name] for each in last) / len(last)) for name in row}
    segments = found[1]["segments"]
    assert (segments[0]["start"], segments[-1]["end"]) == (0, found[1]["timeline"][-1]["end"])
    assert all(a["end"] == b["start"] and a["class"] != b["class"] for a, b in pairwise(segments))
    assert all(segment["score"] >= 0.5 for segment in found[0]["segments"])
    assert predict.main([*words[:3], "--smooth", "0"]) == predict.main([*words[:3], "--threshold", "1.5"]) == 2
