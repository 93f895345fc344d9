"""Video files to uint8 frames: only requested frames, reduced where that saves time.

All readers take the numbers of frames and their times from the file's ``Index``. decord 0.6.0 as measured: open it per
item, outside the training process and with one thread; it raises RuntimeError at open and DECORDError, which is no
subclass, at read.
"""

import bisect
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import av
import numpy as np
from av.video.frame import VideoFrame

from stvit_video.data.decode.av_file import (
    AV_ERRORS,
    NOT_DECODED,
    NOT_OPENED,
    Scaler,
    Survey,
    display_matrix,
    first_size,
    open_av,
    shown_frames,
    shown_size,
)
from stvit_video.data.decode.index import IndexCache, read_index
from stvit_video.data.decode.types import (
    DecodeError,
    Frames,
    Indices,
    Reader,
    Times,
    decode_errors,
    reason,
    reduced_size,
)

TORCHCODEC_ERRORS = (RuntimeError, IndexError, ValueError)
# FFmpeg's own decoders for these skip single frames on request; dav1d would skip requested ones too.
CAN_SKIP_FRAMES = ("h264", "hevc", "mpeg4", "mpeg2video")
REMEDY = "DATA.DECODER pyav reads it"
SAME_TIME_S = 1e-3  # Matroska rounds times to it
PROGRESSIVE = 1  # and what is above it is interlaced
SEEK_DISTANCE = 48  # frames; over a shorter distance, decoding on is cheaper than seeking to a key frame

# Position of each requested frame in the file, its time stamp or its number, to its index; ascending.
Positions = dict[int, int]
Decoded = Iterator[tuple[int | None, VideoFrame]]  # frames with their positions


