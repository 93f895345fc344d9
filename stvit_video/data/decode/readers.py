"""Video files to uint8 frames: only requested frames, reduced where that saves time.

decord 0.6.0 as measured: open it per item, outside the training process and with one thread; it raises RuntimeError
at open and DECORDError, which is no subclass, at read. It and PyAV number frames in the order in which they are shown.
"""

import bisect
import os
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import av
import decord
import numpy as np
from av import Packet
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from stvit_video.data.decode.types import (
    DecodeError,
    Frames,
    Indices,
    Segments,
    Times,
    decode_errors,
    find_segments,
    reduced_size,
)

AV_ERRORS = (av.FFmpegError, OSError, ValueError)
DECORD_ERRORS = (RuntimeError, IndexError, decord.DECORDError)
TORCHCODEC_ERRORS = (RuntimeError, IndexError, ValueError)
NOT_OPENED, NOT_DECODED = "cannot be opened as video", "frames cannot be decoded"
# Containers whose index says exactly where each frame is. In others (AVI, MPEG streams, WMV) a seek lands near a frame,
# and both libraries then return its neighbours.
EXACT_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
# FLV has no such index, but its times are right: PyAV can tell from them where a seek landed. decord does not check.
TIMED_CONTAINERS = (*EXACT_CONTAINERS, "flv")
# FFmpeg's own decoders for these skip single frames on request; dav1d would skip requested ones too.
CAN_SKIP_FRAMES = ("h264", "hevc", "mpeg4", "mpeg2video")
SEEK_DISTANCE = 48  # frames; over a shorter distance, decoding on is cheaper than seeking to a key frame

# Position of each requested frame in the file, its time stamp or its number, to its index; ascending.
Positions = dict[int, int]
Decoded = Iterator[tuple[int | None, VideoFrame]]  # frames with their positions


