"""What every reducer of tokens is given and returns, and the steps that several of them share.

Legend: B clips, N image tokens, M tokens that are left, C channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Added to weights before their logarithm: a dropped token's share of the attention vanishes, its gradient does not (but
# in fp16, whose numbers end above it).
FLOOR = 1e-8

Past = Sequence[tuple[nn.Module, Tensor]]  # blocks that have run, each with the tokens (B, N, C) that it was given


@dataclass
class Reduced:
    """What a reducer leaves of the image tokens.

    ``assignment`` (B, M, N), where it was asked for, says how much a token draws from each image token. ``weights``
    (B, M) says how many image tokens it stands for, 0 for one that is dropped; None: all alike.
    """

    tokens: Tensor  # (B, M, C)
    assignment: Tensor | None = None
    weights: Tensor | None = None


class Reducer(nn.Module, ABC):
    """Base of the reducers: ``count`` tokens are left, and the backbone's own next blocks are run on the way.

    ``past`` is the number of blocks before its own that the reducer looks at.
    """

    past = 0

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self._loss: Tensor | None = None

    @abstractmethod
    def forward(
        self, x: Tensor, blocks: Sequence[nn.Module], past: Past = (), return_assignment: bool = False
    ) -> Reduced:
        """Map image tokens (B, N, C) to what is left of them behind ``blocks``."""

    def auxiliary_loss(self) -> Tensor | None:
        """Return the loss of the last forward pass in training mode, once; None where the reducer learns without."""
        loss, self._loss = self._loss, None
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loss": None}  # a copy of the model is none of its graph


def run(blocks: Sequence[nn.Module], x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Run blocks on tokens (B, M, C) that stand for ``weights`` (B, M) image tokens each."""
    bias = None if weights is None else key_bias(weights)
    for block in blocks:
        x = block(x, key_bias=bias)
    return x


def key_bias(weights: Tensor) -> Tensor:
    """Return what is added to the attention's logits, so that a key counts as often as its weight says."""
    return (weights + FLOOR).log()


def mean_token(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean (B, 1, C) of tokens (B, M, C), each counted as often as its weight says."""
    if weights is None:
        return x.mean(dim=1, keepdim=True)
    shares = weights / weights.sum(dim=1, keepdim=True).clamp_min(FLOOR)
    return (x * shares.unsqueeze(-1)).sum(dim=1, keepdim=True).to(x.dtype)


def take(x: Tensor, indices: Tensor) -> Tensor:
    """Return the tokens (B, M, C) at ``indices`` (B, M) of x (B, N, C)."""
    return x.gather(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def as_assignment(indices: Tensor, count: int) -> Tensor:
    """Return the assignment (B, M, count) of tokens that are image tokens themselves."""
    return nn.functional.one_hot(indices, count).to(torch.float32)


def top(scores: Tensor, count: int) -> Tensor:
    """Return where the ``count`` highest scores (B, N) are, in the order of the tokens."""
    return scores.topk(count, dim=1).indices.sort(dim=1).values
