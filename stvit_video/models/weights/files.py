"""Checkpoint files: read tensors by name without running code from the file, with plain errors for what is wrong."""

import argparse
import contextlib
import datetime
import errno
import json
import pathlib
import pickle
import re
import struct
import types
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stvit_video.common.errors import UsageError, first_line
from stvit_video.models.weights.claims import (
    check_archive,
    check_claims,
    check_storages,
    find_classes,
    parse_json,
    parse_metadata,
)

StateDict = dict[str, Tensor]

# What torch.load raises on a damaged file, depending on where the damage is.
DAMAGE = (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, AssertionError, struct.error)


def _empty_dict(*_: object) -> dict[Any, Any]:
    """Stand in for a dictionary of another class, which is filled afterwards."""
    return {}


def _empty_list(*_: object) -> list[Any]:
    return []


def _arguments(*values: Any) -> tuple[Any, ...]:
    """Stand in for a range or slice, whose length is not that of the file."""
    return values


def _bytes(*values: Any) -> bytes:
    """Return bytes, but not as many zeros as a number says."""
    if values and not isinstance(values[0], bytes | list | tuple):
        raise ValueError("bytes by number")
    return bytes(*values)


# What stands in training checkpoints beside the weights: command lines (DeiT, VideoMAE), configurations (Swin), paths,
# NumPy's numbers and arrays. They hold values and run no code. Classes that may be absent are read as their base.
_SCALAR, _ARRAY = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
CONTAINERS: list[Any] = [
    *(argparse.Namespace, types.SimpleNamespace, frozenset),
    *((_arguments, f"builtins.{name}") for name in ("slice", "range")),
    (_bytes, "builtins.bytes"),
    *((_empty_dict, "collections.defaultdict"), (_empty_list, "collections.deque")),
    *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone),
    *(int, float, bool, str, list, tuple, dict, set),
    *(np.dtype, np.ndarray, *{type(np.dtype(code)) for code in np.typecodes["All"]}),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_ARRAY, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((OrderedDict, name) for name in ("yacs.config.CfgNode", "fvcore.common.config.CfgNode")),
    *((OrderedDict, f"{room}.utilities.data.AttributeDict") for room in ("lightning_fabric", "lightning.fabric")),
    *(
        (pathlib.PurePosixPath, f"{room}.{name}")
        for room in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    ),
]
# Names under which checkpoints have their networks, the one that is taken first: the trained network before its moving
# average, but of a student and its teacher the teacher, which such methods publish.
WRAPPERS = (
    *("model", "state_dict", "module", "model_state_dict", "model_state", "net", "network", "weights", "params"),
    *("teacher", "target_encoder", "ema_model", "model_ema", "state_dict_ema", "ema", "encoder", "backbone"),
)
MOST_JSON = 64 * 2**20  # bytes of a configuration, or of an index of shards
MOST_WRAPPERS = 8  # dictionaries around a network
# Names of other dictionaries.
NO_NETWORK = re.compile(r"optim|sched|scaler|loss|queue|rng|config|args|callback|loops|message_hub", re.IGNORECASE)
# Of DistributedDataParallel, torch.compile, FSDP and activation checkpointing.
PREFIXES = re.compile(r"^(module\.)+|\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.(module\.)*")
# Files that are often mistaken for checkpoints, by their first bytes.
IMPOSTORS = (
    (b"version https://git-lfs", "a Git-LFS pointer, not the file it points to; run `git lfs pull` and give that file"),
    (b"<", "a web page, probably an error message saved under this name; download the file again"),
    (b"{", "JSON text, not a checkpoint; give the file of weights beside it, or download it again"),
    (b"\x89HDF", "an HDF5 file of Keras; save the weights as .safetensors"),
    (b"\x1f\x8b", "compressed with gzip; unpack it"),
    (b"GGUF", "a GGUF file; give the .safetensors that it was made from"),
)
# The weights in a folder of Hugging Face's ``save_pretrained``, or of a run; the first that is there.
FOLDER_FILES = [
    f"{stem}{index}" for stem in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")
]
SHARD = re.compile(r"^(.+)-\d+-of-0*([2-9]|[1-9]\d+)(\.[^.]+)$")


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint file, and the metadata that this package saves with them.

    ``metadata`` has ``name``, ``arguments``, ``classes``, ``views``, ``multi_label`` and ``weights`` (see
    ``header``), or is empty. ``config`` is the ``config.json`` that Hugging Face's libraries save beside,
    ``notes`` say what was chosen in the file.
    ``classes`` are the names of the classifier's classes in order, None where nothing says them.
    """

    path: str
    tensors: StateDict
    metadata: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    classes: list[str] | None = None


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a ``.safetensors`` or ``torch.save`` file, opened once, without running code from it.

    The bytes say which of the two it is. An index of shards, or a folder with one of FOLDER_FILES, is read too.
    Wrappers are opened, and prefixes of parallel and compiled models are stripped. Raises UsageError on a missing or
    unreadable file, or one that would have to run code to load.
    """
    name = str(path)
    path = find_file(Path(path))
    if SHARD.match(path.name):
        index = path.with_name(SHARD.sub(r"\1\3.index.json", path.name))
        raise UsageError(f"Checkpoint {path} is one shard of several; give {index}, which lists them all.")
    with _plain_errors(path):
        content, metadata = _read(path)
    tensors, notes = open_wrappers(content, f"Checkpoint {path}")
    # An index has its tensors in files beside it.
    files = [path] if path.suffix != ".json" else [file for file in path.parent.iterdir() if file.is_file()]
    check_storages(tensors, sum(file.stat().st_size for file in files), f"Checkpoint {path}")
    if metadata.get("arguments"):
        check_claims(metadata, {key: tuple(value.shape) for key, value in tensors.items()}, f"Checkpoint {path}")
    config = _read_config(path.with_name("config.json"))
    classes = find_classes(metadata, content, config)
    if classes and not metadata and not any(value.ndim and len(value) == len(classes) for value in tensors.values()):
        classes = None  # they are of another network: this one has no classifier of so many
    return Checkpoint(name, tensors, metadata, config, notes, classes)


