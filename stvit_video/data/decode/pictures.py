"""Images, and folders of images as videos of their frames."""

import contextlib
import fnmatch
import logging
import os
import re
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from decimal import Decimal
from itertools import pairwise

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from stvit_video.data.decode.types import (
    IMAGE_SUFFIXES,
    DecodeError,
    Frames,
    Indices,
    Reader,
    Segments,
    Times,
    check_size,
    decode_errors,
    natural_order,
    reduced_size,
)

logging.getLogger("PIL").addHandler(logging.NullHandler())  # else it prints what it raises as an error too
# What Pillow raises for damaged, truncated, foreign and suspiciously large files.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
FIRST_BYTES = {
    b"\xff\xd8\xff": ".jpeg",
    b"\x89PNG": ".png",
    b"WEBP": ".webp",
    b"BM": ".bmp",
    b"P5": ".pgm",
    b"P6": ".ppm",
    b"II*\0": ".tiff",
    b"MM\0*": ".tiff",
}
# By content, whatever the ending: those of IMAGE_SUFFIXES, and GIF, which the web often calls .jpg.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")

# A number in a file's name: a minus that does not join two words is its sign, a point or comma its decimal one.
SIGNED = re.compile(r"(?:(?<![^\s_=(\[,])-)?[0-9]+(?:[.,][0-9]+)?")
WHOLE = re.compile(r"[0-9]+")
PLACE = re.compile(r"\{[^{}]*\}|%0?[0-9]*d")  # of the number in a template: img_{:05}.jpg, img_%05d.jpg
# Kinds of pictures that lie beside the frames and are none: optical flow, depth, masks, previews.
BESIDE = re.compile(r"(?<![a-z])(flow|depth|masks?|thumb(nail)?s?|heatmaps?)(?![a-z])|^[xyuv][_-]?#|_[xyuv]$")


def is_picture(name: str) -> bool:
    """Say whether a file is an image by its ending; hidden files are none."""
    return name.lower().endswith(IMAGE_SUFFIXES) and name[0] != "."


def is_pattern(path: str) -> bool:
    """Say whether a path is a folder with a pattern of its frames' names: ``FOLDER/img_{:05}.jpg``, or ``img_*``."""
    name = os.path.basename(path).lower()
    is_open = "*" in name or "?" in name or PLACE.search(name)
    return bool(is_open) and name.endswith((*IMAGE_SUFFIXES, "*")) and not os.path.lexists(path)


def match_frames(names: Iterable[str], pattern: str) -> list[str]:
    """Return the pictures whose names match: a template with ``{...}`` or ``%05d`` for the number, or a glob."""
    places = PLACE.split(pattern)
    text = SIGNED.pattern.join(map(re.escape, places)) if len(places) > 1 else fnmatch.translate(pattern)
    return [name for name in filter(is_picture, names) if re.fullmatch(text, name)]


def order_frames(names: Iterable[str], several: bool = False) -> list[str]:
    """Return the frames among the pictures of a folder, in the order of the numbers in their names.

    Pictures of other kinds than the frames are left out: lone ones, and those of BESIDE. Numbers may have a sign and
    decimals. Raises ValueError, with the reason, where it is not clear which are the frames, or one is there twice;
    ``several`` says that a pattern chose them all, so that they may be of several kinds.
    """
    names = sorted(filter(is_picture, names))
    stems = [os.path.splitext(name)[0] for name in names]
    fractions = {found[1] for stem in stems for found in re.finditer(r"[0-9][.,]([0-9]+)", stem)}
    # 1.9, 1.10, 1.11 count parts, as versions do; seconds are written 1.9, 2.0 or 1.90, 2.00.
    parts = len({*map(len, fractions)}) > 1 and any(len(text) > 1 and text[-1] == "0" for text in fractions)
    parts = parts or any(re.search(r"[0-9][.,][0-9]+[.,][0-9]", stem) for stem in stems)
    number = WHOLE if parts else SIGNED
    kinds: dict[str, list[tuple[tuple[Decimal, ...], str]]] = {}
    for name, stem in zip(names, stems, strict=True):
        numbers = tuple(Decimal(text.replace(",", ".")) for text in number.findall(stem))
        kinds.setdefault("" if several else number.sub("#", stem.lower()), []).append((numbers, name))
    found = {kind: frames for kind, frames in kinds.items() if len(frames) > 1}
    if not found:  # nothing but the names tells their order
        return sorted(names, key=natural_order)
    if len(found) > 1:
        found = {kind: frames for kind, frames in found.items() if not BESIDE.search(kind)} or found
    if len(found) > 1:
        raise ValueError(f"pictures of {len(found)} kinds ({_count(found)})")
    ((kind, frames),) = found.items()
    frames.sort()
    twice = next((pair for pair in pairwise(frames) if pair[0][0] == pair[1][0]), None)
    if twice and not several:
        raise ValueError(f"one frame twice ({twice[0][1]} and {twice[1][1]})")
    if not several:
        _check_one_sequence(kind, frames)
    return [name for _, name in frames]


