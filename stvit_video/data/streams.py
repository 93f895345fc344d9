"""What commands read, and how: files that arguments name, long videos in windows, cameras, threads that read ahead."""

import glob
import os
import queue
import stat
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import av
import numpy as np
from av.video.frame import VideoFrame

from stvit_video.common.errors import UsageError
from stvit_video.data.clips.sampling import TOLERANCE_S, Sampling
from stvit_video.data.clips.timeline import KnownTimes
from stvit_video.data.decode.av_file import AV_ERRORS
from stvit_video.data.decode.types import (
    IMAGE_SUFFIXES,
    MEDIA_SUFFIXES,
    VIDEO_SUFFIXES,
    DecodeError,
    Frames,
    Indices,
    Timeline,
    Times,
    decode_errors,
    natural_order,
    reduced_size,
)

TIMEOUT_S = 15.0  # to open a stream, and for each of its packets
JOIN_S = 2.0  # how long to wait for a thread to end
AHEAD = 2  # files begun beyond those that threads are busy with, and unread pieces of each file

Piece = TypeVar("Piece")


def find_sources(names: Sequence[str], images: bool = False) -> tuple[list[str], str | None]:
    """Return the files that ``names`` stand for, without duplicates, or else the one camera, stream or pipe.

    A file is itself, whatever its ending. A folder stands for the videos in it and below, with ``images`` for the
    images too; a folder of images alone is one video, its frames. A pattern (``*``, ``?``, ``[...]``, ``**``) stands
    for what it matches. Any other name is returned as it is: reading it fails later, with an error of its own.
    Raises UsageError for a folder or pattern without files, and for a stream beside other names.
    """
    live = next(filter(is_live, names), None)
    if live is not None:
        if len(names) > 1:
            raise UsageError(f"{live} is a camera or stream, which does not end; give it alone.")
        return [], live
    suffixes = MEDIA_SUFFIXES if images else VIDEO_SUFFIXES
    found: list[str] = []
    for name in names:
        is_pattern = not os.path.lexists(name) and glob.has_magic(name)
        matching = sorted(glob.glob(name, recursive=True), key=natural_order) if is_pattern else [name]
        inside = [file for match in matching for file in _in_folder(match, suffixes)]
        if not inside and is_pattern:
            raise UsageError(f"Nothing matches {name}; give a pattern that does, or a file or folder.")
        if not inside:
            raise UsageError(f"Folder {name} holds no videos; give one with files ending in {', '.join(suffixes)}.")
        found += inside
    return list(dict.fromkeys(found)), None


def _in_folder(folder: str, suffixes: tuple[str, ...]) -> list[str]:
    """Return the files with these endings in a folder and below; what is no folder is returned as it is."""
    if not os.path.isdir(folder):
        return [folder]
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        found += [os.path.join(parent, name) for name in files if name.lower().endswith(suffixes) and name[0] != "."]
    if not found and any(name.lower().endswith(IMAGE_SUFFIXES) and name[0] != "." for name in os.listdir(folder)):
        return [folder]  # a video that was cut into its frames
    return sorted(found, key=natural_order)


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