def open_wrappers(content: object, source: str) -> tuple[StateDict, tuple[str, ...]]:
    """Return the state dict inside dictionaries, and notes on what was chosen. Raises UsageError if there is none."""
    notes: list[str] = []
    for _ in range(MOST_WRAPPERS):
        if not (inner := _networks(content)):
            break
        content = inner[choose(inner, source, notes)]
    return check_tensors(content, source), tuple(notes)


def find_file(path: Path) -> Path:
    """Return a checkpoint's file, of a folder the one with its weights; raise UsageError where there is none."""
    found = [path / name for name in FOLDER_FILES if (path / name).is_file()]
    if path.is_dir() and not found:
        raise UsageError(f"Checkpoint {path} is a folder without {' or '.join(FOLDER_FILES)}; give a file of weights.")
    if not path.is_dir() and not path.is_file():
        raise UsageError(f"Checkpoint {path} is not a file; give the path of a .safetensors or .pth file.")
    return found[0] if found else path


@contextlib.contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"cannot be read ({error.strerror}); check the file and its rights."
        if error.errno == errno.EINVAL:  # torch seeks past the end of a file that was cut short
            what = "is damaged or cut short; fetch it again."
        raise UsageError(f"Checkpoint {path} {what}") from error


def _networks(content: object) -> dict[str, Any]:
    """Return the dictionaries of tensors in a wrapper by name; empty where ``content`` is a state dict itself."""
    if not isinstance(content, dict):
        return {}
    inner = {key: value for key, value in content.items() if isinstance(key, str) and _holds_tensors(value)}
    if any(isinstance(value, Tensor) for value in content.values()):
        return {key: value for key, value in inner.items() if key in WRAPPERS}
    return {key: value for key, value in inner.items() if not NO_NETWORK.search(key)}


