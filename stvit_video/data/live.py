"""Cameras, streams and pipes, window by window as they come, with clocks that leap, go back or stand still."""

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from stvit_video.common.text import printable
from stvit_video.data.clips.sampling import TOLERANCE_S, ClipSampler
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
from stvit_video.data.windows import BOUND_S, Span

NOT_READ = "cannot be read as a stream"
TIMEOUT_S = 15.0  # to open a stream, and for each of its packets
RECENT_STEPS = 250  # from frame to frame of a stream, by which a gap is told
LONGEST_WAIT_S = 30.0  # before a stream is opened again
MAX_RATE = 1000  # frames per second; those of a window are held in memory
STILL = 3  # frames in a row at one time: from then on the clock stands still, and the rate counts


class LiveFrame(NamedTuple):
    """A frame of a stream. Without pixels, it says how far the time before it reaches."""

    segment: int  # a run of continuous time
    origin: float  # when the segment begins, in seconds after the first frame of the stream
    time: float  # seconds after ``origin``
    pixels: Frames | None
    arrived: float = 0.0  # by the monotonic clock
    waits: bool = True  # whether its source waits for who reads it, as pipes and files do, and cameras do not


class LiveWindow(NamedTuple):
    """A window of a stream: its time, the segment that it lies in, and its frames (H, W, 3) with their times."""

    span: Span
    segment: int
    times: KnownTimes
    frames: list[Frames]
    arrived: float  # when its last frame did, by the monotonic clock
    waits: bool  # see ``LiveFrame``
    first: int | None = None  # of ``read_samples``: the number of its first frame among all samples


def read_windows(
    address: str, window: float, step: float, short_side: int, seconds: float | None = None, reconnect: int = 0
) -> Iterator[LiveWindow]:
    """Yield each window of ``window`` seconds, one every ``step``, when the second frame after it has arrived.

    Times count from the first frame of the stream. Windows begin anew where time is interrupted, as in ``windows_of``;
    the last one of a segment ends with it. Much larger frames are reduced to ``short_side``. Ends after ``seconds`` of
    frames, without the gaps between them, or of waiting for them. A stream that ends or fails is opened again up to
    ``reconnect`` times. Raises DecodeError where the stream cannot be read.
    """
    for segment, run in _read_runs(address, short_side, seconds, reconnect):
        with decode_errors(address, NOT_READ, "pyav", (ValueError,)):
            yield from _cut_run(run, segment, window, step)


def read_samples(
    address: str,
    sampler: ClipSampler,
    group: int,
    step: float,
    short_side: int,
    seconds: float | None = None,
    reconnect: int = 0,
) -> Iterator[LiveWindow]:
    """Yield the last samples of a stream that make a clip, at each ``group`` new ones once ``step`` seconds passed.

    Samples are taken as a dense ``sampler`` takes them from the start of a segment on. The rest is as above.
    """
    count = 0  # of samples
    for segment, run in _read_runs(address, short_side, seconds, reconnect):
        held: deque[LiveFrame] = deque(maxlen=sampler.frames)
        before, due = count, -math.inf
        for sample in _sample(run, sampler.stride, sampler.rate):
            held.append(sample)
            count += 1
            if len(held) < sampler.frames or (count - before) % group or sample.time < due - TOLERANCE_S:
                continue
            due = sample.time + step
            times = np.array([frame.time for frame in held])
            end = sample.origin + sample.time + (times[-1] - times[0]) / max(1, len(times) - 1)
            span = Span(sample.origin + float(times[0]), float(end))
            pixels = [frame.pixels for frame in held if frame.pixels is not None]
            first = count - len(held)
            yield LiveWindow(span, segment, KnownTimes(times), pixels, sample.arrived, sample.waits, first)


def _sample(run: Iterable[LiveFrame], stride: int, rate: float | None) -> Iterator[LiveFrame]:
    """Yield every ``stride``-th frame of a segment, or with ``rate`` of a video of so many frames per second."""
    if rate is None:
        yield from (frame for frame in islice(run, 0, None, stride) if frame.pixels is not None)
        return
    shown: LiveFrame | None = None  # the last one
    number = 0
    for frame in run:
        while shown is not None and number * stride / rate + TOLERANCE_S < frame.time:
            yield shown._replace(time=number * stride / rate)
            number += 1
        shown = shown if frame.pixels is None else frame
    if shown is not None and number * stride / rate <= shown.time + TOLERANCE_S:
        yield shown._replace(time=number * stride / rate)


