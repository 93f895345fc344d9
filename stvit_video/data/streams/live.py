"""Cameras, streams and pipes: what has no length, cannot be opened twice, and is read as it comes."""

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame

from stvit_video.data.decode.types import DecodeError, reason, reduced_size
from stvit_video.data.streams.windows import Buffer, Span

ERRORS = (av.FFmpegError, OSError, ValueError)
TIMEOUT_S = 15.0  # to open a stream, and for each of its packets


def is_live(name: str) -> bool:
    """Say whether a command's argument is a camera's number, a stream's address, a device or a pipe."""
    if name.isascii() and name.isdigit() and not os.path.exists(name):
        return True
    if "://" in name:
        return True
    try:
        mode = os.stat(name).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def read_windows(address: str, window: float, step: float, short_side: int) -> Iterator[tuple[Span, Buffer]]:
    """Yield the frames of each window of ``window`` seconds, one every ``step``, as soon as the next frame has come.

    Times count from the first frame. A stream that ends gives a last window that ends with it. Frames much larger than
    ``short_side`` are reduced. Raises DecodeError where the stream cannot be read.
    """
    buffer, start, end = Buffer(), 0.0, 0.0
    for time, frame in _read(address):
        while time >= start + window:
            span = Span(start, start + window)
            found = buffer.between(span)
            if found.length:  # none where the clock has jumped
                yield span, found
            start, end = start + step, span.end
        buffer.forget(min(start, time - window))
        width, height = reduced_size((frame.width, frame.height), short_side) or (frame.width, frame.height)
        buffer.held.append((time, frame.reformat(width, height, "rgb24").to_ndarray().astype(np.uint8, copy=False)))
    if not buffer.held:
        raise DecodeError(address, "has no frames", "pyav")
    last = buffer.held[-1][0]
    if last >= end:
        times = buffer.times()
        stop = last + (times[-1] / (len(times) - 1) if len(times) > 1 else 0.0)
        rest = Span(max(0.0, stop - window), stop)
        yield rest, buffer.between(Span(rest.start, last + 1.0))


def _read(address: str) -> Iterator[tuple[float, VideoFrame]]:
    """Yield frames with their times, in seconds after the first; a clock that goes back goes on from where it was."""
    try:
        location, form = _location(address)
        with av.open(location, "r", form, timeout=TIMEOUT_S, metadata_errors="ignore") as container:
            if not container.streams.video:
                raise DecodeError(address, "has no video stream", "pyav")
            stream = container.streams.video[0]
            rate = float(stream.average_rate or stream.guessed_rate or 25)
            offset = previous = None
            for number, frame in enumerate(container.decode(stream)):
                time = frame.time if frame.time is not None else number / rate
                if offset is None or previous is None:
                    offset = -time
                elif time + offset < previous:
                    offset = previous + 1 / rate - time
                previous = time + offset
                yield previous, frame
    except ERRORS as error:
        raise DecodeError(address, f"cannot be read as a stream ({reason(error)})", "pyav") from error


def _location(address: str) -> tuple[str, str | None]:
    """Return what PyAV opens a camera or stream by: its file, and the format where that has to be said."""
    if address.isascii() and address.isdigit():
        device = f"/dev/video{address}"
        if not Path(device).exists():
            found = ", ".join(sorted(path.name[5:] for path in Path("/dev").glob("video*"))) or "none"
            raise DecodeError(address, f"is no camera here (cameras: {found})")
        return device, "v4l2" if sys.platform == "linux" else None
    return address, "v4l2" if address.startswith("/dev/video") else None
