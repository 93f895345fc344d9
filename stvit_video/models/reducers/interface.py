"""The interface of token reducers, and the steps that several of them share.

Legend: B clips, N image tokens, M tokens that are left, C channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
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
    """Base of the reducers, which leave ``count`` tokens and run the backbone's next blocks while doing so.

    ``regions`` is the grid (t, h, w) of the remaining tokens, None where they have none.
    """

    past = 0  # blocks before its own whose inputs the reducer reads

    def __init__(self, count: int, regions: Grid | None = None) -> None:
        super().__init__()
        self.count, self.regions = count, regions
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


def gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """Return the tokens (B, M, C) at ``indices`` (B, M) of x (B, N, C)."""
    return x.gather(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def as_assignment(indices: Tensor, count: int) -> Tensor:
    """Return the assignment (B, M, count) of tokens that are the image tokens at ``indices`` (B, M)."""
    return nn.functional.one_hot(indices, count).to(torch.float32)


def keep_tokens(x: Tensor, indices: Tensor, blocks: Blocks, return_assignment: bool) -> Reduced:
    """Return the tokens of x (B, N, C) at ``indices`` (B, M) after ``blocks``: no others take part."""
    assignment = as_assignment(indices, x.shape[1]) if return_assignment else None
    return Reduced(run(blocks, gather_tokens(x, indices)), assignment)


def top_indices(scores: Tensor, count: int) -> Tensor:
    """Return the indices (B, count) of the highest scores (B, N), in ascending order."""
    return scores.topk(count, dim=1).indices.sort(dim=1).values
