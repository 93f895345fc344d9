"""Which frames make a clip: from the length of a video, or the times of its frames, to indices.

Two kinds: ``dense`` takes frames at a fixed stride from some place in the video (Kinetics); ``uniform`` takes one frame
out of each of as many equal parts as the clip has frames, so that a clip spans the video (Something-Something).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from stvit_video.data.clips.timeline import KnownTimes
from stvit_video.data.decode.types import Indices, Timeline, Times

TOLERANCE_S = 1e-6  # files state the times of frames rounded


class Sampling(ABC):
    """Takes clips out of a video: random ones that a seed determines, for training, or evenly spaced ones of a test.

    No clip spans a gap between segments, which are runs of continuous time. Where there are several, each is sampled as
    a video of its own, by as many of the clips as its share of the places where a clip can start; segments shorter than
    a clip are used where all are. Bind clips and seed with functools.partial to get a choice of a ``FrameRequest``,
    which is pickled.
    """

    frames: int  # of a clip

    @abstractmethod
    def places(self, run: Timeline) -> float:
        """Return at how many frames of a run of continuous time a clip can start; 0 where it is shorter than a clip."""

    @abstractmethod
    def choose(self, run: Timeline, clips: int, seed: tuple[int, ...] | None) -> Indices:
        """Return the indices (clips * frames,) of clips in a run of continuous time."""

    @abstractmethod
    def describe(self) -> tuple[str, str]:
        """Return how long a clip is, and what happens to videos that are shorter."""

    @abstractmethod
    def seconds_at(self, fps: float) -> float | None:
        """Return how long a clip of a video of ``fps`` frames per second (0: of one frame) is; None: as the video."""

    def __call__(self, video: Timeline, clips: int, seed: tuple[int, ...] | None = None) -> Indices:
        """Return the indices (clips * frames,) of clips, inside the video and ascending in each clip."""
        segments = video.segments()
        if len(segments) == 1:
            return self.choose(video, clips, seed)
        runs = split(video)
        weights = np.array([self.places(run) for run in runs])
        if not weights.any():
            weights = np.array([float(run.length) for run in runs])
        ends = weights.cumsum()
        chosen = []
        if seed is None:
            # Each clip stands for an equal share of all places, and is taken where most of that share lies: at equal
            # shares, nearest to the share's middle.
            edges = np.linspace(0, ends[-1], clips + 1)[:, None]
            inside = np.minimum(ends, edges[1:]) - np.maximum(ends - weights, edges[:-1])  # (clips, segments)
            off_centre = np.abs(2 * ends - weights - edges[1:] - edges[:-1])
            most = inside.max(axis=1, keepdims=True)
            picks = np.where(inside > most * (1 - 1e-9), off_centre, np.inf).argmin(axis=1)
            for pick, count in zip(*np.unique(picks, return_counts=True), strict=True):
                chosen.append(segments[pick][0] + self.choose(runs[pick], int(count), None))
        else:
            rng = np.random.default_rng((*seed, 1))
            for clip, place in enumerate(rng.uniform(0, ends[-1], clips)):
                pick = min(int(np.searchsorted(ends, place, side="right")), len(runs) - 1)
                chosen.append(segments[pick][0] + self.choose(runs[pick], 1, (*seed, 2 + clip)))
        return np.concatenate(chosen)

    def is_short(self, video: Timeline) -> bool:
        """Say whether no segment of a video is as long as a clip."""
        return not any(self.places(run) for run in split(video))


def split(video: Timeline) -> list[Timeline]:
    """Return the segments of a video, each as a timeline of its own that starts at time 0."""
    segments = video.segments()
    if len(segments) == 1:
        return [video]
    times = video.times()
    return [KnownTimes(times[start:stop]) for start, stop in segments]


@dataclass(frozen=True)
class ClipSampler(Sampling):
    """Chooses dense clips, which have a stride, or uniform ones, which have none.

    Dense test clips are spaced evenly from the first to the last that fits; a single one is centred. Uniform ones take
    evenly spaced places in every part.
    """

    kind: str  # dense or uniform
    frames: int
    stride: int = 1
    # Frames per second. The stride then counts frames of a video of this rate, so that files of any rate, also a
    # variable one, are seen at the same speed.
    rate: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("dense", "uniform"):
            raise ValueError(f"kind {self.kind!r} is unknown; it is dense or uniform.")

    def places(self, run: Timeline) -> float:
        if self.kind == "dense" and self.rate is not None:
            return places_in_time(run.times(), (self.frames - 1) * self.stride / self.rate)
        least = self.frames if self.kind == "uniform" else (self.frames - 1) * self.stride + 1
        if run.length < least:
            return 0.0
        return float(run.length if self.kind == "uniform" else run.length - least + 1)

    def describe(self) -> tuple[str, str]:
        if self.kind == "uniform":
            return f"{self.frames} frames", "frames repeat: lower DATA.FRAMES"
        steps = (self.frames - 1) * self.stride
        length = f"{steps + 1} frames" if self.rate is None else f"{steps / self.rate:.3g} s"
        return length, "clips of them stand still at their end: lower DATA.STRIDE, or set DATA.SAMPLING uniform"

    def seconds_at(self, fps: float) -> float | None:
        rate = fps if self.rate is None else self.rate
        return None if self.kind == "uniform" else self.frames * self.stride / rate if rate else 0.0

    def choose(self, run: Timeline, clips: int, seed: tuple[int, ...] | None) -> Indices:
        rng = None if seed is None else np.random.default_rng(seed)
        if self.kind == "uniform":
            # Parts are equal up to one frame; those of size 0, of a short video, stand for the frame at their start.
            ends = np.arange(self.frames + 1, dtype=np.int64) * run.length // self.frames
            starts = ends[:-1]
            sizes = np.diff(ends)
            if rng is None:
                offsets = [(2 * clip + 1) * sizes // (2 * clips) for clip in range(clips)]
            else:
                offsets = [rng.integers(np.maximum(sizes, 1)) for _ in range(clips)]
            return np.concatenate([starts + offset for offset in offsets])
        # The last start from which a clip fits, 0 where none does: a frame's number, or seconds.
        times = None
        latest = float(max(0, run.length - ((self.frames - 1) * self.stride + 1)))
        if self.rate is not None:
            times = run.times()
            latest = max(0.0, times[-1] - (self.frames - 1) * (self.stride / self.rate))
        if rng is None:
            places = [latest / 2] if clips == 1 else list(np.linspace(0, latest, clips))
        elif times is None:
            places = [rng.integers(int(latest) + 1) for _ in range(clips)]
        else:
            places = [rng.uniform(0, latest) for _ in range(clips)]
        return np.concatenate([self._dense(place, run.length, times) for place in places])

    def starting_at(self, video: Timeline, seconds: float) -> Indices:
        """Return the indices (frames,) of the dense clip that starts with the frame shown at that time.

        Between two segments it starts with the second; where a time comes twice, it is the first one.
        """
        times = video.times()
        segments = video.segments()
        first, stop = next((run for run in segments if seconds <= times[run[1] - 1] + TOLERANCE_S), segments[-1])
        run = times[first:stop]
        if self.rate is not None:
            return first + self._dense(max(0.0, seconds - run[0]), len(run), run - run[0])
        start = min(int(np.searchsorted(run, seconds - TOLERANCE_S)), len(run) - 1)
        return first + self._dense(start, len(run), None)

    def _dense(self, start: float, length: int, times: Times | None) -> Indices:
        """Return the indices of a dense clip; after the end of the run its last frame repeats."""
        steps = np.arange(self.frames, dtype=np.int64)
        if times is None or self.rate is None:
            return np.minimum(int(start) + steps * self.stride, length - 1)
        return np.searchsorted(times, start + self.stride / self.rate * steps + TOLERANCE_S, side="right") - 1


def mean_step(times: Times) -> float:
    """Return how long each frame of ``times`` (N,), from 0, is shown on average; 0 for a single one."""
    return float(times[-1]) / max(1, len(times) - 1)


def places_in_time(times: Times, last: float) -> float:
    """Return at how many frames a clip can start that reaches ``last`` seconds on; the last frame is as long as others.

    ``times`` (N,) are those of a run of continuous time, from 0.
    """
    if len(times) == 1:
        return float(last <= 0)
    step = mean_step(times)
    return max(0.0, round((float(times[-1]) - last) / step + 1, 6)) if step else 0.0
