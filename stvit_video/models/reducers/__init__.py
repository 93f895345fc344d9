"""Token reducers behind one interface: the semantic token generator and the methods it is compared with."""

import math

from stvit_video.models.arguments import GRID_REDUCERS, REDUCERS, Grid, STGMArguments
from stvit_video.models.reducers.interface import Past, Reduced, Reducer, key_bias, mean_token
from stvit_video.models.reducers.merging import MergedTokens
from stvit_video.models.reducers.pruning import AttentionDynamics, DynamicPruning
from stvit_video.models.reducers.sampling import AdaptiveSampling, MeanTokens, RandomOfRegions, RandomTokens
from stvit_video.models.reducers.semantic import SemanticTokenGenerator, check_regions
from stvit_video.models.reducers.semantic_windows import WindowedTokenGenerator

__all__ = ["GRID_REDUCERS", "REDUCERS", "Past", "Reduced", "Reducer", "create_reducer", "key_bias", "mean_token"]


def create_reducer(
    name: str,
    dim: int,
    num_heads: int,
    grid: Grid,
    regions: Grid,
    *,
    stgm: STGMArguments | None = None,
    window: Grid | None = None,
) -> Reducer:
    """Return a reducer that leaves as many tokens as there are regions; ``stgm`` is for that reducer only.

    ``window`` is that of a windowed backbone, which needs one token for each region, in order: a GRID_REDUCERS.
    Raises ValueError for other names and where there are more regions than tokens along an axis.
    """
    if name == "stgm":
        stgm = stgm or STGMArguments()
        if window is None:
            return SemanticTokenGenerator(dim, grid, regions, stgm)
        return WindowedTokenGenerator(dim, grid, regions, window, stgm)
    check_regions(grid, regions)
    count = math.prod(regions)
    if name == "mean":
        return MeanTokens(grid, regions)
    if name == "random":
        return RandomTokens(grid, count) if window is None else RandomOfRegions(grid, regions)
    if window is None and name in REDUCERS:
        if name == "tome":
            return MergedTokens(math.prod(grid), count)
        if name == "dynamicvit":
            return DynamicPruning(dim, count)
        if name == "ats":
            return AdaptiveSampling(count)
        return AttentionDynamics(dim, num_heads, count)
    allowed = REDUCERS if window is None else GRID_REDUCERS
    raise ValueError(f"reducer {name!r} cannot be used here; choose one of {', '.join(allowed)}.")
