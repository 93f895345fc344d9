"""Which frames make a clip: pure functions from lengths, or times, to indices.

Two ways: ``dense`` takes frames at a fixed stride from some place in the video (Kinetics); ``uniform`` takes one frame
out of each of as many equal segments as the clip has frames, so that a clip spans the video (Something-Something).
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from stvit_video.data.decode.types import Indices, Timeline, Times


def clip_indices(start: int, frames: int, stride: int, length: int) -> Indices:
    """Return the ``frames`` indices of a clip from ``start``; past the end of the video the last frame repeats."""
    return np.minimum(start + np.arange(frames, dtype=np.int64) * stride, length - 1)


def random_clip(length: int, frames: int, stride: int, rng: np.random.Generator) -> Indices:
    """Return a clip that starts anywhere such that it fits; a video shorter than the clip starts at 0."""
    latest = max(0, length - ((frames - 1) * stride + 1))
    return clip_indices(int(rng.integers(latest + 1)), frames, stride, length)


def even_clips(length: int, frames: int, stride: int, clips: int) -> list[Indices]:
    """Return ``clips`` clips evenly spaced from the first to the last that fits; a single one is centred."""
    latest = max(0, length - ((frames - 1) * stride + 1))
    starts = [latest / 2] if clips == 1 else np.linspace(0, latest, clips)
    return [clip_indices(int(start), frames, stride, length) for start in starts]


def segments(length: int, frames: int) -> tuple[Indices, Indices]:
    """Return starts and sizes (frames,) of ``frames`` consecutive segments of a video, equal up to one frame.

    In a video of fewer frames than segments, some are of size 0: they stand for the frame at their start.
    """
    ends = np.arange(frames + 1, dtype=np.int64) * length // frames
    return ends[:-1], np.diff(ends)


def random_segments(length: int, frames: int, rng: np.random.Generator) -> Indices:
    """Return a random frame out of each of ``frames`` segments; a video shorter than that repeats frames."""
    starts, sizes = segments(length, frames)
    return starts + rng.integers(np.maximum(sizes, 1))


def even_segments(length: int, frames: int, clips: int) -> list[Indices]:
    """Return ``clips`` clips, each at its own place in every segment, evenly spread; a single one takes the middles."""
    starts, sizes = segments(length, frames)
    return [starts + (2 * clip + 1) * sizes // (2 * clips) for clip in range(clips)]


def timed_clip(start: float, frames: int, step: float, times: Times) -> Indices:
    """Return the frames that are shown at ``start``, ``start + step``, ... seconds; after the end the last one is."""
    moments = start + step * np.arange(frames) + 1e-6  # the times of frames are rounded in files
    return np.searchsorted(times, moments, side="right") - 1


def random_timed_clip(times: Times, frames: int, step: float, rng: np.random.Generator) -> Indices:
    """Return a clip of frames ``step`` seconds apart that starts anywhere such that it fits, else at 0."""
    return timed_clip(rng.uniform(0, max(0.0, times[-1] - (frames - 1) * step)), frames, step, times)


def even_timed_clips(times: Times, frames: int, step: float, clips: int) -> list[Indices]:
    """Return ``clips`` clips of frames ``step`` seconds apart, spaced as ``even_clips``."""
    latest = max(0.0, times[-1] - (frames - 1) * step)
    starts = [latest / 2] if clips == 1 else np.linspace(0, latest, clips)
    return [timed_clip(start, frames, step, times) for start in starts]


@dataclass(frozen=True)
class ClipSampler:
    """How clips of ``frames`` frames are taken: ``kind`` dense, at ``stride``, or uniform, which has no stride.

    With a ``rate``, the stride of a dense clip counts frames of a video of that many frames a second: files of any
    rate, also a variable one, are then seen at the same speed.
    """

    kind: str
    frames: int
    stride: int = 1
    rate: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("dense", "uniform"):
            raise ValueError(f"kind {self.kind!r} is unknown; it is dense or uniform.")

    def random(self, video: Timeline, rng: np.random.Generator) -> Indices:
        """Return the indices (frames,) of a training clip out of a video."""
        if self.kind == "uniform":
            return random_segments(video.length, self.frames, rng)
        if self.rate is not None:
            return random_timed_clip(video.times(), self.frames, self.stride / self.rate, rng)
        return random_clip(video.length, self.frames, self.stride, rng)

    def even(self, video: Timeline, clips: int) -> list[Indices]:
        """Return the indices of ``clips`` test clips, the same at every call."""
        if self.kind == "uniform":
            return even_segments(video.length, self.frames, clips)
        if self.rate is not None:
            return even_timed_clips(video.times(), self.frames, self.stride / self.rate, clips)
        return even_clips(video.length, self.frames, self.stride, clips)


class Sampling(Protocol):
    """A way of taking clips of ``frames`` frames."""

    @property
    def frames(self) -> int: ...

    def random(self, video: Timeline, rng: np.random.Generator) -> Indices:
        """Return the indices (frames,) of a training clip out of a video."""

    def even(self, video: Timeline, clips: int) -> list[Indices]:
        """Return the indices of ``clips`` test clips, the same at every call."""


@dataclass(frozen=True)
class RandomClips:
    """The choice of ``clips`` training clips; ``seed`` fixes it."""

    sampler: Sampling
    clips: int
    seed: tuple[int, ...]

    def __call__(self, video: Timeline) -> Indices:
        """Return the indices (clips * frames,)."""
        rng = np.random.default_rng(self.seed)
        return np.concatenate([self.sampler.random(video, rng) for _ in range(self.clips)])


@dataclass(frozen=True)
class EvenClips:
    """The choice of ``clips`` test clips."""

    sampler: Sampling
    clips: int

    def __call__(self, video: Timeline) -> Indices:
        """Return the indices (clips * frames,)."""
        return np.concatenate(self.sampler.even(video, self.clips))


@dataclass(frozen=True)
class ClipFrom:
    """The choice of one dense clip that starts at so many ``seconds``."""

    sampler: ClipSampler
    seconds: float

    def __call__(self, video: Timeline) -> Indices:
        """Return the indices (frames,)."""
        times, sampler = video.times(), self.sampler
        if sampler.rate is not None:
            return np.maximum(timed_clip(self.seconds, sampler.frames, sampler.stride / sampler.rate, times), 0)
        start = min(int(np.searchsorted(times, self.seconds - 1e-6)), video.length - 1)
        return clip_indices(start, sampler.frames, sampler.stride, video.length)
