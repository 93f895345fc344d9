"""The reducers that the semantic token generator is compared with: selection, pooling, merging, learned pruning.

Legend: B clips, N image tokens, M remaining tokens, C channels, h heads; n tokens at some step, d channels of a key.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvit_video.models.arguments import Grid
from stvit_video.models.precision import at_least_single
from stvit_video.models.reducers.interface import Blocks, Past, Reduced, Reducer, adaptive_pool, key_bias, run

RATIO_WEIGHT = 2.0  # weight of the loss on the share of kept tokens, as in DynamicViT


def gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """Return the tokens (B, M, C) at ``indices`` (B, M) of x (B, N, C); ``take_along_dim`` would export one B alone."""
    return x.gather(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def keep_tokens(x: Tensor, indices: Tensor, blocks: Blocks, return_assignment: bool) -> Reduced:
    """Return the tokens of x (B, N, C) at ``indices`` (B, M) after ``blocks``: no others take part."""
    assignment = F.one_hot(indices, x.shape[1]).float() if return_assignment else None
    return Reduced(run(blocks, gather_tokens(x, indices)), assignment)


def top_indices(scores: Tensor, count: int) -> Tensor:
    """Return the indices (B, count) of the highest scores (B, N), in ascending order."""
    return scores.topk(count, dim=1).indices.sort(dim=1).values


class RandomTokens(Reducer):
    """Image tokens at random, the control: another choice for each clip in training, a fixed one in evaluation."""

    kept: Tensor  # (M,), the choice in evaluation

    def __init__(self, grid: Grid, regions: Grid) -> None:
        super().__init__(grid, regions)
        order = torch.randperm(math.prod(grid), generator=torch.Generator().manual_seed(0), device="cpu")
        self.register_buffer("kept", order[: self.count].sort().values, persistent=False)

    def forward(self, x: Tensor, blocks: Blocks, past: Past = (), return_assignment: bool = False) -> Reduced:
        kept = self.draw(x) if self.training else self.kept.expand(x.shape[0], -1)
        return keep_tokens(x, kept, blocks, return_assignment)

    def draw(self, x: Tensor) -> Tensor:
        """Return a random choice for each clip of x (B, N, C): indices (B, M)."""
        return top_indices(torch.rand(x.shape[:2], device=x.device), self.count)


class RandomOfRegions(RandomTokens):
    """One random image token of each region, for backbones that need a grid."""

    on_grid = True
    starts: Tensor
    sizes: Tensor

    def __init__(self, grid: Grid, regions: Grid) -> None:
        super().__init__(grid, regions)
        # Where regions do not divide an axis, some are one token longer.
        cuts = [torch.arange(count + 1) * length // count for length, count in zip(grid, regions, strict=True)]
        self.register_buffer("starts", torch.cartesian_prod(*(cut[:-1] for cut in cuts)), persistent=False)  # (M, 3)
        self.register_buffer("sizes", torch.cartesian_prod(*(cut.diff() for cut in cuts)), persistent=False)
        drawn = torch.rand(self.count, 3, generator=torch.Generator().manual_seed(0), device="cpu")
        self.kept = self._indices(drawn.to(self.starts.device))

    def draw(self, x: Tensor) -> Tensor:
        return self._indices(torch.rand(x.shape[0], self.count, 3, device=x.device))

    def _indices(self, fractions: Tensor) -> Tensor:
        """Return the indices (..., M) of the tokens at fractions (..., M, 3) of each region's sides."""
        t, h, w = (self.starts + (fractions * self.sizes).long()).unbind(dim=-1)
        return (t * self.grid[1] + h) * self.grid[2] + w


class MeanTokens(Reducer):
    """Means of the image tokens over regions, which overlap where they do not divide the grid (adaptive pooling)."""

    on_grid = True
    regions: Grid

    def forward(self, x: Tensor, blocks: Blocks, past: Past = (), return_assignment: bool = False) -> Reduced:
        B, N, _ = x.shape
        assignment = None
        if return_assignment:
            tokens = torch.eye(N, device=x.device).unsqueeze(0)
            assignment = adaptive_pool(tokens, self.grid, self.regions).expand(B, -1, -1)
        return Reduced(run(blocks, adaptive_pool(x, self.grid, self.regions)), assignment)


