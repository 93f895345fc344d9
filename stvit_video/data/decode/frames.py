"""From a file to the requested frames: choose the reader, try the next decoder where one fails, restore the order.

The way of a clip: a ``FrameRequest`` is sent to the decoding process (``process.py``), which calls ``read_file``.
That opens the file (``open_video``, or the ``ReaderCache``), calls the request's choice with the open ``Reader`` to
get frame indices, and has the reader (``readers.py``) decode those.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stvit_video.common.errors import UsageError
from stvit_video.data.decode.readers import AvReader, DecordReader, ImageReader, TorchCodecReader
from stvit_video.data.decode.types import IMAGE_SUFFIXES, Choice, DecodeError, Reader

# In the order in which they are tried. PyAV comes first: it gives the same pixels as decord in two thirds of the time,
# is right where groups of pictures are open, reads AV1, and reports damaged frames instead of repeating others.
DECODERS: dict[str, Callable[[str, int | None], Reader]] = {
    "pyav": AvReader,
    "decord": DecordReader,
    "torchcodec": TorchCodecReader,
}


def find_decoders(name: str, option: str = "decoder") -> tuple[str, ...]:
    """Return the decoders to try in order: the named one, or with ``auto`` all that are installed.

    Raises UsageError, naming the ``option``, for one that is unknown or not installed.
    """
    installed = tuple(key for key in DECODERS if key != "torchcodec" or importlib.util.find_spec("torchcodec"))
    if name == "auto":
        return installed
    if name not in DECODERS:
        raise UsageError(f"{option}: decoder {name!r} is unknown; choose auto, {', '.join(DECODERS)}.")
    if name not in installed:
        raise UsageError(
            f"{option}: decoder {name!r} is not installed; pip install {name}, or choose auto, {', '.join(installed)}."
        )
    return (name,)


def open_video(path: str, short_side: int | None = None, decoder: str = "decord") -> Reader:
    """Open a folder as its images, and a file by its ending: as an image, or else as a video.

    Much larger frames are reduced to ``short_side``. Raises DecodeError.
    """
    if not os.path.isfile(path) and not os.path.isdir(path):
        raise DecodeError(path, "is not a regular file" if os.path.exists(path) else "no such file")
    if os.path.isdir(path) or path.lower().endswith(IMAGE_SUFFIXES):
        return ImageReader(path, short_side)
    reader = DECODERS[decoder](path, short_side)
    if reader.length == 0:
        raise DecodeError(path, "has no frames", decoder)
    return reader


@dataclass(frozen=True)
class FrameRequest:
    """Asks for frames of one file, or for the times of all. It is pickled to reach the decoding process."""

    path: str
    choice: Choice | None  # returns the indices of the frames to read, once the file is open; None: asks for times
    short_side: int | None = None  # see ``open_video``
    decoders: tuple[str, ...] = ("pyav", "decord")  # in the order in which they are tried
    keep_open: bool = False  # more requests for this file follow

    def answer(self, reader: Reader) -> NDArray[Any]:
        """Return the chosen frames (N, H, W, 3) in the order of the choice, or the times (length,) in seconds."""
        if self.choice is None:
            return reader.times()
        indices = self.choice(reader)
        ascending, positions = np.unique(indices, return_inverse=True)  # readers accept no other order or repetitions
        decoded = reader.frames(ascending)
        return decoded if np.array_equal(ascending, indices) else decoded[positions]


class ReaderCache:
    """Keeps a file open from one request to the next, since opening a long video takes a pass through all of it."""

    def __init__(self) -> None:
        self._key: tuple[str, int | None, str] | None = None
        self._reader: Reader | None = None

    def open(self, request: FrameRequest, decoder: str) -> Reader:
        """Return a reader of the request's file: the open one where it fits, else another."""
        key = (request.path, request.short_side, decoder)
        if self._reader is None or self._key != key:
            self.close()
            self._key, self._reader = key, open_video(*key)
        return self._reader

    def close(self) -> None:
        """Close the open reader, if there is one."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()


def read_file(request: FrameRequest, cache: ReaderCache | None = None) -> NDArray[Any]:
    """Return the answer to a request. Raises DecodeError with what each decoder reported.

    Decoders are tried in turn. Each makes its own choice, since they may not agree on how long a damaged file is.
    """
    cache = cache or ReaderCache()
    errors: list[DecodeError] = []
    for decoder in request.decoders:
        keep_open = False
        try:
            answer = request.answer(cache.open(request, decoder))
            keep_open = request.keep_open
            return answer
        except DecodeError as error:
            errors.append(error)
            if error.decoder in ("", "pillow"):  # no video decoder can help
                break
        finally:  # after any other error too, such as a lack of memory
            if not keep_open:
                cache.close()
    messages = list(dict.fromkeys(error.message for error in errors))
    message = messages[0] if len(messages) == 1 else "; ".join(f"{e.decoder}: {e.message}" for e in errors)
    raise DecodeError(request.path, message, "+".join(dict.fromkeys(error.decoder for error in errors)))
