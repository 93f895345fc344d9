"""PyTorchVideo's data sets and clip samplers in this package's loaders.

A ``LabeledVideoDataset`` stops at the first clip that cannot be decoded and cannot resume inside an epoch. This
package's loaders can go on in both cases, with its list of videos and the clips that its samplers choose.
"""

import random
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from pytorchvideo.data.clip_sampling import ConstantClipsPerVideoSampler, RandomClipSampler

from stvit_video.data.clips.sampling import TOLERANCE_S, Sampling
from stvit_video.data.decode.types import Indices, Timeline, Times
from stvit_video.data.lists.annotations import Video


def videos_of(dataset: Any) -> list[Video]:
    """Return the videos of a ``LabeledVideoDataset``, or of any sequence of (path, {"label": number}) pairs.

    Raises ValueError for a video without a label, as in PyTorchVideo's unlabelled lists.
    """
    pairs = getattr(dataset, "_labeled_videos", dataset)
    videos = []
    for i in range(len(pairs)):
        path, info = pairs[i]
        label = (info or {}).get("label", -1)
        if not isinstance(label, int) or label < 0:
            raise ValueError(f"{path} has the label {label!r}; give each video a whole number from 0 on as its label.")
        videos.append(Video(str(path), label))
    return videos


@dataclass(frozen=True)
class SecondsSampler(Sampling):
    """Chooses clips of a duration, ``frames`` evenly spaced in each, as PyTorchVideo's samplers place them.

    Training uses its ``RandomClipSampler``, testing its ``ConstantClipsPerVideoSampler``.
    """

    frames: int
    seconds: float

    def random(self, video: Timeline, rng: np.random.Generator) -> Indices:
        times, state = video.times(), random.getstate()
        random.seed(int(rng.integers(2**63)))  # PyTorchVideo draws from Python's generator
        try:
            clip = RandomClipSampler(Fraction(self.seconds))(0, _duration(times), {})
        finally:
            random.setstate(state)
        return self._spread(times, clip.clip_start_sec)

    def even(self, video: Timeline, clips: int) -> list[Indices]:
        times, sampler = video.times(), ConstantClipsPerVideoSampler(Fraction(self.seconds), clips)
        chosen, last = [], Fraction(0)
        for _ in range(clips):
            info = sampler(last, _duration(times), {})
            last = info.clip_end_sec
            chosen.append(self._spread(times, info.clip_start_sec))
        return chosen

    def _spread(self, times: Times, start: Fraction) -> Indices:
        """Return ``frames`` indices from ``start`` on, spaced as by PyTorchVideo's UniformTemporalSubsample."""
        first, end = np.searchsorted(times, [float(start) - TOLERANCE_S, float(start) + self.seconds - TOLERANCE_S])
        first = min(int(first), len(times) - 1)
        return np.linspace(first, max(first, end - 1), self.frames).astype(np.int64)


def _duration(times: Times) -> Fraction:
    """Return the duration of a video; its last frame is assumed to last as long as the one before."""
    step = times[-1] - times[-2] if len(times) > 1 else 0.0
    return Fraction(float(times[-1] + step)).limit_denominator(10**6)
