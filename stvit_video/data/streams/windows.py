"""Long videos in windows of time: where they lie, and which frames of each are scored."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from stvit_video.data.clips.sampling import TOLERANCE_S, Sampling
from stvit_video.data.decode.types import Frames, Indices, Timeline, Times


def check_seconds(window: float | None, step: float | None) -> None:
    """Raise ValueError for a window or step that is too short or too long, or for a step without a window."""
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

    The last one ends with the video, so that the windows cover all of it. A video shorter than a window is one window.
    """
    frame = times[-1] / (len(times) - 1) if len(times) > 1 else 0.0  # how long the last frame is shown: the mean
    duration = float(times[-1] + frame)
    if duration <= window + TOLERANCE_S:
        return [Span(0.0, duration)]
    count = int((duration - window + TOLERANCE_S) // step) + 1
    spans = [Span(i * step, i * step + window) for i in range(count)]
    if spans[-1].end < duration - TOLERANCE_S and step <= window:
        spans.append(Span(duration - window, duration))
    return spans


@dataclass(frozen=True)
class KnownTimes:
    """A timeline of known times, in seconds after the first."""

    shown: Times

    @property
    def length(self) -> int:
        return len(self.shown)

    def times(self) -> Times:
        """Return the times (length,)."""
        return self.shown


@dataclass(frozen=True)
class ClipsOfSpans:
    """Chooses ``clips`` test clips of each window, as if the frames of the window were a file of their own."""

    sampler: Sampling
    clips: int
    spans: tuple[Span, ...]

    def __call__(self, video: Timeline) -> Indices:
        """Return the indices (spans * clips * frames,)."""
        times = video.times()
        edges = np.array([(span.start, span.end) for span in self.spans]) - TOLERANCE_S
        chosen: list[Indices] = []
        for first, stop in np.searchsorted(times, edges):
            first = min(int(first), video.length - 1)
            section = times[first : max(first + 1, int(stop))]
            chosen += (clip + first for clip in self.sampler.even(KnownTimes(section - section[0]), self.clips))
        return np.concatenate(chosen)


class Buffer:
    """The latest frames of a stream, as a timeline."""

    def __init__(self, frames: Iterable[tuple[float, Frames]] = ()) -> None:
        self.held = deque(frames)  # time in seconds, frame (H, W, 3)

    @property
    def length(self) -> int:
        return len(self.held)

    def between(self, span: Span) -> "Buffer":
        """Return the frames that are shown in a window."""
        return Buffer(pair for pair in self.held if span.start - TOLERANCE_S <= pair[0] < span.end - TOLERANCE_S)

    def forget(self, before: float) -> None:
        """Drop the frames that were shown before a time."""
        while self.held and self.held[0][0] < before - TOLERANCE_S:
            self.held.popleft()

    def times(self) -> Times:
        """Return when each frame is shown (length,), in seconds after the first."""
        times = np.array([time for time, _ in self.held])
        return times - times[0]

    def frames(self, indices: Indices) -> Frames:
        """Return the frames (N, H, W, 3) at ``indices``, in any order."""
        return np.stack([self.held[i][1] for i in indices])
