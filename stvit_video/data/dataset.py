"""A map-style data set: from a sampler's key to a decoded and transformed sample, and to a batch.

Each training sample draws from a generator seeded by (seed, epoch, index): it is the same in any worker or process.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stvit_video.common.errors import RunFailure
from stvit_video.data.clips.sampling import Sampling
from stvit_video.data.clips.sections import within
from stvit_video.data.clips.transforms import Seed, TestViews, TrainViews
from stvit_video.data.decode.frames import Decoding, FrameRequest
from stvit_video.data.decode.types import Choice, DecodeError, DecoderKilled
from stvit_video.data.failures import Failure
from stvit_video.data.lists.annotations import Video, labels_of
from stvit_video.runtime.limits import describe_memory

MAX_TRIES = 10


@dataclass(frozen=True)
class SampleKey:
    """What a training sampler asks for: a video, and the epoch that determines its random choices."""

    epoch: int
    index: int
    draw: int = 0  # how often the epoch has drawn the video before


@dataclass
class Sample:
    """One video: its pixels (n, h, w, 3), or None where it cannot be read, and its index in the list."""

    pixels: Tensor | None
    label: int | Tensor  # of a multi-label set, 0 or 1 for each class (classes,)
    index: int
    seed: Seed
    failures: list[Failure]
    is_short: bool = False  # shorter than a clip; known of a test only


@dataclass
class Batch:
    """The videos of a batch: their pixels, labels (videos,) and list indices (videos,).

    The labels of a multi-label set are 0 or 1 for each class (videos, classes).
    """

    pixels: Tensor  # uint8, those of all videos in one flat tensor: one file descriptor between processes
    shapes: list[torch.Size]
    seeds: list[Seed]
    labels: Tensor
    indices: Tensor
    views: TrainViews | TestViews
    failures: list[Failure]
    missing: int  # samples without pixels
    short: Tensor  # (videos,), see ``Sample``
    places: list[list[int]]  # of each view of each video among the different views of that video

    def make_clips(self) -> Tensor:
        """Compute the different views (n, 3, T, H, W), on the device of the pixels; call it once per step.

        In training these are all (videos * views); ``expand`` gives each view what was computed for its equal.
        """
        views, counts = self.views, self.different_views
        shape = (sum(counts), 3, views.frames, views.size, views.size)
        if self.pixels.device.type == "cpu":  # NumPy asks for huge pages: the first write takes a third of the time
            clips = torch.from_numpy(np.empty(shape, np.float32))
        else:
            clips = torch.empty(shape, device=self.pixels.device)
        videos = self.pixels.split([shape.numel() for shape in self.shapes])
        parts = (videos, self.shapes, self.seeds, clips.split(counts))
        for pixels, stored, seed, out in zip(*parts, strict=True):
            views.finish(pixels.view(stored), seed, out)
        return clips

    def expand(self, rows: Tensor) -> Tensor:
        """Return the rows (videos, views, ...) of all views, given those (n, ...) of the different ones."""
        parts = rows.split(self.different_views)
        return torch.stack([part[places] for part, places in zip(parts, self.places, strict=True)])

    @property
    def different_views(self) -> list[int]:
        """How many views of each video differ."""
        return [max(places) + 1 for places in self.places]

    @property
    def clip_labels(self) -> Tensor:
        """The label of each clip (videos * views,), or its labels (videos * views, classes)."""
        return self.labels.repeat_interleave(self.views.clips * self.views.crops, dim=0)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with its pixels and labels on another device."""
        pixels, labels = (x.to(device, non_blocking=True) for x in (self.pixels, self.labels))
        return replace(self, pixels=pixels, labels=labels)

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory; the loader calls this where a GPU will read the batch."""
        return replace(self, pixels=self.pixels.pin_memory(), labels=self.labels.pin_memory())


def collate(samples: list[Sample], views: TrainViews | TestViews) -> Batch:
    """Return a batch of samples; those that cannot be read leave only their failures."""
    read = [(sample, *views.drop_copies(sample.pixels)) for sample in samples if sample.pixels is not None]
    flat = [pixels.reshape(-1) for _, pixels, _ in read]
    return Batch(
        pixels=torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8),
        shapes=[pixels.shape for _, pixels, _ in read],
        seeds=[sample.seed for sample, *_ in read],
        labels=torch.stack([torch.as_tensor(sample.label) for sample, *_ in read]) if read else torch.empty(0),
        indices=torch.tensor([sample.index for sample, *_ in read], dtype=torch.int64),
        views=views,
        failures=[failure for sample in samples for failure in sample.failures],
        missing=len(samples) - len(read),
        short=torch.tensor([sample.is_short for sample, *_ in read], dtype=torch.bool),
        places=[places for *_, places in read],
    )


@dataclass(eq=False, repr=False, kw_only=True)
class VideoDataset(Dataset[Sample]):
    """All views of each video of a list. A key is a SampleKey in training, a video's index in a test.

    A video that cannot be read gives a sample without pixels and its failure. In training it is replaced by the next
    one of the list, up to MAX_TRIES in a row: then the list or its root is wrong, which the trainer reports.
    """

    videos: list[Video]
    sampler: Sampling
    views: TrainViews | TestViews
    decoding: Decoding
    stage: str  # that of the failures
    label_columns: int | None = None  # the classes of a multi-label set; None: one label a video
    seed: int = 0  # of training
    on_video: Callable[[], None] | None = None  # called after each video

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: SampleKey | int) -> Sample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[SampleKey | int]) -> list[Sample]:
        """Return a batch's samples. Replacements are read last, when the decoder has no other requests."""
        samples = self._read(keys)
        for i, key in enumerate(keys):
            for attempt in range(1, MAX_TRIES):
                if isinstance(key, int) or samples[i].pixels is not None:
                    break
                (sample,) = self._read([replace(key, index=(key.index + attempt) % len(self.videos))])
                samples[i] = replace(sample, failures=samples[i].failures + sample.failures)
        return samples

    def _read(self, keys: Sequence[SampleKey | int]) -> list[Sample]:
        """Return the samples of the keys; a video is decoded while the one before is transformed."""
        samples = []
        requests = [self.request(key) for key in keys]
        for i in range(len(requests) - 1):  # a file stays open where its next section follows
            if requests[i].path == requests[i + 1].path:
                requests[i] = replace(requests[i], keep_open=True)
        for key, frames in zip(keys, self.decoding.read_all(requests), strict=True):
            index, seed, _ = self._plan(key)
            label = self._label(self.videos[index])
            if isinstance(frames, DecoderKilled):  # to leave out videos by chance would falsify the figures
                raise RunFailure(f"{frames}; {describe_memory()}")
            if isinstance(frames, DecodeError):
                samples.append(
                    Sample(None, label, index, (), [Failure.of(frames, self.stage, self.videos[index].name)])
                )
            else:
                pixels = self.views.prepare(frames, seed)
                samples.append(Sample(pixels, label, index, seed, [], bool(self.decoding.judgement)))
            if self.on_video is not None:
                self.on_video()
        return samples

    def _label(self, video: Video) -> int | Tensor:
        if self.label_columns is None:
            return video.label
        labels = torch.tensor(labels_of(video), dtype=torch.int64)
        return torch.zeros(self.label_columns).index_fill_(0, labels, 1)

    def request(self, key: SampleKey | int) -> FrameRequest:
        """Return which frames to decode for ``key``."""
        index, _, choice = self._plan(key)
        video = self.videos[index]
        request = self.decoding.request(video.path, within(choice, video.section, video.path))
        if isinstance(key, int):
            return replace(request, judge=within(self.sampler.is_short, video.section, video.path))
        return request

    def _plan(self, key: SampleKey | int) -> tuple[int, Seed, Choice]:
        """Return the index of a key's video, the seed of its sample, and the choice of its frames."""
        if isinstance(key, int):
            return key, (), partial(self.sampler, clips=self.views.clips)
        seed = (self.seed, key.epoch, key.index, *((key.draw,) if key.draw else ()))
        return key.index, seed, partial(self.sampler, clips=self.views.clips, seed=(*seed, 0))