def _holds_tensors(value: object) -> bool:
    """Return whether a value is a dictionary with tensors, or with such dictionaries; an optimizer's state is not."""
    level: list[object] = [value]
    seen: set[int] = set()
    for _ in range(MOST_WRAPPERS):
        inner = [held for held in level if isinstance(held, dict) and "param_groups" not in held]
        inner = list({id(held): held for held in inner if id(held) not in seen}.values())  # they may hold each other
        seen.update(map(id, inner))
        level = [held for outer in inner for held in outer.values()]
        if any(isinstance(held, Tensor) for held in level):
            return True
    return False


def choose(names: Collection[str], source: str, notes: list[str]) -> str:
    """Return the network to take of several, dotted names of one or more words, and note it; UsageError if unclear."""

    def rank(name: str) -> int:
        return min((WRAPPERS.index(word) for word in name.split(".") if word in WRAPPERS), default=len(WRAPPERS))

    first, *others = sorted(names, key=lambda name: (name != "", rank(name), name))
    listed = [name.rstrip(".") or "the top level" for name in (first, *others)]
    if others and first and rank(first) == rank(others[0]):
        raise UsageError(f"{source} holds several networks: {', '.join(listed)}; save the one to use alone.")
    if others:
        notes.append(f"it holds several networks: {listed[0]} taken, not {', '.join(listed[1:])}")
    return first


def check_tensors(content: object, name: str, *, strip: bool = True) -> StateDict:
    """Return the tensors of a mapping, prefixes of wrappers stripped; raise UsageError unless all are dense."""
    tensors = {}
    if isinstance(content, dict):
        tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if strip:
        tensors = {PREFIXES.sub("", key): value for key, value in tensors.items()}
        tensors.pop("n_averaged", None)  # a counter of torch's AveragedModel
    if not tensors:
        raise UsageError(f"{name} holds no tensors by name; give a file with a model's state dict.")
    odd = [key for key, value in tensors.items() if value.is_meta or value.layout != torch.strided]
    if odd:
        raise UsageError(f"{name}: {odd[0]} is a sparse or empty tensor; save the weights as ordinary tensors.")
    return tensors


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the ``metadata`` of a ``.safetensors`` without its tensors; empty for PyTorch's files and indexes.

    Raises UsageError for a damaged file.
    """
    return read_header(path)[0]


def read_header(path: str | Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Return ``read_metadata`` of a file, and the shapes of its tensors by name."""
    path = find_file(Path(path))
    with _plain_errors(path), open(path, "rb") as file:
        start = file.read(9)
    named = path.suffix == ".safetensors" and not start.startswith((b"PK", b"\x80"))  # a zip, or a pickle
    if not named and not _is_safetensors(start):
        return {}, {}
    with _open_safetensors(path) as file:
        shapes = {PREFIXES.sub("", name): tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return parse_metadata(file.metadata() or {}, f"Checkpoint {path}"), shapes


def _is_safetensors(start: bytes) -> bool:
    """Return whether a file starts with the length of a JSON header and its brace."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**30


def _read_text(path: Path) -> str:
    """Return the JSON text beside or in place of weights; raise ValueError where it is larger than any such text."""
    if path.stat().st_size > MOST_JSON:
        raise ValueError(f"it has more than {MOST_JSON:,} bytes")
    return path.read_text(encoding="utf-8")


def _read_config(path: Path) -> dict[str, Any]:
    """Return Hugging Face's configuration of a model, empty if there is none."""
    try:
        config = parse_json(_read_text(path))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) and "model_type" in config else {}


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, *DAMAGE) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"Checkpoint {path} is not a complete safetensors file ({first_line(error)[:200]}); fetch it again."
        ) from error


