"""The interface of token reducers, and the steps that several of them share.

Legend: B clips, N image tokens, M tokens that are left, C channels.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from stvit_video.models.arguments import Grid

# Added to weights before their logarithm: the attention to a dropped token becomes negligible, its gradient does not
# vanish (except in fp16, where this rounds to 0).
FLOOR = 1e-8

Blocks = Sequence[nn.Module]
Past = Sequence[tuple[nn.Module, Tensor]]  # blocks that ran before, each with its input tokens


@dataclass
class Reduced:
    """The output of a reducer."""

    tokens: Tensor  # (B, M, C)
    assignment: Tensor | None = None  # (B, M, N) if requested: how much a token draws from each image token
    weights: Tensor | None = None  # (B, M): image tokens it stands for, 0 if dropped; None: all tokens count alike


class Reducer(nn.Module, ABC):
    """Base of the reducers, which leave a token for each region and run the backbone's next blocks while doing so.

    Raises ValueError where there are more regions than tokens along an axis.
    """

    on_grid = False  # whether the remaining tokens lie on the grid of regions
    past = 0  # blocks before its own whose inputs the reducer reads

    def __init__(self, grid: Grid, regions: Grid) -> None:
        super().__init__()
        for length, count, axis in zip(grid, regions, ("time", "height", "width"), strict=True):
            if not 1 <= count <= length:
                raise ValueError(f"{count} regions over {length} tokens of {axis}; allowed: 1 to {length}.")
        self.grid = grid
        self.count = math.prod(regions)
        self.regions = regions if self.on_grid else None
        self._loss: Tensor | None = None

    @abstractmethod
    def forward(self, x: Tensor, blocks: Blocks, past: Past = (), return_assignment: bool = False) -> Reduced:
        """Map image tokens (B, N, C) to the remaining tokens after ``blocks``."""

    def reset_parameters(self) -> None:
        """Initialise what the backbone's own initialisation, which comes before, would get wrong."""

    def auxiliary_loss(self) -> Tensor | None:
        """Return the extra loss of the last forward pass in training mode, once; None if the reducer has none."""
        loss, self._loss = self._loss, None
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loss": None}  # tensors with a graph cannot be deep-copied


def run(blocks: Blocks, x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Run blocks on tokens (B, M, C) that stand for ``weights`` (B, M) image tokens each."""
    bias = None if weights is None else key_bias(weights)
    for block in blocks:
        x = block(x, key_bias=bias)
    return x


def key_bias(weights: Tensor) -> Tensor:
    """Return the bias of attention logits with which a key counts as often as its weight says."""
    return (weights + FLOOR).log()


def mean_token(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean (B, 1, C) of tokens (B, M, C), each counted as often as its weight says."""
    if weights is None:
        return x.mean(dim=1, keepdim=True)
    shares = weights / weights.sum(dim=1, keepdim=True).clamp_min(FLOOR)
    return (x * shares.unsqueeze(-1)).sum(dim=1, keepdim=True).to(x.dtype)


def adaptive_pool(x: Tensor, grid: Grid, regions: Grid, kind: str = "mean") -> Tensor:
    """Pool tokens (B, N, C) of a grid to one for each region (B, M, C): their "mean", or "max" of each channel."""
    pool = F.adaptive_max_pool3d if kind == "max" else F.adaptive_avg_pool3d
    return pool(x.transpose(1, 2).unflatten(2, grid), regions).flatten(2).transpose(1, 2)
