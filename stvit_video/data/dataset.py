"""Map-style datasets: from a sampler's key to a decoded and transformed sample, and to a batch.

No random state is global: each training sample draws from a generator seeded by (seed, epoch, index), so it is the
same in whichever worker or process it is loaded.
"""

from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stvit_video.data.clips.sampling import Sampling
from stvit_video.data.clips.transforms import TestTransform, TrainTransform
from stvit_video.data.decode.frames import Decoding, FrameRequest
from stvit_video.data.decode.types import Choice, DecodeError, Frames
from stvit_video.data.failures import Failure
from stvit_video.data.lists.annotations import Video


@dataclass(frozen=True)
class SampleKey:
    """What a training sampler asks for: a video, and the epoch that determines its random choices."""

    epoch: int
    index: int


Key = TypeVar("Key")
Seed = tuple[int, ...]


# Frames become views in two halves: ``prepare`` runs in the loader's workers, ``finish`` on the model's device, since
# uint8 pixels take a quarter of the space of floats on the way. ``seed`` determines what is random.


@dataclass(frozen=True)
class TrainViews:
    """Random crops of ``count`` clips."""

    transform: TrainTransform
    count: int
    frames: int  # per clip
    late: bool = False  # crop and augment on the model's device too, so that workers only decode

    def prepare(self, frames: Frames, seed: Seed) -> Tensor:
        """Map decoded frames (N, H, W, 3) to uint8 pixels (n, h, w, 3)."""
        pixels = torch.from_numpy(frames)
        return pixels if self.late else self._crop(pixels, seed)

    def finish(self, pixels: Tensor, seed: Seed, out: Tensor) -> None:
        """Write normalised float views (count, 3, frames, size, size) of ``pixels`` to ``out``, on the same device."""
        rng = np.random.default_rng((*seed, 2))
        crops = self._crop(pixels, seed) if self.late else pixels
        for crop, view in zip(crops.chunk(self.count), out, strict=True):
            self.transform.finish(crop, rng, view)

    def _crop(self, pixels: Tensor, seed: Seed) -> Tensor:
        rng = np.random.default_rng((*seed, 1))
        return torch.cat([self.transform.crop(clip, rng) for clip in pixels.chunk(self.count)])


@dataclass(frozen=True)
class TestViews:
    """The crops of each of ``clips`` clips. Nothing is random."""

    __test__ = False

    transform: TestTransform
    clips: int
    frames: int  # per clip

    @property
    def count(self) -> int:
        return self.clips * self.transform.crops

    def prepare(self, frames: Frames, seed: Seed) -> Tensor:
        return self.transform.resize(frames)

    def finish(self, pixels: Tensor, seed: Seed, out: Tensor) -> None:
        for clip, views in zip(pixels.chunk(self.clips), out.chunk(self.clips), strict=True):
            self.transform.finish(clip, views)


Views = TrainViews | TestViews


@dataclass
class Sample:
    """One video: its pixels (n, h, w, 3), or None where it cannot be read, and its index in the list."""

    pixels: Tensor | None
    label: int
    index: int
    seed: Seed
    failures: list[Failure]


@dataclass
class Batch:
    """The videos of a batch: their pixels, labels (videos,) and list indices (videos,)."""

    pixels: Tensor  # uint8, those of all videos in one flat tensor: one file descriptor between processes
    shapes: list[torch.Size]
    seeds: list[Seed]
    labels: Tensor
    indices: Tensor
    views: Views
    failures: list[Failure]
    missing: int = 0  # samples without pixels

    def make_clips(self) -> Tensor:
        """Crop, augment and normalise to views (videos * views, 3, T, H, W), on the device of the pixels.

        This is computed at each call: call it once per step.
        """
        size = self.views.transform.size
        shape = (len(self.shapes), self.views.count, 3, self.views.frames, size, size)
        if self.pixels.device.type == "cpu":  # NumPy asks for huge pages: the first write takes a third of the time
            clips = torch.from_numpy(np.empty(shape, np.float32))
        else:
            clips = torch.empty(shape, device=self.pixels.device)
        videos = self.pixels.split([shape.numel() for shape in self.shapes])
        for pixels, stored, seed, out in zip(videos, self.shapes, self.seeds, clips, strict=True):
            self.views.finish(pixels.view(stored), seed, out)
        return clips.flatten(0, 1)

    @property
    def clip_labels(self) -> Tensor:
        """The label of each clip (videos * views,)."""
        return self.labels.repeat_interleave(self.views.count)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with its pixels and labels on another device."""
        pixels, labels = (x.to(device, non_blocking=True) for x in (self.pixels, self.labels))
        return replace(self, pixels=pixels, labels=labels)

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory; the loader calls this where a GPU will read the batch."""
        return replace(self, pixels=self.pixels.pin_memory(), labels=self.labels.pin_memory())


