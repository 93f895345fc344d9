"""Checkpoints to resume training from, and files of weights, each written completely or not at all."""

import hashlib
import io
import json
import pickle
import re
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from stvit_video.common.errors import UsageError, first_line
from stvit_video.common.files import remove_leftovers, write_atomically
from stvit_video.config.clip_settings import NOT_ADOPTED
from stvit_video.models import LoadReport
from stvit_video.models.weights.claims import check_archive, check_class_names, parse_metadata
from stvit_video.models.weights.files import DAMAGE, pack_weights
from stvit_video.models.weights.layouts import COMPUTED
from stvit_video.models.zoo import IMPLIED_ARGUMENTS

REQUIRED = {
    "model", "optimizer", "average", "averaged", "scheduler", "scaler", "epoch", "step", "bad_steps", "best", "setup",
}  # fmt: skip
DAMAGED = (pickle.UnpicklingError, *DAMAGE)  # what reading a damaged file raises
CHECKSUM_BYTES = hashlib.sha256().digest_size


def pack(content: Any) -> bytes:
    """Return ``content`` as torch saves it, followed by its SHA-256, which torch.load ignores."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
    return buffer.getvalue()


def read_checked(path: Path) -> Any:
    """Return what ``pack`` wrote to a file; raises one of DAMAGED if any bit of it has changed."""
    whole = memoryview(path.read_bytes())  # an OSError here is the disk's, not of damaged content
    content, checksum = whole[:-CHECKSUM_BYTES], whole[-CHECKSUM_BYTES:]
    if hashlib.sha256(content).digest() != checksum:
        raise ValueError("wrong checksum")
    check_archive(io.BytesIO(content), len(content))
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def save_checkpoint(folder: Path, content: dict[str, Any], keep: int) -> Path:
    """Write a training state as ``step_N.pt`` and delete all but the ``keep`` newest."""
    assert content.keys() >= REQUIRED, f"a checkpoint needs {REQUIRED}"
    path = folder / f"step_{content['step']:08d}.pt"
    if path.is_dir():  # made by something else: kept, under another name
        path.rename(path.with_name(f".{path.name}.{time.time_ns()}"))
    write_atomically(path, pack(content))
    # Checkpoints of later steps could not be read: the run continued from an earlier one.
    earlier = [other for other in list_checkpoints(folder) if step_of(other) <= content["step"]]
    for old in earlier[keep:]:
        if old.is_file():
            old.unlink()
    remove_leftovers(folder, "step_*.pt")
    return path


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint is named after."""
    return int(checkpoint.stem.removeprefix("step_"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder by step, newest first."""
    return sorted((path for path in folder.glob("step_*.pt") if path.stem[5:].isdecimal()), key=step_of, reverse=True)


def load_newest(folder: Path) -> dict[str, Any] | None:
    """Return the newest training state that is whole; None where there is no file, UsageError where none is whole."""
    found = list_checkpoints(folder)
    for path in found:
        try:
            content = read_checked(path)
            if _is_training_state(content, path):
                return content
            problem = "is not a training state"
        except IsADirectoryError:
            problem = "is a folder"
        except DAMAGED as error:
            problem = f"is damaged ({first_line(error)[:120]})"
        # In one line: a warning of this place would show a line of code.
        said = f"checkpoint {path} {problem}; trying the one before"
        warnings.warn_explicit(said, UserWarning, f"<{path.name}>", 0)
    if found:
        raise UsageError(
            f"{folder} holds {len(found)} checkpoint(s), the newest {found[0].name}, and none can be used; put a "
            f"whole one there, or OVERWRITE True starts the training again."
        )
    return None


def _is_training_state(content: object, source: Path) -> bool:
    """Return whether a file holds what ``Trainer.state`` returns. Raises UsageError for names of classes."""
    if not isinstance(content, dict) or not content.keys() >= REQUIRED:
        return False
    setup, counts = content["setup"], ("epoch", "step", "bad_steps", "averaged")
    if not isinstance(setup, dict) or any(type(content[key]) is not int or content[key] < 0 for key in counts):
        return False
    kinds: dict[str, Any] = {
        "model": dict,
        "optimizer": dict,
        "scheduler": dict,
        "scaler": dict,
        "average": dict | None,
    }
    if any(not isinstance(content[key], kind) for key, kind in kinds.items()) or not isinstance(
        content["best"], int | float | None
    ):
        return False
    of_setup: dict[str, Any] = {
        **{"batch": int, "sampling": str, "multi_label": bool, "classes": list, "lists": dict, "settings": dict},
        "header": dict,
    }
    if any(key in setup and not isinstance(setup[key], kind | None) for key, kind in of_setup.items()):
        return False
    check_class_names(setup.get("classes"), f"Checkpoint {source}")
    parse_metadata(setup.get("header") or {}, f"Checkpoint {source}")
    return True


class CheckpointWriter(AbstractContextManager["CheckpointWriter"]):
    """Decides when a checkpoint is due, and writes it in a thread: training only waits for a copy of the state."""

    def __init__(self, folder: Path, keep: int, every_steps: int, every_minutes: float) -> None:
        self.folder, self.keep = folder, keep
        self.every_steps, self.every_seconds = every_steps, 60 * every_minutes
        self.last, self.owed = time.monotonic(), False
        self.pool = ThreadPoolExecutor(max_workers=1)
        self.pending: Future[Path] | None = None

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.pool.shutdown()  # finishes a write that has begun, also where training failed
        if kind is None:
            self.wait()

    def is_due(self, step: int) -> bool:
        """Return whether to write after ``step``: as often as configured, but not while the last write goes on."""
        self.owed = self.owed or (self.every_steps > 0 and step % self.every_steps == 0)
        late = self.every_seconds > 0 and time.monotonic() - self.last >= self.every_seconds
        return (self.owed or late) and (self.pending is None or self.pending.done())

    def save(self, content: dict[str, Any]) -> None:
        """Begin to write a copy of a training state. Raises OSError where the one before could not be written."""
        self.wait()
        self.last, self.owed = time.monotonic(), False
        # In CPU memory, where training does not change it.
        copy = tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), content)
        self.pending = self.pool.submit(save_checkpoint, self.folder, copy, self.keep)

    def wait(self) -> None:
        """Return once nothing is being written. Raises OSError where it could not be."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()


def save_weights(path: Path, model: nn.Module, classes: list[str], *about: Any) -> None:
    """Write a ``.safetensors`` with all that building and using the model again takes; see ``pack_weights``."""
    write_atomically(path, pack_weights(model, classes, *about))


def check_all_loaded(report: LoadReport, model: nn.Module) -> None:
    """Raise UsageError unless the checkpoint holds all of this network's weights: others would be tested as random.

    Only the time embedding, which starts at zero, may be new: so an image model is tested on video.
    """
    strange = [f"{key} ({status})" for status in ("new", "wrong shape", "unused") for key in report.keys[status]]
    strange = [key for key in strange if key != "time_embed (new)" and not re.search(COMPUTED, key.split()[0])]
    if strange:
        raise UsageError(
            f"{report.source} is not a whole checkpoint of {model.name}: {', '.join(strange[:8])}"
            f"{' ...' if len(strange) > 8 else ''}. Give the MODEL settings that it was trained with."
        )
    if report.differences:
        raise UsageError(f"{report.source} is of another network than {model.name}: {'; '.join(report.differences)}.")
    given, built = report.arguments, dict(model.arguments, name=model.name)  # type: ignore[arg-type]
    for key in sorted(given.keys() | built.keys()) if given else ():
        old, new = (arguments.get(key, IMPLIED_ARGUMENTS.get(key)) for arguments in (given, built))
        if key not in NOT_ADOPTED and json.dumps(old) != json.dumps(new):
            raise UsageError(f"{report.source} was trained with {key} {old!r}, not {new!r}; set MODEL to match it.")
