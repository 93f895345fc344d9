"""Long videos in windows of time: where they lie, and which frames of each are scored."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from stvit_video.data.clips.sampling import Sampling
from stvit_video.data.decode.types import Frames, Indices, Timeline, Times

EPSILON = 1e-6  # seconds: the times of frames are rounded in files


def check_seconds(window: float | None, step: float | None) -> None:
    """Raise ValueError unless windows have a length and come one after the other."""
    for name, value in (("window", window), ("step", step)):
        if value is not None and not 0.01 <= value <= 1e6:
            raise ValueError(f"{name} {value:g} is out of range; give 0.01 to 1,000,000 seconds.")
    if step is not None and window is None:
        raise ValueError(f"step {step:g} without a window; give the length of a window in seconds too.")


@dataclass(frozen=True)
class Span:
    """A window of a video: from ``start`` to before ``end``, in seconds after its first frame."""

    start: float
    end: float


def spans_of(times: Times, window: float, step: float) -> list[Span]:
    """Return windows of ``window`` seconds, one every ``step`` seconds, over frames shown at ``times``.

    The last one ends with the video, so that none of it is left out; a video shorter than a window is one.
    """
    shown = times[-1] / (len(times) - 1) if len(times) > 1 else 0.0  # how long the last frame is shown: as the mean
    duration = float(times[-1] + shown)
    if duration <= window + EPSILON:
        return [Span(0.0, duration)]
    count = int((duration - window + EPSILON) // step) + 1
    spans = [Span(i * step, i * step + window) for i in range(count)]
    if spans[-1].end < duration - EPSILON and step <= window:
        spans.append(Span(duration - window, duration))
    return spans


@dataclass(frozen=True)
class Clock:
    """When frames are shown, as it is known already."""

    shown: Times

    @property
    def length(self) -> int:
        return len(self.shown)

    def times(self) -> Times:
        """Return when each frame is shown (length,), in seconds after the first."""
        return self.shown


@dataclass(frozen=True)
class Section:
    """The frames ``first`` to before ``stop`` of a video, as if they were a file of their own."""

    video: Timeline
    first: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.first

    def times(self) -> Times:
        """Return when each frame is shown (length,), in seconds after the first of the section."""
        times = self.video.times()[self.first : self.stop]
        return times - times[0]


@dataclass(frozen=True)
class ClipsOfSpans:
    """The choice of ``clips`` test clips of each window: those that a file of these frames alone would be tested by."""

    sampler: Sampling
    clips: int
    spans: tuple[Span, ...]

    def __call__(self, video: Timeline) -> Indices:
        """Return the indices (spans * clips * frames,)."""
        times = video.times()
        edges = np.array([(span.start, span.end) for span in self.spans]) - EPSILON
        chosen: list[Indices] = []
        for first, stop in np.searchsorted(times, edges):
            first = min(int(first), video.length - 1)
            section = Section(video, first, max(first + 1, int(stop)))
            chosen += (clip + first for clip in self.sampler.even(section, self.clips))
        return np.concatenate(chosen)


class Buffer:
    """Frames of a running stream, the oldest ones forgotten."""

    def __init__(self, frames: Iterable[tuple[float, Frames]] = ()) -> None:
        self.held = deque(frames)  # when each is shown, in seconds, and the picture (H, W, 3)

    @property
    def length(self) -> int:
        return len(self.held)

    def between(self, span: Span) -> "Buffer":
        """Return what is shown in a window."""
        return Buffer(pair for pair in self.held if span.start - EPSILON <= pair[0] < span.end - EPSILON)

    def forget(self, before: float) -> None:
        """Let go of what was shown before a time."""
        while self.held and self.held[0][0] < before - EPSILON:
            self.held.popleft()

    def times(self) -> Times:
        """Return when each frame is shown (length,), in seconds after the first."""
        times = np.array([time for time, _ in self.held])
        return times - times[0]

    def frames(self, indices: Indices) -> Frames:
        """Return the frames (N, H, W, 3) at ``indices``, in any order."""
        return np.stack([self.held[i][1] for i in indices])