def _read(path: Path) -> tuple[Any, dict[str, Any]]:
    """Return what a file holds, and its metadata; raise UsageError for a damaged file, or one with code."""
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        raise UsageError(f"Checkpoint {path} is empty; download or save it again.")
    if _is_safetensors(start):
        with _open_safetensors(path) as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return tensors, parse_metadata(opened.metadata() or {}, f"Checkpoint {path}")
    if start.lstrip().startswith(b"{") and (shards := _read_index(path)) is not None:
        return shards, {}
    for signature, what in IMPOSTORS:
        if b"\0" not in start and start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(signature):
            raise UsageError(f"Checkpoint {path} is {what}.")
    if path.suffix in (".pt2", ".onnx"):
        raise UsageError(f"Checkpoint {path} is an exported graph; give the run's folder, or a .safetensors of it.")
    try:
        # Given the open file: by its name torch would take it for a safetensors file.
        with torch.serialization.safe_globals(CONTAINERS), open(path, "rb") as file:
            check_archive(file, path.stat().st_size)
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
        setup = content.get("setup") if isinstance(content, dict) else None  # of a run's own checkpoint
        known = setup.get("header") if isinstance(setup, dict) else None
        return content, parse_metadata(known, f"Checkpoint {path}") if isinstance(known, dict) else {}
    except UsageError:
        raise
    except pickle.UnpicklingError as error:
        refused = sorted(set(re.findall(r"GLOBAL (\S+)", str(error))))
        what = "is neither a safetensors nor a torch file; fetch it again."
        if refused:
            what = f"needs code to load, which is refused ({', '.join(refused)}); save its state dict alone."
        raise UsageError(f"Checkpoint {path} {what}") from error
    except DAMAGE as error:
        what = f"is damaged or cut short ({first_line(error)}); fetch it again."
        if "weights_only" in str(error):  # torch refuses such archives by this name
            what = "is a TorchScript or tar archive, which may hold code; save its state dict alone."
        elif "not in a subdirectory" in str(error) or "hasRecord" in str(error):
            what = "is a zip archive of other files, such as NumPy's .npz; give the file of weights itself."
        raise UsageError(f"Checkpoint {path} {what}") from error


def _read_index(path: Path) -> StateDict | None:
    """Return the tensors of all shards that an index lists; None where the file is no index.

    Raises UsageError where a shard, or a tensor that the index promises, is missing.
    """
    try:
        places = parse_json(_read_text(path))["weight_map"]
        names = sorted(set(places.values()))
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    missing = [str(name) for name in names if not _is_beside(path, name)]
    if missing:
        raise UsageError(
            f"Checkpoint {path} lists {len(names)} shards; not beside it: {', '.join(missing[:4])}. Fetch all of them."
        )
    tensors: StateDict = {}
    for name in names:
        tensors.update(check_tensors(_read(path.with_name(name))[0], f"Checkpoint {path.with_name(name)}", strip=False))
    absent = sorted(places.keys() - tensors.keys())
    if absent:
        raise UsageError(
            f"Checkpoint {path} lists {len(absent)} tensors that its shards lack ({', '.join(absent[:3])}); fetch all "
            f"of them again."
        )
    return tensors


def _is_beside(path: Path, name: object) -> bool:
    """Return whether a file of this name, which is no path, lies beside another one."""
    return isinstance(name, str) and Path(name).name == name != "" and path.with_name(name).is_file()


def pack_weights(model: nn.Module, classes: list[str], *about: Any) -> bytes:
    """Return a ``.safetensors`` of a model with its ``header``: enough to build and use it again."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    return safetensors.torch.save(state, metadata=header(model, classes, *about))


def header(
    model: nn.Module,
    classes: list[str],
    views: dict[str, Any] | None = None,
    multi_label: bool = False,
    weights: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Return what stands beside the weights of a model: its name and arguments, and how it is used.

    ``views`` are the configuration keys that say how a video becomes clips. ``multi_label`` says that each logit is of
    a class by itself, ``weights`` which of a run these are, as its results say it.
    """
    metadata = {
        "format": "pt",
        "name": str(model.name),
        "arguments": json.dumps(model.arguments),
        "classes": json.dumps(classes),
        "views": json.dumps(views or {}),
        "weights": json.dumps(weights),
    }
    if multi_label:
        metadata["multi_label"] = "true"
    return metadata
