"""Map-style datasets: a key from the sampler to a decoded, transformed sample.

Nothing random is global: each training sample draws from a generator seeded by (seed, epoch, index), so it is the same
whichever worker or process loads it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stvit_video.data.annotations import Video
from stvit_video.data.decode import DecodeError, open_video
from stvit_video.data.sampling import ClipSampler
from stvit_video.data.transforms import TestTransform, TrainTransform


@dataclass(frozen=True)
class SampleKey:
    """What a training sampler asks for: the video, and the epoch that its random choices belong to."""

    epoch: int
    index: int


@dataclass(frozen=True)
class Failure:
    """A video or image that could not be read: a row of ``failures.csv``."""

    path: str
    stage: str
    message: str


@dataclass
class Sample:
    """One video's views (V, 3, T, H, W), or none where it failed, with its place in the list."""

    views: Tensor | None
    label: int
    index: int
    failures: list[Failure]


@dataclass
class Batch:
    """Clips (B, 3, T, H, W), labels (B,) and list positions (B,); in testing B = videos * views, video by video."""

    clips: Tensor
    labels: Tensor
    indices: Tensor
    failures: list[Failure]
    missing: int = 0  # samples asked for that have no clip

    def pin_memory(self) -> "Batch":
        """Called by the loader where a GPU will read the batch."""
        return Batch(self.clips.pin_memory(), self.labels.pin_memory(), self.indices, self.failures, self.missing)


def collate(samples: list[Sample]) -> Batch:
    """Put samples together; those that failed leave only their failures."""
    read = [sample for sample in samples if sample.views is not None]
    return Batch(
        clips=torch.cat([sample.views for sample in read]) if read else torch.empty(0),  # type: ignore[misc]
        labels=torch.tensor([sample.label for sample in read], dtype=torch.int64),
        indices=torch.tensor([sample.index for sample in read], dtype=torch.int64),
        failures=[failure for sample in samples for failure in sample.failures],
        missing=len(samples) - len(read),
    )


class TrainDataset(Dataset[Sample]):
    """One random clip a video. An unreadable video is reported and the next one in the list taken instead.

    After ``MAX_TRIES`` in a row the sample has no views: the list or its root is wrong, which the trainer says.
    """

    MAX_TRIES = 10

    def __init__(
        self, videos: list[Video], *, sampler: ClipSampler, transform: TrainTransform, decode_side: int, seed: int
    ) -> None:
        self.videos, self.sampler, self.transform = videos, sampler, transform
        self.decode_side, self.seed = decode_side, seed

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: SampleKey) -> Sample:
        failures: list[Failure] = []
        for attempt in range(self.MAX_TRIES):
            index = (key.index + attempt) % len(self.videos)
            video = self.videos[index]
            rng = np.random.default_rng([self.seed, key.epoch, index])
            try:
                with open_video(video.path, self.decode_side) as reader:
                    frames = reader.frames(self.sampler.random(len(reader), rng))
            except DecodeError as error:
                failures.append(Failure(error.path, "train", error.message))
                continue
            return Sample(self.transform(frames, rng).unsqueeze(0), video.label, index, failures)
        return Sample(None, -1, key.index, failures)


class TestDataset(Dataset[Sample]):
    """A video's views, clips x crops, from one pass of the decoder. An unreadable one is reported, never replaced."""

    __test__ = False

    def __init__(
        self,
        videos: list[Video],
        *,
        sampler: ClipSampler,
        clips: int,
        transform: TestTransform,
        decode_side: int,
        stage: str,
    ) -> None:
        self.videos, self.sampler, self.clips = videos, sampler, clips
        self.transform, self.decode_side, self.stage = transform, decode_side, stage

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> Sample:
        video = self.videos[index]
        try:
            with open_video(video.path, self.decode_side) as reader:
                frames = reader.frames(np.concatenate(self.sampler.even(len(reader), self.clips)))
        except DecodeError as error:
            return Sample(None, video.label, index, [Failure(error.path, self.stage, error.message)])
        views = [self.transform(clip) for clip in frames.reshape(self.clips, self.sampler.frames, *frames.shape[1:])]
        return Sample(torch.cat(views), video.label, index, [])
