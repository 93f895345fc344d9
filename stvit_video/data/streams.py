"""What commands read, and how: files that arguments name, long videos in windows, cameras, threads that read ahead."""

import glob
import os
import queue
import stat
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple, TypeVar

import av
import numpy as np
from av.video.frame import VideoFrame

from stvit_video.common.errors import UsageError
from stvit_video.data.clips.sampling import TOLERANCE_S, Sampling, mean_step
from stvit_video.data.clips.timeline import KnownTimes
from stvit_video.data.decode.av_file import AV_ERRORS, frame_rate
from stvit_video.data.decode.types import (
    GAP_S,
    MEDIA_SUFFIXES,
    VIDEO_SUFFIXES,
    DecodeError,
    Frames,
    Indices,
    Timeline,
    Times,
    decode_errors,
    find_segments,
    gap_length,
    natural_order,
    reduced_size,
)
from stvit_video.data.lists.folders import describe_passed_over, find_media

TIMEOUT_S = 15.0  # to open a stream, and for each of its packets
JOIN_S = 2.0  # how long to wait for a thread to end
AHEAD = 2  # files begun beyond those that threads are busy with, and unread pieces of each file

RECENT_STEPS = 250  # from frame to frame of a stream, by which a gap is told

LiveFrame = tuple[int, float, VideoFrame]  # of a stream: the number of its segment, its time in seconds, the frame
Source = TypeVar("Source")
Piece = TypeVar("Piece")


def find_sources(names: Sequence[str], images: bool = False) -> tuple[list[str], str | None, str]:
    """Return the files that ``names`` stand for, without duplicates, or else the one camera, stream or pipe.

    The third value says what folders hold that is not used, or is "". A file is itself, whatever its ending. A folder
    stands for the videos in it and below, which folders of frames are too, with ``images`` for each image instead; a
    folder of images alone is one video, its frames. A pattern (``*``, ``?``, ``[...]``, ``**``) stands
    for what it matches. Any other name is returned as it is: reading it fails later, with an error of its own.
    Raises UsageError for a folder or pattern without files, and for a stream beside other names.
    """
    live = next(filter(is_live, names), None)
    if live is not None:
        if len(names) > 1:
            raise UsageError(f"{live} is a camera or stream, which does not end; give it alone.")
        return [], live, ""
    found: list[str] = []
    unused: list[str] = []
    for name in names:
        is_pattern = not os.path.lexists(name) and glob.has_magic(name)
        matching = sorted(glob.glob(name, recursive=True), key=natural_order) if is_pattern else [name]
        inside = [file for match in matching for file in _in_folder(match, images, unused)]
        if not inside and is_pattern:
            raise UsageError(f"Nothing matches {name}; give a pattern that does, or a file or folder.")
        if not inside:
            kinds = MEDIA_SUFFIXES if images else VIDEO_SUFFIXES
            raise UsageError(f"Folder {name} holds no videos; give one with files ending in {', '.join(kinds)}.")
        found += inside
    return list(dict.fromkeys(found)), None, describe_passed_over(unused, os.curdir) if unused else ""


def _in_folder(folder: str, images: bool, unused: list[str]) -> list[str]:
    """Return the videos, or with ``images`` the images too, of a folder; what is no folder is returned as it is.

    Appends to ``unused`` what is passed over.
    """
    if not os.path.isdir(folder):
        return [folder]
    found = find_media(folder, frames=1 if images else 2)
    unused += found.passed_over
    if images:
        return sorted([*found.videos, *found.pictures], key=natural_order)
    if found.pictures and not found.videos:
        return [folder]  # a video that was cut into its frames
    unused += found.pictures
    return sorted(found.videos, key=natural_order)


def is_live(name: str) -> bool:
    """Say whether a command's argument is a camera's number, a stream's address, a device or a pipe."""
    exists = os.path.exists(name)
    mode = os.stat(name).st_mode if exists else 0
    is_number = name.isascii() and name.isdigit() and not exists
    return "://" in name or is_number or stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def check_seconds(window: float | None, step: float | None) -> None:
    """Raise ValueError for a window or step that is too short or too long, or for a step without a window."""
    for name, value in (("window", window), ("step", step)):
        if value is not None and not 0.01 <= value <= 1e6:
            raise ValueError(f"{name} {value:g} is out of range; give 0.01 to 1,000,000 seconds.")
    if step is not None and window is None:
        raise ValueError(f"step {step:g} without a window; give the length of a window in seconds too.")


