"""Cameras, streams and pipes, window by window as they come, with clocks that leap, go back or stand still."""

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from stvit_video.data.clips.sampling import TOLERANCE_S
from stvit_video.data.clips.timeline import KnownTimes
from stvit_video.data.decode.av_file import (
    AV_ERRORS,
    Clock,
    Scaler,
    display_matrix,
    frame_rate,
    live_stream,
    shown_size,
)
from stvit_video.data.decode.formats import open_stream
from stvit_video.data.decode.types import GAP_S, DecodeError, Frames, decode_errors, gap_length, reason
from stvit_video.data.streams import STDIN
from stvit_video.data.windows import Span

NOT_READ = "cannot be read as a stream"
TIMEOUT_S = 15.0  # to open a stream, and for each of its packets
RECENT_STEPS = 250  # from frame to frame of a stream, by which a gap is told
MAX_RATE = 1000  # frames per second; those of a window are held in memory
STILL = 3  # frames in a row at one time: from then on the clock stands still, and the rate counts


class LiveFrame(NamedTuple):
    """A frame of a stream. Without pixels, it says how far the time before it reaches."""

    segment: int  # a run of continuous time
    origin: float  # when the segment begins, in seconds after the first frame of the stream
    time: float  # seconds after ``origin``
    pixels: Frames | None


class LiveWindow(NamedTuple):
    """A window of a stream: its time, the segment that it lies in, and its frames (H, W, 3) with their times."""

    span: Span
    segment: int
    times: KnownTimes
    frames: list[Frames]


def read_windows(
    address: str, window: float, step: float, short_side: int, seconds: float | None = None
) -> Iterator[LiveWindow]:
    """Yield each window of ``window`` seconds, one every ``step``, when the second frame after it has arrived.

    Times count from the first frame of the stream. Windows begin anew where time is interrupted, as in ``windows_of``;
    the last one of a segment ends with it. Much larger frames are reduced to ``short_side``. Ends after ``seconds`` of
    frames, without the gaps between them, or of waiting for them. Raises DecodeError where the stream cannot be read.
    """
    shown = _read(address, short_side)
    segment = -1
    for segment, run in groupby(shown if seconds is None else _until(seconds, shown), key=itemgetter(0)):
        with decode_errors(address, NOT_READ, "pyav", (ValueError,)):
            yield from _cut_run(run, segment, window, step)
    if segment < 0:
        raise DecodeError(address, "has no frames", "pyav")


def _until(seconds: float, frames: Iterable[LiveFrame]) -> Iterator[LiveFrame]:
    """Yield frames for so many ``seconds``, and then one without pixels."""
    began = watched = step = 0.0
    last: LiveFrame | None = None
    for frame in frames:
        if last is None:
            began = time.monotonic()  # opening a camera does not count
        else:  # the last frame of a segment is shown as long as the one before
            step = frame.time - last.time if frame.segment == last.segment else step
            watched += step
        if watched >= seconds - TOLERANCE_S or time.monotonic() - began >= seconds:
            yield frame._replace(time=frame.time - max(0.0, watched - seconds), pixels=None)
            return
        yield frame
        last = frame


def _cut_run(run: Iterator[LiveFrame], segment: int, window: float, step: float) -> Iterator[LiveWindow]:
    """Yield the windows of one segment. Only those in which a frame appears take time."""
    held: deque[tuple[float, Frames]] = deque()  # the latest frames, with their times
    number = count = 0  # of the next window, and of frames
    origin = now = 0.0
    reaches: float | None = None

    def cut(start: float, end: float, until: float) -> Iterator[LiveWindow]:
        shown = [pair for pair in held if start - TOLERANCE_S <= pair[0] < until - TOLERANCE_S]
        if shown:
            times, frames = zip(*shown, strict=True)
            yield LiveWindow(Span(origin + start, origin + end), segment, KnownTimes(np.array(times)), list(frames))

    def complete(until: float) -> Iterator[LiveWindow]:
        nonlocal number
        stop = max(number, math.floor((until + TOLERANCE_S - window) / step) + 1)
        begun = math.floor((held[-1][0] + TOLERANCE_S) / step) + 1 if held else 0  # windows from here on have no frame
        for i in range(number, min(stop, begun)):
            yield from cut(i * step, i * step + window, until=i * step + window)
        number = stop

    for frame in run:
        origin, now = frame.origin, frame.time
        yield from complete(now)
        if frame.pixels is None:
            reaches = now
            break
        while held and held[0][0] < min(number * step, now - window) - TOLERANCE_S:
            held.popleft()
        held.append((now, frame.pixels))
        if len(held) > MAX_RATE * max(1.0, window):
            raise ValueError(f"it shows more than {MAX_RATE:,} frames per second; give fewer")
        count += 1
    if not held:
        return
    duration = now + now / max(1, count - 1) if reaches is None else reaches
    yield from complete(duration)
    if number == 0 or (step <= window and (number - 1) * step + window < duration - TOLERANCE_S):
        yield from cut(max(0.0, duration - window), duration, until=math.inf)


