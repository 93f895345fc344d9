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
from stvit_video.data.decode.types import reason
from stvit_video.inference.predictor import Prediction

MIN_SIDE = 240  # pixels; smaller videos are enlarged so that labels fit
LINES = 3


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Return Matplotlib's font, which has Latin, Greek and Cyrillic; other scripts show as boxes."""
    import matplotlib  # slow to start, and only copies need it

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


@dataclass
class Copies:
    """Annotated copies in ``folder``."""

    folder: Path
    names: set[str] = field(default_factory=set)
    missing: int = 0
    seconds: float = 0.0

    def add(self, prediction: Prediction) -> str:
        """Write a copy of a video as H.264, with the most likely classes of each moment in a corner.

        The copy has no sound, and a name that no other copy has. Returns a line that says where it is, or why there is
        none. Raises UsageError where it would replace the video, and OSError where the folder cannot be written to.
        """
        stem = Path(prediction.path).stem
        number = 1
        started = time.perf_counter()
        while (name := stem if number == 1 else f"{stem}-{number}") in self.names:
            number += 1
        self.names.add(name)
        output = self.folder / f"{name}.mp4"
        if output.exists() and output.samefile(prediction.path):
            raise UsageError(f"--annotate {self.folder} would replace {prediction.path} itself; give another folder.")
        try:
            with (
                av.open(os.path.abspath(prediction.path), metadata_errors="ignore") as source,
                whole_file(output, output.suffix) as temporary,
                av.open(str(temporary), "w") as target,
            ):
                _copy(source, target, prediction)
            return f"annotated copy: {output}"
        except (av.FFmpegError, OSError, ValueError) as error:
            # The video was read before, so such an error is that of the copy.
            if isinstance(error, OSError) and error.errno in FILESYSTEM_ERRORS:
                raise OSError(error.errno, error.strerror, str(output)) from error
            self.missing += 1
            return f"no annotated copy: cannot be annotated ({reason(error)})"
        finally:
            self.seconds += time.perf_counter() - started


def _copy(source: av.container.InputContainer, target: av.container.OutputContainer, prediction: Prediction) -> None:
    """Decode, draw and encode one frame at a time, with the same time as in the source.

    A frame shows the classes of the window whose middle is nearest.
    """
    windows = prediction.windows
    middles = np.array([0.0 if w.span is None else (w.span.start + w.span.end) / 2 for w in windows])
    labels = [[f"{name} {100 * score:.1f} %" for name, score in prediction.top(LINES, w)] for w in windows]
    if not source.streams.video:
        raise ValueError("it has no video stream")
    shown = source.streams.video[0]
    rate = shown.average_rate or shown.guessed_rate or Fraction(25)
    stream = first = None  # the first frame gives the size of the picture and time 0
    for number, frame in enumerate(source.decode(shown)):
        moment = frame.time if frame.time is not None else number / float(rate)
        first = moment if first is None else first
        image = frame.to_image().rotate(90 * round(frame.rotation / 90), expand=True)
        scale = max(1.0, MIN_SIDE / min(image.size))
        width, height = (2 * round(side * scale / 2) for side in image.size)  # H.264 needs even sides
        image = image.resize((width, height))
        draw(image, labels[int(abs(middles - (moment - first)).argmin())])
        if stream is None:
            stream = target.add_stream("libx264", rate=rate, options={"crf": "20", "preset": "veryfast"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.time_base = Fraction(1, 90_000)  # resolves the times of a variable frame rate
        made = VideoFrame.from_image(image)
        made.pts = round((moment - first) * 90_000)
        made.time_base = Fraction(1, 90_000)
        target.mux(stream.encode(made))
    if stream is not None:
        target.mux(stream.encode())


def draw(image: Image.Image, lines: Sequence[str]) -> None:
    """Write lines into the upper left corner of a picture, light on a dark background."""
    brush = ImageDraw.Draw(image, "RGBA")
    size = max(11, min(image.size) // 18)
    widest = max((brush.textlength(line, font=_font(size)) for line in lines), default=0)
    if widest > image.width - 2 * size:  # shrink the font to fit long names
        size = max(8, int(size * (image.width - 2 * size) / widest))
    row = round(1.35 * size)
    widest = max((brush.textlength(line, font=_font(size)) for line in lines), default=0)
    brush.rectangle((0, 0, widest + size, row * len(lines) + size // 2), fill=(0, 0, 0, 150))
    for i, line in enumerate(lines):
        fill = (255, 255, 255, 255 if i == 0 else 190)
        brush.text((size // 2, size // 4 + i * row), line, font=_font(size), fill=fill)
