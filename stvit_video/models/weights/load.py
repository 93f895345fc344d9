"""Load weights: convert the layout of a checkpoint, fit it to the sizes of a model, account for every key.

A clip of equal frames then has the outputs of the image model: kernels are repeated over time and divided by their
length; embeddings, centres and position biases are repeated. In space they are resampled. If the grid of a tensor is
not known, it is not guessed: its status is "wrong shape".

Legend: (t, h, w) token grid, n = t*h*w or h*w positions, C channels.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvit_video.common.errors import UsageError, first_line
from stvit_video.models.layers import Grid
from stvit_video.models.weights.files import DAMAGE, Checkpoint, StateDict, check_tensors, read_checkpoint
from stvit_video.models.weights.layouts import LAYOUTS, VIDEOMAE_GRID, recognise

STATUSES = ("loaded", "inflated", "interpolated", "new", "unused", "wrong shape")
Fitted = tuple[Tensor | None, str]  # the tensor, None if it cannot be fitted, and its status


@dataclass
class LoadReport:
    """The status of every key: ``keys[status]`` lists names; ``coverage`` is the share of the model's weights loaded.

    "unused" are keys of the source, under its own names if they were dropped in conversion; others are the model's.
    """

    source: str
    layout: str
    keys: dict[str, list[str]] = field(default_factory=lambda: {status: [] for status in STATUSES})
    weights: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STATUSES, 0))
    notes: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)  # those of "unused" that no model here has
    coverage: float = 0.0
    arguments: dict[str, Any] = field(default_factory=dict)  # of the source model, if its file has them

    def __str__(self) -> str:
        lines = [
            f"{self.source}: {self.layout} layout, {100 * self.coverage:.1f} % of the weights covered",
            f"  {'':12} {'keys':>5} {'weights':>12}",
        ]
        for status in STATUSES:
            names = self.keys[status]
            shown = "" if status == "loaded" else _shorten(names, 4)
            lines.append(f"  {status:12} {len(names):5} {self.weights[status]:12,}  {shown}".rstrip())
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def to_json(self) -> str:
        """Return all of it as JSON text."""
        return json.dumps(asdict(self), indent=2)

    def add(self, status: str, name: str, weights: int) -> None:
        """Add a key."""
        self.keys[status].append(name)
        self.weights[status] += weights


def load_pretrained(
    model: nn.Module,
    source: str | Path | Checkpoint | StateDict,
    *,
    min_coverage: float = 0.5,
    new_head: bool = False,
    motion: float = 0.0,
    depth: int | None = None,
) -> LoadReport:
    """Load weights of a known layout into a model of this package, image or video, and report on every key.

    Known layouts: this package's own (other frame counts, sizes and the image model included), timm's and DeiT's ViT,
    VideoMAE (fine-tuned and pre-trained), Swin as Microsoft, torchvision and timm have it, Video Swin, torchvision's
    ``swin3d`` and the released STViT-R-Swin.

    ``new_head`` leaves out the classifier: the model keeps its own. ``depth`` takes only weights up to that block (see
    ``layer_id``). With ``motion`` above 0, kernels inflated from an image distinguish frames from the first step (see
    ``add_motion``). Raises UsageError when a file cannot be read, its layout is not known, or less than
    ``min_coverage`` of the weights asked for fit; the model is then as it was.
    """
    checkpoint = read_checkpoint(source) if isinstance(source, str | Path) else source
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint("state dict", check_tensors(checkpoint, "state dict"), {})
    name, tensors = checkpoint.path, checkpoint.tensors
    if (recognised := recognise(tensors)) is None:
        raise UsageError(
            f"{name}: the layout of its {len(tensors)} keys ({', '.join(sorted(tensors)[:3])} ...) is not known; "
            f"allowed: {', '.join(layout for layout, *_ in LAYOUTS)}. Check that the file belongs to such a model."
        )
    layout, convert = recognised
    report = LoadReport(name, layout)
    if checkpoint.metadata:
        report.arguments = {"name": checkpoint.metadata["name"], **checkpoint.metadata["arguments"]}
    target = model.state_dict().keys()
    wanted = {key for key in target if not (new_head and key.startswith("head."))}
    if depth is not None:
        wanted = {key for key in wanted if model.layer_id(key) <= depth}  # type: ignore[operator]
    try:
        converted = convert(tensors)
        state, report.notes, report.dropped = converted.state, converted.notes, converted.dropped
        left_out = [state.pop(key) for key in target - wanted if key in state]
        kernel = find_kernel(state)
        image = kernel is None or kernel.shape[2] == 1
        fitted = _fit_all(tensors, state, model, report, wanted, image)
    except DAMAGE as error:
        raise UsageError(
            f"{name} looks like a {layout} checkpoint, but its tensors do not fit together ({first_line(error)}); "
            f"fetch it again."
        ) from error
    _add_notes(report, state, model, "fc_norm.weight" in tensors)
    if left_out:
        what = "of the classifier" if depth is None else f"above depth {depth}"
        report.notes.append(f"{len(left_out)} keys {what} left out, as asked: they start anew")
    _check(report, min_coverage)
    if motion > 0 and image:
        for key in [key for key in report.keys["inflated"] if fitted[key].ndim == 5]:
            fitted[key] = add_motion(fitted[key], motion)
            report.notes.append(f"{key}: random differences between frames added, {motion:g} times its own spread")
    model.load_state_dict(fitted, strict=False)
    return report


def find_kernel(state: StateDict) -> Tensor | None:
    """Return the first kernel of the embedding (C, 3, t, h, w); an image's gets a tubelet of one frame, in place."""
    names = [name for name in state if name.startswith("patch_embed.proj") and state[name].ndim in (4, 5)]
    for name in names:
        if state[name].ndim == 4:
            state[name] = state[name].unsqueeze(2)
    return state[names[0]] if names else None