def _read(address: str, short_side: int) -> Iterator[LiveFrame]:
    """Yield the frames of a stream, all of the size of the first."""
    location = "pipe:0" if address == STDIN else address
    if address.isascii() and address.isdigit():
        location = f"/dev/video{address}"
        if not Path(location).exists():
            found = ", ".join(sorted(path.name[5:] for path in Path("/dev").glob("video*"))) or "none"
            raise DecodeError(address, f"is no camera here (cameras: {found})")
    with (
        decode_errors(address, NOT_READ, "pyav", AV_ERRORS),
        open_stream(location, TIMEOUT_S) as container,
    ):
        stream = live_stream(container, address)
        scale, first = Scaler(address, short_side), None
        for segment, origin, seconds, frame in _tell_time(_decode(address, container, stream), container, stream):
            first = first or shown_size(frame, display_matrix(frame, address))
            yield LiveFrame(segment, origin, seconds, scale(frame, first))


def _decode(address: str, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Yield frames as FFmpeg shows them: what is damaged on the way is passed over, but not the whole stream."""
    error, shown = None, False
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.FFmpegError as damage:
            error = damage
            continue
        shown = shown or bool(frames)
        yield from frames
    if error is not None and not shown:
        raise DecodeError(address, f"frames cannot be decoded ({reason(error)})", "pyav")


def _tell_time(
    frames: Iterable[VideoFrame], container: InputContainer, stream: VideoStream
) -> Iterator[tuple[int, float, float, VideoFrame]]:
    """Yield frames with their segment, its origin and their time in it, in seconds.

    Where the clock goes back, a segment begins, and time goes on from there. Where it leaps, one begins too, and time
    leaps with it, as a camera that waits for motion means it.
    """
    unit = float(stream.time_base or 0) or 1e-6
    stated = max(1, round(1 / (frame_rate(stream) * unit)))
    steps: deque[float] = deque(maxlen=RECENT_STEPS)
    segment = still = 0
    before: int | None = None
    shown = origin = offset = 0  # like stamps, in units of the stream's clock
    for stamp, frame in _read_clock(frames, Clock(trusts_pts=container.format.name != "avi"), stated):
        if before is None:
            offset = -stamp
        elif stamp + offset > shown and stamp >= before:
            step_s = (stamp + offset - shown) * unit
            shown = stamp + offset
            if step_s > GAP_S and step_s > gap_length(np.array(steps)):
                segment, origin = segment + 1, shown
            steps.append(step_s)
            still = 0
        else:
            still = still + 1 if stamp >= before else 0
            if not 0 < still < STILL:
                shown += round(float(np.median(steps)) / unit) if steps else stated
            if still == 0:
                segment, origin, offset = segment + 1, shown, shown - stamp
        before = stamp
        yield segment, origin * unit, (shown - origin) * unit, frame


def _read_clock(frames: Iterable[VideoFrame], clock: Clock, step: int) -> Iterator[tuple[int, VideoFrame]]:
    """Yield frames with their time stamps; single ones that are out of line are interpolated, as in ``Index.times``."""
    before: int | None = None
    here: tuple[int, VideoFrame] | None = None
    for frame in frames:
        stamp = clock.read(frame)
        if stamp is None:
            stamp = here[0] + (here[1].duration or step) if here else 0
        if here is not None:
            is_wrong = before is not None and before <= stamp and not before <= here[0] <= stamp
            yield (before + stamp) // 2 if before is not None and is_wrong else here[0], here[1]
            before = here[0]
        here = stamp, frame
    if here is not None:
        yield here
