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
from stvit_video.data.decode import Request
from stvit_video.data.decoding import Decoding
from stvit_video.data.frames import DecodeError, Frames
from stvit_video.data.ledger import Failure
from stvit_video.data.sampling import ClipSampler, EvenClips, RandomClips
from stvit_video.data.transforms import TestTransform, TrainTransform


@dataclass(frozen=True)
class SampleKey:
    """What a training sampler asks for: the video, and the epoch that its random choices belong to."""

    epoch: int
    index: int


@dataclass
class Sample:
    """One video's views (V, 3, T, H, W), or none where it failed, with its place in the list."""

    views: Tensor | None
    label: int
    index: int
    failures: list[Failure]


@dataclass
class Batch:
    """Clips (videos * views, 3, T, H, W), video by video, and the labels (videos,) and list positions (videos,)."""

    clips: Tensor
    labels: Tensor
    indices: Tensor
    failures: list[Failure]
    missing: int = 0  # samples asked for that have no clip

    @property
    def clip_labels(self) -> Tensor:
        """The label of each clip (videos * views,)."""
        return self.labels.repeat_interleave(len(self.clips) // max(1, len(self.labels)))

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
    """``repeats`` random clips a video. An unreadable video is reported and the next one in the list taken instead.

    After ``MAX_TRIES`` in a row the sample has no views: the list or its root is wrong, which the trainer says.
    """

    MAX_TRIES = 10

    def __init__(
        self,
        videos: list[Video],
        *,
        sampler: ClipSampler,
        transform: TrainTransform,
        decoding: Decoding,
        repeats: int,
        seed: int,
    ) -> None:
        self.videos, self.sampler, self.transform = videos, sampler, transform
        self.decoding, self.repeats, self.seed = decoding, repeats, seed

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: SampleKey) -> Sample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[SampleKey]) -> list[Sample]:
        """Return a batch's samples; a video is decoded while the one before is transformed."""
        read = self.decoding.read_all(self._request(key, key.index) for key in keys)
        return [
            self._replace(key, frames) if isinstance(frames, DecodeError) else self._sample(key, key.index, frames)
            for key, frames in zip(keys, read, strict=True)
        ]

    def _request(self, key: SampleKey, index: int) -> Request:
        choice = RandomClips(self.sampler, self.repeats, (self.seed, key.epoch, index, 0))
        return self.decoding.request(self.videos[index].path, choice)

    def _sample(self, key: SampleKey, index: int, frames: Frames) -> Sample:
        rng = np.random.default_rng([self.seed, key.epoch, index, 1])
        clips = frames.reshape(self.repeats, self.sampler.frames, *frames.shape[1:])
        views = torch.stack([self.transform(clip, rng) for clip in clips])
        return Sample(views, self.videos[index].label, index, [])

    def _replace(self, key: SampleKey, error: DecodeError) -> Sample:
        """Return the first of the next videos that can be read, with the failures up to it."""
        failures = [Failure.of(error, "train")]
        for attempt in range(1, self.MAX_TRIES):
            index = (key.index + attempt) % len(self.videos)
            try:
                sample = self._sample(key, index, self.decoding.read(self._request(key, index)))
            except DecodeError as again:
                failures.append(Failure.of(again, "train"))
            else:
                sample.failures += failures
                return sample
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
        decoding: Decoding,
        stage: str,
    ) -> None:
        self.videos, self.sampler, self.clips = videos, sampler, clips
        self.transform, self.decoding, self.stage = transform, decoding, stage

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        """Return a batch's samples; a video is decoded while the one before is transformed."""
        choice = EvenClips(self.sampler, self.clips)
        read = self.decoding.read_all(self.decoding.request(self.videos[index].path, choice) for index in indices)
        return [self._sample(index, frames) for index, frames in zip(indices, read, strict=True)]

    def _sample(self, index: int, frames: Frames | DecodeError) -> Sample:
        label = self.videos[index].label
        if isinstance(frames, DecodeError):
            return Sample(None, label, index, [Failure.of(frames, self.stage)])
        clips = frames.reshape(self.clips, self.sampler.frames, *frames.shape[1:])
        return Sample(torch.cat([self.transform(clip) for clip in clips]), label, index, [])