class AdaptiveSampling(Reducer):
    """Image tokens sampled by their significance: the attention they receive times the norm of their values.

    Source: Fayyaz et al. (ATS, arXiv 2111.15667). A token is sampled where the cumulative sum of the significances
    passes M evenly spaced levels. In the first block the sampled tokens attend to all image tokens. Tokens that are
    sampled again get weight 0, so that shapes are fixed.

    Differences from the paper: without a class token, the attention received is the mean over all queries, and heads
    are summed; a level selects the token whose share contains it, where the paper interpolates; one block samples,
    not many. Repeats still cost time, and the significance needs the whole attention map (h N^2 numbers per clip).
    """

    def forward(self, x: Tensor, blocks: Blocks, past: Past = (), return_assignment: bool = False) -> Reduced:
        """Map (B, N, C) to (B, M, C), with weights 1 and 0."""
        chosen, weights = sample(significance(blocks[0], x), self.count)
        tokens = blocks[0](gather_tokens(x, chosen), context=x)
        tokens = run(blocks[1:], tokens, weights)
        assignment = F.one_hot(chosen, x.shape[1]) * weights.unsqueeze(-1) if return_assignment else None
        return Reduced(tokens, assignment, weights)


def significance(block: nn.Module, x: Tensor) -> Tensor:
    """Return the share (B, N) of each token in the output of a block's attention; rows sum to 1."""
    probabilities, values = block.attention_probs(x)  # type: ignore[operator]
    scores = (probabilities.mean(dim=2) * at_least_single(values).norm(dim=-1)).sum(dim=1).detach()
    return scores / scores.sum(dim=1, keepdim=True).clamp_min(1e-12)


def sample(distribution: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ascending indices (B, count) at evenly spaced levels of the cumulative sum, and their weights.

    The weight (B, count) of a repeated index is 0, other weights are 1.
    """
    cumulative = distribution.cumsum(dim=1)
    levels = (torch.arange(count, device=cumulative.device) + 0.5) / count * cumulative[:, -1:]
    chosen = (cumulative.unsqueeze(1) < levels.unsqueeze(2)).sum(dim=2)  # searchsorted, which not all exporters support
    new = F.pad(chosen[:, 1:] != chosen[:, :-1], (1, 0), value=True)
    return chosen, new.to(distribution.dtype)


class MergedTokens(Reducer):
    """Bipartite soft matching with proportional attention.

    Source: Bolya et al. (ToMe, arXiv 2210.09461). Tokens are split alternately into two sets; each token of the first
    is paired with the token of the second whose key (mean over heads) is most similar. The most similar pairs are
    averaged, weighted by the number of image tokens that each stands for, whose logarithm is added to the logits.

    Differences from the paper: the tokens go in the reducer's blocks alone, the same number in each. One matching
    removes at most half of them, so a block may match the merged keys again. Tokens keep their order.
    """

    def forward(self, x: Tensor, blocks: Blocks, past: Past = (), return_assignment: bool = False) -> Reduced:
        """Map (B, N, C) to (B, M, C); weights are the numbers of image tokens that were merged."""
        B = x.shape[0]
        N = math.prod(self.grid)  # a constant, so exported graphs have no data-dependent loop
        sizes = at_least_single(x.new_ones(B, N))
        owner = torch.arange(N, device=x.device).expand(B, -1)  # the remaining token that each image token went into
        left = N
        for i, block in enumerate(blocks, start=1):
            target = N - (N - self.count) * i // len(blocks)
            x, keys = block.attend(x, key_bias=None if i == 1 else key_bias(sizes))  # type: ignore[operator]
            while left > target:
                remove = min(left - target, left // 2)
                groups, left = match(keys, remove), left - remove
                (x, keys), sizes = merge((x, keys), sizes, groups, left)
                owner = groups.gather(1, owner)
            x = block.mlp_residual(x)  # type: ignore[operator]
        assignment = None
        if return_assignment:
            assignment = F.one_hot(owner, self.count).transpose(1, 2) / sizes.unsqueeze(-1)
        return Reduced(x, assignment, sizes)


def match(keys: Tensor, remove: int) -> Tensor:
    """Return the group (B, n) of each token, from 0 to n - remove - 1, for keys (B, n, d).

    ``remove`` is at most half of n. A group has at most one token of the second set.
    """
    keys = F.normalize(at_least_single(keys), dim=-1)
    similarity, partner = (keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)).max(dim=2)
    leaving = similarity.topk(remove, dim=1).indices  # (B, remove), indices in the first set
    indices = 2 * leaving
    stays = torch.ones(keys.shape[:2], dtype=torch.long, device=keys.device).scatter(1, indices, 0)
    groups = stays.cumsum(dim=1) - 1
    return groups.scatter(1, indices, groups.gather(1, 2 * partner.gather(1, leaving) + 1))


def merge(tensors: Sequence[Tensor], sizes: Tensor, groups: Tensor, count: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the means (B, count, d) of each (B, n, d) over groups, weighted by sizes (B, n), and the groups' sizes."""
    total = sizes.new_zeros(sizes.shape[0], count).scatter_add(1, groups, sizes)
    shares = (sizes / total.gather(1, groups)).unsqueeze(-1)
    merged = []
    for x in tensors:
        parts = x * shares
        empty = parts.new_zeros(x.shape[0], count, x.shape[2])
        merged.append(empty.scatter_add(1, groups.unsqueeze(-1).expand_as(x), parts).to(x.dtype))
    return tuple(merged), total


def features(inputs: int, outputs: int) -> nn.Sequential:
    """Return layers that map (..., inputs) to (..., outputs)."""
    return nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, outputs), nn.GELU())


