"""Files that are complete or not there: checkpoints to resume from, and the final weights."""

import io
import json
import os
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from stvit_video.models.checkpoints import DAMAGE

REQUIRED = ("model", "optimizer", "scheduler", "epoch", "step")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a restart after a kill, finds it whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must survive a power cut
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_checkpoint(folder: Path, content: dict[str, Any], keep: int) -> Path:
    """Write a training state as ``step_N.pt`` and delete all but the ``keep`` newest."""
    assert all(name in content for name in REQUIRED), f"a checkpoint needs {REQUIRED}"
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path = folder / f"step_{content['step']:08d}.pt"
    write_atomically(path, buffer.getvalue())
    for old in list_checkpoints(folder)[keep:]:
        if old.is_file():
            old.unlink()
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder by step, newest first."""
    found = {
        int(match[1]): path for path in folder.glob("step_*.pt") if (match := re.search(r"step_(\d+)\.pt$", path.name))
    }
    return [found[step] for step in sorted(found, reverse=True)]


def load_newest(folder: Path) -> dict[str, Any] | None:
    """Return the newest training state that is whole, warning about any that is not; None where there is none."""
    for path in list_checkpoints(folder):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, pickle.UnpicklingError, *DAMAGE) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(f"checkpoint {path} is damaged ({reason[:120]}); trying the one before", stacklevel=2)
            continue
        if isinstance(content, dict) and all(name in content for name in REQUIRED):
            return content
        warnings.warn(f"checkpoint {path} is not a training state; trying the one before", stacklevel=2)
    return None


def save_weights(path: Path, model: nn.Module, classes: list[str]) -> None:
    """Write weights as safetensors with the model's name and arguments: enough to build and use it again."""
    metadata = {
        "format": "pt",
        "name": str(model.name),
        "arguments": json.dumps(model.arguments),
        "classes": json.dumps(classes),
    }
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_atomically(path, safetensors.torch.save(state, metadata=metadata))
