"""Images, and folders of images as videos of their frames."""

import os
import struct

import numpy as np
from PIL import Image, ImageOps

from stvit_video.data.decode.types import (
    IMAGE_SUFFIXES,
    DecodeError,
    Frames,
    Indices,
    Reader,
    Segments,
    Times,
    decode_errors,
    natural_order,
    reduced_size,
)

# What Pillow raises for damaged, truncated, foreign and suspiciously large files.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class ImageReader(Reader):
    """Reads an image as a video of one frame, a folder of images of one size as a video of its frames.

    The images of a folder are taken in the natural order of their names. Raises DecodeError.
    """

    def __init__(self, path: str, short_side: int | None = None) -> None:
        self.path, self.paths, self.short_side = path, [path], short_side
        if os.path.isdir(path):
            try:
                names = [name for name in os.listdir(path) if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != "."]
            except OSError as error:
                raise DecodeError(path, f"cannot be listed ({error.strerror})", "pillow") from error
            self.paths = [os.path.join(path, name) for name in sorted(names, key=natural_order)]
        if not self.paths:
            raise DecodeError(path, "is a folder without images", "pillow")
        self._first = read_image(self.paths[0], short_side)
        self.length = len(self.paths)

    def times(self) -> Times:
        if self.length == 1:
            return np.zeros(1)
        raise DecodeError(self.path, "is a folder of frames without a frame rate; unset DATA.FPS", "pillow")

    def segments(self) -> Segments:
        return [(0, self.length)]

    def _read(self, indices: Indices) -> Frames:
        images = []
        for index in indices:
            image = self._first if index == 0 else read_image(self.paths[index], self.short_side)
            if image.shape != self._first.shape:
                name = os.path.basename(self.paths[index])
                raise DecodeError(self.path, f"{name} is of another size than the first frame", "pillow")
            images.append(image)
        return np.stack(images)


def read_image(path: str, short_side: int | None) -> Frames:
    """Return an image (H, W, 3), upright and in RGB without its transparency; of an animation, the first frame.

    Reduced with antialiasing where that saves time, see ``reduced_size``. Raises DecodeError.
    """
    with decode_errors(path, "cannot be read as an image", "pillow", IMAGE_ERRORS), Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow's own conversion clips at 255
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
        image = image.convert("RGB")
    size = reduced_size(image.size, short_side)
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR) if size else image)
