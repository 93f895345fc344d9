"""Which frames make a clip: pure functions from lengths to indices."""

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


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
