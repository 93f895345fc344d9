"""Video files to uint8 frames through PyAV, decord or TorchCodec: only the wanted ones, resized where that is cheaper.

decord 0.6.0 as measured: open per item and outside the training process, one thread, ``RuntimeError`` at open and
``DECORDError`` (not its subclass) at read. It and PyAV number frames in the order in which they are shown.
"""

import bisect
import os
from collections.abc import Iterator
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

from stvit_video.data.decode.types import DecodeError, Frames, Indices, Times, reason, reduced_size

AV_ERRORS = (av.FFmpegError, OSError, ValueError)
# Containers whose index says exactly where each frame is. In others (AVI, MPEG streams, WMV) a jump lands near a frame,
# and both libraries then return its neighbours.
EXACT_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
# FLV has no such index but true times, by which PyAV sees where a jump has landed. decord does not look.
TIMED_CONTAINERS = (*EXACT_CONTAINERS, "flv")
# Whose decoders, FFmpeg's own, leave out single frames on request; dav1d would leave out wanted ones too.
CAN_PASS_OVER = ("h264", "hevc", "mpeg4", "mpeg2video")
FAR = 48  # frames that decoding may pass over before a jump to a key frame is cheaper

Wanted = dict[int, int]  # in ascending order: where each frame is in the file, by time or number, and its index


