"""Training augmentation by torchvision's v2 transforms, drawn once a clip: every frame gets the same change.

Those transforms draw from torch's global generator of the CPU, whatever device the clip is on. It is lent to them with
a seed of ours, so the choices depend on that seed alone and the training around them draws what it would have drawn.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2


@contextmanager
def torch_draws_from(seed: int) -> Iterator[None]:
    """Let torch's CPU generator start from ``seed`` inside the block, and go on afterwards as if nothing was drawn."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the GPUs too, and with them the dropout of the training around us.
        torch.default_generator.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Augment:
    """RandAugment, colour jitter and random erasing of one clip; what is 0 is left out and draws nothing.

    ``layers`` operations of RandAugment have a ``magnitude`` of 0 to 30; none of them mirrors. ``jitter`` is the
    largest relative change of brightness, contrast and saturation, ``erase`` the probability of random erasing.
    """

    layers: int = 0
    magnitude: int = 9
    jitter: float = 0.0
    erase: float = 0.0

    def distort(self, clip: Tensor, rng: np.random.Generator) -> Tensor:
        """Return uint8 (T, 3, H, W) after RandAugment and colour jitter, as uint8."""
        steps = []
        if self.layers > 0:
            steps.append(v2.RandAugment(self.layers, self.magnitude, interpolation=v2.InterpolationMode.BILINEAR))
        if self.jitter > 0:
            steps.append(v2.ColorJitter(self.jitter, self.jitter, self.jitter))
        if not steps:
            return clip
        with torch_draws_from(_seed(rng)):
            return v2.Compose(steps)(clip)

    def cover(self, clip: Tensor, rng: np.random.Generator) -> Tensor:
        """Return normalised float (3, T, H, W), maybe with one rectangle of noise over all frames, in place."""
        if self.erase == 0:
            return clip
        with torch_draws_from(_seed(rng)):
            return v2.RandomErasing(self.erase, value="random", inplace=True)(clip.transpose(0, 1)).transpose(0, 1)


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**63))
