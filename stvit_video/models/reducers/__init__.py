"""Ways to go on with fewer tokens, behind one interface: the semantic tokens' neighbours, to be compared with them."""

import math

from stvit_video.models.layers import Grid
from stvit_video.models.reducers.interface import Reduced, Reducer, key_bias, mean_token
from stvit_video.models.reducers.merging import MergedTokens
from stvit_video.models.reducers.pruning import AttentionDynamics, DynamicPruning
from stvit_video.models.reducers.sampling import AdaptiveSampling, MeanTokens, RandomTokens

__all__ = ["REDUCERS", "Reduced", "Reducer", "create_reducer", "key_bias", "mean_token"]

REDUCERS = ("stgm", "random", "mean", "tome", "dynamicvit", "ats", "spot")


def create_reducer(name: str, dim: int, num_heads: int, grid: Grid, regions: Grid) -> Reducer:
    """Return a reducer of REDUCERS other than stgm that leaves as many tokens as there are regions.

    Raises ValueError where there are more regions than tokens along an axis.
    """
    for length, count, axis in zip(grid, regions, ("time", "height", "width"), strict=True):
        if not 1 <= count <= length:
            raise ValueError(f"{count} regions over {length} tokens of {axis}; allowed: 1 to {length}.")
    count = math.prod(regions)
    if name == "random":
        return RandomTokens(grid, count)
    if name == "mean":
        return MeanTokens(grid, regions)
    if name == "tome":
        return MergedTokens(math.prod(grid), count)
    if name == "dynamicvit":
        return DynamicPruning(dim, count)
    if name == "ats":
        return AdaptiveSampling(count)
    if name == "spot":
        return AttentionDynamics(dim, num_heads, count)
    raise ValueError(f"reducer {name!r} is none of {', '.join(REDUCERS[1:])}; choose one of them.")