class AvReader:
    """A video file read by PyAV, which knows AV1 too. Raises DecodeError.

    The length is the number of packets that hold a frame to be shown, counted without decoding. Frames that are neither
    wanted nor needed for others are not decoded, and a scaler is set up once a file rather than once a frame: both
    together are why this takes less time than decord here, for the same pixels.
    """

    def __init__(self, path: str, short_side: int | None = None) -> None:
        self.path, self.short_side = path, short_side
        self._container, self._stream = _open_av(path)
        self._scaler = VideoReformatter()
        self._numbered: Iterator[tuple[int, VideoFrame]] | None = None  # frames in turn, where none can be jumped to
        self._passed = 0
        try:
            packets = [(p.pts, p.is_keyframe) for p in self._container.demux(self._stream) if _is_shown(p)]
        except AV_ERRORS as error:
            raise DecodeError(path, f"cannot be opened as video ({reason(error)})", "pyav") from error
        self.length = len(packets)
        if not packets:
            raise DecodeError(path, "has no frames", "pyav")
        stamps = [pts for pts, _ in packets if pts is not None]
        self._stamps: list[int] | None = sorted(set(stamps))
        self._keys = sorted(pts for pts, key in packets if key and pts is not None)
        # Some containers (AVI) say only when a packet is to be decoded. Frames are counted off from the start there.
        if len(self._stamps) < len(packets) or not self._keys:
            self._stamps = None

    def times(self) -> Times:
        """Return when each frame is shown (length,), in seconds after the first."""
        if self._stamps is None:
            rate = self._stream.average_rate or self._stream.guessed_rate
            if not rate:
                raise DecodeError(self.path, "states neither times nor a frame rate", "pyav")
            return np.arange(self.length) / float(rate)
        stamps = np.asarray(self._stamps, dtype=np.float64)
        return (stamps - stamps[0]) * float(self._stream.time_base or 0)

    def frames(self, indices: Indices) -> Frames:
        """Return the frames (N, H, W, 3) at ascending ``indices``."""
        if self._stamps is None or self._container.format.name not in TIMED_CONTAINERS:
            numbered, self._numbered = self._number_from(int(indices[0])), None
            found = self._stack(self._pick(numbered, {index: index for index in indices.tolist()}))
            self._numbered, self._passed = numbered, int(indices[-1]) + 1
            return found
        wanted = {self._stamps[index]: index for index in indices.tolist()}
        try:
            return self._stack(self._jump_and_pick(wanted))
        except DecodeError:  # not for damage alone: after a jump into a gradual refresh, frames are withheld
            self._rewind()
            return self._stack(self._pick(self._decode_on(wanted), wanted))

    def _number_from(self, index: int) -> Iterator[tuple[int, VideoFrame]]:
        """Return the frames with their numbers, going on behind those that were read where ``index`` is there."""
        if self._numbered is not None and index >= self._passed:
            return self._numbered
        self._rewind()
        return enumerate(self._container.decode(self._stream))

    def _stack(self, wanted: Iterator[VideoFrame]) -> Frames:
        try:
            pictures = [self._to_array(frame) for frame in wanted]
        except AV_ERRORS as error:
            raise DecodeError(self.path, f"frames cannot be decoded ({reason(error)})", "pyav") from error
        sizes = {f"{picture.shape[1]}x{picture.shape[0]}" for picture in pictures}
        if len(sizes) > 1:
            raise DecodeError(self.path, f"changes its size ({', '.join(sorted(sizes))}); re-encode it", "pyav")
        return np.stack(pictures)

    def _to_array(self, frame: VideoFrame) -> Frames:
        width, height = reduced_size((frame.width, frame.height), self.short_side) or (None, None)
        picture = self._scaler.reformat(frame, width=width, height=height, format="rgb24", threads=1).to_ndarray()
        return np.rot90(picture, round(frame.rotation / 90))

    def _rewind(self) -> None:
        """Start again; to seek to 0 would be to look for a time, which need not be that of the first frame."""
        self._container.close()
        self._container, self._stream = _open_av(self.path)

    def _jump_and_pick(self, wanted: Wanted) -> Iterator[VideoFrame]:
        """Yield the frames that are wanted by time, from the key frame before each that is far from the one before."""
        for key, run in self._part(wanted):
            self._container.seek(key, stream=self._stream)
            yield from self._pick(self._decode_on(run), run)

    def _part(self, wanted: Wanted) -> list[tuple[int, Wanted]]:
        """Return runs of frames that are cheaper to decode on than to jump between, each with where to jump first."""
        runs: list[tuple[int, Wanted]] = []
        last_stamp = last_index = 0
        for stamp, index in wanted.items():
            key = self._keys[max(0, bisect.bisect_right(self._keys, stamp) - 1)]
            if not runs or (key > last_stamp and index - last_index > FAR):
                runs.append((min(key, stamp), {}))
            runs[-1][1][stamp] = index
            last_stamp, last_index = stamp, index
        return runs

    def _decode_on(self, wanted: Wanted) -> Iterator[tuple[int | None, VideoFrame]]:
        """Decode on from here to frames with their times, without those that are neither wanted nor referred to."""
        context = self._stream.codec_context
        may_pass_over = context.name in CAN_PASS_OVER
        for packet in self._container.demux(self._stream):
            context.skip_frame = "NONREF" if may_pass_over and packet.pts not in wanted else "DEFAULT"
            for frame in packet.decode():
                yield frame.pts, frame

    def _pick(self, decoded: Iterator[tuple[int | None, VideoFrame]], wanted: Wanted) -> Iterator[VideoFrame]:
        """Yield the frames that are wanted, out of those that are decoded."""
        for place, index in wanted.items():
            found = next((pair for pair in decoded if pair[0] is not None and pair[0] >= place), None)
            if found is None:
                raise DecodeError(self.path, f"frame {index} is missing: the file ends before", "pyav")
            if found[0] != place or found[1].is_corrupt:
                raise DecodeError(self.path, f"frame {index} is damaged", "pyav")
            yield found[1]

    def close(self) -> None:
        """Close the file."""
        self._container.close()


class DecordReader:
    """A video file read by decord; frames larger than ``short_side`` are resized inside it. Raises DecodeError."""

    def __init__(self, path: str, short_side: int | None = None) -> None:
        self.path = path
        width, height = _probe(path, "decord", short_side) or (-1, -1)
        try:
            self._reader = decord.VideoReader(
                os.path.abspath(path), ctx=decord.cpu(0), width=width, height=height, num_threads=1
            )
            self.length = len(self._reader)
        except (RuntimeError, decord.DECORDError) as error:
            raise DecodeError(path, f"cannot be opened as video ({reason(error)})", "decord") from error
        if self.length == 0:
            raise DecodeError(path, "has no frames", "decord")

    def times(self) -> Times:
        """Return when each frame is shown (length,), in seconds after the first."""
        starts = self._reader.get_frame_timestamp(np.arange(self.length))[:, 0].astype(np.float64)
        return starts - starts[0]

    def frames(self, indices: Indices) -> Frames:
        """Return the frames (N, H, W, 3) at ascending ``indices``."""
        try:
            return to_numpy(self._reader.get_batch(indices))
        except (RuntimeError, IndexError, decord.DECORDError) as error:
            raise DecodeError(self.path, f"frames cannot be decoded ({reason(error)})", "decord") from error

    def close(self) -> None:
        """Close the file."""
        del self._reader