def _read_runs(
    address: str, short_side: int, seconds: float | None, reconnect: int
) -> Iterator[tuple[int, Iterator[LiveFrame]]]:
    """Yield the number and the frames of each segment."""
    shown = _read_again(address, short_side, reconnect) if reconnect else _read(address, short_side)
    segment = -1
    for segment, run in groupby(shown if seconds is None else _until(seconds, shown), key=itemgetter(0)):
        yield segment, run
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
    held: deque[LiveFrame] = deque()  # the latest frames
    number = count = 0  # of the next window, and of frames
    origin = now = 0.0
    reaches: float | None = None

    def cut(start: float, end: float, until: float) -> Iterator[LiveWindow]:
        shown = [frame for frame in held if start - BOUND_S <= frame.time < until - BOUND_S]
        if shown:
            times = KnownTimes(np.array([frame.time for frame in shown]))
            pixels = [frame.pixels for frame in shown if frame.pixels is not None]
            span = Span(origin + start, origin + end)
            yield LiveWindow(span, segment, times, pixels, shown[-1].arrived, shown[-1].waits)

    def complete(until: float) -> Iterator[LiveWindow]:
        nonlocal number
        stop = max(number, math.floor((until + BOUND_S - window) / step) + 1)
        # Windows from here on have no frame.
        begun = math.floor((held[-1].time + BOUND_S) / step) + 1 if held else 0
        for i in range(number, min(stop, begun)):
            yield from cut(i * step, i * step + window, until=i * step + window)
        number = stop

    for frame in run:
        origin, now = frame.origin, frame.time
        yield from complete(now)
        if frame.pixels is None:
            reaches = now
            break
        while held and held[0].time < min(number * step, now - window) - BOUND_S:
            held.popleft()
        held.append(frame)
        if len(held) > MAX_RATE * max(1.0, window):
            raise ValueError(f"it shows more than {MAX_RATE:,} frames per second; give fewer")
        count += 1
    if not held:
        return
    duration = now + now / max(1, count - 1) if reaches is None else reaches
    yield from complete(duration)
    if number == 0 or (step <= window and (number - 1) * step + window < duration - BOUND_S):
        yield from cut(max(0.0, duration - window), duration, until=math.inf)


def _read_again(address: str, short_side: int, times: int) -> Iterator[LiveFrame]:
    """Yield the frames of a stream that is opened again when it ends or fails: then a segment begins, time going on."""
    began, segment, origin = time.monotonic(), 0, 0.0
    for attempt in range(times + 1):
        error: DecodeError | None = None
        last = segment - 1
        try:
            for frame in _read(address, short_side):
                if last < 0:  # the first of all: opening a camera does not count
                    began, last = time.monotonic(), 0
                last = segment + frame.segment
                yield frame._replace(segment=last, origin=origin + frame.origin)
        except DecodeError as failure:
            error = failure
        if attempt == times:
            if error is not None:
                raise error
            return
        wait = min(2.0**attempt, LONGEST_WAIT_S)
        why = "ended" if error is None else error.message
        print(f"note: {printable(address)} {why}; opened again in {wait:g} s", file=sys.stderr, flush=True)
        time.sleep(wait)
        segment, origin = last + 1, time.monotonic() - began if last >= 0 else 0.0


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
        saying_silence(address) as note_frame,
        open_stream(location, TIMEOUT_S) as container,
    ):
        scheme, is_url, _ = location.partition("://")
        is_file = scheme in ("http", "https", "file") and (
            container.duration is not None or (container.size > 0 and container.format.name != "hls")
        )
        waits = not location.startswith("/dev/video") and (not is_url or is_file)
        stream = live_stream(container, address)
        scale, first = Scaler(address, short_side), None
        for segment, origin, seconds, frame in _tell_time(_decode(address, container, stream), container, stream):
            note_frame()
            first = first or shown_size(frame, display_matrix(frame, address))
            yield LiveFrame(segment, origin, seconds, scale(frame, first), time.monotonic(), waits)


@contextmanager
def saying_silence(address: str) -> Iterator[Callable[[], None]]:
    """Say once when no frame came for TIMEOUT_S; what is provided is called at each frame.

    Reading a pipe has no deadline: whoever fills it may be slow.
    """
    latest, ended = [time.monotonic()], threading.Event()

    def listen() -> None:
        said = 0.0
        while not ended.wait(min(1.0, TIMEOUT_S)):
            if said != latest[0] and time.monotonic() - latest[0] > TIMEOUT_S:
                print(f"note: no frame of {printable(address)} for {TIMEOUT_S:g} s", file=sys.stderr, flush=True)
                said = latest[0]

    threading.Thread(target=listen, daemon=True).start()
    try:
        yield lambda: latest.__setitem__(0, time.monotonic())
    finally:
        ended.set()


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
