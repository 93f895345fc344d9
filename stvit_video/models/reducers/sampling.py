"""Reducers without parameters that pool image tokens or choose among them."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvit_video.models.layers import Grid
from stvit_video.models.reducers.interface import Past, Reduced, Reducer, as_assignment, run, take, top


class RandomTokens(Reducer):
    """Image tokens chosen by lot: in training others for every clip, in evaluation the same for all, always.

    The control that any choice has to beat.
    """

    kept: Tensor

    def __init__(self, grid: Grid, count: int) -> None:
        super().__init__(count)
        order = torch.randperm(math.prod(grid), generator=torch.Generator().manual_seed(0), device="cpu")
        self.register_buffer("kept", order[:count].sort().values, persistent=False)

    def forward(
        self, x: Tensor, blocks: Sequence[nn.Module], past: Past = (), return_assignment: bool = False
    ) -> Reduced:
        """Map (B, N, C) to (B, M, C)."""
        B, N, _ = x.shape
        if self.training:
            kept = top(torch.rand(B, N, device=x.device), self.count)
        else:
            kept = self.kept.expand(B, -1)
        return Reduced(run(blocks, take(x, kept)), as_assignment(kept, N) if return_assignment else None)


class RandomOfRegions(Reducer):
    """One image token of each region by lot, for backbones that need a grid; drawn when ``RandomTokens`` draws.

    Where regions do not divide an axis, some are a token longer.
    """

    starts: Tensor
    sizes: Tensor
    kept: Tensor

    def __init__(self, grid: Grid, regions: Grid) -> None:
        super().__init__(math.prod(regions))
        self.grid = grid
        cuts = [torch.arange(count + 1) * length // count for length, count in zip(grid, regions, strict=True)]
        starts, sizes = (
            torch.cartesian_prod(*axis) for axis in ([cut[:-1] for cut in cuts], [cut.diff() for cut in cuts])
        )
        self.register_buffer("starts", starts, persistent=False)  # (M, 3), in tokens
        self.register_buffer("sizes", sizes, persistent=False)
        draws = torch.rand(self.count, 3, generator=torch.Generator().manual_seed(0), device="cpu")
        self.register_buffer("kept", self._places(draws), persistent=False)

    def forward(
        self, x: Tensor, blocks: Sequence[nn.Module], past: Past = (), return_assignment: bool = False
    ) -> Reduced:
        """Map (B, N, C) to (B, M, C)."""
        B, N, _ = x.shape
        kept = self._places(torch.rand(B, self.count, 3, device=x.device)) if self.training else self.kept.expand(B, -1)
        return Reduced(run(blocks, take(x, kept)), as_assignment(kept, N) if return_assignment else None)

    def _places(self, draws: Tensor) -> Tensor:
        """Return the image token of each region at a share (..., M, 3) of its sides, (..., M)."""
        t, h, w = (self.starts + (draws * self.sizes).long()).unbind(dim=-1)
        return (t * self.grid[1] + h) * self.grid[2] + w


class MeanTokens(Reducer):
    """Means of the image tokens over regions, which overlap where they do not divide the grid (adaptive pooling)."""

    def __init__(self, grid: Grid, regions: Grid) -> None:
        super().__init__(math.prod(regions))
        self.grid, self.regions = grid, regions

    def forward(
        self, x: Tensor, blocks: Sequence[nn.Module], past: Past = (), return_assignment: bool = False
    ) -> Reduced:
        """Map (B, N, C) to (B, M, C)."""
        B, N, _ = x.shape
        assignment = None
        if return_assignment:
            assignment = self._pool(torch.eye(N, device=x.device).unsqueeze(0)).expand(B, -1, -1)
        return Reduced(run(blocks, self._pool(x)), assignment)

    def _pool(self, x: Tensor) -> Tensor:
        maps = x.transpose(1, 2).unflatten(2, self.grid)
        return F.adaptive_avg_pool3d(maps, self.regions).flatten(2).transpose(1, 2)


class AdaptiveSampling(Reducer):
    """Image tokens sampled by their significance: the attention they receive times the norm of their values.

    Source: Fayyaz et al. (ATS, arXiv 2111.15667). Significance is made a distribution, and a token is sampled where its
    cumulative sum passes M evenly spaced levels. The first block then lets the sampled tokens ask all image tokens. A
    token that is met at several levels is kept once; the places left over are dropped (weight 0), so that shapes stay.

    Ours: without a class token the attention received is the mean over all queries, and heads are added up; the level
    falls to the token in whose share it lies, where the paper interpolates between tokens; one stage in place of one in
    many blocks. Places left over are not saved: the paper's variable number of tokens needs a batch of one. The whole
    attention map (h N^2 numbers a clip) is made for the significance, without fused attention.
    """

    def forward(
        self, x: Tensor, blocks: Sequence[nn.Module], past: Past = (), return_assignment: bool = False
    ) -> Reduced:
        """Map (B, N, C) to (B, M, C), with weights 1 and 0."""
        chosen, weights = sample(significance(blocks[0], x), self.count)
        tokens = blocks[0](take(x, chosen), context=x)
        tokens = run(blocks[1:], tokens, weights)
        assignment = as_assignment(chosen, x.shape[1]) * weights.unsqueeze(-1) if return_assignment else None
        return Reduced(tokens, assignment, weights)


def significance(block: nn.Module, x: Tensor) -> Tensor:
    """Return how much each token (B, N) would give to the output of a block's attention; rows sum to 1."""
    probabilities, values = block.look(x)  # type: ignore[operator]
    scores = (probabilities.mean(dim=2) * values.float().norm(dim=-1)).sum(dim=1).detach()
    return scores / scores.sum(dim=1, keepdim=True).clamp_min(1e-12)


def sample(distribution: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the tokens (B, count) in which evenly spaced levels of the cumulative sum lie, and weights.

    The weight is 0 where a token has been returned before, else 1. Tokens are in order.
    """
    cumulative = distribution.cumsum(dim=1)
    levels = (torch.arange(count, device=cumulative.device) + 0.5) / count * cumulative[:, -1:]
    chosen = (cumulative.unsqueeze(1) < levels.unsqueeze(2)).sum(dim=2)  # as searchsorted, which not all exports know
    new = F.pad(chosen[:, 1:] != chosen[:, :-1], (1, 0), value=True)
    return chosen, new.to(distribution.dtype)
