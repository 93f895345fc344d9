"""Checkpoint files: read tensors by name without running code from the file, and say plainly what is wrong with it."""

import argparse
import json
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from stvit_video.errors import UsageError

StateDict = dict[str, Tensor]

# What torch.load raises on a file that is not whole, by where it was damaged.
DAMAGE = (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError)
# Containers that published training checkpoints carry beside their weights: the command line (DeiT, VideoMAE), and the
# configuration (Swin), which is read as an ordinary dictionary. They hold values and run nothing.
CONTAINERS: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]
# What is often saved under a checkpoint's name, by its first bytes.
IMPOSTORS = (
    (b"version https://git-lfs", "a Git-LFS pointer, not the file it points to; run `git lfs pull` and give that file"),
    (b"<", "a web page, probably an error message saved under this name; download the file again"),
    (b"{", "JSON text, not a checkpoint; download the file again"),
)


def read_state_dict(path: str | Path) -> StateDict:
    """Read the tensors of a ``.safetensors`` or ``torch.save`` file without running code from it.

    Wrappers (``model``, ``state_dict``, ``module``) are opened and a ``module.`` prefix is stripped. Raises UsageError
    on a missing or unreadable file, or one that would have to run code to load.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"Checkpoint {path} is not a file; give the path of a .safetensors or .pth file.")
    _refuse_impostors(path)
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


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return what this package saved beside the weights of a ``.safetensors``: name, arguments, classes.

    Empty for other files.
    """
    if Path(path).suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if not {"name", "arguments"} <= metadata.keys():
        return {}
    classes = json.loads(metadata["classes"]) if "classes" in metadata else None
    return {"name": metadata["name"], "arguments": json.loads(metadata["arguments"]), "classes": classes}


def _refuse_impostors(path: Path) -> None:
    with open(path, "rb") as file:
        start = file.read(64).lstrip(b"\xef\xbb\xbf \r\n\t")
    if not start:
        raise UsageError(f"Checkpoint {path} is empty; download or save it again.")
    for signature, what in IMPOSTORS:
        if start.startswith(signature):
            raise UsageError(f"Checkpoint {path} is {what}.")


def _read_safetensors(path: Path) -> StateDict:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UsageError(f"Checkpoint {path} is not a complete safetensors file ({error}); fetch it again.") from error


def _read_torch(path: Path) -> object:
    try:
        with torch.serialization.safe_globals(CONTAINERS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = sorted(set(re.findall(r"GLOBAL (\S+)", str(error))))
        if refused:
            raise UsageError(
                f"Checkpoint {path} needs code to load, which is refused ({', '.join(refused)}); "
                f"save its state dict alone and give that file."
            ) from error
        raise UsageError(f"Checkpoint {path} is not a torch file; fetch it again.") from error
    except DAMAGE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"Checkpoint {path} is damaged or cut short ({reason}); fetch it again.") from error