def collate(samples: list[Sample], views: Views) -> Batch:
    """Return a batch of samples; those that cannot be read leave only their failures."""
    read = [(sample, sample.pixels) for sample in samples if sample.pixels is not None]
    flat = [pixels.reshape(-1) for _, pixels in read]
    return Batch(
        pixels=torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8),
        shapes=[pixels.shape for _, pixels in read],
        seeds=[sample.seed for sample, _ in read],
        labels=torch.tensor([sample.label for sample, _ in read], dtype=torch.int64),
        indices=torch.tensor([sample.index for sample, _ in read], dtype=torch.int64),
        views=views,
        failures=[failure for sample in samples for failure in sample.failures],
        missing=len(samples) - len(read),
    )


@dataclass(eq=False, repr=False)
class VideoDataset(Dataset[Sample], Generic[Key]):
    """The videos of a list as samples. One that cannot be read gives a sample without pixels and its failure."""

    videos: list[Video]
    _: KW_ONLY
    sampler: Sampling
    views: Views
    decoding: Decoding
    stage: str  # that of the failures

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: Key) -> Sample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[Key]) -> list[Sample]:
        """Return a batch's samples; a video is decoded while the one before is transformed."""
        samples = []
        for key, frames in zip(keys, self.decoding.read_all(map(self.request, keys)), strict=True):
            index, seed, _ = self._plan(key)
            label = self.videos[index].label
            if isinstance(frames, DecodeError):
                samples.append(Sample(None, label, index, (), [Failure.of(frames, self.stage)]))
            else:
                samples.append(Sample(self.views.prepare(frames, seed), label, index, seed, []))
        return samples

    def request(self, key: Key) -> FrameRequest:
        """Return which frames to decode for ``key``."""
        index, _, choice = self._plan(key)
        return self.decoding.request(self.videos[index].path, choice)

    @abstractmethod
    def _plan(self, key: Key) -> tuple[int, Seed, Choice]:
        """Return the index of a key's video, the seed of its sample, and the choice of its frames."""


@dataclass(eq=False, repr=False)
class TrainDataset(VideoDataset[SampleKey]):
    """Random clips of each video. One that cannot be read is reported and replaced by the next in the list.

    After ``MAX_TRIES`` in a row the sample has no pixels: the list or its root is wrong, which the trainer reports.
    """

    MAX_TRIES = 10

    _: KW_ONLY
    views: TrainViews
    stage: str = "train"
    seed: int

    def __getitems__(self, keys: list[SampleKey]) -> list[Sample]:
        """Return a batch's samples. Replacements are read last, when the decoder has no other requests."""
        samples = super().__getitems__(keys)
        for i, key in enumerate(keys):
            for attempt in range(1, self.MAX_TRIES):
                if samples[i].pixels is not None:
                    break
                following = replace(key, index=(key.index + attempt) % len(self.videos))
                (sample,) = super().__getitems__([following])
                samples[i] = replace(sample, failures=samples[i].failures + sample.failures)
        return samples

    def _plan(self, key: SampleKey) -> tuple[int, Seed, Choice]:
        seed = (self.seed, key.epoch, key.index)
        return key.index, seed, partial(self.sampler.random_clips, clips=self.views.count, seed=(*seed, 0))


@dataclass(eq=False, repr=False)
class TestDataset(VideoDataset[int]):
    """Each video's views, clips x crops, from one pass of the decoder. None is replaced."""

    __test__ = False

    _: KW_ONLY
    views: TestViews

    def _plan(self, key: int) -> tuple[int, Seed, Choice]:
        return key, (), partial(self.sampler.even_clips, clips=self.views.clips)
