"""Load weights: convert the layout of a checkpoint, fit it to the sizes of a model, account for every key.

A clip of equal frames then has the outputs of the image model: kernels are repeated over time and divided by their
length; embeddings, centres and position biases are repeated. In space they are resampled. If the grid of a tensor is
not known, it is not guessed: its status is "wrong shape".

Legend: (t, h, w) token grid, n = t*h*w or h*w positions, C channels.
"""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stvit_video.models.arguments import VIDEOMAE_EPS
from stvit_video.models.layers import Grid
from stvit_video.models.weights.files import DAMAGE, Checkpoint, StateDict, open_wrappers, read_checkpoint
from stvit_video.models.weights.layouts import Converted, fold_scales, misfit, recognise
from stvit_video.models.weights.report import (
    MIN_COVERAGE,
    LoadReport,
    check_config,
    check_report,
    check_values,
    shorten,
)
from stvit_video.models.weights.resize import (
    Fitted,
    add_motion,
    interleaved_sines,
    resample,
    resample_bias,
    split_positions,
    tile_centres,
)

CENTRES = "stgm.global_centres"
VIDEOMAE_GRID: Grid = (8, 14, 14)  # 16 frames of 224x224, the size of its published models


def load_pretrained(
    model: nn.Module,
    source: str | Path | Checkpoint | StateDict,
    *,
    min_coverage: float = MIN_COVERAGE,
    new_head: bool = False,
    motion: float = 0.0,
    depth: int | None = None,
    antialias: bool = True,
) -> LoadReport:
    """Load weights of a published layout into a model of this package, image or video, and report on every key.

    ``new_head`` leaves out the classifier: the model keeps its own. ``depth`` takes only weights up to that block (see
    ``layer_id``). With ``motion`` above 0, kernels inflated from an image distinguish frames from the first step (see
    ``add_motion``). ``antialias`` is how positions of another size are resampled. Raises UsageError when a file cannot
    be read, its layout is not known, it is part of a network or of another one, holds values that are not finite, or
    less than ``min_coverage`` of the weights asked for fit; the model is then as it was. A ``min_coverage`` below the
    default admits parts of a network.
    """
    checkpoint = read_checkpoint(source) if isinstance(source, str | Path) else source
    if not isinstance(checkpoint, Checkpoint):
        state, notes = open_wrappers(checkpoint, "state dict")
        checkpoint = Checkpoint("state dict", state, {}, notes=notes)
    name, tensors = checkpoint.path, checkpoint.tensors
    layout, converted = recognise(tensors, name)
    check_values({key: value for key, value in tensors.items() if key not in converted.dropped}, name)
    config = checkpoint.config if layout.name.startswith("Hugging Face") else {}
    report = LoadReport(name, layout.name, notes=[*checkpoint.notes, *converted.notes], dropped=converted.dropped)
    if checkpoint.metadata:
        report.arguments = {"name": checkpoint.metadata["name"], **checkpoint.metadata["arguments"]}
    target = model.state_dict().keys()
    wanted = {key for key in target if not (new_head and key.startswith("head."))}
    if depth is not None:
        wanted = {key for key in wanted if model.layer_id(key) <= depth}  # type: ignore[operator]
    try:
        fold_scales(converted.state, target, report.notes)
        kernel = find_kernel(converted.state)
        image = kernel is None or kernel.shape[2] == 1
        state = dict(converted.state)  # what is not used yet
        left_out = [state.pop(key) for key in target - wanted if key in state]
        _prepare_positions(state, converted, model, report, image)
        changed = separate_time(state, model, report)
        positions = changed | adapt_positions(state, model, report, image, antialias, report.arguments or config)
        fitted = _fit_all(tensors, state, model, report, wanted, image, positions)
    except DAMAGE as error:
        raise misfit(name, layout.name, error) from error
    check_values(fitted, f"{name}, in the model's precision,")
    check_report(report, model, converted.state, wanted, min_coverage, depth)
    check_config(config, model, name)
    _add_notes(report, converted, state, model)
    if left_out:
        what = "of the classifier" if depth is None else f"above depth {depth}"
        report.notes.append(f"{len(left_out)} keys {what} left out, as asked: they start anew")
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
    source: StateDict,
    state: StateDict,
    model: nn.Module,
    report: LoadReport,
    wanted: Collection[str],
    image: bool,
    positions: dict[str, str],
) -> StateDict:
    """Return the tensors that fit, and report the status of each key and the coverage; ``state`` keeps unused ones.

    ``positions`` is the status of position embeddings that were changed before.
    """
    target = model.state_dict()
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


