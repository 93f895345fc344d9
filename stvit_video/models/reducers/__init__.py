"""Token reducers behind one interface: the semantic token generator and the methods it is compared with."""

from collections.abc import Callable

from stvit_video.models.arguments import GRID_REDUCERS, REDUCERS, Grid, SemanticArguments
from stvit_video.models.reducers import comparison
from stvit_video.models.reducers.interface import Reducer, key_bias, mean_token
from stvit_video.models.reducers.semantic import SemanticTokenGenerator, WindowedTokenGenerator

__all__ = ["GRID_REDUCERS", "REDUCERS", "Reducer", "create_reducer", "key_bias", "mean_token"]


def create_reducer(
    settings: SemanticArguments, dim: int, num_heads: int, grid: Grid, regions: Grid, window: Grid | None = None
) -> Reducer:
    """Return the reducer that the settings name.

    ``window`` is that of a windowed backbone, which needs one token for each region, in order: a GRID_REDUCERS.
    """
    name = settings.reducer
    if window is not None and name not in GRID_REDUCERS:
        raise ValueError(
            f"windows need a grid of tokens, so reducer {name!r} cannot apply; choose one of "
            f"{', '.join(GRID_REDUCERS)}, or a stvit_vit model."
        )
    if name == "stgm":
        if window is None:
            return SemanticTokenGenerator(dim, grid, regions, settings)
        return WindowedTokenGenerator(dim, grid, regions, window, settings)
    learned = {"dynamicvit": comparison.DynamicPruning, "spot": comparison.AttentionDynamics}
    if name in learned:
        return learned[name](grid, regions, dim, num_heads)
    plain: dict[str, Callable[[Grid, Grid], Reducer]] = {
        "mean": comparison.MeanTokens,
        "random": comparison.RandomTokens if window is None else comparison.RandomOfRegions,
        "tome": comparison.MergedTokens,
        "ats": comparison.AdaptiveSampling,
    }
    return plain[name](grid, regions)