def _check_one_sequence(kind: str, frames: list[tuple[tuple[Decimal, ...], str]]) -> None:
    """Raise ValueError where the last number counts more than once: the frames of several videos, as cam1_001.jpg."""
    fields = [i for i, column in enumerate(zip(*(numbers for numbers, _ in frames), strict=True)) if len({*column}) > 1]
    if len(fields) < 2 or len({numbers[fields[-1]] for numbers, _ in frames}) == len(frames):
        return
    is_clock = len(frames[0][0]) >= 3 and re.search(r"[0-9]{2}[^0-9]?[0-5][0-9][^0-9]?[0-5][0-9]\.\w+$", frames[0][1])
    if is_clock and max(numbers[-1] for numbers, _ in frames) < 60:
        return
    several: dict[str, list[str]] = {}
    for numbers, name in frames:
        first = [f"{number}" if i < fields[-1] else "#" for i, number in enumerate(numbers)]
        several.setdefault("".join(a + b for a, b in zip(kind.split("#"), [*first, ""], strict=False)), []).append(name)
    raise ValueError(f"frames of {len(several)} videos ({_count(several)})")


def _count(kinds: Mapping[str, Sized]) -> str:
    shown = ", ".join(f"{len(frames)} {kind.replace('#', '{}')}" for kind, frames in sorted(kinds.items())[:4])
    return f"{shown}, ..." if len(kinds) > 4 else shown


def find_frames(path: str) -> list[str]:
    """Return the paths of a folder's frames in their order; ``path`` may end in a pattern. Raises DecodeError."""
    folder, pattern = os.path.split(path) if is_pattern(path) else (path, "")
    try:
        names = os.listdir(folder)
        chosen = order_frames(match_frames(names, pattern) if pattern else names, several=bool(pattern))
    except OSError as error:
        raise DecodeError(path, f"cannot be listed ({error.strerror})", "pillow") from error
    except ValueError as error:
        advice = "give a pattern of the frames: DATA.FRAME_PATTERN img_{:05}.jpg, or the path FOLDER/img_{:05}.jpg"
        raise DecodeError(path, f"holds {error}; {advice}", "pillow") from error
    if not chosen:
        raise DecodeError(path, "has no images that match" if pattern else "is a folder without images", "pillow")
    return [os.path.join(folder, name) for name in chosen]


class ImageReader(Reader):
    """Reads an image as a video of one frame, a folder of images of one size as a video of its frames.

    ``path`` may end in a pattern of the frames' names, see ``find_frames``. Raises DecodeError.
    """

    def __init__(self, path: str, short_side: int | None = None) -> None:
        self.path, self.short_side = path, short_side
        self.paths = find_frames(path) if os.path.isdir(path) or is_pattern(path) else [path]
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


@contextlib.contextmanager
def open_image(path: str) -> Iterator[Image.Image]:
    """Open an image, without Pillow's warnings. Raises one of IMAGE_ERRORS, also for one that is too large."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            file = Image.open(path, formats=IMAGE_FORMATS)
        except UnidentifiedImageError as error:
            raise ValueError(f"its content is none of {', '.join(IMAGE_FORMATS)}, or damaged") from error
        with file:
            check_size(*file.size)
            yield file


def image_suffix(path: str) -> str:
    """Return the ending that a file should have by its first bytes, where it is an image; else ""."""
    with open(path, "rb") as file:
        start = file.read(16)
    start = start[8:] if start.startswith(b"RIFF") else start
    return next((suffix for first, suffix in FIRST_BYTES.items() if start.startswith(first)), "")


def read_image(path: str, short_side: int | None) -> Frames:
    """Return an image (H, W, 3), upright and in RGB without its transparency; of an animation, the first frame.

    Reduced with antialiasing where that saves time, see ``reduced_size``. Raises DecodeError.
    """
    with decode_errors(path, "cannot be read as an image", "pillow", IMAGE_ERRORS), open_image(path) as file:
        return convert_image(file, short_side)


def convert_image(image: Image.Image, short_side: int | None) -> Frames:
    """Return an open image as ``read_image`` does. Raises one of IMAGE_ERRORS."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":  # Pillow takes them for 0 to 255, and files mostly hold 0 to 1
        raise ValueError("its pixels are floating-point numbers of an unknown range; save it with 8 bits")
    if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    image = image.convert("RGB")
    size = reduced_size(image.size, short_side)
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR) if size else image)
