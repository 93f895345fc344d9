"""What every reader of videos and images has in common: its frames, what can be asked of it, and how it fails."""

import re
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

# In lower case; a file's ending is compared in lower case too.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")
VIDEO_SUFFIXES = (
    ".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv",
    ".ts", ".mts", ".m2ts", ".3gp", ".ogv",
)  # fmt: skip

WORTH_REDUCING = 1.5  # measured with decord: at 256 pixels for 224 its resize adds 55 %, at 1080 it saves a third

Frames = NDArray[np.uint8]  # (N, H, W, 3), RGB
Indices = NDArray[np.int64]
Times = NDArray[np.float64]


class DecodeError(Exception):
    """A video or image cannot be read; ``message`` says why, ``path`` which, ``decoder`` who tried last."""

    def __init__(self, path: str, message: str, decoder: str = "") -> None:
        super().__init__(path, message, decoder)  # all three, so that it can be sent to another process
        self.path, self.message, self.decoder = path, message, decoder

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


class Timeline(Protocol):
    """When a video's frames are shown: all that choosing some takes. They are numbered in that order."""

    @property
    def length(self) -> int:
        """Frames that can be asked for; what the file announces is not trusted."""

    def times(self) -> Times:
        """Return when each frame is shown (length,), in seconds after the first. Raises DecodeError."""


class Reader(Timeline, Protocol):
    """An open file."""

    def frames(self, indices: Indices) -> Frames:
        """Return the frames (N, H, W, 3) at ascending ``indices`` without repetitions. Raises DecodeError."""

    def close(self) -> None:
        """Let go of the file."""


Choice = Callable[[Reader], Indices]  # which frames to read, in any order, once the file is open


def reduced_size(size: tuple[int, int], short_side: int | None) -> tuple[int, int] | None:
    """Return the (width, height) with that short side for a frame so much larger that reducing it early saves time.

    None where it is not: a decoder's resize costs more than the transforms' own, which comes later all the same.
    """
    if short_side is None or min(size) <= WORTH_REDUCING * short_side:
        return None
    scale = short_side / min(size)
    return round(size[0] * scale), round(size[1] * scale)


def reason(error: Exception) -> str:
    """Return the last meaningful line of a decoder's message, without its own source positions."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "Stack trace" not in line]
    return (lines[0].rpartition("] ")[2] or lines[0])[:160] if lines else type(error).__name__


def natural_order(name: str) -> list[str | int]:
    """Return a key that sorts 2.jpg before 10.jpg."""
    parts = re.split("([0-9]+)", name)  # text and digits in turn, so that keys compare like with like
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]
