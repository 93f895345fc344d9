"""Weights from elsewhere: read a file safely, convert its layout, fit it to a model, account for every key.

Conversions are pure functions from state dict to state dict. Whatever the source, a clip of equal frames through the
loaded video model gives what the image model gives: kernels are repeated over time and divided by their length,
embeddings repeated.
"""

import json
import pickle
import re
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from stvit_video.errors import UsageError

StateDict = dict[str, Tensor]

# What torch.load raises on a file that is not whole, by where it was damaged.
DAMAGE = (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError)
STATUSES = ("loaded", "inflated", "interpolated", "new", "unused", "wrong shape")


@dataclass
class LoadReport:
    """What became of every key: ``keys[status]`` lists names; ``coverage`` is the share of the weights loaded."""

    source: str
    layout: str
    keys: dict[str, list[str]] = field(default_factory=lambda: {status: [] for status in STATUSES})
    notes: list[str] = field(default_factory=list)
    coverage: float = 0.0
    arguments: dict[str, Any] = field(default_factory=dict)  # the source model's, where its file says

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.layout} layout, {100 * self.coverage:.1f} % of the weights covered"]
        for status in STATUSES:
            names = self.keys[status]
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            lines.append(f"  {status:12} {len(names):5}  {shown if status != 'loaded' else ''}".rstrip())
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def load_pretrained(
    model: nn.Module, source: str | Path | StateDict, *, min_coverage: float = 0.5, new_head: bool = False
) -> LoadReport:
    """Load weights of a known layout into a model of this package, image or video, and report on every key.

    Known layouts: this package's own (other frame counts, sizes and the image model included) and timm's ViT and DeiT
    (a class token is dropped, with a note). ``new_head`` keeps the model's own classifier where the class counts
    differ. Raises UsageError when a file cannot be read or less than ``min_coverage`` of the weights fit.
    """
    state = read_state_dict(source) if isinstance(source, str | Path) else dict(source)
    report = LoadReport(str(source) if isinstance(source, str | Path) else "state dict", "stvit_video")
    if isinstance(source, str | Path):
        report.arguments = read_arguments(Path(source))
    if "head.weight" in state or "cls_token" in state:
        report.layout = "timm ViT"
        state = from_timm_vit(state, report.notes)
    target = model.state_dict()
    fitted: StateDict = {}
    for name, value in target.items():
        if name not in state:
            report.keys["new"].append(name)
            continue
        tensor, status = fit(name, state[name], value, model)
        if tensor is None and name.startswith("head.") and new_head:
            status = "new"
        report.keys[status].append(name)
        if tensor is not None:
            fitted[name] = tensor
    report.keys["unused"] = sorted(set(state) - set(target))
    _check(report, target, fitted, min_coverage, new_head)
    model.load_state_dict(fitted, strict=False)
    return report


def _check(report: LoadReport, target: StateDict, fitted: StateDict, min_coverage: float, new_head: bool) -> None:
    counted = {name: value.numel() for name, value in target.items() if not (new_head and name.startswith("head."))}
    report.coverage = sum(counted.get(name, 0) for name in fitted) / max(1, sum(counted.values()))
    heads = [name for name in report.keys["wrong shape"] if name.startswith("head.")]
    if heads:
        raise UsageError(
            f"{report.source}: its classifier ({', '.join(heads)}) has another class count than the model. "
            f"Set MODEL.NEW_HEAD True (new_head=True) to train a new one, or build the model with its class count."
        )
    if report.coverage < min_coverage:
        missing = report.keys["new"] + report.keys["wrong shape"]
        raise UsageError(
            f"{report.source}: only {100 * report.coverage:.1f} % of the model's weights found, "
            f"{100 * min_coverage:.0f} % required (MODEL.INIT_MIN_COVERAGE). Not covered: {', '.join(missing[:20])}"
            f"{' ...' if len(missing) > 20 else ''}. Unused: {', '.join(report.keys['unused'][:10]) or 'none'}. "
            f"Check that the file belongs to this architecture."
        )


def read_state_dict(path: str | Path) -> StateDict:
    """Read the tensors of a ``.safetensors`` or ``torch.save`` file without running code from it.

    Wrappers (``model``, ``state_dict``, ``module``) are opened and a ``module.`` prefix is stripped. Raises UsageError
    on a missing or unreadable file, or one that would have to run code to load.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"Checkpoint {path} is not a file; give the path of a .safetensors or .pth file.")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for wrapper in ("model", "state_dict", "module"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    tensors = {}
    if isinstance(content, dict | OrderedDict):
        tensors = {str(k).removeprefix("module."): v for k, v in content.items() if isinstance(v, Tensor)}
    if not tensors:
        raise UsageError(f"Checkpoint {path} holds no tensors by name; give a file with a model's state dict.")
    return tensors


def read_arguments(path: Path) -> dict[str, Any]:
    """Return name and arguments of the model that this package saved as ``.safetensors``; nothing for other files."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if not {"name", "arguments"} <= metadata.keys():
        return {}
    return {"name": metadata["name"], **json.loads(metadata["arguments"])}


