"""Images as videos: an image file is a video of one frame, a folder of images a video of its frames."""

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
    decode_errors,
    natural_order,
    reduced_size,
)

# What Pillow raises for damaged, truncated, foreign and suspiciously large files.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def read_image(path: str, short_side: int | None) -> Frames:
    """Return an image (H, W, 3), upright and in RGB; of an animation, the first frame.

    Reduced with antialiasing where that saves time, see ``reduced_size``. Raises DecodeError.
    """
    with decode_errors(path, "cannot be read as an image", "pillow", IMAGE_ERRORS), Image.open(path) as file:
        image = _to_rgb(ImageOps.exif_transpose(file))
    size = reduced_size(image.size, short_side)
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR) if size else image)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode in RGB, without its transparency."""
    if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    return image.convert("RGB")


class ImageReader:
    """Reads the images at ``paths``, all of one size, as the frames of a video. Raises DecodeError."""

    def __init__(self, path: str, paths: list[str], short_side: int | None) -> None:
        self.path, self.paths, self.short_side = path, paths, short_side
        self._first = read_image(paths[0], short_side)
        self.length = len(paths)

    def times(self) -> Times:
        """Return the time of a single image, which is 0; raises DecodeError for a folder, which states no times."""
        if self.length == 1:
            return np.zeros(1)
        raise DecodeError(self.path, "is a folder of frames without a frame rate; unset DATA.FPS", "pillow")

    def frames(self, indices: Indices) -> Frames:
        """Return the frames (N, H, W, 3) at ``indices``."""
        images = []
        for index in indices:
            image = self._first if index == 0 else read_image(self.paths[index], self.short_side)
            if image.shape != self._first.shape:
                name = os.path.basename(self.paths[index])
                raise DecodeError(self.path, f"{name} is of another size than the first frame", "pillow")
            images.append(image)
        return np.stack(images)

    def close(self) -> None:
        """Do nothing: no file is held open."""


def open_folder(path: str, short_side: int | None = None) -> ImageReader:
    """Open a folder of images as a video, in the natural order of their names. Raises DecodeError."""
    try:
        names = [name for name in os.listdir(path) if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != "."]
    except OSError as error:
        raise DecodeError(path, f"cannot be listed ({error.strerror})", "pillow") from error
    if not names:
        raise DecodeError(path, "is a folder without images", "pillow")
    return ImageReader(path, [os.path.join(path, name) for name in sorted(names, key=natural_order)], short_side)
