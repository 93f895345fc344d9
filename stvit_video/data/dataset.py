"""Map-style datasets: a key from the sampler to a decoded, transformed sample.

Nothing random is global: each training sample draws from a generator seeded by (seed, epoch, index), so it is the same
whichever worker or process loads it.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stvit_video.data.clips.sampling import EvenClips, RandomClips, Sampling
from stvit_video.data.clips.transforms import TestTransform, TrainTransform
from stvit_video.data.decode.frames import Request
from stvit_video.data.decode.process import Decoding
from stvit_video.data.decode.types import DecodeError, Frames
from stvit_video.data.failures import Failure
from stvit_video.data.lists.annotations import Video


@dataclass(frozen=True)
class SampleKey:
    """What a training sampler asks for: the video, and the epoch that its random choices belong to."""

    epoch: int
    index: int


Seed = tuple[int, ...]


class Views(Protocol):
    """How a video's frames become ``count`` views of (3, ``frames``, ``size``, ``size``), in two halves.

    The first runs in the loader's workers; the second where the model is, so that bytes travel and not floats, which
    are four times as many. ``seed`` fixes what is random.
    """

    @property
    def count(self) -> int: ...

    @property
    def frames(self) -> int: ...

    @property
    def size(self) -> int: ...

    def prepare(self, frames: Frames, seed: Seed) -> Tensor:
        """Map decoded frames (N, H, W, 3) to uint8 pixels (n, h, w, 3)."""

    def finish(self, pixels: Tensor, seed: Seed, out: Tensor) -> None:
        """Write normalised float views (count, 3, frames, size, size) of ``pixels`` to ``out``, on the same device."""


@dataclass(frozen=True)
class TrainViews:
    """``count`` random crops, of as many clips. With ``late``, all but the decoding happens where the model is."""

    transform: TrainTransform
    count: int
    frames: int
    late: bool = False

    @property
    def size(self) -> int:
        return self.transform.size

    def prepare(self, frames: Frames, seed: Seed) -> Tensor:
        pixels = torch.from_numpy(frames)
        return pixels if self.late else self._crop(pixels, seed)

    def finish(self, pixels: Tensor, seed: Seed, out: Tensor) -> None:
        rng = np.random.default_rng((*seed, 2))
        crops = self._crop(pixels, seed) if self.late else pixels
        for crop, view in zip(crops.chunk(self.count), out, strict=True):
            self.transform.finish(crop, rng, view)

    def _crop(self, pixels: Tensor, seed: Seed) -> Tensor:
        rng = np.random.default_rng((*seed, 1))
        return torch.cat([self.transform.crop(clip, rng) for clip in pixels.chunk(self.count)])


@dataclass(frozen=True)
class TestViews:
    """The crops of each of ``clips`` clips."""

    __test__ = False

    transform: TestTransform
    clips: int
    frames: int

    @property
    def count(self) -> int:
        return self.clips * self.transform.crops

    @property
    def size(self) -> int:
        return self.transform.size

    def prepare(self, frames: Frames, seed: Seed) -> Tensor:
        return self.transform.resize(frames)

    def finish(self, pixels: Tensor, seed: Seed, out: Tensor) -> None:
        for clip, views in zip(pixels.chunk(self.clips), out.chunk(self.clips), strict=True):
            self.transform.finish(clip, views)


@dataclass
class Sample:
    """One video's pixels (n, h, w, 3), or none where it failed, with its place in the list."""

    pixels: Tensor | None
    label: int
    index: int
    seed: Seed
    failures: list[Failure]


@dataclass
class Batch:
    """Videos' pixels, one after the other in one tensor, their labels (videos,) and list positions (videos,)."""

    pixels: Tensor  # uint8, flat: one tensor is one file descriptor between processes
    shapes: list[torch.Size]
    seeds: list[Seed]
    labels: Tensor
    indices: Tensor
    views: Views
    failures: list[Failure]
    missing: int = 0  # samples asked for that have no pixels

    @property
    def clips(self) -> Tensor:
        """The views (videos * views, 3, T, H, W), video by video, computed on the device of the pixels."""
        video = (self.views.count, 3, self.views.frames, self.views.size, self.views.size)
        if self.pixels.device.type == "cpu":  # NumPy asks for huge pages: a third of the time for the first writes
            clips = torch.from_numpy(np.empty((len(self.shapes), *video), np.float32))
        else:
            clips = torch.empty(len(self.shapes), *video, device=self.pixels.device)
        parts = self.pixels.split([shape.numel() for shape in self.shapes])
        for part, shape, seed, out in zip(parts, self.shapes, self.seeds, clips, strict=True):
            self.views.finish(part.view(shape), seed, out)
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
        """Called by the loader where a GPU will read the batch."""
        return replace(self, pixels=self.pixels.pin_memory(), labels=self.labels.pin_memory())