class AvReader:
    """Reads a video file with PyAV, which also reads AV1. Raises DecodeError.

    The length is the number of packets that hold a frame to be shown, counted without decoding. Two things make this
    faster than decord for the same pixels: frames that are neither requested nor referenced are not decoded, and a
    scaler is set up once per file instead of once per frame.
    """

    def __init__(self, path: str, short_side: int | None = None) -> None:
        self.path, self.short_side = path, short_side
        self._container, self._stream = _open_av(path)
        self._scaler = VideoReformatter()
        self._numbered: Decoded | None = None  # the frames from where the last request ended, without seeking
        self._next = 0  # the number of the first of them
        with decode_errors(path, NOT_OPENED, "pyav", AV_ERRORS):
            packets = [(p.pts, p.is_keyframe) for p in self._container.demux(self._stream) if _is_shown(p)]
        self.length = len(packets)
        stamps = sorted({pts for pts, _ in packets if pts is not None})
        self._keys = sorted(pts for pts, key in packets if key and pts is not None)
        # Some containers (AVI) only say when to decode a packet. Their frames are counted from the start.
        self._stamps = stamps if len(stamps) == len(packets) and self._keys else None

    def times(self) -> Times:
        if self._stamps is None:
            rate = self._stream.average_rate or self._stream.guessed_rate
            if not rate:
                raise DecodeError(self.path, "states neither times nor a frame rate", "pyav")
            return np.arange(self.length) / float(rate)
        stamps = np.asarray(self._stamps, dtype=np.float64)
        return (stamps - stamps[0]) * float(self._stream.time_base or 0)

    def segments(self) -> Segments:
        return find_segments(self.times())

    def frames(self, indices: Indices) -> Frames:
        if self._stamps is None or self._container.format.name not in TIMED_CONTAINERS:
            if self._numbered is None or indices[0] < self._next:
                self._reopen()
                self._numbered = enumerate(self._container.decode(self._stream))
            numbered, self._numbered = self._numbered, None  # after an error, decoding starts again
            frames = self._stack(self._find(numbered, index, index) for index in indices.tolist())
            self._numbered = numbered
            self._next = int(indices[-1]) + 1
            return frames
        positions = {self._stamps[index]: index for index in indices.tolist()}
        try:
            return self._stack(self._seek_and_find(positions))
        except DecodeError:  # not always damage: after a seek into a gradual refresh, the decoder withholds frames
            self._reopen()
            decoded = self._decode(positions)
            return self._stack(self._find(decoded, stamp, index) for stamp, index in positions.items())

    def _stack(self, frames: Iterator[VideoFrame]) -> Frames:
        arrays = []
        with decode_errors(self.path, NOT_DECODED, "pyav", AV_ERRORS):
            for frame in frames:
                width, height = reduced_size((frame.width, frame.height), self.short_side) or (None, None)
                scaled = self._scaler.reformat(frame, width=width, height=height, format="rgb24", threads=1)
                arrays.append(np.rot90(scaled.to_ndarray(), round(frame.rotation / 90)))
        sizes = {f"{array.shape[1]}x{array.shape[0]}" for array in arrays}
        if len(sizes) > 1:
            raise DecodeError(self.path, f"changes its size ({', '.join(sorted(sizes))}); re-encode it", "pyav")
        return np.stack(arrays)

    def _reopen(self) -> None:
        """Start again. A seek to 0 would look for that time, which need not be the first frame's."""
        self._container.close()
        self._container, self._stream = _open_av(self.path)

    def _seek_and_find(self, positions: Positions) -> Iterator[VideoFrame]:
        """Yield the requested frames, over a short distance by decoding on instead of seeking to a key frame."""
        decoded: Decoded | None = None
        last_stamp = last_index = 0
        for stamp, index in positions.items():
            key = self._keys[max(0, bisect.bisect_right(self._keys, stamp) - 1)]
            if decoded is None or (key > last_stamp and index - last_index > SEEK_DISTANCE):
                self._container.seek(min(key, stamp), stream=self._stream)
                decoded = self._decode(positions)
            last_stamp, last_index = stamp, index
            yield self._find(decoded, stamp, index)

    def _decode(self, positions: Positions) -> Decoded:
        """Yield frames with their times from here on, without those that are neither requested nor referenced."""
        context = self._stream.codec_context
        may_skip = context.name in CAN_SKIP_FRAMES
        for packet in self._container.demux(self._stream):
            context.skip_frame = "NONREF" if may_skip and packet.pts not in positions else "DEFAULT"
            for frame in packet.decode():
                yield frame.pts, frame

    def _find(self, decoded: Decoded, position: int, index: int) -> VideoFrame:
        """Return the frame ``index``, at a position which ``decoded`` has not passed."""
        found, frame = next((pair for pair in decoded if pair[0] is not None and pair[0] >= position), (None, None))
        if frame is None:
            raise DecodeError(self.path, f"frame {index} is missing: the file ends before", "pyav")
        if found != position or frame.is_corrupt:
            raise DecodeError(self.path, f"frame {index} is damaged", "pyav")
        return frame

    def close(self) -> None:
        self._container.close()


class DecordReader:
    """Reads a video file with decord, which resizes much larger frames itself. Raises DecodeError."""

    def __init__(self, path: str, short_side: int | None = None) -> None:
        self.path = path
        width, height = _probe(path, "decord", short_side) or (-1, -1)
        with decode_errors(path, NOT_OPENED, "decord", DECORD_ERRORS):
            self._reader = decord.VideoReader(
                os.path.abspath(path), ctx=decord.cpu(0), width=width, height=height, num_threads=1
            )
            self.length = len(self._reader)

    def times(self) -> Times:
        starts = self._reader.get_frame_timestamp(np.arange(self.length))[:, 0].astype(np.float64)
        return starts - starts[0]

    def segments(self) -> Segments:
        return find_segments(self.times())

    def frames(self, indices: Indices) -> Frames:
        with decode_errors(self.path, NOT_DECODED, "decord", DECORD_ERRORS):
            return to_numpy(self._reader.get_batch(indices))

    def close(self) -> None:
        del self._reader


