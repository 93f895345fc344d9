"""Video and image files to uint8 frames: only the wanted frames, resized in the decoder where that is cheaper.

decord 0.6.0 as measured: open per item and inside the worker, one thread, ``RuntimeError`` at open and ``DECORDError``
(not its subclass) at read.
"""

import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import av
import decord
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

# In lower case; a file's ending is compared in lower case too.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg")

Frames = NDArray[np.uint8]  # (N, H, W, 3)

# What Pillow raises on files that are damaged, cut short, of another kind, or so large that they look like an attack.
IMAGE_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class DecodeError(Exception):
    """A video or image cannot be read; the message says why, ``path`` which."""

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
        size = _reduced_size(_video_size(path), short_side) if short_side else None
        width, height = size or (-1, -1)
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


class ImageReader:
    """An image file as a video of one frame, upright and in RGB; of an animation, the first frame.

    Reduced with antialiasing where its short side is more than ``short_side`` pixels. Raises DecodeError.
    """

    def __init__(self, path: str, short_side: int | None = None) -> None:
        self.path = path
        if not Path(path).is_file():
            raise DecodeError(path, "no such file")
        try:
            with Image.open(path) as file:
                picture = _to_rgb(ImageOps.exif_transpose(file))
        except IMAGE_DAMAGE as error:
            raise DecodeError(path, f"cannot be read as an image ({_reason(error)})") from error
        size = _reduced_size(picture.size, short_side) if short_side else None
        self._frames: Frames = np.asarray(picture.resize(size, Image.Resampling.BILINEAR) if size else picture)[None]

    def __len__(self) -> int:
        return 1

    def __enter__(self) -> "ImageReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._frames

    def frames(self, indices: Sequence[int] | NDArray[np.int64]) -> Frames:
        """Return the one frame (N, H, W, 3) as often as ``indices`` name it; they are all 0."""
        try:
            return self._frames[np.asarray(indices)]
        except IndexError as error:
            raise DecodeError(self.path, f"has one frame only ({error})") from error


def open_video(path: str, short_side: int | None = None) -> VideoReader | ImageReader:
    """Open a file as what its ending says: an image, or anything else as a video. Raises DecodeError."""
    return (ImageReader if path.lower().endswith(IMAGE_SUFFIXES) else VideoReader)(path, short_side)


def _to_rgb(picture: Image.Image) -> Image.Image:
    """Return a picture of any mode in RGB, without its transparency."""
    if picture.mode.startswith("I"):  # 16 bits a pixel, which Pillow's own conversion cuts off at 255
        picture = Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).astype(np.uint8))
    return picture.convert("RGB")


def _video_size(path: str) -> tuple[int, int]:
    """Return the (width, height) that the header of a video file states."""
    try:
        with av.open(path, metadata_errors="ignore") as container:
            stream = next(iter(container.streams.video), None)
            if stream is None or stream.codec_context is None:
                raise DecodeError(path, "has no video stream that can be decoded")
            return stream.codec_context.width, stream.codec_context.height
    except (av.FFmpegError, OSError, ValueError) as error:
        raise DecodeError(path, f"cannot be opened as video ({_reason(error)})") from error


def _reduced_size(size: tuple[int, int], short_side: int) -> tuple[int, int] | None:
    """Return the (width, height) that brings a larger short side to ``short_side``; None where it is not larger."""
    if min(size) <= short_side:
        return None
    scale = short_side / min(size)
    return round(size[0] * scale), round(size[1] * scale)


def _reason(error: Exception) -> str:
    """Return the last meaningful line of a decoder's message, without its own source positions."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "Stack trace" not in line]
    return (lines[0].rpartition("] ")[2] or lines[0])[:160] if lines else type(error).__name__