def _read_safetensors(path: Path) -> StateDict:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise UsageError(f"Checkpoint {path} is not a complete safetensors file ({error}); fetch it again.") from error


def _read_torch(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL \S+", str(error))
        if refused:
            raise UsageError(
                f"Checkpoint {path} needs code to load, which is refused ({refused[0]}); "
                f"save its state dict alone and give that file."
            ) from error
        raise UsageError(f"Checkpoint {path} is not a torch file; fetch it again.") from error
    except DAMAGE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"Checkpoint {path} is damaged or cut short ({reason}); fetch it again.") from error


def from_timm_vit(state: StateDict, notes: list[str]) -> StateDict:
    """Convert a timm or DeiT ViT to our names: class token and its position dropped, 2-D kernel made a tubelet of 1."""
    state = dict(state)
    prefix_tokens = sum(state.pop(name, None) is not None for name in ("cls_token", "dist_token", "reg_token"))
    if prefix_tokens:
        notes.append(f"{prefix_tokens} class or distillation token(s) dropped: tokens are averaged instead")
        if "pos_embed" in state and _is_square(state["pos_embed"].shape[1] - prefix_tokens):
            state["pos_embed"] = state["pos_embed"][:, prefix_tokens:]
    for name in ("weight", "bias"):
        if f"head.{name}" in state:
            state[f"head.proj.{name}"] = state.pop(f"head.{name}")
        if f"fc_norm.{name}" in state and f"norm.{name}" not in state:
            state[f"norm.{name}"] = state.pop(f"fc_norm.{name}")
            notes.append(f"fc_norm.{name} used as norm.{name}: here tokens are normalised before they are averaged")
    kernel = state.get("patch_embed.proj.weight")
    if kernel is not None and kernel.ndim == 4:
        state["patch_embed.proj.weight"] = kernel.unsqueeze(2)
    return state


def fit(name: str, value: Tensor, target: Tensor, model: nn.Module) -> tuple[Tensor | None, str]:
    """Return ``value`` in the shape of ``target``, and how it got there; None and "wrong shape" where it cannot."""
    fitted, status = value, "loaded"
    if value.shape != target.shape:
        if name == "patch_embed.proj.weight":
            fitted, status = inflate_kernel(value, target.shape[2]), "inflated"
        elif name == "time_embed":
            fitted = resample_time(value, target.shape[1])
            status = "inflated" if value.shape[1] == 1 else "interpolated"
        elif name == "pos_embed":
            fitted, status = resample_space(value, model.grid[1:]), "interpolated"  # type: ignore[index, arg-type]
        elif name == "stgm.global_centres":
            regions = model.stgm.pooling.regions  # type: ignore[union-attr]
            fitted, status = tile_centres(value, regions)  # type: ignore[arg-type]
    if fitted.shape != target.shape:
        return None, "wrong shape"
    return fitted.to(target.dtype), status


def inflate_kernel(kernel: Tensor, length: int) -> Tensor:
    """Give a kernel (C, 3, k, h, w) another length in time so that equal frames keep their response."""
    if kernel.ndim != 5 or kernel.shape[2] == length:
        return kernel
    return kernel.sum(dim=2, keepdim=True).expand(-1, -1, length, -1, -1) / length


def resample_time(embedding: Tensor, length: int) -> Tensor:
    """Stretch an embedding (1, t, C) to another number of frames, linearly."""
    if embedding.shape[1] == 1:
        return embedding.expand(-1, length, -1)
    stretched = F.interpolate(embedding.float().transpose(1, 2), size=length, mode="linear", align_corners=True)
    return stretched.transpose(1, 2)


def resample_space(embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a square position embedding (1, h*w, C) to another grid, bicubic with antialiasing."""
    if not _is_square(embedding.shape[1]):
        return embedding
    side = round(embedding.shape[1] ** 0.5)
    maps = embedding.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return maps.flatten(2).transpose(1, 2)


def tile_centres(centres: Tensor, regions: tuple[int, int, int]) -> tuple[Tensor, str]:
    """Give global centres (1, t*h*w, C) another number of frames: repeated from an image, else resampled in time."""
    t, h, w = regions
    frames, rest = divmod(centres.shape[1], h * w)
    if rest:
        return centres, "wrong shape"
    per_place = centres.reshape(frames, h * w, -1).transpose(0, 1)  # (h*w, t, C)
    return resample_time(per_place, t).transpose(0, 1).reshape(1, t * h * w, -1), (
        "inflated" if frames == 1 else "interpolated"
    )


def _is_square(count: int) -> bool:
    return count > 0 and round(count**0.5) ** 2 == count