class LearnedPruning(Reducer):
    """Keeps the tokens whose predicted relevance is highest.

    In training each token is kept or dropped at random (straight-through Gumbel-softmax). Dropped tokens stay in the
    tensor, but are not attended to and do not count in the mean; a loss pulls the share of kept tokens in each clip to
    M / N. Training therefore costs more than without reduction. In evaluation only the M most relevant are kept.
    """

    def __init__(self, grid: Grid, regions: Grid, dim: int, num_heads: int) -> None:
        super().__init__(grid, regions)
        self.embed = features(dim, dim)
        width = dim
        if self.past:  # three statistics of the attention of each head, and their change
            self.observe = features(6 * num_heads, dim)
            width = 2 * dim
        half = max(1, width // 2)
        quarter = max(1, width // 4)
        layers = (nn.Linear(width, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 2))
        self.decide = nn.Sequential(*layers)

    @abstractmethod
    def score(self, x: Tensor, past: Past) -> Tensor:
        """Return the logits (B, N, 2) of keeping and of dropping each token."""

    def forward(self, x: Tensor, blocks: Blocks, past: Past = (), return_assignment: bool = False) -> Reduced:
        """Map (B, N, C) to (B, M, C); in training mode to (B, N, C) with weights 1 and 0."""
        logits, N = at_least_single(self.score(x, past)), x.shape[1]
        if not self.training:
            self._loss = None
            kept = top_indices(logits[..., 0] - logits[..., 1], self.count)
            return keep_tokens(x, kept, blocks, return_assignment)
        soft = F.gumbel_softmax(logits, dim=-1)[..., 0]
        best = soft.detach().amax(dim=1, keepdim=True)  # always kept: a clip without tokens has no mean
        hard = (soft.detach() >= best.clamp_max(0.5)).to(soft.dtype)
        keep = hard + (soft - soft.detach())  # exactly 0 or 1, with the gradient of the probability
        self._loss = RATIO_WEIGHT * (keep.mean(dim=1) - self.count / N).square().mean()
        assignment = torch.diag_embed(keep.detach()) if return_assignment else None
        return Reduced(run(blocks, x, keep), assignment, keep)


class DynamicPruning(LearnedPruning):
    """Relevance from a token's own features and from the mean of all tokens.

    Source: Rao et al. (DynamicViT, arXiv 2106.02034). Differences from the paper: it prunes once, not three times, and
    has no distillation losses, which need a trained teacher.
    """

    def score(self, x: Tensor, past: Past) -> Tensor:
        own, shared = self.embed(x).tensor_split(2, dim=-1)
        return self.decide(torch.cat([own, shared.mean(dim=1, keepdim=True).expand_as(shared)], dim=-1))


class AttentionDynamics(LearnedPruning):
    """Relevance from a token's features, its attention statistics, and their change between two blocks.

    Source: Schlesinger et al. (SPOT, arXiv 2511.10488); the exact form is our reading. The statistics of the last two
    blocks before the reducer are, for each head, the mean and deviation of the attention that a token receives and the
    deviation of what it gives. With a single block before the reducer the change is zero. Gradients do not flow
    through the statistics; tokens are pruned once.
    """

    past = 2

    def score(self, x: Tensor, past: Past) -> Tensor:
        now, before = attention_statistics(*past[-1], x.shape), attention_statistics(*past[0], x.shape)
        dynamics = self.observe(torch.cat([now, now - before], dim=-1).to(x.dtype))
        return self.decide(torch.cat([self.embed(x), dynamics], dim=-1))


def attention_statistics(block: nn.Module, x: Tensor, shape: torch.Size) -> Tensor:
    """Return statistics (B, N, 3 h) of a block's attention to its input x, clips of ``shape`` (B, N, C) or frames."""
    shares = block.attention_probs(x)[0].detach() * x.shape[1]  # type: ignore[operator]  # (B', h, n queries, n keys)
    parts = (shares.mean(dim=2), shares.std(dim=2, correction=0), shares.std(dim=3, correction=0))  # (B', h, n) each
    return torch.cat(parts, dim=1).transpose(1, 2).reshape(shape[0], shape[1], -1)