class Span(NamedTuple):
    """A window of a video: from ``start`` to before ``end``, in seconds after its first frame."""

    start: float
    end: float


class Excerpt(NamedTuple):
    """A window of a file: its time, the segment of the file that it lies in, and its frames."""

    span: Span
    segment: int
    start: int
    stop: int


def windows_of(times: Times, window: float, step: float) -> list[Excerpt]:
    """Return windows of ``window`` seconds over frames shown at ``times``, one every ``step`` seconds.

    They begin anew in each segment of continuous time, and its last one ends with it, so that together they cover it. A
    segment shorter than a window is one window. Windows in which no frame appears are left out.
    """
    found = []
    for segment, (first, stop) in enumerate(find_segments(times)):
        run = times[first:stop] - times[first]
        duration = float(run[-1]) + mean_step(run)
        starts = [0.0]
        if duration > window + TOLERANCE_S:
            last = int((duration - window + TOLERANCE_S) // step)  # the number of the last window that fits
            # Of each frame, the first and the last window that it appears in: not all windows, of which a time lapse
            # has millions.
            firsts = np.maximum((run + TOLERANCE_S - window) // step + 1, 0).astype(np.int64)
            lasts = np.minimum((run + TOLERANCE_S) // step, last).astype(np.int64)
            nexts = np.maximum(firsts, np.append(0, np.maximum.accumulate(lasts)[:-1] + 1))
            numbers = [i for a, b in zip(nexts.tolist(), lasts.tolist(), strict=True) for i in range(a, b + 1)]
            starts = [i * step for i in numbers]
            if last * step + window < duration - TOLERANCE_S and step <= window:
                starts.append(duration - window)
        for start in starts:
            end = min(start + window, duration)
            a, b = np.searchsorted(run, (start - TOLERANCE_S, end - TOLERANCE_S)).tolist()
            b = len(run) if end == duration else b
            if a < b:
                span = Span(float(times[first] + start), float(times[first] + end))
                found.append(Excerpt(span, segment, first + a, first + b))
    return found


def clips_of_windows(video: Timeline, sampler: Sampling, clips: int, windows: Sequence[Excerpt]) -> Indices:
    """Return the indices (windows * clips * frames,) of test clips of each window, as if it were a file of its own."""
    times = video.times()
    parts = [KnownTimes(times[window.start : window.stop]) for window in windows]
    chosen = [sampler.choose(part, clips, None) for part in parts]
    return np.concatenate([window.start + indices for window, indices in zip(windows, chosen, strict=True)])


class LiveWindow(NamedTuple):
    """A window of a stream: its time, the segment that it lies in, and its frames (H, W, 3) with their times."""

    span: Span
    segment: int
    times: KnownTimes
    frames: list[Frames]


def read_windows(address: str, window: float, step: float, short_side: int) -> Iterator[LiveWindow]:
    """Yield each window of ``window`` seconds, one every ``step``, when the first frame after it arrives.

    Times count from the first frame of the stream. Windows begin anew where time is interrupted, as in ``windows_of``;
    the last one of a segment ends with it. Much larger frames are reduced to ``short_side``. Raises DecodeError where
    the stream cannot be read.
    """
    segment = -1
    for segment, run in groupby(_read(address), key=itemgetter(0)):
        yield from _cut_run(run, segment, window, step, short_side)
    if segment < 0:
        raise DecodeError(address, "has no frames", "pyav")


def _cut_run(
    run: Iterator[LiveFrame], segment: int, window: float, step: float, short_side: int
) -> Iterator[LiveWindow]:
    """Yield the windows of one run of continuous time."""
    held: deque[tuple[float, Frames]] = deque()  # the latest frames, with their times in seconds

    def cut(start: float, end: float, until: float) -> LiveWindow:
        shown = [pair for pair in held if start - TOLERANCE_S <= pair[0] < until - TOLERANCE_S]
        times = np.array([time for time, _ in shown])
        return LiveWindow(Span(start, end), segment, KnownTimes(times), [frame for _, frame in shown])

    origin: float | None = None
    start = end = 0.0
    for _, time, frame in run:
        if origin is None:
            origin = start = end = time
        while time >= start + window:
            end = start + window
            found = cut(start, end, until=end)
            if found.frames:  # none where no frame has come for that long
                yield found
            start += step
        while held and held[0][0] < min(start, time - window) - TOLERANCE_S:
            held.popleft()
        width, height = reduced_size((frame.width, frame.height), short_side) or (frame.width, frame.height)
        held.append((time, frame.reformat(width, height, "rgb24").to_ndarray().astype(np.uint8, copy=False)))
    first, last = held[0][0], held[-1][0]
    if last >= end:
        stop = last + ((last - first) / (len(held) - 1) if len(held) > 1 else 0.0)
        yield cut(max(origin or 0.0, stop - window), stop, until=last + 1.0)


def _read(address: str) -> Iterator[LiveFrame]:
    """Yield frames, each with the number of its segment and its time in seconds after the first.

    Where the clock goes back, a segment begins, and time goes on from there.
    """
    location = address
    form = "v4l2" if address.startswith("/dev/video") else None
    if address.isascii() and address.isdigit():
        location = f"/dev/video{address}"
        form = "v4l2" if sys.platform == "linux" else None
        if not Path(location).exists():
            found = ", ".join(sorted(path.name[5:] for path in Path("/dev").glob("video*"))) or "none"
            raise DecodeError(address, f"is no camera here (cameras: {found})")
    with (
        decode_errors(address, "cannot be read as a stream", "pyav", AV_ERRORS),
        av.open(location, "r", form, timeout=TIMEOUT_S, metadata_errors="ignore") as container,
    ):
        if not container.streams.video:
            raise DecodeError(address, "has no video stream", "pyav")
        stream = container.streams.video[0]
        rate = frame_rate(stream)
        offset = previous = None
        segment = 0
        steps: deque[float] = deque(maxlen=RECENT_STEPS)
        for number, frame in enumerate(container.decode(stream)):
            time = frame.time if frame.time is not None else number / rate
            if offset is None or previous is None:
                offset = previous = -time
            elif time + offset < previous:
                offset = previous + 1 / rate - time
                segment += 1
            else:
                step_s = time + offset - previous
                segment += step_s > GAP_S and step_s > gap_length(np.array(steps))
                steps.append(step_s)
            previous = time + offset
            yield segment, previous, frame


def read_ahead(
    sources: Sequence[Source], read: Callable[[Source], Iterator[Piece]], workers: int
) -> Iterator[tuple[int, Piece | DecodeError | None]]:
    """Read sources piece by piece in ``workers`` threads.

    Yields (index of the source, piece) in the order of the list, and at the end of each (index, None), or (index,
    DecodeError) where it cannot be read any further. The threads end when the iterator is closed.
    """
    todo: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    results: list[queue.Queue[Piece | BaseException | None]] = [queue.Queue(AHEAD) for _ in sources]
    closed = threading.Event()

    def work() -> None:
        while (i := todo.get()) is not None and not closed.is_set():
            end: BaseException | None = None
            try:
                for piece in read(sources[i]):
                    results[i].put(piece)
                    if closed.is_set():
                        return
            except BaseException as error:  # raised below, where the caller is
                end = error
            results[i].put(end)

    # Daemons: a thread that waits for a slow file, up to its deadline, does not delay Ctrl-C.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(sources)))]
    for thread in threads:
        thread.start()
    ahead = len(threads) + AHEAD
    for i in range(min(ahead, len(sources))):
        todo.put(i)
    try:
        for i in range(len(sources)):
            while (item := results[i].get()) is not None and not isinstance(item, BaseException):
                yield i, item
            if item is not None and not isinstance(item, DecodeError):
                raise item
            yield i, item
            if i + ahead < len(sources):
                todo.put(i + ahead)
    finally:
        closed.set()
        for result in results:  # a thread that waits for a place in a queue goes on, and sees that it is over
            while not result.empty():
                result.get_nowait()
        for _ in threads:
            todo.put(None)
        for thread in threads:  # a thread still in native code at the end would abort the process
            thread.join(timeout=JOIN_S)