class AvReader(Reader):
    """Reads a video file with PyAV, which also reads AV1. Raises DecodeError.

    Two things make this faster than decord for the same pixels: frames that are neither requested nor referenced are
    not decoded, and a scaler is set up once per file instead of once per frame.
    """

    def __init__(self, path: str, short_side: int | None = None, cache: IndexCache | None = None) -> None:
        self.path, self.short_side = path, short_side
        self._cache = cache or IndexCache()
        known = self._cache.get(path)
        self._container, self._stream = open_av(path, known.stream if known else None)
        # As the container says, which is nearly always right.
        self._size = self._stream.codec_context.width, self._stream.codec_context.height
        self._scaler = Scaler(path, short_side)
        self._numbered: Decoded | None = None  # the frames from where the last request ended, without seeking
        self._next = 0  # the number of the first of them
        self._trouble = False  # whether the last request met damage after a seek
        self._index = known or read_index(path, self._container, self._stream, False, self._cache)
        self.length = len(self._index.stamps)
        self._note()

    def times(self) -> Times:
        return self._index.times()

    def _note(self) -> None:
        """Remark on what is shown as it is stored."""
        context, shape = self._stream.codec_context, self._stream.sample_aspect_ratio
        if shape and shape != 1:
            self._cache.note(
                "pixels", f"{self.path} has pixels that are not square ({shape}); frames are read as stored."
            )
        if context.field_order > PROGRESSIVE:
            self._cache.note("fields", f"{self.path} is interlaced; frames are read as stored, with both fields.")

    def _read(self, indices: Indices) -> Frames:
        if not self._index.keys:
            if self._numbered is None or indices[0] < self._next:
                self._reopen()
                self._numbered = enumerate(shown_frames(self._container, self._stream, []))
            numbered, self._numbered = self._numbered, None  # after an error, decoding starts again
            frames = self._stack(self._find(numbered, index, index) for index in indices.tolist())
            self._numbered = numbered
            self._next = int(indices[-1]) + 1
            return frames
        positions = dict(zip(self._index.stamps[indices].tolist(), indices.tolist(), strict=True))
        self._trouble = False
        try:
            frames = self._stack(self._seek_and_find(positions))
        except DecodeError:  # not always damage: after a seek, a decoder may withhold frames
            self._trouble = True
        if not self._trouble:
            return frames
        # How damage is concealed depends on all frames before: decoded whole from the start, it looks as in FFmpeg.
        self._reopen()
        shown = self._decode(None)
        return self._stack(self._find(shown, stamp, index) for stamp, index in positions.items())

    def all_frames(self) -> Iterator[Frames]:
        """See Reader. The file is decoded once from its start; damage is shown as FFmpeg conceals it."""
        self._reopen()
        self._numbered = None
        decoded = shown_frames(self._container, self._stream, [])
        for index in range(self.length):
            frame = next(decoded, None)
            if frame is None:
                raise DecodeError(self.path, f"frame {index} is missing: the file ends before", "pyav")
            yield self._stack(iter([frame]))[0]

    def check(self) -> None:
        self.frames([0])
        container, stream = open_av(self.path, self._index.stream)
        stream.codec_context.options["err_detect"] = "explode"  # some damage is concealed without a mark else
        survey = Survey(self.path, self._cache.progress)
        with container:
            for _ in survey.frames(container, stream):
                pass
            problem = survey.damage(container, stream)
        if not problem and survey.shown != self.length:
            problem = f"shows {survey.shown} of {self.length} frames"
        if problem:
            raise DecodeError(self.path, problem, "pyav")

    def _stack(self, frames: Iterator[VideoFrame]) -> Frames:
        arrays: list[Frames] = []
        with decode_errors(self.path, NOT_DECODED, "pyav", AV_ERRORS):
            for frame in frames:
                if self._index.size is None and (frame.width, frame.height) != self._size:
                    self._index = replace(self._index, size=first_size(self.path, self._index.stream))
                arrays.append(self._scaler(frame, self._index.size))
        return np.stack(arrays)

    def _reopen(self) -> None:
        """Start again. A seek to 0 would look for that time, which need not be the first frame's."""
        self._container.close()
        self._container, self._stream = open_av(self.path, self._index.stream)

    def _seek_and_find(self, positions: Positions) -> Iterator[VideoFrame]:
        """Yield the requested frames, over a short distance by decoding on instead of seeking to a key frame."""
        decoded: Decoded | None = None
        last_stamp = last_index = 0
        keys = self._index.keys
        for stamp, index in positions.items():
            key = keys[max(0, bisect.bisect_right(keys, stamp) - 1)]
            if decoded is None or (key > last_stamp and index - last_index > SEEK_DISTANCE):
                self._container.seek(min(key, stamp), stream=self._stream)
                decoded = self._decode(positions)
            last_stamp, last_index = stamp, index
            yield self._find(decoded, stamp, index)

    def _decode(self, positions: Positions | None) -> Decoded:
        """Yield frames with their times from here on: all, or those that are requested or referenced."""
        context = self._stream.codec_context
        may_skip = positions is not None and self._index.steady and context.name in CAN_SKIP_FRAMES
        wanted, keys, landed = positions or {}, set(self._index.keys), positions is None

        def skip(packet: av.Packet) -> None:
            nonlocal landed
            if not landed and packet.size and packet.pts not in keys:
                raise DecodeError(self.path, "cannot be sought in: its table of key frames is wrong", "pyav")
            landed = True
            context.skip_frame = "NONREF" if may_skip and packet.pts not in wanted else "DEFAULT"

        errors: list[Exception] = []
        for frame in shown_frames(self._container, self._stream, errors, skip):
            if errors:  # frames are lost, so that FFmpeg numbers those after them otherwise
                raise DecodeError(self.path, f"{NOT_DECODED} ({reason(errors[0])})", "pyav")
            self._trouble = self._trouble or frame.is_corrupt
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


