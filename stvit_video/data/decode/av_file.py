"""A video file opened with PyAV: which stream is the video, and its frames as FFmpeg shows them."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import Type
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from stvit_video.data.decode.formats import CODECS, open_file
from stvit_video.data.decode.packets import find_end
from stvit_video.data.decode.types import MAX_PIXELS, DecodeError, Frames, check_size, decode_errors, reduced_size

AV_ERRORS = (av.FFmpegError, OSError, ValueError)
NOT_OPENED, NOT_DECODED = "cannot be opened as video", "frames cannot be decoded"
ASLANT = 0.02  # of a display matrix: about a degree, as in FFmpeg
NOT_VIDEO = Disposition.attached_pic | Disposition.timed_thumbnails
PROGRESS_S = 1.0
CUT_ANYWHERE = ("mpegts", "mpeg", "mpegvideo", "h264", "hevc")

Matrix = tuple[int, int, int, int]


def open_av(path: str, number: int | None = None) -> tuple[InputContainer, VideoStream]:
    """Open a file and its video stream of that number, or the one that ``_choose_stream`` takes."""
    with decode_errors(path, NOT_OPENED, "pyav", AV_ERRORS):
        container = open_file(path, again=number is not None)
    streams = video_streams(container)
    if number is None and len(streams) > 1:
        number = _choose_stream(path, container, streams)
        container.close()
        return open_av(path, number)
    streams = [stream for stream in streams if number in (None, stream.index)]
    if not streams:
        problem = describe_codecs(container)
        container.close()
        raise DecodeError(path, problem, "pyav")
    streams[0].codec_context.thread_count = 1
    with decode_errors(path, NOT_OPENED, "pyav", AV_ERRORS):
        _limit_size(streams[0])
    return container, streams[0]


def _choose_stream(path: str, container: InputContainer, streams: list[VideoStream]) -> int:
    """Return the number of the stream to watch: marked as default, else the longest, else the largest, else the first.

    Single pictures and rare ones (covers, thumbnails) are passed over where another stream has ten times as many.
    """
    packets, ends = dict.fromkeys((s.index for s in streams), 0), dict.fromkeys((s.index for s in streams), 0.0)
    with decode_errors(path, NOT_OPENED, "pyav", AV_ERRORS):
        for packet in container.demux(*streams):
            if packet.size and not packet.is_discard:
                packets[packet.stream_index] += 1
                end = float((packet.pts or packet.dts or 0) * packet.time_base)
                ends[packet.stream_index] = max(ends[packet.stream_index], end)
    most = max(packets.values())
    real = [stream for stream in streams if packets[stream.index] * 10 >= most]

    return max(real, key=lambda stream: _rank(stream, ends[stream.index])).index


def _rank(stream: VideoStream, end: float = 0.0) -> tuple[bool, int, int]:
    size = stream.codec_context.width * stream.codec_context.height
    return bool(stream.disposition & Disposition.default), round(end), size


def video_streams(container: InputContainer) -> list[VideoStream]:
    """Return the streams of a file that can be decoded, without covers and thumbnails that are marked as such."""
    streams = [stream for stream in container.streams.video if not stream.disposition & NOT_VIDEO]
    return [
        stream for stream in streams if stream.codec_context and stream.codec_context.codec.canonical_name in CODECS
    ]


def describe_codecs(container: InputContainer) -> str:
    """Say that nothing of a file can be decoded, with the names of its video codecs."""
    names = ", ".join(stream.codec_context.name for stream in container.streams.video if stream.codec_context)
    return f"has no video stream that can be decoded{f' ({names}); convert it to H.264' if names else ''}"


def live_stream(container: InputContainer, name: str) -> VideoStream:
    """Return the stream to watch of a camera or pipe, chosen as of a file, except that no one knows the longest.

    Raises DecodeError, and ValueError for frames that are too large.
    """
    streams = video_streams(container)
    if not streams:
        raise DecodeError(name, describe_codecs(container), "pyav")
    stream = max(streams, key=_rank)
    _limit_size(stream)
    return stream


def _limit_size(stream: VideoStream) -> None:
    """Refuse frames that are too large, also those that come later. Raises ValueError."""
    context = stream.codec_context
    context.options = {"max_pixels": str(MAX_PIXELS)}
    check_size(context.width, context.height)


def frame_rate(stream: VideoStream) -> float:
    """Return the frames per second that a file states, or 25."""
    return float(stream.average_rate or stream.guessed_rate or 25)


def shown_frames(
    container: InputContainer,
    stream: VideoStream,
    errors: list[Exception],
    prepare: Callable[[av.Packet], None] | None = None,
) -> Iterator[VideoFrame]:
    """Yield frames as FFmpeg shows them: what cannot be decoded is passed over, and the reason added to ``errors``.

    ``prepare`` is called with each packet before it is decoded.
    """
    packets = container.demux(stream)
    packet: av.Packet | None = None
    while packet is None or packet.size or packet.dts is not None:  # the last one is empty: it asks for what is left
        try:
            packet = next(packets)
            if prepare is not None:
                prepare(packet)
            frames = packet.decode()
        except StopIteration:  # after an error in the container, which FFmpeg takes for the end
            packet = av.Packet()
            frames = stream.decode(None)
        except AV_ERRORS as error:
            errors.append(error)
            continue
        yield from frames


def display_matrix(frame: VideoFrame, path: str) -> Matrix:
    """Return (a, b, c, d), each -1, 0 or 1: a pixel at (x, y) is shown at (a x + c y, b x + d y) from some corner.

    Raises DecodeError for frames that are shown aslant.
    """
    side_data: Any = frame.side_data  # its stubs know names only
    matrix = side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return 1, 0, 0, 1
    values = np.frombuffer(matrix, np.int32)[[0, 1, 3, 4]].astype(np.float64)
    a, b, c, d = (np.sign(values) * (np.abs(values) > ASLANT * np.abs(values).max())).astype(int).tolist()
    if (abs(a), abs(b), abs(c), abs(d)) not in ((1, 0, 0, 1), (0, 1, 1, 0)):
        raise DecodeError(path, "is shown aslant by its display matrix; re-encode it upright", "pyav")
    return a, b, c, d


def upright(pixels: Frames, matrix: Matrix) -> Frames:
    """Return stored pixels (H, W, 3) turned and mirrored as the display matrix says."""
    a, b, c, d = matrix
    if b:  # rows become columns
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: b or d, :: a or c]


def shown_size(frame: VideoFrame, matrix: Matrix) -> tuple[int, int]:
    """Return the (width, height) at which a frame is shown."""
    return (frame.height, frame.width) if matrix[1] else (frame.width, frame.height)


class Scaler:
    """Makes frames upright RGB arrays (H, W, 3) of one size, scaled as FFmpeg does."""

    def __init__(self, path: str, short_side: int | None = None) -> None:
        self._path, self._short_side, self._reformatter = path, short_side, VideoReformatter()

    def __call__(self, frame: VideoFrame, first: tuple[int, int] | None) -> Frames:
        """Return a frame at the (width, height) of the ``first``, or at its own; much larger ones are reduced."""
        matrix = display_matrix(frame, self._path)
        own = shown_size(frame, matrix)
        check_size(*own)
        first = first or own
        size = reduced_size(first, self._short_side) or first
        width, height = size[::-1] if matrix[1] else size
        kernel = "BILINEAR" if own == first else "BICUBIC"
        scaled = self._reformatter.reformat(frame, width, height, "rgb24", interpolation=kernel, threads=1)
        return upright(np.asarray(scaled.to_ndarray(), np.uint8), matrix)


def first_size(path: str, number: int) -> tuple[int, int]:
    """Return the (width, height) at which the first frame of a file is shown."""
    container, stream = open_av(path, number)
    with container:
        frame = next(shown_frames(container, stream, []))
        return shown_size(frame, display_matrix(frame, path))


class Survey:
    """Decodes all of a file, calling ``progress`` about once a second, and says what of it is damaged."""

    def __init__(self, path: str, progress: Callable[[], None]) -> None:
        self._path, self._progress, self._starts_clean = path, progress, True
        self.sizes: dict[tuple[int, int], None] = {}  # (width, height) as shown, in the order of their first frames
        self.errors: list[Exception] = []  # why packets could not be decoded
        self.errors_before = 0  # of them those before the first frame
        self.shown = self._flagged = self._packets = self._last = 0

    def frames(self, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
        """Yield all frames."""
        reported = time.monotonic()
        for frame in shown_frames(container, stream, self.errors, self._count):
            if not self.shown:
                self.errors_before = len(self.errors)
            self.shown += 1
            self._flagged += frame.is_corrupt
            self.sizes[shown_size(frame, display_matrix(frame, self._path))] = None
            if time.monotonic() - reported > PROGRESS_S:
                reported = time.monotonic()
                self._progress()
            yield frame

    def _count(self, packet: av.Packet) -> None:
        if not self._packets:
            self._starts_clean = packet.is_keyframe
        self._packets += packet.size > 0
        self._last = max(self._last, (packet.pts or packet.dts or 0) + (packet.duration or 0))

    def damage(self, container: InputContainer, stream: VideoStream) -> str:
        """Say in words what FFmpeg reports about the file; empty where there is nothing."""
        # A recording that was cut anywhere begins with frames whose references are missing.
        was_cut = container.format.name in CUT_ANYWHERE or not self._starts_clean
        failed = len(self.errors) - (self.errors_before if was_cut else 0)
        counts = {"packets cannot be decoded": failed, "frames are damaged": self._flagged}
        found = [f"{count} of its {what}" for what, count in counts.items() if count]
        found += [end] if (end := find_end(container, stream, self._packets, self._last)) else []
        return "; ".join(found)


class Clock:
    """Reads when frames are shown, as FFmpeg does: of two clocks, the one that has gone back less often."""

    def __init__(self, trusts_pts: bool) -> None:
        self._trusts_pts = trusts_pts
        self._last: dict[str, int] = {}
        self._faults = {"pts": 0, "dts": 0}

    def read(self, frame: VideoFrame) -> int | None:
        """Return a frame's time stamp, None where the file states none."""
        stamps = {"pts": frame.pts if self._trusts_pts else None, "dts": frame.dts}
        for name, stamp in stamps.items():
            if stamp is not None:
                self._faults[name] += name in self._last and stamp <= self._last[name]
                self._last[name] = stamp
        pts, dts = stamps.values()
        return pts if pts is not None and (dts is None or self._faults["pts"] <= self._faults["dts"]) else dts
