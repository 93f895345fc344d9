"""Long videos in windows: their times and frames, and which of these are new in each window."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stvit_video.data.clips.sampling import TOLERANCE_S, Sampling, mean_step
from stvit_video.data.clips.timeline import KnownTimes
from stvit_video.data.decode.types import Indices, Timeline, Times, find_segments


def check_seconds(window: float | None, step: float | None) -> None:
    """Raise ValueError for a window or step that is too short or too long, or for a step without a window."""
    for name, value in (("window", window), ("step", step)):
        if value is not None and not 0.01 <= value <= 1e6:
            raise ValueError(f"{name} {value:g} is out of range; give 0.01 to 1,000,000 seconds.")
    if step is not None and window is None:
        raise ValueError(f"step {step:g} without a window; give the length of a window in seconds too.")


class Span(NamedTuple):
    """A window of a video: from ``start`` to before ``end``, in seconds after its first frame."""

    start: float
    end: float


class Excerpt(NamedTuple):
    """A window of a file: its time, the segment of the file that it lies in, and its frames."""

    span: Span
    segment: int
    start: int
    stop: int


def windows_of(times: Times, window: float, step: float) -> list[Excerpt]:
    """Return windows of ``window`` seconds over frames shown at ``times``, one every ``step`` seconds.

    They begin anew in each segment of continuous time, and its last one ends with it, so that together they cover it. A
    segment shorter than a window is one window. Windows in which no frame appears are left out.
    """
    found = []
    for segment, (first, stop) in enumerate(find_segments(times)):
        run = times[first:stop] - times[first]
        duration = float(run[-1]) + mean_step(run)
        starts = [0.0]
        if duration > window + TOLERANCE_S:
            last = int((duration - window + TOLERANCE_S) // step)  # the number of the last window that fits
            # Of each frame, the first and the last window that it appears in: not all windows, of which a time lapse
            # has millions.
            firsts = np.maximum((run + TOLERANCE_S - window) // step + 1, 0).astype(np.int64)
            lasts = np.minimum((run + TOLERANCE_S) // step, last).astype(np.int64)
            nexts = np.maximum(firsts, np.append(0, np.maximum.accumulate(lasts)[:-1] + 1))
            numbers = [i for a, b in zip(nexts.tolist(), lasts.tolist(), strict=True) for i in range(a, b + 1)]
            starts = [i * step for i in numbers]
            if last * step + window < duration - TOLERANCE_S and step <= window:
                starts.append(duration - window)
        for start in starts:
            end = min(start + window, duration)
            a, b = np.searchsorted(run, (start - TOLERANCE_S, end - TOLERANCE_S)).tolist()
            b = len(run) if end == duration else b
            if a < b:
                span = Span(float(times[first] + start), float(times[first] + end))
                found.append(Excerpt(span, segment, first + a, first + b))
    return found


def clips_of_windows(video: Timeline, sampler: Sampling, clips: int, windows: Sequence[Excerpt]) -> Indices:
    """Return the indices (windows * clips * frames,) of test clips of each window, as if it were a file of its own."""
    times = video.times()
    parts = [KnownTimes(times[window.start : window.stop]) for window in windows]
    chosen = [sampler.choose(part, clips, None) for part in parts]
    return np.concatenate([window.start + indices for window, indices in zip(windows, chosen, strict=True)])
