"""Weights from elsewhere: convert a checkpoint's layout, fit it to a model's sizes, account for every key.

Whatever the source, a clip of equal frames through the loaded video model gives what the image model gives: kernels are
repeated over time and divided by their length; embeddings and position biases are repeated.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvit_video.errors import UsageError
from stvit_video.models.checkpoints import StateDict, read_metadata, read_state_dict
from stvit_video.models.layers import Grid
from stvit_video.models.layouts import LAYOUTS, Converted, recognise

STATUSES = ("loaded", "inflated", "interpolated", "new", "unused", "wrong shape")


@dataclass
class LoadReport:
    """What became of every key: ``keys[status]`` lists names; ``coverage`` is the share of the weights loaded.

    "unused" are keys of the source, in its own names where they were dropped in conversion; the others are the model's.
    """

    source: str
    layout: str
    keys: dict[str, list[str]] = field(default_factory=lambda: {status: [] for status in STATUSES})
    weights: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STATUSES, 0))
    notes: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)  # the part of "unused" that has no place in any model here
    coverage: float = 0.0
    arguments: dict[str, Any] = field(default_factory=dict)  # the source model's, where its file says

    def __str__(self) -> str:
        lines = [
            f"{self.source}: {self.layout} layout, {100 * self.coverage:.1f} % of the weights covered",
            f"  {'':12} {'keys':>5} {'weights':>12}",
        ]
        for status in STATUSES:
            names = self.keys[status]
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            shown = "" if status == "loaded" else shown
            lines.append(f"  {status:12} {len(names):5} {self.weights[status]:12,}  {shown}".rstrip())
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def to_json(self) -> str:
        """Return all of it as JSON text."""
        return json.dumps(asdict(self), indent=2)

    def add(self, status: str, name: str, weights: int) -> None:
        """Account for a key."""
        self.keys[status].append(name)
        self.weights[status] += weights


def load_pretrained(
    model: nn.Module, source: str | Path | StateDict, *, min_coverage: float = 0.5, new_head: bool = False
) -> LoadReport:
    """Load weights of a known layout into a model of this package, image or video, and report on every key.

    Known layouts: this package's own (other frame counts, sizes and the image model included), timm's and DeiT's ViT,
    VideoMAE (fine-tuned and pre-trained), Swin as Microsoft, torchvision and timm have it, Video Swin, torchvision's
    ``swin3d`` and the released STViT-R-Swin. ``new_head`` keeps the model's own classifier where the class
    counts differ. Raises UsageError when a file cannot be read, its layout is not known, or less than
    ``min_coverage`` of the weights fit; the model is then as it was.
    """
    state = read_state_dict(source) if isinstance(source, str | Path) else dict(source)
    name = str(source) if isinstance(source, str | Path) else "state dict"
    recognised = recognise(state)
    if recognised is None:
        raise UsageError(
            f"{name}: the layout of its {len(state)} keys ({', '.join(sorted(state)[:3])} ...) is not known; allowed: "
            f"{', '.join(layout for layout, _, _ in LAYOUTS)}. Check that the file belongs to such a model."
        )
    converted = recognised[1](state)
    report = LoadReport(name, recognised[0], notes=converted.notes, dropped=converted.dropped)
    if isinstance(source, str | Path):
        metadata = read_metadata(source)
        report.arguments = {"name": metadata["name"], **metadata["arguments"]} if metadata else {}
    adapt_to_kind(converted, model)
    fitted = _fit_all(state, converted, model, report, new_head)
    _check(report, model, fitted, min_coverage, new_head)
    model.load_state_dict(fitted, strict=False)
    return report


def _fit_all(
    source: StateDict, converted: Converted, model: nn.Module, report: LoadReport, new_head: bool
) -> StateDict:
    """Return the tensors that fit the model; the report says what became of each key."""
    state, target, fitted = converted.state, model.state_dict(), {}
    for name, value in target.items():
        if name not in state:
            if name.endswith("num_batches_tracked"):
                continue  # a counter that no computation here reads
            report.add("new", name, value.numel())
            continue
        tensor, status = fit(name, state[name], value, model)
        if status == "loaded":
            status = converted.changed.get(name, status)
        if tensor is None and name.startswith("head.") and new_head:
            status = "new"
        report.add(status, name, value.numel())
        if tensor is not None:
            fitted[name] = tensor
    for name in sorted(set(state) - set(target)):
        report.add("unused", name, state[name].numel())
    for name in report.dropped:
        report.add("unused", name, source[name].numel() if name in source else 0)
    biases = [name for name in report.keys["unused"] if name.endswith("relative_position_bias_table")]
    if biases:
        report.notes.append(f"{len(biases)} position bias tables unused: semantic tokens have no position bias")
    return fitted


def _check(report: LoadReport, model: nn.Module, fitted: StateDict, min_coverage: float, new_head: bool) -> None:
    counted = {
        name: value.numel()
        for name, value in model.state_dict().items()
        if value.is_floating_point() and not (new_head and name.startswith("head."))
    }
    report.coverage = sum(counted.get(name, 0) for name in fitted) / max(1, sum(counted.values()))
    heads = [name for name in report.keys["wrong shape"] if name.startswith("head.")]
    if report.coverage < min_coverage:
        missing = report.keys["new"] + report.keys["wrong shape"]
        raise UsageError(
            f"{report.source} ({report.layout} layout): only {100 * report.coverage:.1f} % of the model's weights "
            f"found, {100 * min_coverage:.0f} % required (MODEL.INIT_MIN_COVERAGE). Not covered: "
            f"{', '.join(missing[:20])}{' ...' if len(missing) > 20 else ''}. "
            f"Unused: {', '.join(report.keys['unused'][:10]) or 'none'}. "
            f"Check that the file belongs to this architecture."
        )
    if heads:
        raise UsageError(
            f"{report.source}: its classifier ({', '.join(heads)}) has another class count than the model. "
            f"Set MODEL.NEW_HEAD True (new_head=True) to train a new one, or build the model with its class count."
        )


def adapt_to_kind(converted: Converted, model: nn.Module) -> None:
    """Bring position embeddings to the model's kind (per frame and time, or per clip), in place, with notes."""
    kind, state = getattr(model, "positions", None), converted.state
    if kind is None or "pos_embed" not in state:
        return
    grid = converted.position_grid
    if grid is None:
        grid = _position_grid(state["pos_embed"].shape[1], model.grid)  # type: ignore[arg-type]
    if kind == "clip":
        given, times = state["pos_embed"], state.pop("time_embed", None)
        state["pos_embed"] = clip_positions(given, times, grid, model.grid)  # type: ignore[arg-type]
        if state["pos_embed"] is not given:
            converted.changed["pos_embed"] = "inflated" if given.shape[1] == grid[1] * grid[2] else "interpolated"
    elif grid[0] > 1:
        state["pos_embed"], state["time_embed"] = split_positions(state["pos_embed"], grid)
        converted.changed = dict.fromkeys(("pos_embed", "time_embed"), "interpolated")
        converted.notes.append("positions of a clip split into space and time; positions='clip' keeps them as they are")
    if converted.fc_norm is not None and converted.fc_norm != model.fc_norm:
        where = "after" if converted.fc_norm else "before"
        converted.notes.append(
            f"its last norm comes {where} the mean over tokens, unlike the model's: build it with "
            f"fc_norm={converted.fc_norm} for equal outputs"
        )