def spans_of(times: Times, window: float, step: float) -> list[Span]:
    """Return windows of ``window`` seconds, one every ``step`` seconds, over frames shown at ``times``.

    The last one ends with the video, so that the windows cover all of it. A video shorter than a window is one window.
    """
    frame = times[-1] / (len(times) - 1) if len(times) > 1 else 0.0  # how long the last frame is shown: the mean
    duration = float(times[-1] + frame)
    if duration <= window + TOLERANCE_S:
        return [Span(0.0, duration)]
    count = int((duration - window + TOLERANCE_S) // step) + 1
    spans = [Span(i * step, i * step + window) for i in range(count)]
    if spans[-1].end < duration - TOLERANCE_S and step <= window:
        spans.append(Span(duration - window, duration))
    return spans


def clips_of_spans(video: Timeline, sampler: Sampling, clips: int, spans: Sequence[Span]) -> Indices:
    """Return the indices (spans * clips * frames,) of test clips of each window, as if it were a file of its own."""
    times = video.times()
    chosen: list[Indices] = []
    for first, stop in np.searchsorted(times, np.array(spans) - TOLERANCE_S):
        first = min(int(first), video.length - 1)
        section = times[first : max(first + 1, int(stop))]
        chosen.append(first + sampler(KnownTimes(section - section[0]), clips))
    return np.concatenate(chosen)


def read_windows(
    address: str, window: float, step: float, short_side: int
) -> Iterator[tuple[Span, KnownTimes, list[Frames]]]:
    """Yield each window of ``window`` seconds, one every ``step``, when the first frame after it arrives.

    A window comes with the times and the frames (H, W, 3) that are shown in it. Times count from the first frame. When
    a stream ends, the last window ends with it. Much larger frames are reduced to ``short_side``. Raises DecodeError
    where the stream cannot be read.
    """
    held: deque[tuple[float, Frames]] = deque()  # the latest frames, with their times in seconds

    def cut(start: float, end: float, until: float) -> tuple[Span, KnownTimes, list[Frames]]:
        shown = [pair for pair in held if start - TOLERANCE_S <= pair[0] < until - TOLERANCE_S]
        times = np.array([time for time, _ in shown])
        return Span(start, end), KnownTimes(times - times[:1]), [frame for _, frame in shown]

    start = end = 0.0
    for time, frame in _read(address):
        while time >= start + window:
            end = start + window
            found = cut(start, end, until=end)
            if found[1].length:  # none where the clock has jumped
                yield found
            start += step
        while held and held[0][0] < min(start, time - window) - TOLERANCE_S:
            held.popleft()
        width, height = reduced_size((frame.width, frame.height), short_side) or (frame.width, frame.height)
        held.append((time, frame.reformat(width, height, "rgb24").to_ndarray().astype(np.uint8, copy=False)))
    if not held:
        raise DecodeError(address, "has no frames", "pyav")
    first, last = held[0][0], held[-1][0]
    if last >= end:
        stop = last + ((last - first) / (len(held) - 1) if len(held) > 1 else 0.0)
        yield cut(max(0.0, stop - window), stop, until=last + 1.0)


def _read(address: str) -> Iterator[tuple[float, VideoFrame]]:
    """Yield frames with their times in seconds after the first. Where the clock goes back, time goes on from there."""
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


def read_ahead(
    paths: Sequence[str], start: Callable[[], Callable[[str], Iterator[Piece]]], workers: int
) -> Iterator[tuple[int, Piece | DecodeError | None]]:
    """Read files piece by piece in ``workers`` threads; ``start`` makes a reader for each thread.

    Yields (index of the file, piece) in the order of the list, and at the end of each file (index, None), or (index,
    DecodeError) where it cannot be read any further. The threads end when the iterator is closed.
    """
    todo: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    results: list[queue.Queue[Piece | BaseException | None]] = [queue.Queue(AHEAD) for _ in paths]
    closed = threading.Event()

    def work() -> None:
        read: Callable[[str], Iterator[Piece]] | None = None
        while (i := todo.get()) is not None and not closed.is_set():
            end: BaseException | None = None
            try:
                read = read or start()
                for piece in read(paths[i]):
                    results[i].put(piece)
                    if closed.is_set():
                        return
            except BaseException as error:  # raised below, where the caller is
                end = error
            results[i].put(end)

    # Daemons: a thread that waits for a slow file, up to its deadline, does not delay Ctrl-C.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(paths)))]
    for thread in threads:
        thread.start()
    ahead = len(threads) + AHEAD
    for i in range(min(ahead, len(paths))):
        todo.put(i)
    try:
        for i in range(len(paths)):
            while (item := results[i].get()) is not None and not isinstance(item, BaseException):
                yield i, item
            if item is not None and not isinstance(item, DecodeError):
                raise item
            yield i, item
            if i + ahead < len(paths):
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
