"""Copies of videos with the predicted classes drawn on the frames."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame
from PIL import Image, ImageDraw, ImageFont

from stvit_video.common.errors import FILESYSTEM_ERRORS, UsageError
from stvit_video.common.files import whole_file
from stvit_video.data.decode.frames import open_video
from stvit_video.data.decode.types import DecodeError, Indices, Reader, Segments, Times, reason
from stvit_video.inference.prediction import Prediction, Window

MIN_SIDE = 240  # pixels; smaller videos are enlarged so that labels fit
MIN_TEXT = 13  # pixels of the font
LINES = 3
FOLDER_RATE = 25.0  # frames per second of a copy of a folder of frames
MIN_STEP_S = 1e-4  # from frame to frame of a copy, which a file can tell apart


@lru_cache(maxsize=8)
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Return Matplotlib's font, which has Latin, Greek and Cyrillic; other scripts show as boxes."""
    import matplotlib  # slow to start, and only copies need it

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


@dataclass
class Copies:
    """Annotated copies in ``folder``."""

    folder: Path
    used: dict[str, int] = field(default_factory=dict)  # names, and how often copies were to have each
    missing: int = 0
    seconds: float = 0.0

    def add(self, prediction: Prediction) -> str:
        """Write a copy of a video as H.264, with the most likely classes of each moment in a corner.

        The copy has no sound, and a name that no other copy has. Returns a line that says where it is, or why there is
        none. Raises UsageError where it would replace the video, and OSError where the folder cannot be written to.
        """
        stem = Path(prediction.path).stem
        name = stem
        started = time.perf_counter()
        while name in self.used:
            self.used[stem] += 1
            name = f"{stem}-{self.used[stem]}"
        self.used[name] = 1
        output = self.folder / f"{name}.mp4"
        if output.exists() and output.samefile(prediction.path):
            raise UsageError(f"--annotate {self.folder} would replace {prediction.path} itself; give another folder.")
        try:
            with (
                open_video(prediction.path) as video,
                whole_file(output, output.suffix) as temporary,
                av.open(os.path.abspath(temporary), "w") as target,  # "a:b/c.mp4" would be a protocol
            ):
                _copy(video, target, prediction)
            return f"annotated copy: {output}"
        except DecodeError as error:
            self.missing += 1
            return f"no annotated copy: {error.message}"
        except (av.FFmpegError, OSError, ValueError, OverflowError) as error:
            # The video was read before, so such an error is that of the copy.
            if isinstance(error, OSError) and error.errno in FILESYSTEM_ERRORS:
                raise OSError(error.errno, error.strerror, str(output)) from error
            self.missing += 1
            return f"no annotated copy: cannot be annotated ({reason(error)})"
        finally:
            self.seconds += time.perf_counter() - started


def _copy(video: Reader, target: av.container.OutputContainer, prediction: Prediction) -> None:
    """Decode, draw and encode one frame at a time, with the same times as in the source, but without its gaps.

    A frame shows the classes of the window whose middle is nearest, among those of its segment of time.
    """
    labels = [prediction.top(LINES, window) for window in prediction.windows]
    try:
        times = video.times()
    except DecodeError:  # a folder of frames
        times = np.arange(video.length) / FOLDER_RATE
    shown = _nearest_windows(prediction.windows, times, video.segments())
    steps = np.diff(times)
    usual = float(np.median(steps[steps > 0])) if (steps > 0).any() else 1 / FOLDER_RATE
    steps[[start - 1 for start, _ in video.segments()[1:]]] = usual
    moments = np.append(0.0, np.maximum(steps, MIN_STEP_S).cumsum())
    stream = None  # the first frame gives the size of the picture
    for picture, moment, window in zip(video.all_frames(), moments, shown, strict=True):
        image = Image.fromarray(picture)
        scale = max(1.0, MIN_SIDE / min(image.size))
        width, height = (2 * round(side * scale / 2) for side in image.size)  # H.264 needs even sides
        image = image.resize((width, height))
        draw(image, labels[window])
        if stream is None:
            rate = Fraction(1 / usual).limit_denominator(1001)
            stream = target.add_stream("libx264", rate=rate, options={"crf": "20", "preset": "veryfast"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.time_base = Fraction(1, 90_000)  # resolves the times of a variable frame rate
        made = VideoFrame.from_image(image)
        made.pts = round(moment * 90_000)
        made.time_base = Fraction(1, 90_000)
        target.mux(stream.encode(made))
    if stream is not None:
        target.mux(stream.encode())


def _nearest_windows(windows: Sequence[Window], times: Times, segments: Segments) -> Indices:
    """Return for each frame the number of the window of its segment whose middle is nearest; 0 for a whole video."""
    found = np.zeros(len(times), np.int64)
    for number, (start, stop) in enumerate(segments):
        own = [i for i, window in enumerate(windows) if window.segment == number and window.span is not None]
        if own:
            middles = np.array([sum(windows[i].span or ()) / 2 for i in own])
            bounds = (middles[1:] + middles[:-1]) / 2
            found[start:stop] = np.array(own)[np.searchsorted(bounds, times[start:stop])]
    return found


def draw(image: Image.Image, scores: Sequence[tuple[str, float]]) -> None:
    """Write classes and their scores into the upper left corner of a picture, light on a dark background."""
    brush = ImageDraw.Draw(image, "RGBA")
    size = max(MIN_TEXT, min(image.size) // 24)
    font = load_font(size)
    percents = [f" {100 * score:.1f} %" for _, score in scores]
    room = image.width - 2 * size - max(map(font.getlength, percents), default=0)
    lines = [f"{shorten(name, room, font)}{percent}" for (name, _), percent in zip(scores, percents, strict=True)]
    row = round(1.35 * size)
    widest = max(map(font.getlength, lines), default=0)
    brush.rectangle((0, 0, widest + size, row * len(lines) + size // 2), fill=(0, 0, 0, 150))
    for i, line in enumerate(lines):
        fill = (255, 255, 255, 255 if i == 0 else 190)
        brush.text((size // 2, size // 4 + i * row), line, font=font, fill=fill)


def shorten(text: str, room: float, font: ImageFont.FreeTypeFont) -> str:
    """Return text in one line, cut at its end where it is wider than ``room`` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "…") > room:
        text = text[:-1].rstrip(" …”")
    return text + "…"