def to_numpy(batch: Any) -> Frames:
    """Return decord's own array as NumPy's; importing PyTorchVideo makes decord return tensors instead."""
    return batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch)


class TorchCodecReader:
    """Reads a video file with TorchCodec, if installed, and leaves resizing to the transforms. Raises DecodeError."""

    def __init__(self, path: str, short_side: int | None = None) -> None:
        from torchcodec.decoders import VideoDecoder  # optional, and it imports torch

        self.path = path
        _probe(path, "torchcodec")
        with decode_errors(path, NOT_OPENED, "torchcodec", TORCHCODEC_ERRORS):
            self._decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)
            self.length = len(self._decoder)

    def times(self) -> Times:
        with closing(AvReader(self.path)) as reader:
            return reader.times()

    def segments(self) -> Segments:
        return find_segments(self.times())

    def frames(self, indices: Indices) -> Frames:
        with decode_errors(self.path, NOT_DECODED, "torchcodec", TORCHCODEC_ERRORS):
            return self._decoder.get_frames_at(indices.tolist()).data.numpy()

    def close(self) -> None:
        del self._decoder


def _probe(path: str, decoder: str, short_side: int | None = None) -> tuple[int, int] | None:
    """Return the (width, height) to which decord should reduce a file's frames; None where that saves no time.

    Raises DecodeError where decord and TorchCodec would return other frames than the requested ones.
    """
    container, stream = _open_av(path)
    with container, decode_errors(path, NOT_OPENED, "pyav", AV_ERRORS):
        problem = _why_inexact(container, stream)
        size = reduced_size((stream.codec_context.width, stream.codec_context.height), short_side)
    if problem:
        raise DecodeError(path, f"{problem}, where {decoder} finds wrong frames; DATA.DECODER auto reads it", decoder)
    if size is None:
        return None
    container, stream = _open_av(path)
    with container, decode_errors(path, NOT_OPENED, "pyav", AV_ERRORS):
        frame = next(container.decode(stream), None)
    turned = frame is not None and round(frame.rotation / 90) % 2  # decord turns frames before it resizes them
    return size[::-1] if turned else size


def _why_inexact(container: InputContainer, stream: VideoStream) -> str:
    """Return what decord 0.6.0 and TorchCodec 0.17 get wrong about a file; empty where there is nothing."""
    name = container.format.name
    if name not in EXACT_CONTAINERS:
        return f"is in a container ({name}) without an exact index"
    if len(container.streams.video) > 1:
        return "has several video streams"
    seen: set[int] = set()
    latest_key: int | None = None
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.pts is None or packet.pts in seen or packet.pts < 0 or not _is_shown(packet):
            return "has frames that are not shown, or without a time of their own"
        seen.add(packet.pts)
        if packet.is_keyframe:
            latest_key = packet.pts
        elif latest_key is not None and packet.pts < latest_key:
            # The frame is stored after a key frame that is shown later: after a seek there, frames are miscounted.
            return "has open groups of pictures"
    return ""


def _is_shown(packet: Packet) -> bool:
    """Say whether a player shows the packet's frame: neither an edit list nor the end of the file cuts it off."""
    if not packet.size or packet.is_discard or packet.is_corrupt:
        return False
    # The fifth bit of a VP8 frame is 0 where it serves as a reference only.
    return packet.stream.codec_context.name != "vp8" or bool(memoryview(packet)[0] >> 4 & 1)


def _open_av(path: str) -> tuple[InputContainer, VideoStream]:
    """Open a file and its first video stream that is not the cover picture of a sound file."""
    with decode_errors(path, NOT_OPENED, "pyav", AV_ERRORS):
        container = av.open(os.path.abspath(path), metadata_errors="ignore")  # "a:b.mp4" alone would be a protocol
    for stream in container.streams.video:
        if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic:
            stream.codec_context.thread_count = 1
            return container, stream
    container.close()
    raise DecodeError(path, "has no video stream that can be decoded", "pyav")
