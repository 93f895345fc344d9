"""From a file to the requested frames: choose the reader, try the next decoder where one fails, restore the order.

The way of a clip: a ``FrameRequest`` is sent to the decoding process (``process.py``), which calls ``read_file``.
That opens the file (``open_video``, or the ``ReaderCache``), calls the request's choice with the open ``Reader`` to
get frame indices, and has the reader (``readers.py``, ``images.py``) decode those.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stvit_video.data.decode.images import ImageReader, open_folder
from stvit_video.data.decode.readers import AvReader, DecordReader, TorchCodecReader
from stvit_video.data.decode.types import IMAGE_SUFFIXES, Choice, DecodeError, Frames, Reader, Times

# In the order in which they are tried. PyAV comes first: it gives the same pixels as decord in two thirds of the time,
# is right where groups of pictures are open, reads AV1, and reports damaged frames instead of repeating others.
DECODERS: dict[str, Callable[[str, int | None], Reader]] = {
    "pyav": AvReader,
    "decord": DecordReader,
    "torchcodec": TorchCodecReader,
}


def find_decoders(name: str) -> tuple[str, ...]:
    """Return the decoders to try in order: the named one, or with ``auto`` all that are installed.

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
    """Open a folder as its images, and a file by its ending: as an image, or else as a video.

    Much larger frames are reduced to ``short_side``. Raises DecodeError.
    """
    if os.path.isdir(path):
        return open_folder(path, short_side)
    if not os.path.isfile(path):
        raise DecodeError(path, "is not a regular file" if os.path.exists(path) else "no such file")
    if path.lower().endswith(IMAGE_SUFFIXES):
        return ImageReader(path, [path], short_side)
    return DECODERS[decoder](path, short_side)


@dataclass(frozen=True)
class FrameRequest:
    """Asks for frames of one file. It is pickled to reach the decoding process."""

    path: str
    choice: Choice  # returns the indices of the frames to read, once the file is open
    short_side: int | None = None  # see ``open_video``
    decoders: tuple[str, ...] = ("pyav", "decord")  # in the order in which they are tried
    keep_open: bool = False  # more requests for this file follow

    def answer(self, reader: Reader) -> Frames:
        """Return the chosen frames (N, H, W, 3) in the order of the choice; each is decoded once, in file order."""
        indices = self.choice(reader)
        ascending, positions = np.unique(indices, return_inverse=True)  # readers accept no other order or repetitions
        decoded = reader.frames(ascending)
        return decoded if np.array_equal(ascending, indices) else decoded[positions]


@dataclass(frozen=True)
class TimesRequest:
    """Asks for the times of all frames of one file."""

    path: str
    decoders: tuple[str, ...]
    short_side: None = None
    keep_open: bool = False

    def answer(self, reader: Reader) -> Times:
        """Return the times (length,) of the frames, in seconds after the first."""
        return reader.times()


ReadRequest = FrameRequest | TimesRequest


class ReaderCache:
    """Keeps a file open from one request to the next, since opening a long video takes a pass through all of it."""

    def __init__(self) -> None:
        self._key: tuple[str, int | None, str] | None = None
        self._reader: Reader | None = None

    def open(self, request: ReadRequest, decoder: str) -> Reader:
        """Return the open reader if it is for this file, size and decoder; else close it and open another."""
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


def read_file(request: ReadRequest, cache: ReaderCache | None = None) -> NDArray[Any]:
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
