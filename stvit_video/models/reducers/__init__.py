"""Ways to go on with fewer tokens, behind one interface: the semantic tokens' neighbours, to be compared with them."""

import math

from stvit_video.models.layers import Grid
from stvit_video.models.reducers.interface import Reduced, Reducer, key_bias, mean_token
from stvit_video.models.reducers.merging import MergedTokens
from stvit_video.models.reducers.pruning import AttentionDynamics, DynamicPruning
from stvit_video.models.reducers.sampling import AdaptiveSampling, MeanTokens, RandomOfRegions, RandomTokens

__all__ = [
    "GRID_REDUCERS",
    "REDUCERS",
    "Reduced",
    "Reducer",
    "create_grid_reducer",
    "create_reducer",
    "key_bias",
    "mean_token",
]

REDUCERS = ("stgm", "random", "mean", "tome", "dynamicvit", "ats", "spot")
GRID_REDUCERS = REDUCERS[:3]  # those that can leave a token for each region, as windows need it


def create_reducer(name: str, dim: int, num_heads: int, grid: Grid, regions: Grid) -> Reducer:
    """Return a reducer of REDUCERS other than stgm that leaves as many tokens as there are regions.

    Raises ValueError where there are more regions than tokens along an axis.
    """
    _check_regions(grid, regions)
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


def create_grid_reducer(name: str, grid: Grid, regions: Grid) -> Reducer:
    """Return a reducer of GRID_REDUCERS other than stgm that leaves one token for each region, in order.

    Raises ValueError where there are more regions than tokens along an axis.
    """
    _check_regions(grid, regions)
    if name == "random":
        return RandomOfRegions(grid, regions)
    if name == "mean":
        return MeanTokens(grid, regions)
    raise ValueError(f"reducer {name!r} leaves no grid of tokens; choose one of {', '.join(GRID_REDUCERS)}.")


def _check_regions(grid: Grid, regions: Grid) -> None:
    for length, count, axis in zip(grid, regions, ("time", "height", "width"), strict=True):
        if not 1 <= count <= length:
            raise ValueError(f"{count} regions over {length} tokens of {axis}; allowed: 1 to {length}.")
