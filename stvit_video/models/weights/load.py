"""Load weights: convert the layout of a checkpoint, fit it to the sizes of a model, account for every key.

For each source, the loaded video model maps a clip of equal frames to the output of the image model: kernels are
repeated over time and divided by their length; embeddings and position biases are repeated.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from stvit_video.common.errors import UsageError, first_line
from stvit_video.models.layers import Grid
from stvit_video.models.weights.files import DAMAGE, Checkpoint, StateDict, check_tensors, read_checkpoint
from stvit_video.models.weights.layouts import LAYOUTS, Converted, recognise
from stvit_video.models.weights.resize import adapt_positions, add_motion, fit, is_image_state

STATUSES = ("loaded", "inflated", "interpolated", "new", "unused", "wrong shape")


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
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            shown = "" if status == "loaded" else shown
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
    ``add_motion``). Raises UsageError when a file cannot be read, its layout is not known, or less
    than ``min_coverage`` of the weights asked for fit; the model is then as it was.
    """
    checkpoint = read_checkpoint(source) if isinstance(source, str | Path) else source
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint("state dict", check_tensors(checkpoint, "state dict"), {})
    name, state = checkpoint.path, dict(checkpoint.tensors)
    recognised = recognise(state)
    if recognised is None:
        raise UsageError(
            f"{name}: the layout of its {len(state)} keys ({', '.join(sorted(state)[:3])} ...) is not known; allowed: "
            f"{', '.join(layout for layout, _, _ in LAYOUTS)}. Check that the file belongs to such a model."
        )
    layout, convert = recognised
    report = LoadReport(name, layout)
    if checkpoint.metadata:
        report.arguments = {"name": checkpoint.metadata["name"], **checkpoint.metadata["arguments"]}
    try:
        converted = convert(state)
        from_image = is_image_state(converted.state)
        fitted = _fit_all(state, converted, model, report, new_head, depth)
    except DAMAGE as error:
        reason = first_line(error)
        raise UsageError(
            f"{name} looks like a {layout} checkpoint, but its tensors do not fit together ({reason}); fetch it again."
        ) from error
    _check(report, model, fitted, min_coverage, new_head, depth)
    if motion > 0 and from_image:
        for key in [key for key in report.keys["inflated"] if fitted[key].ndim == 5]:
            fitted[key] = add_motion(fitted[key], motion)
            report.notes.append(f"{key}: random differences between frames added, {motion:g} times its own spread")
    model.load_state_dict(fitted, strict=False)
    return report


def _input_size(arguments: dict[str, Any]) -> Grid | None:
    """Return (T, H, W) of the source model, None if its file does not say."""
    frames, size = arguments.get("num_frames"), arguments.get("image_size")
    sides = [size, size] if isinstance(size, int) else size
    if not isinstance(frames, int) or not isinstance(sides, list) or len(sides) != 2:
        return None
    return (frames, sides[0], sides[1])


def _fit_all(
    source: StateDict, converted: Converted, model: nn.Module, report: LoadReport, new_head: bool, depth: int | None
) -> StateDict:
    """Return the tensors that fit the model, and report the status of each key."""
    adapt_positions(converted, model, _input_size(report.arguments))
    report.notes, report.dropped = converted.notes, converted.dropped
    state, target, fitted = converted.state, model.state_dict(), {}
    image = is_image_state(state)
    for name, value in target.items():
        tensor, status = None, "new"
        if not _wanted(name, model, new_head, depth):
            converted.left_out += [name] if state.pop(name, None) is not None else []
        elif name in state:
            tensor, status = fit(name, state.pop(name), value, model, image)
            status = converted.changed.get(name, status) if status == "loaded" else status
        elif name in converted.unplaced:
            status = "wrong shape"
        elif name.endswith("num_batches_tracked"):
            continue  # a counter that is not used
        report.add(status, name, value.numel())
        if tensor is not None:
            fitted[name] = tensor
    for name in sorted(state):
        report.add("unused", name, state[name].numel())
    for name in report.dropped:
        report.add("unused", name, source[name].numel() if name in source else 0)
    _add_notes(report, converted, model, sorted(state), depth)
    return fitted


def _wanted(name: str, model: nn.Module, new_head: bool, depth: int | None) -> bool:
    """Return whether a parameter is requested from the source."""
    if new_head and name.startswith("head."):
        return False
    return depth is None or model.layer_id(name) <= depth  # type: ignore[operator]


def _add_notes(
    report: LoadReport, converted: Converted, model: nn.Module, unused: list[str], depth: int | None
) -> None:
    """Add notes on what the table of keys alone does not show."""
    biases = [name for name in unused if name.endswith("relative_position_bias_table")]
    if biases and report.layout != "timm ViT":
        report.notes.append(f"{len(biases)} position bias tables unused: semantic tokens have no position bias")
    others = [name for name in unused if name not in biases and not name.startswith("head.")]
    if others:
        report.notes.append(
            f"{len(others)} keys have no place in this model, so its outputs will differ from the source's: "
            f"{', '.join(others[:3])}{' ...' if len(others) > 3 else ''}"
        )
    if converted.left_out:
        what = "of the classifier" if depth is None else f"above depth {depth}"
        report.notes.append(f"{len(converted.left_out)} keys {what} left out, as asked: they start anew")
    if report.keys["wrong shape"]:
        report.notes.append(f"of another shape, so they start anew: {', '.join(report.keys['wrong shape'][:3])}")
    known = report.arguments.get("fc_norm", converted.fc_norm)
    if known is not None and hasattr(model, "fc_norm") and known != model.fc_norm:
        where = "after" if known else "before"
        report.notes.append(
            f"its last norm comes {where} the mean over tokens, unlike the model's: build it with fc_norm={known} for "
            f"equal outputs"
        )


def _check(
    report: LoadReport, model: nn.Module, fitted: StateDict, min_coverage: float, new_head: bool, depth: int | None
) -> None:
    counted = {
        name: value.numel()
        for name, value in model.state_dict().items()
        if value.is_floating_point() and _wanted(name, model, new_head, depth)
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
