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

from stvit_video.data.clips.sampling import TOLERANCE_S, Sampling, mean_step, places_in_time
from stvit_video.data.decode.types import Indices, Timeline
from stvit_video.data.lists.annotations import Video


def videos_of(dataset: Any) -> list[Video]:
    """Return the videos of a ``LabeledVideoDataset``, or of any sequence of (path, {"label": number}) pairs.

    Raises ValueError for a video without a label, as in PyTorchVideo's unlabelled lists.
    """
    pairs = getattr(dataset, "_labeled_videos", dataset)
    videos = []
    for path, info in (pairs[i] for i in range(len(pairs))):
        label = (info or {}).get("label", -1)
        if not isinstance(label, int) or label < 0:
            raise ValueError(f"{path} has the label {label!r}; give each video a whole number from 0 on as its label.")
        videos.append(Video(str(path), label))
    return videos


@dataclass(frozen=True)
class SecondsSampler(Sampling):
    """Takes clips of a duration, placed as by PyTorchVideo's Random- and ConstantClipsPerVideoSampler.

    The frames of a clip are evenly spaced, as by its UniformTemporalSubsample.
    """

    frames: int
    seconds: float

    def places(self, run: Timeline) -> float:
        times = run.times()
        return places_in_time(times, self.seconds - mean_step(times))

    def describe(self) -> tuple[str, str]:
        return f"{self.seconds:g} s", "clips of them are slower than others: lower DATA.CLIP_SECONDS"

    def seconds_at(self, fps: float) -> float | None:
        return self.seconds

    def choose(self, run: Timeline, clips: int, seed: tuple[int, ...] | None) -> Indices:
        times = run.times()
        seconds = Fraction(self.seconds)
        last_frame = times[-1] - times[-2] if len(times) > 1 else 0.0  # assumed to last as long as the one before
        duration = Fraction(float(times[-1] + last_frame)).limit_denominator(10**6)
        sampler = ConstantClipsPerVideoSampler(seconds, clips) if seed is None else RandomClipSampler(seconds)
        rng = np.random.default_rng(seed)
        state = random.getstate()  # PyTorchVideo draws from Python's generator
        chosen = []
        end = Fraction(0)
        try:
            for _ in range(clips):
                random.seed(int(rng.integers(2**63)))
                start, end = sampler(end, duration, {})[:2]
                edges = np.array([float(start), float(start) + self.seconds]) - TOLERANCE_S
                first, stop = np.searchsorted(times, edges).tolist()
                first = min(first, len(times) - 1)
                chosen.append(np.linspace(first, max(first, stop - 1), self.frames).astype(np.int64))
        finally:
            random.setstate(state)
        return np.concatenate(chosen)
