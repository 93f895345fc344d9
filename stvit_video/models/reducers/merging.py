"""Token merging: pairs of tokens with like keys become one, between the attention and the MLP of a block."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvit_video.models.reducers.interface import Past, Reduced, Reducer, key_bias


class MergedTokens(Reducer):
    """Bipartite soft matching with proportional attention.

    Source: Bolya et al. (ToMe, arXiv 2210.09461). Tokens are dealt out to two sets in turn; each of the first finds the
    one of the second whose key (mean over heads) is most like its own, and the most alike pairs become their mean,
    weighted by the number of image tokens behind each. That number's logarithm is added to the attention's logits.

    Ours: the paper takes a few tokens away in every block of the network, here equal numbers go in each of the
    reducer's blocks. One matching removes at most half of the tokens; where a block has to remove more, it matches
    again, on the merged keys. Tokens keep their order.
    """

    def __init__(self, total: int, count: int) -> None:
        super().__init__(count)
        self.total = total  # image tokens: a number, so that graphs recorded of this have no loop to guess

    def forward(
        self, x: Tensor, blocks: Sequence[nn.Module], past: Past = (), return_assignment: bool = False
    ) -> Reduced:
        """Map (B, N, C) to (B, M, C), with the number of image tokens behind each as weights."""
        B, N = x.shape[0], self.total
        sizes = torch.ones(B, N, device=x.device)
        owner = torch.arange(N, device=x.device).expand(B, -1)  # of each image token
        left = N
        for i, block in enumerate(blocks, start=1):
            target = N - (N - self.count) * i // len(blocks)
            x, keys = block.attend(x, key_bias=None if i == 1 else key_bias(sizes))  # type: ignore[operator]
            while left > target:
                remove = min(left - target, left // 2)
                groups, left = match(keys, remove), left - remove
                (x, keys), sizes = merge((x, keys), sizes, groups, left)
                owner = groups.gather(1, owner)
            x = block.transform(x)  # type: ignore[operator]
        assignment = None
        if return_assignment:
            assignment = F.one_hot(owner, self.count).transpose(1, 2) / sizes.unsqueeze(-1)
        return Reduced(x, assignment, sizes)


def match(keys: Tensor, remove: int) -> Tensor:
    """Return the group (B, n) that each of n tokens goes to, from 0 to n - remove - 1; keys are (B, n, d).

    ``remove`` is at most half of n: every group is one token of the second set with any number of the first, or one
    token of the first alone.
    """
    keys = F.normalize(keys.float(), dim=-1)
    likeness, partner = (keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)).max(dim=2)
    leaving = likeness.topk(remove, dim=1).indices  # (B, remove), numbers in the first set
    places = 2 * leaving
    stays = torch.ones(keys.shape[:2], dtype=torch.long, device=keys.device).scatter(1, places, 0)
    groups = stays.cumsum(dim=1) - 1
    return groups.scatter(1, places, groups.gather(1, 2 * partner.gather(1, leaving) + 1))


def merge(tensors: Sequence[Tensor], sizes: Tensor, groups: Tensor, count: int) -> tuple[list[Tensor], Tensor]:
    """Return the means (B, count, d) of tensors (B, n, d) over groups, weighted by sizes (B, n), and their sizes."""
    total = sizes.new_zeros(sizes.shape[0], count).scatter_add(1, groups, sizes)
    shares = (sizes / total.gather(1, groups)).unsqueeze(-1)
    means = []
    for x in tensors:
        empty = shares.new_zeros(x.shape[0], count, x.shape[2])
        means.append(empty.scatter_add(1, groups.unsqueeze(-1).expand_as(x), x * shares).to(x.dtype))
    return means, total
