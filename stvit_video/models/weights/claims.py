"""What a file of weights says of itself: read strictly, and compared with the file before anything is made of it.

A file may come from anyone. What it says decides which network is built and what is printed, so it is not believed.
"""

import json
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from typing import IO, Any

import torch
from torch import Tensor

from stvit_video.common.errors import UsageError, first_line
from stvit_video.models.arguments import EARLIER_EPS
from stvit_video.models.zoo import create_model, list_models

Shapes = Mapping[str, tuple[int, ...]]

MOST_TEXT = 4 * 2**20  # characters of metadata; 22,000 names of ImageNet take 1.5 million
MOST_NAME = 500  # characters of a class name
MOST_SIDE = 4096  # frames or pixels along an axis of a clip
MOST_PIXELS = 2**25  # of a clip, all frames together
MOST_POSITIONS = 4096  # of a window, for each pair of which an index is kept
MOST_VIEWS = 8  # of all tensors together, in multiples of what the file holds: tied weights count once for each name
BYTEARRAY = b"bytearray\n"
REQUIRED = ("num_frames", "image_size", "num_classes")
# Where checkpoints have the names of their classes: this package's states, Hugging Face, torchvision, OpenMMLab.
CLASS_KEYS = ("classes", "class_names", "CLASSES", "id2label", "class_to_idx")
CLASS_HOLDERS = ("setup", "meta", "dataset_meta")


