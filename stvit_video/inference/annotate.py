"""Copies of videos with the predicted classes drawn on the frames."""

import time
from collections.abc import Iterator, Sequence
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
from stvit_video.data.decode.av_file import display_matrix, open_av, shown_frames, upright
from stvit_video.data.decode.frames import open_video
from stvit_video.data.decode.pictures import ImageReader
from stvit_video.data.decode.types import DecodeError, Frames, Indices, Reader, Segments, Times, reason
from stvit_video.inference.predictor import Prediction, Window

MIN_SIDE = 240  # pixels; smaller videos are enlarged so that labels fit
LINES = 3
FOLDER_RATE = 25.0  # frames per second of a copy of a folder of frames
MIN_STEP_S = 1e-4  # from frame to frame of a copy, which a file can tell apart


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
                open_video(prediction.path) as video,
                whole_file(output, output.suffix) as temporary,
                av.open(str(temporary), "w") as target,
            ):
                _copy(video, target, prediction)
            return f"annotated copy: {output}"
        except DecodeError as error:
            self.missing += 1
            return f"no annotated copy: {error.message}"
        except (av.FFmpegError, OSError, ValueError) as error:
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
    labels = [[f"{name} {100 * score:.1f} %" for name, score in prediction.top(LINES, w)] for w in prediction.windows]
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
    for picture, moment, window in zip(_pictures(video), moments, shown, strict=False):
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


def _pictures(video: Reader) -> Iterator[Frames]:
    """Yield the frames (H, W, 3) of a video from its first to its last, which a file is decoded for once."""
    if isinstance(video, ImageReader):
        yield from (video.frames([i])[0] for i in range(video.length))
        return
    container, stream = open_av(video.path)
    with container:
        for frame in shown_frames(container, stream, []):
            pixels = np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
            yield np.ascontiguousarray(upright(pixels, display_matrix(frame, video.path)))


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