class DecordReader(Reader):
    """Reads a video file with decord, which resizes much larger frames itself. Raises DecodeError."""

    def __init__(self, path: str, short_side: int | None = None, cache: IndexCache | None = None) -> None:
        import decord  # optional where it has no wheel, and slow to import

        decord.logging.set_level(decord.logging.QUIET)  # it raises what it would print about a damaged file
        self.path, self._errors = path, (RuntimeError, IndexError, decord.DECORDError)
        self._times, size = _prove_plain(path, "decord", short_side, cache)
        width, height = size or (-1, -1)
        with decode_errors(path, NOT_OPENED, "decord", self._errors):
            self._reader = decord.VideoReader(
                os.path.abspath(path), ctx=decord.cpu(0), width=width, height=height, num_threads=1
            )
            self.length = len(self._reader)
            starts = self._reader.get_frame_timestamp(np.arange(self.length))[:, 0]
        if self.length != len(self._times) or np.abs(starts - starts[:1] - self._times).max(initial=0) > SAME_TIME_S:
            raise DecodeError(path, f"is numbered otherwise by decord; {REMEDY}", "decord")

    def times(self) -> Times:
        return self._times

    def _read(self, indices: Indices) -> Frames:
        with decode_errors(self.path, NOT_DECODED, "decord", self._errors):
            return to_numpy(self._reader.get_batch(indices))

    def close(self) -> None:
        del self._reader


def to_numpy(batch: Any) -> Frames:
    """Return decord's own array as NumPy's; importing PyTorchVideo makes decord return tensors instead."""
    return batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch)


class TorchCodecReader(Reader):
    """Reads a video file with TorchCodec, if installed, and leaves resizing to the transforms. Raises DecodeError."""

    def __init__(self, path: str, short_side: int | None = None, cache: IndexCache | None = None) -> None:
        from torchcodec.decoders import VideoDecoder  # optional, and it imports torch

        self.path = path
        self._times, _ = _prove_plain(path, "torchcodec", None, cache)
        with decode_errors(path, NOT_OPENED, "torchcodec", TORCHCODEC_ERRORS):
            self._decoder = VideoDecoder(os.path.abspath(path), dimension_order="NHWC", num_ffmpeg_threads=1)
            self.length = len(self._decoder)
        if self.length != len(self._times):
            raise DecodeError(path, f"is numbered otherwise by torchcodec; {REMEDY}", "torchcodec")

    def times(self) -> Times:
        return self._times

    def _read(self, indices: Indices) -> Frames:
        with decode_errors(self.path, NOT_DECODED, "torchcodec", TORCHCODEC_ERRORS):
            return self._decoder.get_frames_at(indices.tolist()).data.numpy()

    def close(self) -> None:
        del self._decoder


def _prove_plain(
    path: str, decoder: str, short_side: int | None, cache: IndexCache | None
) -> tuple[Times, tuple[int, int] | None]:
    """Return the times of a file's frames, and the (width, height) to reduce them to; None where that saves no time.

    Raises DecodeError where a decoder that takes every packet for a frame would return others than FFmpeg shows. All of
    the file is decoded for that, once: damage is nowhere else to be seen, and decord shows other frames there.
    """
    container, stream = open_av(path)
    with container, decode_errors(path, NOT_OPENED, "pyav", AV_ERRORS):
        index = read_index(path, container, stream, True, cache or IndexCache())
        problem = index.plain or index.damage
        if not problem and sum(entry.is_keyframe for entry in stream.index_entries) > len(index.keys):
            problem = "has no table of key frames"
    if problem:
        raise DecodeError(path, f"{problem}, where {decoder} finds wrong frames; {REMEDY}", decoder)
    container, stream = open_av(path, index.stream)
    with container, decode_errors(path, NOT_OPENED, "pyav", AV_ERRORS):
        frame = next(container.decode(stream))
    a, b, c, d = matrix = display_matrix(frame, path)
    if a * d < b * c:
        raise DecodeError(path, f"is mirrored, which {decoder} ignores; {REMEDY}", decoder)
    return index.times(), reduced_size(shown_size(frame, matrix), short_side)  # decord turns frames, then resizes
