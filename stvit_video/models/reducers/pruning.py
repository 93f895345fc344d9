"""Reducers that learn which tokens to keep: decisions on all tokens in training, the best M in evaluation.

Legend: B clips, N image tokens, M remaining tokens, C channels, h heads.
"""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvit_video.models.reducers.interface import Blocks, Past, Reduced, Reducer, keep_tokens, run, top_indices

RATIO_WEIGHT = 2.0  # weight of the loss on the share of kept tokens, as in DynamicViT


class LearnedPruning(Reducer):
    """Keeps the tokens whose predicted relevance is highest.

    In training each token is kept or dropped at random (straight-through Gumbel-softmax). Dropped tokens stay in the
    tensor, but are not attended to and do not count in the mean; a loss pulls the share of kept tokens in each clip to
    M / N. Training therefore costs more than without reduction, also because the gradient of the decisions excludes
    fused attention on a CPU. In evaluation only the M most relevant tokens are kept.
    """

    @abstractmethod
    def score(self, x: Tensor, past: Past) -> Tensor:
        """Return the logits (B, N, 2) of keeping and of dropping each token."""

    def forward(self, x: Tensor, blocks: Blocks, past: Past = (), return_assignment: bool = False) -> Reduced:
        """Map (B, N, C) to (B, M, C); in training mode to (B, N, C) with weights 1 and 0."""
        logits, N = self.score(x, past).float(), x.shape[1]
        if not self.training:
            self._loss = None
            kept = top_indices(logits[..., 0] - logits[..., 1], self.count)
            return keep_tokens(x, kept, blocks, return_assignment)
        soft = F.gumbel_softmax(logits, dim=-1)[..., 0]
        best = soft.detach().amax(dim=1, keepdim=True)  # always kept: a clip without tokens has no mean
        hard = (soft.detach() >= best.clamp_max(0.5)).float()
        keep = hard + (soft - soft.detach())  # exactly 0 or 1, with the gradient of the probability
        self._loss = RATIO_WEIGHT * (keep.mean(dim=1) - self.count / N).square().mean()
        assignment = torch.diag_embed(keep.detach()) if return_assignment else None
        return Reduced(run(blocks, x, keep), assignment, keep)


class DynamicPruning(LearnedPruning):
    """Relevance from a token's own features and from the mean of all tokens.

    Source: Rao et al. (DynamicViT, arXiv 2106.02034). Differences from the paper: it prunes once, not three times, and
    has no distillation losses, which need a trained teacher. A dropped token does not attend to itself, which has no
    effect on the kept ones.
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__(count)
        self.embed = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.decide = decision_layers(dim)

    def score(self, x: Tensor, past: Past) -> Tensor:
        """Return the logits (B, N, 2) of keeping and of dropping each token."""
        own, shared = self.embed(x).tensor_split(2, dim=-1)
        return self.decide(torch.cat([own, shared.mean(dim=1, keepdim=True).expand_as(shared)], dim=-1))


class AttentionDynamics(LearnedPruning):
    """Relevance from a token's features, its attention statistics, and their change between two blocks.

    Source: Schlesinger et al. (SPOT, arXiv 2511.10488), which combines token embeddings, statistics of the attention
    maps per head, and their change over the layers. The exact form is our reading. The statistics of the last two
    blocks before the reducer are the mean and deviation of the attention that a token receives and the deviation of
    what it gives (whose mean is constant without a class token). With a single block before the reducer the change is
    zero. Gradients do not flow through the statistics; tokens are pruned once.
    """

    past = 2

    def __init__(self, dim: int, num_heads: int, count: int) -> None:
        super().__init__(count)
        self.embed = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        statistics = 2 * 3 * num_heads
        self.observe = nn.Sequential(nn.LayerNorm(statistics), nn.Linear(statistics, dim), nn.GELU())
        self.decide = decision_layers(2 * dim)

    def score(self, x: Tensor, past: Past) -> Tensor:
        """Return the logits (B, N, 2) of keeping and of dropping each token."""
        now, before = attention_statistics(*past[-1], x.shape), attention_statistics(*past[0], x.shape)
        dynamics = self.observe(torch.cat([now, now - before], dim=-1).to(x.dtype))
        return self.decide(torch.cat([self.embed(x), dynamics], dim=-1))


def attention_statistics(block: nn.Module, x: Tensor, shape: torch.Size) -> Tensor:
    """Return statistics (B, N, 3 h) of a block's attention for each token; 1 is the mean attention received.

    ``x`` is the block's input, ``shape`` (B, N, C) that of whole clips: x may be their frames.
    """
    shares = block.attention_probs(x)[0].detach() * x.shape[1]  # type: ignore[operator]  # (B', h, n queries, n keys)
    parts = (shares.mean(dim=2), shares.std(dim=2, correction=0), shares.std(dim=3, correction=0))  # (B', h, n) each
    return torch.cat(parts, dim=1).transpose(1, 2).reshape(shape[0], shape[1], -1)


def decision_layers(dim: int) -> nn.Sequential:
    """Return the layers that map features (..., dim) to the logits (..., 2) of keeping and dropping."""
    half, quarter = max(1, dim // 2), max(1, dim // 4)
    return nn.Sequential(nn.Linear(dim, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 2))