def to_numpy(batch: Any) -> Frames:
    """Return what decord gives out as an array: its own kind, or a tensor since something imported PyTorchVideo."""
    return batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch)


class TorchCodecReader:
    """A video file read by TorchCodec, where that and FFmpeg are installed. Raises DecodeError.

    Frames come in the file's own size; ``short_side`` is left to the transforms.
    """

    def __init__(self, path: str, short_side: int | None = None) -> None:
        from torchcodec.decoders import VideoDecoder  # optional, and it imports torch

        self.path = path
        _probe(path, "torchcodec")
        try:
            self._decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)
            self.length = len(self._decoder)
        except (RuntimeError, ValueError) as error:
            raise DecodeError(path, f"cannot be opened as video ({reason(error)})", "torchcodec") from error
        if self.length == 0:
            raise DecodeError(path, "has no frames", "torchcodec")

    def times(self) -> Times:
        """Return when each frame is shown (length,), in seconds after the first."""
        reader = AvReader(self.path)
        try:
            return reader.times()
        finally:
            reader.close()

    def frames(self, indices: Indices) -> Frames:
        """Return the frames (N, H, W, 3) at ascending ``indices``."""
        try:
            return self._decoder.get_frames_at(indices.tolist()).data.numpy()
        except (RuntimeError, IndexError, ValueError) as error:
            raise DecodeError(self.path, f"frames cannot be decoded ({reason(error)})", "torchcodec") from error

    def close(self) -> None:
        """Close the file."""
        del self._decoder


def _probe(path: str, decoder: str, short_side: int | None = None) -> tuple[int, int] | None:
    """Return the (width, height) to which decord is to reduce the frames of a file; None where they are not larger.

    Raises DecodeError where decord and TorchCodec would return other frames than those that were asked for.
    """
    container, stream = _open_av(path)
    with container:
        try:
            why = _why_inexact(container, stream)
        except AV_ERRORS as error:
            raise DecodeError(path, f"cannot be opened as video ({reason(error)})", "pyav") from error
        size = reduced_size((stream.codec_context.width, stream.codec_context.height), short_side)
    if why:
        raise DecodeError(path, f"{why}, where {decoder} finds wrong frames; DATA.DECODER auto reads it", decoder)
    return size[::-1] if size and _is_turned(path) else size


def _is_turned(path: str) -> bool:
    """Say whether frames lie on their side, from the first one. decord turns them before it resizes."""
    container, stream = _open_av(path)
    with container:
        try:
            frame = next(container.decode(stream), None)
        except AV_ERRORS as error:
            raise DecodeError(path, f"cannot be opened as video ({reason(error)})", "pyav") from error
    return frame is not None and bool(round(frame.rotation / 90) % 2)


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
            # A frame stored after a later key frame: after a jump to that one, frames are miscounted.
            return "has open groups of pictures"
    return ""


def _is_shown(packet: Packet) -> bool:
    """Say whether a packet holds a frame that a player shows: not one cut off by an edit list, nor by the file's end.

    Nor one of VP8 that only serves as a reference, which its fifth bit says.
    """
    if not packet.size or packet.is_discard or packet.is_corrupt:
        return False
    return packet.stream.codec_context.name != "vp8" or bool(memoryview(packet)[0] >> 4 & 1)


def _open_av(path: str) -> tuple[InputContainer, VideoStream]:
    """Open a file and its first video stream that is not the cover of a sound file."""
    try:
        container = av.open(os.path.abspath(path), metadata_errors="ignore")  # "a:b.mp4" alone would be a protocol
    except AV_ERRORS as error:
        raise DecodeError(path, f"cannot be opened as video ({reason(error)})", "pyav") from error
    for stream in container.streams.video:
        if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic:
            stream.codec_context.thread_count = 1
            return container, stream
    container.close()
    raise DecodeError(path, "has no video stream that can be decoded", "pyav")
