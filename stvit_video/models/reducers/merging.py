"""Token merging: pairs of tokens with similar keys become one, between the attention and the MLP of a block.

Legend: B clips, N image tokens, M remaining tokens, C channels; n tokens at some step, d channels of a key.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stvit_video.models.reducers.interface import Blocks, Past, Reduced, Reducer, key_bias


class MergedTokens(Reducer):
    """Bipartite soft matching with proportional attention.

    Source: Bolya et al. (ToMe, arXiv 2210.09461). Tokens are split alternately into two sets; each token of the first
    is paired with the token of the second whose key (mean over heads) is most similar. The most similar pairs are
    averaged, weighted by the number of image tokens that each stands for. The logarithm of that number is added to the
    attention logits.

    Differences from the paper: it removes a few tokens in every block of the network, here each of the reducer's
    blocks removes the same number. One matching removes at most half of the tokens; a block that has to remove more
    matches the merged keys again. Tokens keep their order.
    """

    def __init__(self, total: int, count: int) -> None:
        super().__init__(count)
        self.total = total  # image tokens: a constant, so that exported graphs have no data-dependent loop

    def forward(self, x: Tensor, blocks: Blocks, past: Past = (), return_assignment: bool = False) -> Reduced:
        """Map (B, N, C) to (B, M, C); weights are the numbers of image tokens that were merged."""
        B, N = x.shape[0], self.total
        sizes = torch.ones(B, N, device=x.device)
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

    ``remove`` is at most half of n. A group is one token of the second set with any number of the first, or a single
    token of the first.
    """
    keys = F.normalize(keys.float(), dim=-1)
    similarity, partner = (keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)).max(dim=2)
    leaving = similarity.topk(remove, dim=1).indices  # (B, remove), indices in the first set
    indices = 2 * leaving
    stays = torch.ones(keys.shape[:2], dtype=torch.long, device=keys.device).scatter(1, indices, 0)
    groups = stays.cumsum(dim=1) - 1
    return groups.scatter(1, indices, groups.gather(1, 2 * partner.gather(1, leaving) + 1))


def merge(tensors: Sequence[Tensor], sizes: Tensor, groups: Tensor, count: int) -> tuple[list[Tensor], Tensor]:
    """Return the means (B, count, d) of tensors (B, n, d) over groups, weighted by sizes (B, n), and their sizes."""
    total = sizes.new_zeros(sizes.shape[0], count).scatter_add(1, groups, sizes)
    shares = (sizes / total.gather(1, groups)).unsqueeze(-1)
    means = []
    for x in tensors:
        empty = shares.new_zeros(x.shape[0], count, x.shape[2])
        means.append(empty.scatter_add(1, groups.unsqueeze(-1).expand_as(x), x * shares).to(x.dtype))
    return means, total