def _prepare_positions(
    state: StateDict, converted: Converted, model: nn.Module, report: LoadReport, image: bool
) -> None:
    """Give the position embeddings of patches alone, in place; VideoMAE's, which its files leave out, are computed."""
    target: Grid | None = getattr(model, "grid", None)
    table = state.get("pos_embed")
    if target is None:
        return
    if table is None:
        if "VideoMAE" in report.layout:
            # The formula counts the positions of the network's own grid, whatever the file was trained on.
            width = state["patch_embed.proj.weight"].shape[0]
            state["pos_embed"] = interleaved_sines(math.prod(target), width)
            grid = "x".join(map(str, target))
            report.notes.append(f"positions are VideoMAE's fixed sines, computed for this model's {grid} tokens")
        return
    # Files differ in which of their tokens beside the patches have a position.
    counts = sorted({0, sum(converted.tokens), *converted.tokens[:1], sum(converted.tokens[:2])}, reverse=True)
    sizes = {table.shape[1] - count: count for count in counts}
    frame, clip = math.prod(target[1:]), math.prod(target)
    exact = [count for size, count in sizes.items() if size == (frame if image else clip)]
    square = [count for size, count in sizes.items() if image and math.isqrt(size) ** 2 == size]
    state["pos_embed"] = table[:, (exact or square or counts)[0] :]


def adapt_positions(
    state: StateDict, model: nn.Module, report: LoadReport, image: bool, antialias: bool, known: dict[str, Any]
) -> dict[str, str]:
    """Convert position embeddings to the model's grid and kind, in place; return the status of those that change.

    ``known`` are arguments of the source's network, among them its ``image_size`` if the file says it.
    """
    kind = getattr(model, "positions", None)
    given = state.get("pos_embed")
    if kind is None or given is None or given.ndim != 3:
        return {}
    target: Grid = model.grid  # type: ignore[assignment]
    grid = _position_grid(state, report, target, image, known)
    if grid is not None and grid[1:] != target[1:]:
        way = "with antialiasing, as timm does" if antialias else "without antialiasing, as Hugging Face does"
        sizes = " to ".join("x".join(map(str, each[1:])) for each in (grid, target))
        report.notes.append(f"positions resampled from {sizes}, bicubic {way} (MODEL.INIT_ANTIALIAS)")
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
            changed.update(pos_embed="interpolated", time_embed="interpolated")
            report.notes.append("positions of a clip split into space and time; positions='clip' keeps them as is")
        grid, target = (1, grid[1], grid[2]), (1, target[1], target[2])
    state["pos_embed"] = resample(given, grid, target, antialias)
    return changed


def separate_time(state: StateDict, model: nn.Module, report: LoadReport) -> dict[str, str]:
    """Convert weights of a clip's generator and early positions in time to the streaming form, in place, if need be.

    What all frames have in common stays where it was: the mean position in time goes to the positions in space, so that
    an image model keeps its outputs. All groups share one set of global centres in the streaming form: the mean of
    those that the file has. Return the status of the keys that change.
    """
    times, centres, positions = (state.get(key) for key in ("time_embed", CENTRES, "pos_embed"))
    if not getattr(model, "streaming", False) or times is None or positions is None:
        return {}
    count: int = model.token_reducer.count  # type: ignore[assignment, union-attr]
    several = times.shape[1] > 1 and centres is not None and centres.shape[1] > count
    if report.arguments.get("streaming", False) or not (report.arguments or several):
        return {}  # of the streaming form itself, or nothing says that it is not
    mean = times.mean(dim=1, keepdim=True)
    state["pos_embed"], state["time_embed"] = positions + mean, times - mean
    changed = {"time_embed": "interpolated"}
    if several and centres.shape[1] % count == 0:  # type: ignore[union-attr]
        state[CENTRES] = centres.unflatten(1, (-1, count)).mean(dim=1)  # type: ignore[union-attr]
        changed[CENTRES] = "interpolated"
    if times.shape[1] > 1:
        report.differ(
            "its positions in time are added before the base and its generator reads the whole clip; in the streaming "
            "form positions are added to the semantic tokens, and groups of frames share the mean of its global "
            "centres; to compute as it does, set MODEL.STREAMING False"
        )
    return changed


