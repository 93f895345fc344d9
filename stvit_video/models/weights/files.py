"""Checkpoint files: read tensors by name without running code from the file, with plain errors for what is wrong."""

import argparse
import errno
import json
import pickle
import re
import struct
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stvit_video.common.errors import UsageError, first_line

StateDict = dict[str, Tensor]

# What torch.load raises on a damaged file, depending on where the damage is.
DAMAGE = (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, AssertionError, struct.error)
# Containers in published training checkpoints, beside the weights: the command line (DeiT, VideoMAE) and the
# configuration (Swin), which is read as an ordinary dictionary. They hold values and run no code.
CONTAINERS: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]
WRAPPERS = ("model", "state_dict", "module")
PREFIXES = re.compile(r"^((module|_orig_mod)\.)+")  # of DistributedDataParallel and torch.compile
# Files that are often mistaken for checkpoints, by their first bytes.
IMPOSTORS = (
    (b"version https://git-lfs", "a Git-LFS pointer, not the file it points to; run `git lfs pull` and give that file"),
    (b"<", "a web page, probably an error message saved under this name; download the file again"),
    (b"{", "JSON text, not a checkpoint; download the file again"),
)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint file, and the metadata that this package saves with them.

    ``metadata`` has ``name``, ``arguments``, ``classes``, ``views`` and ``multi_label`` (see ``pack_weights``), or is
    empty.
    """

    path: str
    tensors: StateDict
    metadata: dict[str, Any]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a ``.safetensors`` or ``torch.save`` file, opened once, without running code from it.

    Wrappers (``model``, ``state_dict``, ``module``) are opened and a ``module.`` prefix is stripped. Raises UsageError
    on a missing or unreadable file, or one that would have to run code to load.
    """
    name = str(path)
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"Checkpoint {path} is not a file; give the path of a .safetensors or .pth file.")
    try:
        content, metadata = _read(path)
    except OSError as error:
        what = f"cannot be read ({error.strerror}); check the file and its rights."
        if error.errno == errno.EINVAL:  # torch seeks past the end of a file that was cut short
            what = "is damaged or cut short; fetch it again."
        raise UsageError(f"Checkpoint {path} {what}") from error
    while isinstance(content, dict):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    return Checkpoint(name, check_tensors(content, f"Checkpoint {path}"), metadata)


def check_tensors(content: object, name: str) -> StateDict:
    """Return the tensors of a mapping, prefixes of wrappers stripped; raise UsageError unless all are dense."""
    tensors = {}
    if isinstance(content, dict):
        tensors = {PREFIXES.sub("", str(key)): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UsageError(f"{name} holds no tensors by name; give a file with a model's state dict.")
    odd = [key for key, value in tensors.items() if value.is_meta or value.layout != torch.strided]
    if odd:
        raise UsageError(f"{name}: {odd[0]} is a sparse or empty tensor; save the weights as ordinary tensors.")
    return tensors


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the ``metadata`` of a ``.safetensors`` without its tensors; empty for other files."""
    return _read_safetensors(Path(path), tensors=False)[1] if Path(path).suffix == ".safetensors" else {}


def _read_safetensors(path: Path, *, tensors: bool) -> tuple[StateDict, dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            content = {name: file.get_tensor(name) for name in (file.keys() if tensors else ())}
            return content, _parse_metadata(file.metadata() or {})
    except SafetensorError as error:
        raise UsageError(f"Checkpoint {path} is not a complete safetensors file ({error}); fetch it again.") from error


def _parse_metadata(header: dict[str, str]) -> dict[str, Any]:
    try:
        values = {key: json.loads(header.get(key, "null")) for key in ("arguments", "classes", "views", "multi_label")}
        values["multi_label"] = bool(values["multi_label"])
        return {**values, "name": header["name"], "arguments": dict(values["arguments"])}
    except (ValueError, LookupError, TypeError):
        return {}  # written by another program


def _read(path: Path) -> tuple[Any, dict[str, Any]]:
    """Return what a file holds, and its metadata; raise UsageError for a damaged file, or one with code."""
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        raise UsageError(f"Checkpoint {path} is empty; download or save it again.")
    for signature, what in IMPOSTORS:
        if b"\0" not in start and start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(signature):
            raise UsageError(f"Checkpoint {path} is {what}.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, tensors=True)
    if path.suffix in (".pt2", ".onnx"):
        raise UsageError(f"Checkpoint {path} is an exported graph; give the run's folder, or a .safetensors of it.")
    try:
        with torch.serialization.safe_globals(CONTAINERS):
            return torch.load(path, map_location="cpu", weights_only=True), {}
    except pickle.UnpicklingError as error:
        refused = sorted(set(re.findall(r"GLOBAL (\S+)", str(error))))
        what = "is not a torch file; fetch it again."
        if refused:
            what = f"needs code to load, which is refused ({', '.join(refused)}); save its state dict alone."
        raise UsageError(f"Checkpoint {path} {what}") from error
    except DAMAGE as error:
        what = f"is damaged or cut short ({first_line(error)}); fetch it again."
        if "weights_only" in str(error):  # torch refuses such archives by this name
            what = "is a TorchScript or tar archive, which may hold code; save its state dict alone."
        raise UsageError(f"Checkpoint {path} {what}") from error


def pack_weights(
    model: nn.Module, classes: list[str], views: dict[str, Any] | None = None, multi_label: bool = False
) -> bytes:
    """Return a ``.safetensors`` of a model with its name and arguments: enough to build and use it again.

    ``views`` are the configuration keys that say how a video becomes clips. ``multi_label`` says that each logit is of
    a class by itself.
    """
    metadata = {
        "format": "pt",
        "name": str(model.name),
        "arguments": json.dumps(model.arguments),
        "classes": json.dumps(classes),
        "views": json.dumps(views or {}),
    }
    if multi_label:
        metadata["multi_label"] = "true"
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    return safetensors.torch.save(state, metadata=metadata)
