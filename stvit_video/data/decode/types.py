"""What all readers of videos and images share: types, errors and sizes."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

# In lower case; a file's ending is compared in lower case too.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")
VIDEO_SUFFIXES = (
    ".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv",
    ".ts", ".mts", ".m2ts", ".3gp", ".ogv",
)  # fmt: skip
MEDIA_SUFFIXES = IMAGE_SUFFIXES + VIDEO_SUFFIXES

# Measured with decord: reducing 256 pixels to 224 in the decoder adds 55 % to its time, reducing 1080 saves a third.
WORTH_REDUCING = 1.5

Frames = NDArray[np.uint8]  # (N, H, W, 3), RGB
Indices = NDArray[np.int64]
Times = NDArray[np.float64]


class DecodeError(Exception):
    """A video or image cannot be read: ``path``, the reason in ``message``, and the ``decoder`` that failed last."""

    def __init__(self, path: str, message: str, decoder: str = "") -> None:
        super().__init__(path, message, decoder)  # all three, so that the error can be pickled
        self.path, self.message, self.decoder = path, message, decoder

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


class DecoderKilled(DecodeError):
    """The process that decoded a video was killed twice, as systems do where memory is short: not the file's fault."""


@contextmanager
def decode_errors(path: str, message: str, decoder: str, kinds: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turn a decoder's exceptions of these ``kinds`` into a DecodeError: ``message`` and the reason in parentheses."""
    try:
        yield
    except kinds as error:
        raise DecodeError(path, f"{message} ({reason(error)})", decoder) from error


class Timeline(Protocol):
    """The number of frames of a video and their times, which is all that a sampler needs."""

    length: int  # frames that can be read; what the file announces is not trusted

    def times(self) -> Times:
        """Return the times (length,) at which frames are shown, in seconds after the first. Raises DecodeError."""


class Reader(Timeline, Protocol):
    """An open file. Frames are numbered in the order in which they are shown."""

    def frames(self, indices: Indices) -> Frames:
        """Return the frames (N, H, W, 3) at ascending ``indices`` without repetitions. Raises DecodeError."""

    def close(self) -> None:
        """Close the file."""


Choice = Callable[[Reader], Indices]  # which frames to read, in any order; called with the open file


def reduced_size(size: tuple[int, int], short_side: int | None) -> tuple[int, int] | None:
    """Return the (width, height) with that short side, or None where the transforms' own resize alone is faster."""
    if short_side is None or min(size) <= WORTH_REDUCING * short_side:
        return None
    scale = short_side / min(size)
    return round(size[0] * scale), round(size[1] * scale)


def reason(error: Exception) -> str:
    """Return the first meaningful line of a decoder's message, without its source positions."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "Stack trace" not in line]
    return (lines[0].rpartition("] ")[2] or lines[0])[:160] if lines else type(error).__name__


def natural_order(name: str) -> list[str | int]:
    """Return a key that sorts 2.jpg before 10.jpg."""
    parts = re.split("([0-9]+)", name)  # text and digits alternate, so that keys compare like with like
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]
