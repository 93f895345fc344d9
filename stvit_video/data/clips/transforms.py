"""Frames to clips: uint8 (T, H, W, 3) from the decoder to normalised float (3, T, S, S) for the model.

This happens in two halves: ``prepare`` runs in the loader's workers, ``finish`` on the model's device, since uint8
pixels take a quarter of the space of floats on the way. A seed determines what is random. A crop of a resized frame is
computed as the resize of a crop, which processes fewer pixels.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from stvit_video.data.decode.types import Frames

Seed = tuple[int, ...]


@contextmanager
def torch_draws_from(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator inside the block, and restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the GPUs too, and with them the dropout of the training that calls this.
        torch.default_generator.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Augment:
    """RandAugment, colour jitter and random erasing of a clip. What is 0 is left out and draws no random numbers."""

    layers: int = 0  # operations of RandAugment, none of which mirrors
    magnitude: int = 9  # of these operations, 0 to 30
    jitter: float = 0.0  # largest relative change of brightness, contrast and saturation
    erase: float = 0.0  # probability of random erasing

    def distort(self, clip: Tensor, rng: np.random.Generator) -> Tensor:
        """Return uint8 (T, 3, H, W) after RandAugment and colour jitter, as uint8."""
        steps = []
        if self.layers > 0:
            steps.append(v2.RandAugment(self.layers, self.magnitude, interpolation=v2.InterpolationMode.BILINEAR))
        if self.jitter > 0:
            steps.append(v2.ColorJitter(self.jitter, self.jitter, self.jitter))
        if not steps:
            return clip
        with torch_draws_from(int(rng.integers(2**63))):
            return v2.Compose(steps)(clip)

    def cover(self, clip: Tensor, rng: np.random.Generator) -> Tensor:
        """Fill a random rectangle of all frames (3, T, H, W), normalised float, with noise; in place."""
        if self.erase == 0:
            return clip
        with torch_draws_from(int(rng.integers(2**63))):
            return v2.RandomErasing(self.erase, value="random", inplace=True)(clip.transpose(0, 1)).transpose(0, 1)


@dataclass(frozen=True)
class Normalise:
    """uint8 in 0 to 255 to float with the given mean and standard deviation (of values in 0 to 1), channels first."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Tensor, out: Tensor) -> Tensor:
        """Map uint8 (T, H, W, 3) to float32 (3, T, H, W), written to ``out``."""
        mean = torch.tensor(self.mean, device=pixels.device).view(3, 1, 1, 1) * 255
        std = torch.tensor(self.std, device=pixels.device).view(3, 1, 1, 1) * 255
        return out.copy_(pixels.permute(3, 0, 1, 2)).sub_(mean).div_(std)


