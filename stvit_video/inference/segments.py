"""The timeline of a video: scores smoothed over its windows, and the segments in which a class is seen."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from typing import NamedTuple

import torch

from stvit_video.inference.prediction import Window


class Segment(NamedTuple):
    """A time, in seconds, in which a class is seen: its index, and the mean of its scores."""

    start: float
    end: float
    label: int
    score: float


def smooth(windows: Iterable[Window], count: int) -> Iterator[Window]:
    """Yield windows with the mean scores of the last ``count`` of them, anew where time is interrupted."""
    recent: deque[Window] = deque(maxlen=count)
    for window in windows:
        if recent and recent[-1].segment != window.segment:
            recent.clear()
        recent.append(window)
        yield replace(window, scores=torch.stack([each.scores for each in recent]).mean(dim=0))


def find_segments(windows: Sequence[Window], threshold: float, multi_label: bool) -> list[Segment]:
    """Return the segments of consecutive windows in which a class scores ``threshold`` or more, in order of time.

    Of a model with one label, it also has to be the most likely class. Windows overlap: a window stands for the time up
    to half way between its middle and those of its neighbours.
    """
    found: list[Segment] = []
    for _, run in groupby(windows, key=lambda window: window.segment):
        inside = list(run)
        scores = torch.stack([window.scores for window in inside])  # (windows, classes)
        seen = scores >= threshold
        if not multi_label:
            seen &= torch.nn.functional.one_hot(scores.argmax(dim=1), scores.shape[1]).bool()
        bounds = _bounds(inside)
        for label in seen.any(dim=0).nonzero().flatten().tolist():
            for is_seen, group in groupby(range(len(inside)), key=lambda i, label=label: bool(seen[i, label])):  # type: ignore[misc]
                if is_seen:
                    numbers = list(group)
                    score = float(scores[numbers, label].mean())
                    found.append(Segment(bounds[numbers[0]][0], bounds[numbers[-1]][1], label, score))
    return sorted(found)


def _bounds(windows: Sequence[Window]) -> list[tuple[float, float]]:
    """Return the time for which each window stands, inside the window."""
    spans = [window.span for window in windows if window.span is not None]
    middles = [(span.start + span.end) / 2 for span in spans]
    half_way = [(a + b) / 2 for a, b in pairwise(middles)]
    starts, ends = [spans[0].start, *half_way], [*half_way, spans[-1].end]
    return [(max(span.start, a), min(span.end, b)) for span, a, b in zip(spans, starts, ends, strict=True)]