def _fit_all(
    source: StateDict, state: StateDict, model: nn.Module, report: LoadReport, wanted: set[str], image: bool
) -> StateDict:
    """Return the tensors that fit, and report the status of each key and the coverage; ``state`` keeps unused ones."""
    target = model.state_dict()
    positions = adapt_positions(state, model, report, image)
    fitted = {}
    for name, value in target.items():
        status = positions.get(name, "new")
        if name in state:
            tensor, own_status = fit(name, state.pop(name), value, model, image)
            status = positions.get(name, "loaded") if own_status == "loaded" else own_status
            if tensor is not None:
                fitted[name] = tensor
        elif name.endswith("num_batches_tracked") and name in wanted:
            continue  # a counter that is not used
        report.add(status, name, value.numel())
    for name in [*sorted(state), *report.dropped]:
        tensor = state.get(name, source.get(name))
        report.add("unused", name, 0 if tensor is None else tensor.numel())
    counted = {key: value.numel() for key, value in target.items() if value.is_floating_point() and key in wanted}
    report.coverage = sum(counted.get(key, 0) for key in fitted) / max(1, sum(counted.values()))
    return fitted


def adapt_positions(state: StateDict, model: nn.Module, report: LoadReport, image: bool) -> dict[str, str]:
    """Convert position embeddings to the model's grid and kind, in place; return the status of those that change."""
    kind = getattr(model, "positions", None)
    given = state.get("pos_embed")
    if kind is None or given is None or given.ndim != 3:
        return {}
    target: Grid = model.grid  # type: ignore[assignment]
    grid = _position_grid(state, report, target, image)
    del state["pos_embed"]
    if grid is None or given.shape[1] != math.prod(grid):
        return {"pos_embed": "wrong shape"}
    changed = {"pos_embed": "loaded" if grid == target else "interpolated"}
    if grid != target and grid == (1, *target[1:]):  # those of an image of this size
        changed["pos_embed"] = "inflated" if kind == "clip" else "loaded"
    if kind == "clip":  # one position for each token of a clip; else one in a frame and one in time
        times = state.pop("time_embed", None)
        if grid[0] == 1 and times is not None:
            given = (given.unsqueeze(1) + times.unsqueeze(2)).flatten(1, 2)
            grid = (times.shape[1], grid[1], grid[2])
    else:
        if grid[0] > 1:
            given, state["time_embed"] = split_positions(given, grid)
            changed["time_embed"] = "interpolated"
            report.notes.append("positions of a clip split into space and time; positions='clip' keeps them as is")
        grid, target = (1, grid[1], grid[2]), (1, target[1], target[2])
    state["pos_embed"] = resample(given, grid, target)
    return changed