@dataclass(frozen=True, kw_only=True)
class TrainViews:
    """Random crops of ``clips`` clips, with optional mirroring and augmentation, each the same in a clip's frames."""

    clips: int
    crops: ClassVar[int] = 1  # of each clip
    frames: int  # per clip
    size: int  # of the crop's sides
    normalise: Normalise
    short_side: tuple[int, int]  # without ``area``: resize the short side to a random length in this range, then crop
    area: tuple[float, float] | None = None  # else stretch a random share of the frame's area in this range to the crop
    ratio: tuple[float, float] = (1.0, 1.0)  # with ``area``: of width to height
    flip: bool = False  # mirror a clip with probability 0.5
    augment: Augment = Augment()
    late: bool = False  # crop and augment on the model's device too, so that workers only decode

    def prepare(self, frames: Frames, seed: Seed) -> Tensor:
        """Map decoded frames (N, H, W, 3) to uint8 pixels (n, h, w, 3)."""
        pixels = torch.from_numpy(frames)
        return pixels if self.late else self._crop_all(pixels, seed)

    def drop_copies(self, pixels: Tensor) -> tuple[Tensor, list[int]]:
        """Return the pixels unchanged, and the place of each view: none is the same as another."""
        return pixels, list(range(self.clips))

    def finish(self, pixels: Tensor, seed: Seed, out: Tensor) -> None:
        """Write normalised float views (clips * crops, 3, frames, size, size) to ``out``, where the pixels are."""
        rng = np.random.default_rng((*seed, 2))
        crops = self._crop_all(pixels, seed) if self.late else pixels
        for crop, view in zip(crops.chunk(self.clips), out, strict=True):
            self.augment.cover(self.normalise(crop, view), rng)

    def _crop_all(self, pixels: Tensor, seed: Seed) -> Tensor:
        rng = np.random.default_rng((*seed, 1))
        return torch.cat([self.crop(clip, rng) for clip in pixels.chunk(self.clips)])

    def crop(self, frames: Tensor, rng: np.random.Generator) -> Tensor:
        """Map one clip's frames (T, H, W, 3) to uint8 (T, size, size, 3)."""
        clip = frames.permute(0, 3, 1, 2)  # (T, 3, H, W)
        height, width = clip.shape[-2:]
        clip = F.resized_crop(clip, *self._box(height, width, rng), [self.size, self.size], antialias=True)
        if self.flip and rng.random() < 0.5:
            clip = F.horizontal_flip(clip)
        return self.augment.distort(clip, rng).permute(0, 2, 3, 1)

    def _box(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Draw the top, left, height and width of a crop."""
        if self.area is None:
            side = int(rng.integers(self.short_side[0], self.short_side[1] + 1))
            crop = max(1, round(self.size * min(height, width) / side))  # the square in pixels of the frame
            return int(rng.integers(height - crop + 1)), int(rng.integers(width - crop + 1)), crop, crop
        for _ in range(10):
            area = height * width * rng.uniform(*self.area)
            ratio = math.exp(rng.uniform(*np.log(self.ratio)))
            h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < h <= height and 0 < w <= width:
                return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
        square = min(height, width)
        return (height - square) // 2, (width - square) // 2, square, square


@dataclass(frozen=True, kw_only=True)
class TestViews:
    """The crops of each of ``clips`` clips, whose short side is resized. Nothing is random."""

    __test__ = False  # pytest would take it for a test case

    clips: int
    crops: int  # 1, in the centre, or 3 along the longer side
    frames: int  # per clip
    size: int  # of the crops' sides
    normalise: Normalise
    short_side: int

    def prepare(self, frames: Frames, seed: Seed = ()) -> Tensor:
        """Map decoded frames (N, H, W, 3) to uint8 (N, h, w, 3) of the size from which crops are taken."""
        clip = torch.from_numpy(frames).permute(0, 3, 1, 2)  # (N, 3, H, W)
        scale = self.short_side / min(clip.shape[-2:])
        size = [max(self.size, round(side * scale)) for side in clip.shape[-2:]]
        return F.resize(clip, size, antialias=True).permute(0, 2, 3, 1)

    def drop_copies(self, pixels: Tensor) -> tuple[Tensor, list[int]]:
        """Return the pixels (n, h, w, 3) of the clips that differ, and of each view its place among those that differ.

        Clips of a video that is shorter than a clip are the same: one is enough to score it.
        """
        kept: list[Tensor] = []
        places = []
        for clip in pixels.chunk(self.clips):
            # Most differ in their first frame already.
            same = (i for i, other in enumerate(kept) if torch.equal(other[0], clip[0]) and torch.equal(other, clip))
            places.append(next(same, len(kept)))
            kept += [clip] if places[-1] == len(kept) else []
        crops = self.different_crops(pixels.shape)
        views = [place * crops + min(crop, crops - 1) for place, crop in product(places, range(self.crops))]
        return pixels if len(kept) == self.clips else torch.cat(kept), views

    def different_crops(self, shape: torch.Size) -> int:
        """Return how many crops of a clip of pixels (n, h, w, 3) differ: one where a crop is the whole picture."""
        return self.crops if max(shape[1:3]) > self.size else 1

    def finish(self, pixels: Tensor, seed: Seed, out: Tensor) -> None:
        """Write the normalised float views (n, 3, frames, size, size) that differ to ``out``, where the pixels are."""
        rows, columns = pixels.shape[1] - self.size, pixels.shape[2] - self.size  # how far a crop can move
        shares = (0.5,) if self.different_crops(pixels.shape) == 1 else (0.0, 0.5, 1.0)
        for (clip, share), view in zip(product(pixels.split(self.frames), shares), out, strict=True):
            top = round(rows * (share if rows > columns else 0.5))
            left = round(columns * (0.5 if rows > columns else share))
            self.normalise(clip[:, top : top + self.size, left : left + self.size], view)


@dataclass(kw_only=True)
class Mix:
    """Shuffles the clips of a batch, then mixes each, and its label, with the one before it."""

    mixup: float  # alpha of MixUp; 0 leaves it out
    cutmix: float  # alpha of CutMix; 0 leaves it out
    probability: float  # of mixing a batch at all
    switch: float  # probability of CutMix where both are used
    num_classes: int

    def __post_init__(self) -> None:
        kinds = ((v2.MixUp, self.mixup), (v2.CutMix, self.cutmix))
        self.transforms = [kind(alpha=alpha, num_classes=self.num_classes) for kind, alpha in kinds if alpha > 0]

    def __call__(self, clips: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Map clips (B, 3, T, H, W) and labels (B,) to mixed clips and the share of each class (B, classes).

        Of a multi-label set, labels and shares are those of each class by itself (B, classes).
        """
        with torch_draws_from(seed):
            if torch.rand(()) >= self.probability:
                return clips, labels if labels.ndim == 2 else nn.functional.one_hot(labels, self.num_classes).float()
            transform = self.transforms[-1 if torch.rand(()) < self.switch else 0]
            # Clips of one video are neighbours in a batch; mixing them with each other would add little variety.
            order = torch.randperm(len(labels)).to(clips.device)
            # tv_tensors.Video says that the last two of the five dimensions are H and W.
            mixed, shares = transform(tv_tensors.Video(clips[order]), labels[order])
        return mixed.as_subclass(Tensor), shares
