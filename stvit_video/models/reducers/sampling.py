"""Reducers without parameters that pool image tokens or select some of them.

Legend: B clips, N image tokens, M remaining tokens, C channels, h heads.
"""

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvit_video.models.arguments import Grid
from stvit_video.models.reducers.interface import (
    Blocks,
    Past,
    Reduced,
    Reducer,
    as_assignment,
    gather_tokens,
    keep_tokens,
    run,
    top_indices,
)


class RandomSelection(Reducer):
    """Base of the random choices: another choice for each clip in training, one fixed choice in evaluation."""

    kept: Tensor  # (M,), the choice in evaluation

    def forward(self, x: Tensor, blocks: Blocks, past: Past = (), return_assignment: bool = False) -> Reduced:
        """Map (B, N, C) to (B, M, C)."""
        kept = self.draw(x) if self.training else self.kept.expand(x.shape[0], -1)
        return keep_tokens(x, kept, blocks, return_assignment)

    @abstractmethod
    def draw(self, x: Tensor) -> Tensor:
        """Return a random choice for each clip of x (B, N, C): indices (B, M)."""


class RandomTokens(RandomSelection):
    """Image tokens sampled at random: the control that any other choice has to beat."""

    def __init__(self, grid: Grid, count: int) -> None:
        super().__init__(count)
        order = torch.randperm(math.prod(grid), generator=torch.Generator().manual_seed(0), device="cpu")
        self.register_buffer("kept", order[:count].sort().values, persistent=False)

    def draw(self, x: Tensor) -> Tensor:
        return top_indices(torch.rand(x.shape[:2], device=x.device), self.count)


class RandomOfRegions(RandomSelection):
    """One random image token of each region, for backbones that need a grid.

    Where regions do not divide an axis, some are one token longer.
    """

    starts: Tensor
    sizes: Tensor

    def __init__(self, grid: Grid, regions: Grid) -> None:
        super().__init__(math.prod(regions), regions)
        self.grid = grid
        cuts = [torch.arange(count + 1) * length // count for length, count in zip(grid, regions, strict=True)]
        self.register_buffer("starts", torch.cartesian_prod(*(cut[:-1] for cut in cuts)), persistent=False)  # (M, 3)
        self.register_buffer("sizes", torch.cartesian_prod(*(cut.diff() for cut in cuts)), persistent=False)
        fractions = torch.rand(self.count, 3, generator=torch.Generator().manual_seed(0), device="cpu")
        self.register_buffer("kept", self._indices(fractions), persistent=False)

    def draw(self, x: Tensor) -> Tensor:
        return self._indices(torch.rand(x.shape[0], self.count, 3, device=x.device))

    def _indices(self, fractions: Tensor) -> Tensor:
        """Return the indices (..., M) of the tokens at fractions (..., M, 3) of each region's sides."""
        t, h, w = (self.starts + (fractions * self.sizes).long()).unbind(dim=-1)
        return (t * self.grid[1] + h) * self.grid[2] + w


class MeanTokens(Reducer):
    """Means of the image tokens over regions, which overlap where they do not divide the grid (adaptive pooling)."""

    def __init__(self, grid: Grid, regions: Grid) -> None:
        super().__init__(math.prod(regions), regions)
        self.grid = grid

    def forward(self, x: Tensor, blocks: Blocks, past: Past = (), return_assignment: bool = False) -> Reduced:
        """Map (B, N, C) to (B, M, C)."""
        B, N, _ = x.shape
        assignment = None
        if return_assignment:
            assignment = self._pool(torch.eye(N, device=x.device).unsqueeze(0)).expand(B, -1, -1)
        return Reduced(run(blocks, self._pool(x)), assignment)

    def _pool(self, x: Tensor) -> Tensor:
        assert self.regions is not None
        maps = x.transpose(1, 2).unflatten(2, self.grid)
        return F.adaptive_avg_pool3d(maps, self.regions).flatten(2).transpose(1, 2)


class AdaptiveSampling(Reducer):
    """Image tokens sampled by their significance: the attention they receive times the norm of their values.

    Source: Fayyaz et al. (ATS, arXiv 2111.15667). The significances of a clip are normalised to a distribution, and a
    token is sampled where the cumulative sum passes M evenly spaced levels. In the first block the sampled tokens
    attend to all image tokens. A token that is sampled several times is kept once and the repeats get weight 0, so
    that shapes are fixed.

    Differences from the paper: there is no class token, so the attention received is the mean over all queries, and
    heads are summed; a level selects the token whose share contains it, where the paper interpolates; one block
    samples, where the paper samples in many. Repeats still cost time: the paper's variable number of tokens needs
    batches of one. The significance needs the whole attention map (h N^2 numbers per clip), without fused attention.
    """

    def forward(self, x: Tensor, blocks: Blocks, past: Past = (), return_assignment: bool = False) -> Reduced:
        """Map (B, N, C) to (B, M, C), with weights 1 and 0."""
        chosen, weights = sample(significance(blocks[0], x), self.count)
        tokens = blocks[0](gather_tokens(x, chosen), context=x)
        tokens = run(blocks[1:], tokens, weights)
        assignment = as_assignment(chosen, x.shape[1]) * weights.unsqueeze(-1) if return_assignment else None
        return Reduced(tokens, assignment, weights)


def significance(block: nn.Module, x: Tensor) -> Tensor:
    """Return the share (B, N) of each token in the output of a block's attention; rows sum to 1."""
    probabilities, values = block.attention_probs(x)  # type: ignore[operator]
    scores = (probabilities.mean(dim=2) * values.float().norm(dim=-1)).sum(dim=1).detach()
    return scores / scores.sum(dim=1, keepdim=True).clamp_min(1e-12)


def sample(distribution: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the indices (B, count) of tokens at evenly spaced levels of the cumulative sum, and weights (B, count).

    Indices ascend. The weight of a repeated index is 0, other weights are 1.
    """
    cumulative = distribution.cumsum(dim=1)
    levels = (torch.arange(count, device=cumulative.device) + 0.5) / count * cumulative[:, -1:]
    chosen = (cumulative.unsqueeze(1) < levels.unsqueeze(2)).sum(dim=2)  # searchsorted, which not all exporters support
    new = F.pad(chosen[:, 1:] != chosen[:, :-1], (1, 0), value=True)
    return chosen, new.to(distribution.dtype)
