"""Token grids, and the windows they are cut into.

Legend: B clips, (T, H, W) grid, (t, h, w) window, P = t*h*w positions of a window, C channels.
"""

import math

from torch import Tensor

from stvit_video.models.arguments import Grid


def count_windows(grid: Grid, window: Grid) -> Grid:
    """Return how many windows along each axis cover a grid."""
    return (math.ceil(grid[0] / window[0]), math.ceil(grid[1] / window[1]), math.ceil(grid[2] / window[2]))


def window_view(x: Tensor, window: Grid) -> Tensor:
    """View (B, T, H, W, C), a multiple of the window, as (B, T/t, H/h, W/w, t, h, w, C)."""
    t, h, w = window
    return x.unflatten(3, (-1, w)).unflatten(2, (-1, h)).unflatten(1, (-1, t)).permute(0, 1, 3, 5, 2, 4, 6, 7)


def window_partition(x: Tensor, window: Grid) -> Tensor:
    """Cut (B, T, H, W, C), a multiple of the window, into (B, T/t, H/h, W/w, P, C)."""
    return window_view(x, window).flatten(4, 6)


def window_reverse(windows: Tensor, window: Grid) -> Tensor:
    """Undo ``window_partition``: (B, T/t, H/h, W/w, P, C) to (B, T, H, W, C)."""
    B, nt, nh, nw, _, C = windows.shape
    t, h, w = window
    x = windows.reshape(B, nt, nh, nw, t, h, w, C).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(B, nt * t, nh * h, nw * w, C)
