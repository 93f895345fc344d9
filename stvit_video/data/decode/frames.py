"""From a file to the frames that are wanted of it: the right reader, and the next one where the first fails."""

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from stvit_video.data.decode.images import open_folder, open_picture
from stvit_video.data.decode.readers import AvReader, DecordReader, TorchCodecReader
from stvit_video.data.decode.types import IMAGE_SUFFIXES, Choice, DecodeError, Frames, Indices, Reader, Times

Read = TypeVar("Read")
# In the order in which they are tried. PyAV comes first: it gives the same pixels as decord in two thirds of the time,
# is right where groups of pictures are open, reads AV1, and says which frames are damaged instead of repeating others.
DECODERS: dict[str, Callable[[str, int | None], Reader]] = {
    "pyav": AvReader,
    "decord": DecordReader,
    "torchcodec": TorchCodecReader,
}


def find_decoders(name: str) -> tuple[str, ...]:
    """Return the decoders to try in order: the one of this name, or with ``auto`` all that are installed.

    Raises ValueError for one that is unknown or not installed.
    """
    installed = tuple(key for key in DECODERS if key != "torchcodec" or importlib.util.find_spec("torchcodec"))
    if name == "auto":
        return installed
    if name not in DECODERS:
        raise ValueError(f"decoder {name!r} is unknown; choose auto, {', '.join(DECODERS)}.")
    if name not in installed:
        raise ValueError(
            f"decoder {name!r} is not installed; pip install {name}, or choose auto, {', '.join(installed)}."
        )
    return (name,)


def open_video(path: str, short_side: int | None = None, decoder: str = "decord") -> Reader:
    """Open a folder as its images, a file as what its ending says: an image, or anything else as a video.

    Where the short side is more than ``short_side`` pixels, frames are reduced to that. Raises DecodeError.
    """
    if os.path.isdir(path):
        return open_folder(path, short_side)
    if not os.path.isfile(path):
        raise DecodeError(path, "is not a regular file" if os.path.exists(path) else "no such file")
    if path.lower().endswith(IMAGE_SUFFIXES):
        return open_picture(path, short_side)
    return DECODERS[decoder](path, short_side)


@dataclass(frozen=True)
class Request:
    """Which frames of which file: ``choice`` picks them once the file is open; ``more`` of them will be asked for."""

    path: str
    choice: Choice
    short_side: int | None = None
    decoders: tuple[str, ...] = ("pyav", "decord")
    more: bool = False


@dataclass(frozen=True)
class TimesRequest:
    """Asks when the frames of a file are shown."""

    path: str
    decoders: tuple[str, ...]


class Shelf:
    """Where a file stays open from a request to the next one: to open a long video takes a pass through all of it."""

    def __init__(self) -> None:
        self._held: tuple[tuple[str, int | None, str], Reader] | None = None

    @contextmanager
    def borrow(self, path: str, short_side: int | None, decoder: str, more: bool) -> Iterator[Reader]:
        """Give out an open reader, the one held here where it is of this file; with ``more`` it is held again."""
        key, held, self._held = (path, short_side, decoder), self._held, None
        if held is not None and held[0] != key:
            held[1].close()
            held = None
        reader = held[1] if held is not None else open_video(path, short_side, decoder)
        try:
            yield reader
        except BaseException:
            reader.close()
            raise
        if more:
            self._held = (key, reader)
        else:
            reader.close()


def read_frames(request: Request, shelf: Shelf | None = None) -> Frames:
    """Return the chosen frames (N, H, W, 3) in the order of the choice; each is decoded once, in file order.

    Decoders are tried in turn, the choice being made anew for each, since they may not agree on how long a damaged
    file is. With ``more`` to come the file stays open on the ``shelf``. Raises DecodeError with what each said.
    """
    return _try_in_turn(
        request, request.short_side, lambda reader: _read_in_order(reader, request.choice(reader)), shelf, request.more
    )


def read_times(request: TimesRequest) -> Times:
    """Return when each frame is shown (length,), in seconds after the first. Raises DecodeError with what each said."""
    return _try_in_turn(request, None, lambda reader: reader.times())


def _try_in_turn(
    request: Request | TimesRequest,
    short_side: int | None,
    use: Callable[[Reader], Read],
    shelf: Shelf | None = None,
    more: bool = False,
) -> Read:
    shelf, more = shelf or Shelf(), more and shelf is not None
    said: list[DecodeError] = []
    for decoder in request.decoders:
        try:
            with shelf.borrow(request.path, short_side, decoder, more) as reader:
                return use(reader)
        except DecodeError as error:
            said.append(error)
            if error.decoder in ("", "pillow"):  # nothing that another video decoder could read
                break
    raise _joined(request.path, said)


def _read_in_order(reader: Reader, indices: Indices) -> Frames:
    """Return the frames at ``indices``, in any order and with repetitions, which readers do not take."""
    wanted, positions = np.unique(indices, return_inverse=True)
    decoded = reader.frames(wanted)
    return decoded if np.array_equal(wanted, indices) else decoded[positions]


def _joined(path: str, said: Sequence[DecodeError]) -> DecodeError:
    """Return one error for what all decoders said."""
    messages = {error.message for error in said}
    message = messages.pop() if len(messages) == 1 else "; ".join(f"{error.decoder}: {error.message}" for error in said)
    return DecodeError(path, message, "+".join(dict.fromkeys(error.decoder for error in said)))
