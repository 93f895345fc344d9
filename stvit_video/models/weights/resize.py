"""Fit the tensors of a checkpoint to the sizes of a model, so that a clip of equal frames equals its image.

Kernels are repeated over time and divided by their length; embeddings, centres and position biases are repeated. In
space they are resampled. If the grid of a tensor is not known, it is not guessed: its status is "wrong shape".

Legend: (t, h, w) token grid, n = t*h*w or h*w positions, C channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvit_video.models.layers import Grid
from stvit_video.models.weights.layouts import Converted

Fitted = tuple[Tensor | None, str]  # the tensor, None if it cannot be fitted, and its status


def find_kernel(state: dict[str, Tensor]) -> Tensor | None:
    """Return the first kernel of the embedding (C, 3, t, h, w), which distinguishes image from video models."""
    names = ("patch_embed.proj.weight", "patch_embed.proj.0.c.weight")
    kernels = [state[name] for name in names if name in state and state[name].ndim == 5]
    return kernels[0] if kernels else None


def is_image_state(state: dict[str, Tensor]) -> bool:
    """Return whether a converted state dict is that of an image model."""
    kernel = find_kernel(state)
    return kernel is None or kernel.shape[2] == 1


def adapt_positions(converted: Converted, model: nn.Module, input_size: Grid | None) -> None:
    """Convert position embeddings to the model's grid and kind (separate for a frame and time, or for a clip).

    ``input_size`` is (T, H, W) of the source, None if unknown.
    """
    kind, state = getattr(model, "positions", None), converted.state
    if kind is None or "pos_embed" not in state or state["pos_embed"].ndim != 3:
        return
    target: Grid = model.grid  # type: ignore[assignment]
    grid = _position_grid(converted, input_size, target)
    given = state.pop("pos_embed")
    if grid is None or given.shape[1] != math.prod(grid):
        converted.unplaced.append("pos_embed")
        return
    if kind == "clip":
        state["pos_embed"] = clip_positions(given, state.pop("time_embed", None), grid, target)
        status = "inflated" if grid[0] == 1 and grid[1:] == target[1:] else "interpolated"
    else:
        status = "interpolated"
        if grid[0] > 1:
            given, state["time_embed"] = split_positions(given, grid)
            converted.changed["time_embed"] = status
            converted.notes.append("positions of a clip split into space and time; positions='clip' keeps them as is")
        state["pos_embed"] = resample_space(given, grid[1:], target[1:])
    if grid != target and not (kind == "frame" and grid[1:] == target[1:] and grid[0] == 1):
        converted.changed["pos_embed"] = status


def _position_grid(converted: Converted, input_size: Grid | None, target: Grid) -> Grid | None:
    """Return the grid of the source's positions, None if unknown."""
    count = converted.state["pos_embed"].shape[1]
    kernel = find_kernel(converted.state)
    if converted.position_grid is not None:
        return converted.position_grid
    one_frame = "time_embed" in converted.state or is_image_state(converted.state)
    if input_size is not None and kernel is not None:
        frames, rows, columns = (size // step for size, step in zip(input_size, kernel.shape[2:], strict=True))
        return (1 if one_frame else frames, rows, columns)
    side = math.isqrt(count)
    if one_frame and count == target[1] * target[2]:
        return (1, target[1], target[2])
    if one_frame:
        return (1, side, side) if side * side == count else None
    frames, rest = divmod(count, target[1] * target[2])
    return None if rest else (frames, target[1], target[2])


def split_positions(positions: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return parts in space (1, h*w, C) and time (1, t, C) whose sum is nearest to positions (1, t*h*w, C)."""
    frames = positions.reshape(grid[0], grid[1] * grid[2], -1)
    space = frames.mean(dim=0)
    return space.unsqueeze(0), (frames.mean(dim=1) - space.mean(dim=0)).unsqueeze(0)


def clip_positions(positions: Tensor, times: Tensor | None, grid: Grid, target: Grid) -> Tensor:
    """Return positions (1, t*h*w, C) for the target grid, from those of another grid or of a frame."""
    if grid[0] == 1 and times is not None:
        positions = (positions.unsqueeze(1) + times.unsqueeze(2)).flatten(1, 2)
        grid = (times.shape[1], grid[1], grid[2])
    if grid == target:
        return positions
    frames = [resample_space(frame, grid[1:], target[1:]) for frame in positions.chunk(grid[0], dim=1)]
    return (
        resample_time(torch.cat(frames).transpose(0, 1), target[0]).transpose(0, 1).reshape(1, -1, frames[0].shape[2])
    )


def fit(name: str, value: Tensor, target: Tensor, model: nn.Module, image: bool) -> Fitted:
    """Return ``value`` in the shape of ``target`` and its status; None and "wrong shape" if it cannot be fitted.

    ``image``: the source is an image model.
    """
    root, _, leaf = name.rpartition(".")
    fitted: Tensor | None = value
    status = "loaded"
    if leaf == "global_centres" and value.ndim == 3:
        regions = model.get_submodule(root).regions
        fitted, status = tile_centres(value, regions, image)  # type: ignore[arg-type]
    elif value.shape != target.shape:
        if root.startswith("patch_embed.proj") and value.ndim == target.ndim == 5:
            fitted, status = inflate_kernel(value, target.shape[2]), "inflated"
        elif name == "time_embed" and value.ndim == 3:
            fitted = resample_time(value, target.shape[1])
            status = "inflated" if value.shape[1] == 1 else "interpolated"
        elif leaf == "relative_position_bias_table" and value.ndim == 2:
            fitted, status = resample_bias(value, model.get_submodule(root).table_shape, image)  # type: ignore[arg-type]
    if fitted is None or fitted.shape != target.shape:
        return None, "wrong shape"
    return fitted.to(target.dtype), status


def inflate_kernel(kernel: Tensor, length: int) -> Tensor:
    """Change the length in time of a kernel (C, 3, k, h, w) so that the response to equal frames is unchanged."""
    if kernel.shape[2] == length:
        return kernel
    return kernel.sum(dim=2, keepdim=True).expand(-1, -1, length, -1, -1) / length


def add_motion(kernel: Tensor, amount: float) -> Tensor:
    """Add noise that sums to zero over the frames of a kernel (C, 3, k, h, w): equal frames keep their response.

    An inflated kernel is equal for all its frames and cannot respond to changes between them. ``amount`` is the
    standard deviation of the noise in multiples of the kernel's. It is drawn from torch's global generator.
    """
    noise = torch.randn_like(kernel)
    return kernel + amount * kernel.std() * (noise - noise.mean(dim=2, keepdim=True))


def resample_time(embedding: Tensor, length: int) -> Tensor:
    """Interpolate an embedding (n, t, C) linearly to another number of frames."""
    if embedding.shape[1] == 1:
        return embedding.expand(-1, length, -1)
    if embedding.shape[1] == length:
        return embedding
    stretched = F.interpolate(embedding.float().transpose(1, 2), size=length, mode="linear", align_corners=True)
    return stretched.transpose(1, 2)


def resample_space(embedding: Tensor, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Resize an embedding (1, h*w, C) to another grid, bicubic with antialiasing."""
    if grid == target:
        return embedding
    maps = embedding.float().reshape(1, *grid, -1).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=target, mode="bicubic", antialias=True, align_corners=False)
    return maps.flatten(2).transpose(1, 2)


def resample_bias(table: Tensor, shape: Grid, image: bool) -> Fitted:
    """Fit a relative position bias table (t*h*w, heads) to another reach (t, h, w), all odd; return it and its status.

    In space tables are interpolated (bicubic): windows of another size cover the same field. In time an offset keeps
    its meaning: longer tables repeat their ends (an image's single entry everywhere), shorter ones drop them.
    """
    count, heads = table.shape
    frames, rest = divmod(count, shape[1] * shape[2])
    rows, columns = shape[1], shape[2]
    if image or rest or frames % 2 == 0:
        # Windows are square: the largest odd square that divides the count is the reach in space, the quotient in time.
        sides = [side for side in range(1, math.isqrt(count) + 1, 2) if count % side**2 == 0 and count % 2]
        rows = columns = sides[-1] if sides else 1
        frames = count // rows**2
        if rows == 1 or (image and frames > 1):
            return None, "wrong shape"
    maps = table.reshape(frames, rows, columns, heads)
    if (rows, columns) != shape[1:]:
        planes = maps.float().permute(0, 3, 1, 2)
        maps = F.interpolate(planes, size=shape[1:], mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    offsets = torch.arange(shape[0]) - shape[0] // 2 + frames // 2
    inflated = frames == 1 and (rows, columns) == shape[1:]
    return maps[offsets.clamp(0, frames - 1)].reshape(-1, heads), "inflated" if inflated else "interpolated"


def tile_centres(centres: Tensor, regions: Grid, image: bool) -> Fitted:
    """Fit global centres (1, n, C) to other regions: an image's are repeated over time, a clip's resampled in time."""
    t, h, w = regions
    count, side = centres.shape[1], math.isqrt(centres.shape[1])
    status = "loaded" if count == t * h * w else "inflated" if image else "interpolated"
    if image and count != h * w:
        if side**2 != count:
            return None, "wrong shape"
        centres, status, count = resample_space(centres, (side, side), (h, w)), "interpolated", h * w
    frames, rest = divmod(count, h * w)
    if rest:
        return None, "wrong shape"
    per_position = centres.reshape(frames, h * w, -1).transpose(0, 1)  # (h*w, t, C)
    return resample_time(per_position, t).transpose(0, 1).reshape(1, t * h * w, -1), status
