"""Token reducers behind one interface: the semantic token generator and the methods it is compared with."""

import math

from stvit_video.models.arguments import GRID_REDUCERS, REDUCERS, Grid, STGMArguments
from stvit_video.models.reducers import comparison
from stvit_video.models.reducers.interface import Past, Reduced, Reducer, key_bias, mean_token
from stvit_video.models.reducers.semantic import SemanticTokenGenerator, WindowedTokenGenerator, check_regions

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
    if name not in REDUCERS:
        raise ValueError(f"reducer {name!r} is unknown; choose one of {', '.join(REDUCERS)}.")
    if window is not None and name not in GRID_REDUCERS:
        raise ValueError(
            f"windows need a grid of tokens, so reducer {name!r} cannot apply; choose one of "
            f"{', '.join(GRID_REDUCERS)}, or a stvit_vit model."
        )
    if name == "stgm":
        stgm = stgm or STGMArguments()
        if window is None:
            return SemanticTokenGenerator(dim, grid, regions, stgm)
        return WindowedTokenGenerator(dim, grid, regions, window, stgm)
    check_regions(grid, regions)
    count = math.prod(regions)
    if name == "mean":
        return comparison.MeanTokens(grid, regions)
    if name == "random":
        return (comparison.RandomTokens if window is None else comparison.RandomOfRegions)(grid, regions)
    if name == "tome":
        return comparison.MergedTokens(math.prod(grid), count)
    if name == "dynamicvit":
        return comparison.DynamicPruning(dim, count)
    if name == "ats":
        return comparison.AdaptiveSampling(count)
    return comparison.AttentionDynamics(dim, num_heads, count)