def parse_metadata(header: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return what ``header`` of ``files.py`` wrote, by key; empty where another program wrote it, or nothing.

    Raises UsageError where it is of this package and its parts are not of the kind that was written.
    """
    texts = {key: header.get(key, "null") for key in ("arguments", "classes", "views", "multi_label", "weights")}
    name, text = header.get("name"), texts["arguments"]
    if not isinstance(name, str) or (name not in list_models() and not str(text).lstrip().startswith("{")):
        return {}
    for key, value in texts.items():
        if not isinstance(value, str) or len(value) > MOST_TEXT:
            raise _unclear(source, key, f"{len(value):,} characters" if isinstance(value, str) else repr(value)[:40])
    try:
        values = {key: parse_json(value) for key, value in texts.items()}
    except ValueError as error:
        if name not in list_models():
            return {}
        raise UsageError(f"{source}: its metadata cannot be read ({error}); save its weights again.") from error
    kinds: dict[str, Any] = {"arguments": dict, "classes": list, "multi_label": bool, "weights": dict}
    for key, kind in kinds.items():
        values[key] = values[key] or None
        if not isinstance(values[key], kind | None):
            raise _unclear(source, key, repr(values[key])[:40])
    arguments = values["arguments"] or {}
    if lacking := [key for key in REQUIRED if arguments and not isinstance(arguments.get(key), int | list)]:
        raise _unclear(source, f"arguments: {lacking[0]}", repr(arguments.get(lacking[0]))[:40])
    for key, value in arguments.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, float) and not math.isfinite(one):
                raise _unclear(source, f"arguments: {key}", repr(value)[:40])
    for key, value in (values["weights"] or {}).items():
        if not re.fullmatch(r"weights(_\w+)?", key) or not isinstance(value, str | int | float | None):
            raise _unclear(source, "weights", repr({key: value})[:60])
    classes = check_class_names(values["classes"], source)
    if classes and arguments and len(classes) != arguments["num_classes"]:
        raise UsageError(
            f"{source} names {len(classes)} classes and its classifier has {arguments['num_classes']!r:.20}; "
            f"write it again from the run that it is of."
        )
    if arguments.get("positions") == "clip" and arguments.get("fc_norm"):
        arguments.setdefault("norm_eps", EARLIER_EPS)  # such models did not record it then
    return {
        **values,
        "name": name,
        "arguments": arguments,
        "classes": classes,
        "multi_label": bool(values["multi_label"]),
    }


def _unclear(source: str, key: str, found: str) -> UsageError:
    return UsageError(f"{source}: its metadata has {key} {found!r}, which is not what weights carry; save them again.")


def parse_json(text: str) -> Any:
    """Return what JSON text says; raise ValueError for names given twice and deep nesting."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a name is given twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def check_class_names(names: Any, source: str) -> list[str] | None:
    """Return class names; raise UsageError unless they are texts of bounded length.

    Those of folders may have any characters, which are escaped where they are shown, and ImageNet's has equal ones.
    """
    if not names:
        return None
    for name in names:
        if not isinstance(name, str) or len(name) > MOST_NAME:
            raise UsageError(f"{source}: a class is named {name!r:.40}; allowed: text of {MOST_NAME} characters.")
    return list(names)


def check_claims(metadata: Mapping[str, Any], shapes: Shapes, source: str) -> None:
    """Raise UsageError unless the network that metadata describe has the shapes of the file's tensors, by name.

    It is built without memory for its weights. What the file lacks is reported when it is loaded.
    """
    arguments = metadata["arguments"]
    _check_sizes(arguments, len(shapes), source)
    try:
        with torch.device("meta"):
            model = create_model(metadata["name"], **arguments)
    except UsageError as error:
        raise UsageError(f"{source}: {error!s:.300}") from error
    except (RuntimeError, TypeError, ArithmeticError, LookupError, MemoryError) as error:
        raise UsageError(
            f"{source} describes a network that cannot be built ({first_line(error)[:100]}); save its weights again."
        ) from error
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name, shape in expected.items():
        if name in shapes and tuple(shapes[name]) != shape:
            raise UsageError(
                f"{source}: {name} is {_by(shapes[name])} in the file and {_by(shape)} in the network that its "
                f"metadata describe; save its weights again."
            )
    lacking = sum(math.prod(shape) for name, shape in expected.items() if name not in shapes)
    if lacking > sum(map(math.prod, shapes.values())):
        first = next(name for name in expected if name not in shapes)
        raise UsageError(
            f"{source} lacks most of the network that its metadata describe ({lacking:,} weights, {first} first); "
            f"save its weights again."
        )


def _by(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "one number"


def _check_sizes(arguments: Mapping[str, Any], tensors: int, source: str) -> None:
    """Raise UsageError for sizes that take long to build even without weights; ``create_model`` checks their kinds."""

    def sizes(key: str) -> list[int]:
        value = arguments.get(key)
        found = value if isinstance(value, list | tuple) else [value]
        return [number for number in found if type(number) is int]

    clip = [*sizes("num_frames"), *(sizes("image_size") * 2)[:2]]
    blocks = [*sizes("depth"), sum(sizes("depths")), *sizes("units"), *sizes("base_depth")]
    for what, least in (
        (f"clips of {_by(clip)}", max([0, *clip]) > MOST_SIDE or math.prod(clip) > MOST_PIXELS),
        (f"{max(blocks)} blocks, and has {tensors} tensors", max(blocks) > tensors),
        (f"windows of {_by(sizes('window'))}", math.prod(sizes("window")) > MOST_POSITIONS),
        ("frames of windows", max([0, *sizes("window_frames"), *sizes("frames_per_centre")]) > MOST_SIDE),
        (f"regions of {_by(sizes('regions'))}", math.prod(sizes("regions")) > MOST_PIXELS),
    ):
        if least:
            raise UsageError(f"{source} describes a network with {what[:80]}; weights may not ask for that much.")


def find_classes(*places: object) -> list[str] | None:
    """Return the class names that the first of several mappings holds, itself or in one of CLASS_HOLDERS."""
    for place in places:
        inner = [place.get(name) for name in CLASS_HOLDERS] if isinstance(place, dict) else []
        for holder in [value for value in (place, *inner) if isinstance(value, dict)]:
            for key in CLASS_KEYS:
                if names := _class_names(holder.get(key)):
                    return names
    return None


def _class_names(value: object) -> list[str]:
    """Return names that are a list, {name: number} or {number: name}; empty for anything else."""
    if isinstance(value, dict):
        pairs = [(key, name) if isinstance(name, str) else (name, key) for key, name in value.items()]
        by_place = {str(place): place for place in range(len(value))}
        named = {by_place.get(str(number)): name for number, name in pairs if isinstance(number, str | int)}
        value = [named.get(place) for place in range(len(value))]
    names = value if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value) else ()
    return [] if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else list(names)  # Hugging Face's stand-ins


def check_archive(file: IO[bytes], size: int) -> None:
    """Raise ValueError where a torch file of ``size`` bytes says that it takes more memory.

    Torch stores tensors as they are, so a zip archive unpacks to less. A ``bytearray``, which torch allows in every
    file and networks do not have, may be made of a number alone.
    """
    try:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            return _check_pickle(file)
        with zipfile.ZipFile(file) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return  # TorchScript, which torch refuses before it unpacks anything
            unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > size:
                raise ValueError(f"its {size:,} bytes unpack to {unpacked:,}")
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    with archive.open(name) as content:
                        _check_pickle(content)
    except (zipfile.BadZipFile, NotImplementedError, struct.error, zlib.error) as error:
        raise ValueError(str(error)) from error


def _check_pickle(file: IO[bytes]) -> None:
    """Raise ValueError for a ``bytearray``, by its name as pickles write it; what is read is not kept in memory."""
    end = b""
    while block := file.read(2**20):
        if BYTEARRAY in end + block:
            raise ValueError("it holds a bytearray")
        end = block[-len(BYTEARRAY) :]


def check_storages(tensors: Mapping[str, Tensor], size: int, source: str) -> None:
    """Raise UsageError for tensors that take more memory than the ``size`` of a file, now or where they are used.

    A few bytes may be viewed as any number of weights, and a number alone makes a tensor without values.
    """
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    if sum(held.values()) > size:
        raise UsageError(
            f"{source}: its tensors take {sum(held.values()):,} bytes, and the file has {size:,}; fetch it again."
        )
    shown = 0
    for name, tensor in tensors.items():
        shown += (seen := tensor.numel() * tensor.element_size())
        if seen > tensor.untyped_storage().nbytes() or shown > MOST_VIEWS * sum(held.values()):
            raise UsageError(
                f"{source}: {name} is {_by(tensor.shape)} and repeats the values of a smaller tensor; save the weights "
                f"as ordinary tensors."
            )
