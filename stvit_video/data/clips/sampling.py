"""Which frames make a clip: from the length of a video, or the times of its frames, to indices.

Two kinds: ``dense`` takes frames at a fixed stride from some place in the video (Kinetics); ``uniform`` takes one frame
out of each of as many equal segments as the clip has frames, so that a clip spans the video (Something-Something).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from stvit_video.data.decode.types import Indices, Timeline, Times

TOLERANCE_S = 1e-6  # files state the times of frames rounded

# Takes (video, clips, seed=None) to the indices (clips * frames,) of clips: random ones that the seed determines, for
# training, or without a seed the evenly spaced ones of a test. Bind clips and seed with functools.partial to get a
# choice of a ``FrameRequest``, which is pickled.
Sampling = Callable[..., Indices]


@dataclass(frozen=True)
class ClipSampler:
    """Chooses dense clips, which have a stride, or uniform ones, which have none: a ``Sampling``.

    Dense test clips are spaced evenly from the first to the last that fits; a single one is centred. Uniform ones take
    evenly spaced places in every segment.
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

    def __call__(self, video: Timeline, clips: int, seed: tuple[int, ...] | None = None) -> Indices:
        rng = None if seed is None else np.random.default_rng(seed)
        if self.kind == "uniform":
            # Segments are equal up to one frame; those of size 0, of a short video, stand for the frame at their start.
            ends = np.arange(self.frames + 1, dtype=np.int64) * video.length // self.frames
            starts = ends[:-1]
            sizes = np.diff(ends)
            if rng is None:
                offsets = [(2 * clip + 1) * sizes // (2 * clips) for clip in range(clips)]
            else:
                offsets = [rng.integers(np.maximum(sizes, 1)) for _ in range(clips)]
            return np.concatenate([starts + offset for offset in offsets])
        # The last start from which a clip fits, 0 where none does: a frame's number, or seconds.
        times = None
        latest = float(max(0, video.length - ((self.frames - 1) * self.stride + 1)))
        if self.rate is not None:
            times = video.times()
            latest = max(0.0, times[-1] - (self.frames - 1) * (self.stride / self.rate))
        if rng is None:
            places = [latest / 2] if clips == 1 else list(np.linspace(0, latest, clips))
        elif times is None:
            places = [rng.integers(int(latest) + 1) for _ in range(clips)]
        else:
            places = [rng.uniform(0, latest) for _ in range(clips)]
        return np.concatenate([self._dense(place, video.length, times) for place in places])

    def starting_at(self, video: Timeline, seconds: float) -> Indices:
        """Return the indices (frames,) of the dense clip that starts with the frame shown at that time."""
        if self.rate is not None:
            return np.maximum(self._dense(seconds, video.length, video.times()), 0)
        first = min(int(np.searchsorted(video.times(), seconds - TOLERANCE_S)), video.length - 1)
        return self._dense(first, video.length, None)

    def _dense(self, start: float, length: int, times: Times | None) -> Indices:
        """Return the indices of a dense clip; after the end of the video its last frame repeats."""
        steps = np.arange(self.frames, dtype=np.int64)
        if times is None or self.rate is None:
            return np.minimum(int(start) + steps * self.stride, length - 1)
        return np.searchsorted(times, start + self.stride / self.rate * steps + TOLERANCE_S, side="right") - 1
