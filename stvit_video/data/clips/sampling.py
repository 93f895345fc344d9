"""Which frames make a clip: from the length of a video, or the times of its frames, to indices.

Two kinds: ``dense`` takes frames at a fixed stride from some place in the video (Kinetics); ``uniform`` takes one frame
out of each of as many equal segments as the clip has frames, so that a clip spans the video (Something-Something).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from stvit_video.data.decode.types import Indices, Reader, Timeline, Times

TOLERANCE_S = 1e-6  # files state the times of frames rounded
BLOCK_BYTES = 64 * 2**20  # of frames in memory at once, where all of a video are read


class Sampling(ABC):
    """Chooses clips of ``frames`` frames.

    Bind all arguments but ``video`` with functools.partial to get a choice of a ``FrameRequest``, which is pickled.
    """

    frames: int

    @abstractmethod
    def random(self, video: Timeline, rng: np.random.Generator) -> Indices:
        """Return the indices (frames,) of a training clip."""

    @abstractmethod
    def even(self, video: Timeline, clips: int) -> list[Indices]:
        """Return the indices (frames,) of each of ``clips`` test clips; the same at every call."""

    def random_clips(self, video: Timeline, clips: int, seed: tuple[int, ...]) -> Indices:
        """Return the indices (clips * frames,) of training clips, which ``seed`` determines."""
        rng = np.random.default_rng(seed)
        return np.concatenate([self.random(video, rng) for _ in range(clips)])

    def even_clips(self, video: Timeline, clips: int) -> Indices:
        """Return the indices (clips * frames,) of test clips."""
        return np.concatenate(self.even(video, clips))


@dataclass(frozen=True)
class ClipSampler(Sampling):
    """Chooses dense clips, which have a stride, or uniform ones, which have none."""

    kind: str  # dense or uniform
    frames: int
    stride: int = 1
    # Frames per second. The stride then counts frames of a video of this rate, so that files of any rate, also a
    # variable one, are seen at the same speed.
    rate: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("dense", "uniform"):
            raise ValueError(f"kind {self.kind!r} is unknown; it is dense or uniform.")

    def random(self, video: Timeline, rng: np.random.Generator) -> Indices:
        """Return the indices (frames,) of a training clip: from a random start, or a random frame per segment."""
        if self.kind == "uniform":
            starts, sizes = segments(video.length, self.frames)
            return starts + rng.integers(np.maximum(sizes, 1))
        times = None if self.rate is None else video.times()
        latest = self._latest_start(video.length, times)
        start = int(rng.integers(int(latest) + 1)) if times is None else rng.uniform(0, latest)
        return self._dense(start, video.length, times)

    def even(self, video: Timeline, clips: int) -> list[Indices]:
        """Return the indices (frames,) of ``clips`` test clips.

        Dense clips are spaced evenly from the first to the last that fits; a single one is centred. Uniform clips take
        evenly spaced places in every segment.
        """
        if self.kind == "uniform":
            starts, sizes = segments(video.length, self.frames)
            return [starts + (2 * clip + 1) * sizes // (2 * clips) for clip in range(clips)]
        times = None if self.rate is None else video.times()
        latest = self._latest_start(video.length, times)
        starts_at = [latest / 2] if clips == 1 else np.linspace(0, latest, clips)
        return [self._dense(start, video.length, times) for start in starts_at]

    def starting_at(self, video: Timeline, seconds: float) -> Indices:
        """Return the indices (frames,) of the dense clip that starts with the frame shown at that time."""
        if self.rate is not None:
            return np.maximum(self._dense(seconds, video.length, video.times()), 0)
        first = min(int(np.searchsorted(video.times(), seconds - TOLERANCE_S)), video.length - 1)
        return self._dense(first, video.length, None)

    def _latest_start(self, length: int, times: Times | None) -> float:
        """Return the last start from which a dense clip fits, 0 where none does: in seconds with ``times``."""
        if times is None or self.rate is None:
            return max(0, length - ((self.frames - 1) * self.stride + 1))
        return max(0.0, times[-1] - (self.frames - 1) * (self.stride / self.rate))

    def _dense(self, start: float, length: int, times: Times | None) -> Indices:
        """Return the indices of a dense clip; after the end of the video its last frame repeats."""
        steps = np.arange(self.frames, dtype=np.int64)
        if times is None or self.rate is None:
            return np.minimum(int(start) + steps * self.stride, length - 1)
        return np.searchsorted(times, start + self.stride / self.rate * steps + TOLERANCE_S, side="right") - 1


def segments(length: int, frames: int) -> tuple[Indices, Indices]:
    """Return starts and sizes (frames,) of ``frames`` consecutive segments of a video, equal up to one frame.

    In a video of fewer frames than segments, some are of size 0: they stand for the frame at their start.
    """
    ends = np.arange(frames + 1, dtype=np.int64) * length // frames
    return ends[:-1], np.diff(ends)


def read_every_frame(video: Reader) -> Indices:
    """Read the whole video, block by block; return the index of the first frame (1,), which is then sent back.

    A choice of a ``FrameRequest``. Raises DecodeError where a frame cannot be read.
    """
    first = np.zeros(1, np.int64)
    block = max(1, BLOCK_BYTES // video.frames(first).nbytes)
    for start in range(0, video.length, block):
        video.frames(np.arange(start, min(start + block, video.length)))
    return first
