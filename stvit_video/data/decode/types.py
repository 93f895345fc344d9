"""What all readers of videos and images share: types, errors and sizes."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

# In lower case; a file's ending is compared in lower case too.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
VIDEO_SUFFIXES = (
    ".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv",
    ".ts", ".mts", ".m2ts", ".3gp", ".ogv", ".gif", ".divx", ".xvid", ".vob", ".asf", ".mxf", ".f4v", ".3g2", ".m2v",
    ".mpe", ".m1v", ".rm", ".rmvb", ".dv", ".mp4v", ".qt", ".y4m",
)  # fmt: skip
MEDIA_SUFFIXES = IMAGE_SUFFIXES + VIDEO_SUFFIXES

# Measured with decord: reducing 256 pixels to 224 in the decoder adds 55 % to its time, reducing 1080 saves a third.
WORTH_REDUCING = 1.5

NO_MEMORY = "does not fit into memory"
BLOCK_BYTES = 64 * 2**20  # of frames in memory at once, where all of a video are read

Frames = NDArray[np.uint8]  # (N, H, W, 3), RGB
Indices = NDArray[np.int64]
Times = NDArray[np.float64]
Segments = list[tuple[int, int]]  # (start, stop) in frames: runs of continuous time, one after another

# A longer step between frames is a gap. FFmpeg too takes more than ten seconds for a break (``dts_delta_threshold``):
# screen recordings and phones leave out frames for some seconds while nothing moves, and networks lose some.
GAP_S = 10.0
# It is also much longer than the quarter of the steps that are shortest: in time lapses and slide shows all are long.
GAP_STEPS = 20.0

# A small file can hold frames that fill the memory. This many pixels, of 12K video, are those at which Pillow warns.
MAX_PIXELS = 89_478_485
MAX_RATIO = 32  # of sides; a longer strip is not reduced, since its short side is small


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
    except MemoryError:
        raise DecodeError(path, NO_MEMORY, decoder) from None
    except kinds as error:
        raise DecodeError(path, f"{message} ({reason(error)})", decoder) from error


class Timeline(Protocol):
    """The number of frames of a video and their times, which is all that a sampler needs."""

    length: int  # frames that can be read; what the file announces is not trusted

    def times(self) -> Times:
        """Return the times (length,) at which frames are shown, in seconds after the first. Raises DecodeError.

        They ascend inside each segment; where a stream began anew, those of the next segment may be smaller.
        """

    def segments(self) -> Segments:
        """Return the runs of continuous time, which hold all frames; one where frames have no times."""


class Reader(ABC):
    """An open video, image or folder of frames: a Timeline with pixels. Frames are numbered as they are shown."""

    path: str
    length: int
    is_whole = False  # whether ``check`` has found nothing

    @abstractmethod
    def times(self) -> Times:
        """See Timeline."""

    @abstractmethod
    def _read(self, indices: Indices) -> Frames:
        """Return the frames (N, H, W, 3) at ascending ``indices`` without repetitions. Raises DecodeError."""

    def segments(self) -> Segments:
        """See Timeline."""
        return find_segments(self.times())

    def frames(self, indices: ArrayLike) -> Frames:
        """Return the frames (N, H, W, 3) at ``indices``, in any order and with repetitions. Raises DecodeError."""
        wanted = np.asarray(indices).reshape(-1)
        if wanted.size == 0:
            return self._read(np.zeros(1, np.int64))[:0]
        if wanted.dtype.kind not in "iu":
            raise DecodeError(self.path, f"frames are asked for as {wanted.dtype.name}; give whole numbers")
        outside = wanted[(wanted < 0) | (wanted >= self.length)]
        if outside.size:
            raise DecodeError(self.path, f"frame {outside[0]} does not exist; give 0 to {self.length - 1}")
        ascending, positions = np.unique(wanted.astype(np.int64), return_inverse=True)
        decoded = self._read(ascending)
        return decoded if np.array_equal(ascending, wanted) else decoded[positions]

    def all_frames(self) -> Iterator[Frames]:
        """Yield all frames (H, W, 3) in their order, one at a time. Raises DecodeError."""
        return (self.frames([index])[0] for index in range(self.length))

    def check(self) -> None:
        """Read every frame. Raises DecodeError for what is damaged."""
        block = max(1, BLOCK_BYTES // self.frames([0]).nbytes)
        for start in range(0, self.length, block):
            self.frames(np.arange(start, min(start + block, self.length)))

    def close(self) -> None:  # noqa: B027 - images hold nothing open
        """Close the file."""

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


Choice = Callable[[Reader], Indices]  # which frames to read, in any order; called with the open file


def find_segments(times: Times) -> Segments:
    """Return the runs of continuous time among ``times`` (N,), in seconds and in the order of the frames.

    Time is interrupted where it goes back (a stream began anew) and where it leaps (a camera waited for motion, a clock
    was set). Videos of few or changing frames per second are one run.
    """
    steps = np.diff(times)
    gap = gap_length(steps) if (steps > GAP_S).any() else GAP_S
    cuts = (np.flatnonzero((steps < 0) | (steps > gap)) + 1).tolist()
    return list(zip([0, *cuts], [*cuts, len(times)], strict=True))


def gap_length(steps: Times) -> float:
    """Return how many seconds a step between frames takes at least to be a gap among ``steps`` (N,)."""
    forward = steps[steps > 0]
    return max(GAP_S, GAP_STEPS * float(np.quantile(forward, 0.25, method="lower"))) if len(forward) else GAP_S


def check_size(width: int, height: int) -> None:
    """Raise ValueError for frames that are too large, or strips of more than some thousand pixels."""
    if width * height > MAX_PIXELS or max(width, height) > MAX_RATIO * max(64, min(width, height)):
        most = f"{MAX_PIXELS:,} pixels, and sides of 1 to {MAX_RATIO}"
        raise ValueError(f"a frame has {width}x{height} pixels; give at most {most}")


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