def _position_grid(state: StateDict, report: LoadReport, target: Grid, image: bool) -> Grid | None:
    """Return the grid of the source's positions, None if unknown."""
    count = state["pos_embed"].shape[1]
    kernel = find_kernel(state)
    if report.layout == "VideoMAE" and count == math.prod(VIDEOMAE_GRID):
        return VIDEOMAE_GRID
    one_frame = image or "time_embed" in state
    if kernel is not None and "num_frames" in report.arguments:
        frames, size = report.arguments["num_frames"], report.arguments["image_size"]
        sides = [size, size] if isinstance(size, int) else size
        t, h, w = (length // step for length, step in zip((frames, *sides), kernel.shape[2:], strict=True))
        return (1 if one_frame else t, h, w)
    frames, rest = divmod(count, target[1] * target[2])
    if one_frame and count != target[1] * target[2]:
        side = math.isqrt(count)
        return (1, side, side) if side * side == count else None
    return None if rest else (frames, target[1], target[2])


def split_positions(positions: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return parts in space (1, h*w, C) and time (1, t, C) whose sum is nearest to positions (1, t*h*w, C)."""
    frames = positions.reshape(grid[0], grid[1] * grid[2], -1)
    space = frames.mean(dim=0)
    return space.unsqueeze(0), (frames.mean(dim=1) - space.mean(dim=0)).unsqueeze(0)


def fit(name: str, value: Tensor, target: Tensor, model: nn.Module, image: bool) -> Fitted:
    """Return ``value`` in the shape of ``target`` and its status; None and "wrong shape" if it cannot be fitted."""
    root, _, leaf = name.rpartition(".")
    fitted: Tensor | None = value
    status = "loaded"
    if leaf == "global_centres" and value.ndim == 3:
        regions: Grid = model.get_submodule(root).regions  # type: ignore[assignment]
        fitted, status = tile_centres(value, regions, image)
    elif value.shape == target.shape:
        pass
    elif root.startswith("patch_embed.proj") and value.ndim == target.ndim == 5:
        # The response to equal frames stays the same.
        length, status = target.shape[2], "inflated"
        fitted = value.sum(dim=2, keepdim=True).expand(-1, -1, length, -1, -1) / length
    elif name == "time_embed" and value.ndim == 3:
        fitted = resample(value, (value.shape[1], 1, 1), (target.shape[1], 1, 1))
        status = "inflated" if value.shape[1] == 1 else "interpolated"
    elif leaf == "relative_position_bias_table" and value.ndim == 2:
        shape: Grid = model.get_submodule(root).table_shape  # type: ignore[assignment]
        fitted, status = resample_bias(value, shape, image)
    if fitted is None or fitted.shape != target.shape:
        return None, "wrong shape"
    return fitted.to(target.dtype), status


def _add_notes(report: LoadReport, state: StateDict, model: nn.Module, fc_norm: bool) -> None:
    """Add notes on what the table of keys does not show: on the unused keys in ``state``, and the place of the norm."""
    biases = [name for name in sorted(state) if name.endswith("relative_position_bias_table")]
    if biases and report.layout != "timm ViT":
        report.notes.append(f"{len(biases)} position bias tables unused: semantic tokens have no position bias")
    others = [name for name in sorted(state) if name not in biases and not name.startswith("head.")]
    if others:
        shown = f"{len(others)} keys have no place in this model ({_shorten(others, 3)})"
        report.notes.append(f"{shown}, so its outputs will differ from the source's")
    if report.keys["wrong shape"]:
        report.notes.append(f"of another shape, so they start anew: {_shorten(report.keys['wrong shape'], 3)}")
    known = report.arguments.get("fc_norm", None if report.layout == "stvit_video" else fc_norm)
    if known is not None and hasattr(model, "fc_norm") and known != model.fc_norm:
        where = "after" if known else "before"
        report.notes.append(f"its last norm comes {where} the mean over tokens: fc_norm={known} gives equal outputs")


def _check(report: LoadReport, min_coverage: float) -> None:
    """Raise UsageError where too little of the model is covered, or the classifier has other classes."""
    keys = report.keys
    if report.coverage < min_coverage:
        raise UsageError(
            f"{report.source} ({report.layout} layout): only {100 * report.coverage:.1f} % of the model's weights "
            f"found, {100 * min_coverage:.0f} % required (MODEL.INIT_MIN_COVERAGE). Not covered: "
            f"{_shorten(keys['new'] + keys['wrong shape'], 20)}. Unused: {_shorten(keys['unused'], 10) or 'none'}. "
            f"Check that the file belongs to this architecture."
        )
    heads = [name for name in keys["wrong shape"] if name.startswith("head.")]
    if heads:
        raise UsageError(
            f"{report.source}: its classifier ({', '.join(heads)}) has another class count than the model. "
            f"Set MODEL.NEW_HEAD True (new_head=True) to train a new one, or build the model with its class count."
        )


def _shorten(names: list[str], count: int) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def add_motion(kernel: Tensor, amount: float) -> Tensor:
    """Add noise that sums to zero over the frames of a kernel (C, 3, k, h, w): equal frames keep their response.

    An inflated kernel is equal for all its frames and cannot respond to changes between them. ``amount`` is the
    standard deviation of the noise in multiples of the kernel's. It is drawn from torch's global generator.
    """
    noise = torch.randn_like(kernel)
    return kernel + amount * kernel.std() * (noise - noise.mean(dim=2, keepdim=True))


def resample(embedding: Tensor, grid: Grid, target: Grid) -> Tensor:
    """Resize an embedding (1, t*h*w, C) to another grid: bicubic with antialiasing in space, then linear in time."""
    maps = embedding.float().reshape(*grid, -1).permute(0, 3, 1, 2)  # (t, C, h, w)
    if grid[1:] != target[1:]:
        maps = F.interpolate(maps, size=target[1:], mode="bicubic", antialias=True)
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
        # Windows are square: the largest odd square that divides the count is the reach in space, the quotient in time.
        sides = [side for side in range(1, math.isqrt(count) + 1, 2) if count % side**2 == 0 and count % 2]
        rows = columns = sides[-1] if sides else 1
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