def _position_grid(count: int, grid: Grid) -> Grid:
    """Return the grid of ``count`` positions: the model's own, a frame of it, a square frame, or frames of its size."""
    if count in (math.prod(grid), grid[1] * grid[2]):
        return grid if count == math.prod(grid) else (1, grid[1], grid[2])
    side = math.isqrt(count)
    if count != side * side and count % (grid[1] * grid[2]) == 0:
        return (count // (grid[1] * grid[2]), grid[1], grid[2])
    return (1, side, side)


def split_positions(positions: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the sum of a part in space (1, h*w, C) and one in time (1, t, C) that is nearest to (1, t*h*w, C)."""
    places = positions.reshape(grid[0], grid[1] * grid[2], -1)
    space = places.mean(dim=0)
    return space.unsqueeze(0), (places.mean(dim=1) - space.mean(dim=0)).unsqueeze(0)


def clip_positions(positions: Tensor, times: Tensor | None, grid: Grid, target: Grid) -> Tensor:
    """Return positions (1, t*h*w, C) for every place of the target grid, from those of another grid or of a frame."""
    if grid[0] == 1 and times is not None:
        positions = (positions.unsqueeze(1) + times.unsqueeze(2)).flatten(1, 2)
        grid = (times.shape[1], grid[1], grid[2])
    if grid == target or positions.shape[1] != math.prod(grid):
        return positions
    frames = torch.cat([resample_space(frame, target[1:]) for frame in positions.chunk(grid[0], dim=1)])  # (t, h*w, C)
    frames = resample_time(frames.transpose(0, 1), target[0]).transpose(0, 1)
    return frames.reshape(1, math.prod(target), -1)


def fit(name: str, value: Tensor, target: Tensor, model: nn.Module) -> tuple[Tensor | None, str]:
    """Return ``value`` in the shape of ``target``, and how it got there; None and "wrong shape" where it cannot."""
    fitted, status = value, "loaded"
    if value.shape != target.shape:
        root, _, leaf = name.rpartition(".")
        module = model.get_submodule(root) if leaf in ("relative_position_bias_table", "global_centres") else model
        if root.startswith("patch_embed.proj"):
            fitted, status = inflate_kernel(value, target.shape[2] if target.ndim == 5 else 1), "inflated"
        elif name == "time_embed":
            fitted = resample_time(value, target.shape[1])
            status = "inflated" if value.shape[1] == 1 else "interpolated"
        elif name == "pos_embed":
            fitted, status = resample_space(value, model.grid[1:]), "interpolated"  # type: ignore[index, arg-type]
        elif leaf == "global_centres":
            fitted, status = tile_centres(value, module.pooling.regions)  # type: ignore[union-attr, arg-type]
        elif leaf == "relative_position_bias_table":
            fitted, status = resample_bias(value, module.table_shape)  # type: ignore[arg-type]
    if fitted.shape != target.shape:
        return None, "wrong shape"
    return fitted.to(target.dtype), status


def inflate_kernel(kernel: Tensor, length: int) -> Tensor:
    """Give a kernel (C, 3, k, h, w) another length in time so that equal frames keep their response."""
    if kernel.ndim != 5 or kernel.shape[2] == length:
        return kernel
    return kernel.sum(dim=2, keepdim=True).expand(-1, -1, length, -1, -1) / length


def resample_time(embedding: Tensor, length: int) -> Tensor:
    """Stretch an embedding (n, t, C) to another number of frames, linearly."""
    if embedding.shape[1] == 1:
        return embedding.expand(-1, length, -1)
    stretched = F.interpolate(embedding.float().transpose(1, 2), size=length, mode="linear", align_corners=True)
    return stretched.transpose(1, 2)


def resample_space(embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a square position embedding (1, h*w, C) to another grid, bicubic with antialiasing."""
    side = math.isqrt(embedding.shape[1])
    if side**2 != embedding.shape[1]:
        return embedding
    maps = embedding.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return maps.flatten(2).transpose(1, 2)


def resample_bias(table: Tensor, shape: Grid) -> tuple[Tensor, str]:
    """Give a relative position bias table (t*h*w, heads) another reach (t, h, w), all odd; say how it was done.

    In space tables are stretched (bicubic), as windows of another size look at the same field. In time an offset keeps
    its meaning: longer tables repeat their ends (an image's single entry: everywhere), shorter ones drop them.
    """
    count, heads = table.shape
    frames, rest = divmod(count, shape[1] * shape[2])
    side = math.isqrt(count)
    if not rest and frames % 2:
        maps = table.reshape(frames, shape[1], shape[2], heads)
    elif side * side == count:
        square = table.float().reshape(1, side, side, heads).permute(0, 3, 1, 2)
        maps = F.interpolate(square, size=shape[1:], mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
        frames = 1
    else:
        return table, "wrong shape"
    places = torch.arange(shape[0]) - shape[0] // 2 + frames // 2
    maps = maps[places.clamp(0, frames - 1)]
    inflated = frames == 1 and not rest
    return maps.reshape(-1, heads), "inflated" if inflated else "interpolated"


def tile_centres(centres: Tensor, regions: Grid) -> tuple[Tensor, str]:
    """Give global centres (1, t*h*w, C) another number of frames: repeated from an image, else resampled in time."""
    t, h, w = regions
    frames, rest = divmod(centres.shape[1], h * w)
    if rest:
        return centres, "wrong shape"
    per_place = centres.reshape(frames, h * w, -1).transpose(0, 1)  # (h*w, t, C)
    return resample_time(per_place, t).transpose(0, 1).reshape(1, t * h * w, -1), (
        "inflated" if frames == 1 else "interpolated"
    )
