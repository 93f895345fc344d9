"""Cameras, streams and pipes, which have no length and cannot be opened twice: read frame by frame."""

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame

from stvit_video.data.decode.readers import AV_ERRORS
from stvit_video.data.decode.types import DecodeError, decode_errors, reduced_size
from stvit_video.data.streams.windows import Buffer, Span

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
    """Yield the frames of each window of ``window`` seconds, one every ``step``, when the first frame after it arrives.

    Times count from the first frame. When a stream ends, the last window ends with it. Much larger frames are reduced
    to ``short_side``. Raises DecodeError where the stream cannot be read.
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
    """Yield frames with their times in seconds after the first. Where the clock goes back, time goes on from there."""
    with decode_errors(address, "cannot be read as a stream", "pyav", AV_ERRORS):
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


def _location(address: str) -> tuple[str, str | None]:
    """Return the file or address to open with PyAV, and its format where that has to be named."""
    if address.isascii() and address.isdigit():
        device = f"/dev/video{address}"
        if not Path(device).exists():
            found = ", ".join(sorted(path.name[5:] for path in Path("/dev").glob("video*"))) or "none"
            raise DecodeError(address, f"is no camera here (cameras: {found})")
        return device, "v4l2" if sys.platform == "linux" else None
    return address, "v4l2" if address.startswith("/dev/video") else None
