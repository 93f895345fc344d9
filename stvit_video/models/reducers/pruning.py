"""Reducers that learn which tokens to keep: soft decisions on all tokens in training, the best M in evaluation."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvit_video.models.reducers.interface import Past, Reduced, Reducer, as_assignment, run, take, top

RATIO_WEIGHT = 2.0  # of the loss that pulls the share of kept tokens to its target, as in DynamicViT


class LearnedPruning(Reducer):
    """Keeps the tokens whose predicted relevance is highest.

    In training every token is kept or dropped by lot (Gumbel-softmax), the decision's gradient being that of its
    probability. Nothing is removed then: dropped tokens are not attended to and count nothing in the mean, and a loss
    pulls the share of kept tokens in each clip to M / N. So training costs more than without reduction: the decisions'
    gradient also forbids fused attention on a CPU. In evaluation the M most relevant tokens are taken and no others.
    """

    @abstractmethod
    def score(self, x: Tensor, past: Past) -> Tensor:
        """Return the logits (B, N, 2) of keeping and of dropping each token."""

    def forward(
        self, x: Tensor, blocks: Sequence[nn.Module], past: Past = (), return_assignment: bool = False
    ) -> Reduced:
        """Map (B, N, C) to (B, M, C); in training mode to (B, N, C) with weights 1 and 0."""
        logits, N = self.score(x, past).float(), x.shape[1]
        if not self.training:
            self._loss = None
            kept = top(logits[..., 0] - logits[..., 1], self.count)
            return Reduced(run(blocks, take(x, kept)), as_assignment(kept, N) if return_assignment else None)
        soft = F.gumbel_softmax(logits, dim=-1)[..., 0]
        best = soft.detach().amax(dim=1, keepdim=True)  # is kept always: a clip without tokens has no mean
        hard = (soft.detach() >= best.clamp_max(0.5)).float()
        keep = hard + (soft - soft.detach())  # exactly 0 or 1, with a gradient
        self._loss = RATIO_WEIGHT * (keep.mean(dim=1) - self.count / N).square().mean()
        assignment = torch.diag_embed(keep.detach()) if return_assignment else None
        return Reduced(run(blocks, x, keep), assignment, keep)


class DynamicPruning(LearnedPruning):
    """Relevance from a token's own features and from the mean of all.

    Source: Rao et al. (DynamicViT, arXiv 2106.02034). Ours: one stage of pruning where the paper has three, and
    neither of its two distillation losses, which need a trained teacher. A dropped token does not attend to itself,
    which nothing that is kept can notice.
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__(count)
        self.embed = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.decide = decision(dim)

    def score(self, x: Tensor, past: Past) -> Tensor:
        """Return the logits (B, N, 2) of keeping and of dropping each token."""
        own, shared = self.embed(x).tensor_split(2, dim=-1)
        return self.decide(torch.cat([own, shared.mean(dim=1, keepdim=True).expand_as(shared)], dim=-1))


class AttentionDynamics(LearnedPruning):
    """Relevance from a token's features, the attention it takes part in, and how that changes between two blocks.

    Source: Schlesinger et al. (SPOT, arXiv 2511.10488), which joins token embeddings, compact statistics of the
    attention maps by head, and their course over the layers. Its exact form is our reading. The statistics, taken in
    the last two blocks before the reducer, are the mean and the spread of the attention that a token receives and the
    spread of what it gives (the mean of that is constant without a class token). With one block before the reducer
    there is no change to see and it is zero. Gradients do not flow through the statistics, and there is one stage.
    """

    past = 2

    def __init__(self, dim: int, num_heads: int, count: int) -> None:
        super().__init__(count)
        self.embed = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        statistics = 2 * 3 * num_heads
        self.observe = nn.Sequential(nn.LayerNorm(statistics), nn.Linear(statistics, dim), nn.GELU())
        self.decide = decision(2 * dim)

    def score(self, x: Tensor, past: Past) -> Tensor:
        """Return the logits (B, N, 2) of keeping and of dropping each token."""
        now, before = attention_statistics(*past[-1], x.shape), attention_statistics(*past[0], x.shape)
        seen = self.observe(torch.cat([now, now - before], dim=-1).to(x.dtype))
        return self.decide(torch.cat([self.embed(x), seen], dim=-1))


def attention_statistics(block: nn.Module, x: Tensor, shape: torch.Size) -> Tensor:
    """Return what a block's attention says of each token: (B, N, 3 h), 1 in the mean being an even share.

    ``x`` is what the block was given, ``shape`` (B, N, C) that of the whole clips, of which x may be the frames.
    """
    shares = block.look(x)[0].detach() * x.shape[1]  # type: ignore[operator]  # (B', h, n queries, n keys)
    parts = (shares.mean(dim=2), shares.std(dim=2, correction=0), shares.std(dim=3, correction=0))  # (B', h, n) each
    return torch.cat(parts, dim=1).transpose(1, 2).reshape(shape[0], shape[1], -1)


def decision(dim: int) -> nn.Sequential:
    """Return the layers that map features (..., dim) to the logits (..., 2) of keeping and dropping."""
    half, quarter = max(1, dim // 2), max(1, dim // 4)
    return nn.Sequential(nn.Linear(dim, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 2))
