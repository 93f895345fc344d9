"""Images as videos: one file is a video of one frame, a folder of images a video of as many."""

import os
import struct

import numpy as np
from PIL import Image, ImageOps

from stvit_video.data.decode.types import (
    IMAGE_SUFFIXES,
    DecodeError,
    Frames,
    Indices,
    Times,
    natural_order,
    reason,
    reduced_size,
)

# What Pillow raises on files that are damaged, cut short, of another kind, or so large that they look like an attack.
IMAGE_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def read_picture(path: str, short_side: int | None) -> Frames:
    """Return an image (H, W, 3), upright and in RGB; of an animation, the first frame.

    Reduced with antialiasing where its short side is more than ``short_side`` pixels. Raises DecodeError.
    """
    try:
        with Image.open(path) as file:
            picture = _to_rgb(ImageOps.exif_transpose(file))
    except IMAGE_DAMAGE as error:
        raise DecodeError(path, f"cannot be read as an image ({reason(error)})", "pillow") from error
    size = reduced_size(picture.size, short_side)
    return np.asarray(picture.resize(size, Image.Resampling.BILINEAR) if size else picture)


def _to_rgb(picture: Image.Image) -> Image.Image:
    """Return a picture of any mode in RGB, without its transparency."""
    if picture.mode.startswith("I"):  # 16 bits a pixel, which Pillow's own conversion cuts off at 255
        picture = Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).astype(np.uint8))
    return picture.convert("RGB")


class PictureReader:
    """The images at ``paths``, of one size, as the frames of a video. Raises DecodeError."""

    def __init__(self, path: str, paths: list[str], short_side: int | None) -> None:
        self.path, self.paths, self.short_side = path, paths, short_side
        self._first = read_picture(paths[0], short_side)
        self.length = len(paths)

    def times(self) -> Times:
        """Not known: such a folder says nothing of when its frames were taken."""
        if len(self.paths) == 1:
            return np.zeros(1)
        raise DecodeError(self.path, "is a folder of frames without a frame rate; unset DATA.FPS", "pillow")

    def frames(self, indices: Indices) -> Frames:
        """Return the frames (N, H, W, 3) at ``indices``."""
        pictures = []
        for index in indices:
            picture = self._first if index == 0 else read_picture(self.paths[index], self.short_side)
            if picture.shape != self._first.shape:
                raise DecodeError(
                    self.path,
                    f"{os.path.basename(self.paths[index])} is of another size than the first frame",
                    "pillow",
                )
            pictures.append(picture)
        return np.stack(pictures)

    def close(self) -> None:
        """Nothing is held open."""


def open_picture(path: str, short_side: int | None = None) -> PictureReader:
    """Open an image file as a video of one frame. Raises DecodeError."""
    return PictureReader(path, [path], short_side)


def open_folder(path: str, short_side: int | None = None) -> PictureReader:
    """Open a folder of images as a video: its frames in the order of their names, 2 before 10. Raises DecodeError."""
    try:
        names = [name for name in os.listdir(path) if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != "."]
    except OSError as error:
        raise DecodeError(path, f"cannot be listed ({error.strerror})", "pillow") from error
    if not names:
        raise DecodeError(path, "is a folder without images", "pillow")
    return PictureReader(path, [os.path.join(path, name) for name in sorted(names, key=natural_order)], short_side)