def _position_grid(
    state: StateDict, report: LoadReport, target: Grid, image: bool, known: dict[str, Any]
) -> Grid | None:
    """Return the grid of the source's positions, None if unknown."""
    count = state["pos_embed"].shape[1]
    kernel = find_kernel(state)
    if "VideoMAE" in report.layout:  # the last: learned positions, which some of its models have
        return next((grid for grid in (target, VIDEOMAE_GRID) if count == math.prod(grid)), None)
    one_frame = image or "time_embed" in state
    if kernel is not None and "image_size" in known:
        frames, size = known.get("num_frames", 1), known["image_size"]
        sides = [size, size] if isinstance(size, int) else size
        t, h, w = (length // step for length, step in zip((frames, *sides), kernel.shape[2:], strict=True))
        return (1 if one_frame else t, h, w)
    frames, rest = divmod(count, target[1] * target[2])
    side = math.isqrt(count)
    if one_frame and count != target[1] * target[2]:
        return (1, side, side) if side * side == count else None
    if one_frame and side * side == count and side != target[1] and report.layout != "stvit_video":
        report.notes.append(
            f"its {count} positions are taken for the model's {target[1]}x{target[2]} tokens; of square images they "
            f"are {side}x{side}, and then out of place"
        )
    if rest or (report.layout != "stvit_video" and not one_frame and count != math.prod(target)):
        return None  # as many positions may be fewer frames of larger images
    return (frames, target[1], target[2])


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
    if fitted is None or fitted.shape != target.shape or value.is_floating_point() != target.is_floating_point():
        return None, "wrong shape"
    return fitted.to(target.dtype), status


def _add_notes(report: LoadReport, converted: Converted, state: StateDict, model: nn.Module) -> None:
    """Add notes on what the table of keys does not show; ``state`` are the unused keys."""
    biases = [name for name in sorted(state) if name.endswith("relative_position_bias_table")]
    if biases:
        report.notes.append(f"{len(biases)} position bias tables unused: semantic tokens have no position bias")
    resampled = [name for name in report.keys["interpolated"] if name.endswith("relative_position_bias_table")]
    if resampled and report.layout != "stvit_video":
        report.differ(f"{len(resampled)} position bias tables resampled: its source has windows of another size there")
    others = [name for name in sorted(state) if name not in biases and not name.startswith("head.")]
    if others:
        shown = f"{len(others)} keys have no place in this model ({shorten(others, 3)})"
        report.differ(f"{shown}, so its outputs will differ from the source's")
    if report.keys["wrong shape"]:
        report.notes.append(f"of another shape, so they start anew: {shorten(report.keys['wrong shape'], 3)}")
    if report.layout != "stvit_video" and not {"head.proj.weight", "head.proj.bias"} & converted.state.keys():
        report.notes.append("it has no classifier: the model's own starts anew")
    for why in converted.differs:
        report.differ(why)
    known = report.arguments if report.layout == "stvit_video" else converted.needs
    needs: dict[str, Any] = {}
    for key in ("fc_norm", "positions", "base_attention", "streaming", "window_fit", "norm_eps"):
        if key in known and hasattr(model, key) and getattr(model, key) != known[key]:
            needs[key] = known[key]
    if not needs.get("streaming", True):  # ``separate_time`` has converted it
        del needs["streaming"]
    stages: Any = getattr(model, "layers", ())
    if not any(side % size for side, size in _window_sides(stages)):
        needs.pop("window_fit", None)
    if needs.keys() & {"fc_norm", "positions"} and "norm_eps" in known:  # whose default follows from these
        needs.pop("norm_eps", None)
        if known["norm_eps"] != VIDEOMAE_EPS:
            needs["norm_eps"] = known["norm_eps"]
    if needs:
        arguments = ", ".join(f"{key}={value!r}" for key, value in needs.items())
        settings = " ".join(f"MODEL.{key.upper()} {value}" for key, value in needs.items())
        report.differ(f"its network has {arguments}, this model not; to compute as it does, set {settings}")
    if "fc_norm" in needs:
        where = "after" if needs["fc_norm"] else "before"
        report.notes.append(f"its last norm comes {where} the mean over tokens")
    _compare_windows(report, stages, model)


def _window_sides(stages: Any) -> list[tuple[int, int]]:
    """Return the sides of the maps of Swin's stages, height and width, each with that of its windows."""
    return [pair for stage in stages for pair in zip(stage.grid[1:], stage.window[1:], strict=True)]


def _compare_windows(report: LoadReport, stages: Any, model: Any) -> None:
    """Note where a published Swin pads, cuts and shifts otherwise than any model here."""
    if report.layout == "Hugging Face Swin" and any(
        min(stage.grid[1:]) <= stage.window[1] < max(stage.grid[1:]) for stage in stages
    ):
        report.differ("where a window covers one side of a map, its source shifts along neither, here along the other")
    if report.layout not in ("torchvision Swin3D", "Video Swin"):
        return
    sides = _window_sides(stages)
    if any(side < size for side, size in sides):
        least = max(model.patch[1] * 2 ** (len(stages) - 1) * (size - 1) + 1 for _, size in sides)
        report.differ(
            f"on maps smaller than a window its source reads other entries of its bias tables, which no model here "
            f"does; equal outputs take images of at least {least} pixels"
        )
    frames, size = stages[0].grid[0], stages[0].window[0]
    if (frames > size and frames % size) or model.input_size[0] % model.patch[0]:
        report.differ(
            "its source pads clips with zeros that take part, here padding in time is hidden; equal outputs take "
            f"a multiple of {size * model.patch[0]} frames, or fewer than that in whole tubelets"
        )