@dataclass(frozen=True)
class Collate:
    """Puts samples together; those that failed leave only their failures."""

    views: Views

    def __call__(self, samples: list[Sample]) -> Batch:
        read = [(sample, sample.pixels) for sample in samples if sample.pixels is not None]
        flat = [pixels.reshape(-1) for _, pixels in read]
        return Batch(
            pixels=torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8),
            shapes=[pixels.shape for _, pixels in read],
            seeds=[sample.seed for sample, _ in read],
            labels=torch.tensor([sample.label for sample, _ in read], dtype=torch.int64),
            indices=torch.tensor([sample.index for sample, _ in read], dtype=torch.int64),
            views=self.views,
            failures=[failure for sample in samples for failure in sample.failures],
            missing=len(samples) - len(read),
        )


class TrainDataset(Dataset[Sample]):
    """Random clips of each video. An unreadable video is reported and the next one in the list taken instead.

    After ``MAX_TRIES`` in a row the sample has no pixels: the list or its root is wrong, which the trainer says.
    """

    MAX_TRIES = 10

    def __init__(
        self, videos: list[Video], *, sampler: Sampling, views: TrainViews, decoding: Decoding, seed: int
    ) -> None:
        self.videos, self.sampler, self.views = videos, sampler, views
        self.decoding, self.seed = decoding, seed

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: SampleKey) -> Sample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[SampleKey]) -> list[Sample]:
        """Return a batch's samples; a video is decoded while the one before is transformed."""
        read = self.decoding.read_all(self.request(key, key.index) for key in keys)
        return [
            self._replace(key, frames) if isinstance(frames, DecodeError) else self._sample(key, key.index, frames, [])
            for key, frames in zip(keys, read, strict=True)
        ]

    def request(self, key: SampleKey, index: int) -> Request:
        """Return what is to be decoded of the video at ``index``, as ``key``'s epoch draws it."""
        choice = RandomClips(self.sampler, self.views.count, (self.seed, key.epoch, index, 0))
        return self.decoding.request(self.videos[index].path, choice)

    def _sample(self, key: SampleKey, index: int, frames: Frames, failures: list[Failure]) -> Sample:
        seed = (self.seed, key.epoch, index)
        return Sample(self.views.prepare(frames, seed), self.videos[index].label, index, seed, failures)

    def _replace(self, key: SampleKey, error: DecodeError) -> Sample:
        """Return the first of the next videos that can be read, with the failures up to it."""
        failures = [Failure.of(error, "train")]
        for attempt in range(1, self.MAX_TRIES):
            index = (key.index + attempt) % len(self.videos)
            try:
                return self._sample(key, index, self.decoding.read(self.request(key, index)), failures)
            except DecodeError as again:
                failures.append(Failure.of(again, "train"))
        return Sample(None, -1, key.index, (), failures)


class TestDataset(Dataset[Sample]):
    """A video's views, clips x crops, from one pass of the decoder. An unreadable one is reported, never replaced."""

    __test__ = False

    def __init__(
        self, videos: list[Video], *, sampler: Sampling, views: TestViews, decoding: Decoding, stage: str
    ) -> None:
        self.videos, self.sampler, self.views = videos, sampler, views
        self.decoding, self.stage = decoding, stage

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        """Return a batch's samples; a video is decoded while the one before is transformed."""
        read = self.decoding.read_all(map(self.request, indices))
        return [self._sample(index, frames) for index, frames in zip(indices, read, strict=True)]

    def request(self, index: int) -> Request:
        """Return what is to be decoded of the video at ``index``."""
        return self.decoding.request(self.videos[index].path, EvenClips(self.sampler, self.views.clips))

    def _sample(self, index: int, frames: Frames | DecodeError) -> Sample:
        label = self.videos[index].label
        if isinstance(frames, DecodeError):
            return Sample(None, label, index, (), [Failure.of(frames, self.stage)])
        return Sample(self.views.prepare(frames, ()), label, index, (), [])
