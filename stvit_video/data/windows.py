"""Long videos in windows: their times and frames, and which of these are new in each window."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from stvit_video.data.clips.sampling import Sampling, mean_step
from stvit_video.data.clips.timeline import KnownTimes
from stvit_video.data.decode.types import Indices, Timeline, Times, find_segments

# A frame belongs to a window that it misses by less. Matroska states whole milliseconds, so that two times, and with
# them a frame and the start of its window, are up to one apart from where they should be.
BOUND_S = 0.0011


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
        if duration > window + BOUND_S:
            last = int((duration - window + BOUND_S) // step)  # the number of the last window that fits
            # Of each frame, the first and the last window that it appears in: not all windows, of which a time lapse
            # has millions.
            firsts = np.maximum((run + BOUND_S - window) // step + 1, 0).astype(np.int64)
            lasts = np.minimum((run + BOUND_S) // step, last).astype(np.int64)
            nexts = np.maximum(firsts, np.append(0, np.maximum.accumulate(lasts)[:-1] + 1))
            numbers = [i for a, b in zip(nexts.tolist(), lasts.tolist(), strict=True) for i in range(a, b + 1)]
            starts = [i * step for i in numbers]
            if last * step + window < duration - BOUND_S and step <= window:
                starts.append(duration - window)
        for start in starts:
            end = min(start + window, duration)
            a, b = np.searchsorted(run, (start - BOUND_S, end - BOUND_S)).tolist()
            b = len(run) if end == duration else b
            if a < b:
                span = Span(float(times[first] + start), float(times[first] + end))
                found.append(Excerpt(span, segment, first + a, first + b))
    return found


def frame_rate(times: Times) -> float:
    """Return the mean number of frames per second in the continuous time of a video; 0 where no two frames have any."""
    runs = [times[first:stop] for first, stop in find_segments(times)]
    seconds = float(sum(run[-1] - run[0] for run in runs))
    return (len(times) - len(runs)) / seconds if seconds else 0.0


class Part(NamedTuple):
    """Windows whose frames are read in one request."""

    windows: list[Excerpt]
    indices: list[Indices]  # of each window, its clips' frames in the file; in a stream those that are not there yet
    is_streamed: bool


def plan_reading(
    times: Times, windows: Sequence[Excerpt], sampler: Sampling, clips: int, group: int | None, frames: int
) -> Iterator[Part]:
    """Yield the windows in parts of about so many ``frames``, with test clips of each as if it were a file of its own.

    With ``group``, the frames that a stream takes at a time, windows that share frames with the one before are
    streamed: a part has only their new frames, and begins anew (with a whole clip) where nothing is shared.
    """
    part: list[tuple[Excerpt, Indices, int]] = []
    before: Indices | None = None
    streamed = False

    def finish() -> Part:
        nonlocal streamed
        is_shared = [new < len(clip) for _, clip, new in part]
        whole = 0 if streamed else 1  # of a stream that begins here, the first window is new from its first frame
        streamed = any(is_shared[whole:])
        indices = [
            clip[len(clip) - new :] if streamed and i >= whole else clip for i, (_, clip, new) in enumerate(part)
        ]
        return Part([window for window, *_ in part], indices, streamed)

    for window in windows:
        clip = window.start + sampler.choose(KnownTimes(times[window.start : window.stop]), clips, None)
        new = len(clip) if group is None or before is None else new_frames(before, clip, group)
        if part and sum(count for *_, count in part) + new > frames:
            yield finish()
            part = []
        part.append((window, clip, new))
        before = clip
    if part:
        yield finish()


def take(video: Timeline, indices: Indices) -> Indices:
    """Return the indices that were chosen before: the choice of a request for the frames of a ``Part``."""
    return indices


def new_frames(before: Indices, chosen: Indices, group: int) -> int:
    """Return how many of the last frames of a window's clip the clip before lacks; all of them where none is shared.

    What is shared has to move by whole groups of frames, as it does where both clips lie on one grid of samples.
    """
    count = len(chosen)
    shifts = range(group, count, group)
    return next((n for n in shifts if np.array_equal(before[n:], chosen[:-n])), count)
