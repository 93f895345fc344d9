"""Fit tensors to other sizes: positions, position biases and centres of other grids, kernels of other lengths.

Legend: (t, h, w) token grid, n = t*h*w or h*w positions, C channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from stvit_video.models.layers import Grid

Fitted = tuple[Tensor | None, str]  # the tensor, None if it cannot be fitted, and its status


def interleaved_sines(count: int, dim: int) -> Tensor:
    """Return VideoMAE's position table (1, count, dim): sines in even channels, cosines in odd ones."""
    rates = 10000.0 ** -(2 * (torch.arange(dim, dtype=torch.float64) // 2) / dim)
    angles = torch.arange(count, dtype=torch.float64).unsqueeze(1) * rates
    table = torch.where(torch.arange(dim) % 2 == 0, angles.sin(), angles.cos())
    return table.float().unsqueeze(0)


def split_positions(positions: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return parts in space (1, h*w, C) and time (1, t, C) whose sum is nearest to positions (1, t*h*w, C)."""
    frames = positions.reshape(grid[0], grid[1] * grid[2], -1)
    space = frames.mean(dim=0)
    return space.unsqueeze(0), (frames.mean(dim=1) - space.mean(dim=0)).unsqueeze(0)


def add_motion(kernel: Tensor, amount: float) -> Tensor:
    """Add noise that sums to zero over the frames of a kernel (C, 3, k, h, w): equal frames keep their response.

    An inflated kernel is equal for all its frames and cannot respond to changes between them. ``amount`` is the
    standard deviation of the noise in multiples of the kernel's. It is drawn from torch's global generator.
    """
    noise = torch.randn_like(kernel)
    return kernel + amount * kernel.std() * (noise - noise.mean(dim=2, keepdim=True))


def resample(embedding: Tensor, grid: Grid, target: Grid, antialias: bool = True) -> Tensor:
    """Resize an embedding (1, t*h*w, C) to another grid: bicubic in space, then linear in time."""
    maps = embedding.float().reshape(*grid, -1).permute(0, 3, 1, 2)  # (t, C, h, w)
    if grid[1:] != target[1:]:
        maps = F.interpolate(maps, size=target[1:], mode="bicubic", antialias=antialias)
    places = maps.flatten(2).permute(2, 1, 0)  # (h*w, C, t)
    places = F.interpolate(places, size=target[0], mode="linear", align_corners=True)  # a single frame is repeated
    return places.permute(2, 0, 1).reshape(1, math.prod(target), -1)


def resample_bias(table: Tensor, shape: Grid, image: bool) -> Fitted:
    """Fit a relative position bias table (t*h*w, heads) to another reach (t, h, w), all odd; return it and its status.

    In space tables are interpolated (bicubic): windows of another size cover the same field. In time an offset keeps
    its meaning: longer tables repeat their ends (an image's single entry everywhere), shorter ones drop them.
    """
    count, heads = table.shape
    frames, rest = divmod(count, shape[1] * shape[2])
    rows, columns = shape[1], shape[2]
    if image or rest or frames % 2 == 0:
        # Windows are square: the largest odd square that divides the count is the reach in space, the quotient in time,
        # which in a clip is more than 1.
        sides = [side for side in range(1, math.isqrt(count) + 1, 2) if count % side**2 == 0 and count % 2]
        longer = [side for side in sides if side > 1 and side**2 < count and not image]
        rows = columns = (longer or sides or [1])[-1]
        frames = count // rows**2
        if rows == 1 or (image and frames > 1):
            return None, "wrong shape"
    maps = table.reshape(frames, rows, columns, heads)
    if (rows, columns) != shape[1:]:
        maps = F.interpolate(maps.float().permute(0, 3, 1, 2), size=shape[1:], mode="bicubic").permute(0, 2, 3, 1)
    offsets = torch.arange(shape[0]) - shape[0] // 2 + frames // 2
    inflated = frames == 1 and (rows, columns) == shape[1:]
    return maps[offsets.clamp(0, frames - 1)].reshape(-1, heads), "inflated" if inflated else "interpolated"


def tile_centres(centres: Tensor, regions: Grid, image: bool) -> Fitted:
    """Fit global centres (1, n, C) to other regions: an image's are repeated over time, a clip's resampled in time."""
    _, h, w = regions
    count, side = centres.shape[1], math.isqrt(centres.shape[1])
    grid = (1, side, side) if image and count != h * w else (count // (h * w), h, w)
    if math.prod(grid) != count:
        return None, "wrong shape"
    status = "inflated" if image and grid[1:] == (h, w) else "interpolated"
    return resample(centres, grid, regions), "loaded" if grid == regions else status
