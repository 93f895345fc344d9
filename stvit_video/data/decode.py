"""Video files to uint8 frames: only the wanted frames, resized in the decoder where that is cheaper.

decord 0.6.0 as measured: open per item and inside the worker, one thread, ``RuntimeError`` at open and ``DECORDError``
(not its subclass) at read.
"""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import av
import decord
import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]  # (N, H, W, 3)


class DecodeError(Exception):
    """A video cannot be read; the message says why, ``path`` which."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path, self.message = path, message


class VideoReader:
    """An open video: its length in frames, and frames at given indices. Use as a context manager.

    Where the short side of the file is more than ``short_side`` pixels, frames are resized to that inside the decoder:
    they leave it smaller, which costs less than converting and copying full ones. Raises DecodeError.
    """

    def __init__(self, path: str, short_side: int | None = None) -> None:
        self.path = path
        if not Path(path).is_file():
            raise DecodeError(path, "no such file")
        width, height = _reduced_size(path, short_side) if short_side else (-1, -1)
        try:
            self._reader = decord.VideoReader(path, ctx=decord.cpu(0), width=width, height=height, num_threads=1)
            self._length = len(self._reader)
        except (RuntimeError, decord.DECORDError) as error:
            raise DecodeError(path, f"cannot be opened as video ({_reason(error)})") from error
        if self._length == 0:
            raise DecodeError(path, "has no frames")

    def __len__(self) -> int:
        return self._length

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._reader

    def frames(self, indices: Sequence[int] | NDArray[np.int64]) -> Frames:
        """Return the frames (N, H, W, 3) at ``indices``, in that order; each is decoded once, in file order."""
        wanted, positions = np.unique(np.asarray(indices), return_inverse=True)
        try:
            decoded: Frames = self._reader.get_batch(wanted).asnumpy()
        except (RuntimeError, IndexError, decord.DECORDError) as error:
            raise DecodeError(self.path, f"frames cannot be decoded ({_reason(error)})") from error
        return decoded if len(wanted) == len(positions) and (np.diff(positions) == 1).all() else decoded[positions]


def _reduced_size(path: str, short_side: int) -> tuple[int, int]:
    """Return the (width, height) to decode at, (-1, -1) for the file's own, read from its header."""
    try:
        with av.open(path, metadata_errors="ignore") as container:
            stream = next(iter(container.streams.video), None)
            if stream is None or stream.codec_context is None:
                raise DecodeError(path, "has no video stream that can be decoded")
            width, height = stream.codec_context.width, stream.codec_context.height
    except (av.FFmpegError, OSError, ValueError) as error:
        raise DecodeError(path, f"cannot be opened as video ({_reason(error)})") from error
    if min(width, height) <= short_side:
        return -1, -1
    scale = short_side / min(width, height)
    return round(width * scale), round(height * scale)


def _reason(error: Exception) -> str:
    """Return the last meaningful line of a decoder's message, without its own source positions."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "Stack trace" not in line]
    return (lines[0].rpartition("] ")[2] or lines[0])[:160] if lines else type(error).__name__
