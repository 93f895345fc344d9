"""What the packets of a video say without being decoded: whether each is one frame, and where decoding may begin.

A packet is nearly always one frame, but not where a file holds hidden frames, single fields, placeholders, or what was
left of frames when it was cut. ``prove`` answers for those formats whose packets say so themselves.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

# Containers whose index says exactly where each frame is. In others (AVI, MPEG streams, WMV) a seek lands near a frame.
EXACT_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
H264_IDR, H264_SEI, H264_SLICES = 5, 6, range(1, 6)
HEVC_SEI, HEVC_SLICES, HEVC_KEYS = 39, range(32), range(16, 22)
RECOVERY_POINT, ORIENTATION = 6, 47  # messages
HIGH_PROFILES = (44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244)  # their SPS has more fields
RECOVERY, IDR, TURNED = 1, 2, 3  # kinds of starts; the last states how its frames are turned
GAP, MISSING = 10.0, 1.5  # times the usual distance of frames
LONG = 3000  # frames of a variable rate that are not decoded to make sure that none is missing; reading finds it too


@dataclass(frozen=True)
class Proof:
    """Packets that were proven to be frames: the time stamps of those that are shown, in order of display."""

    stamps: list[int]
    keys: list[int]  # of the frames from which decoding may begin, without anything before
    steady: bool  # whether no frame is missing between others
    sure: bool  # whether decoding need not confirm it
    plain: str  # why a decoder that takes every packet for a frame, and every key for a beginning, is wrong; or empty


class BitReader:
    """Reads a bit stream, the most significant bit of each byte first."""

    def __init__(self, data: bytes) -> None:
        self._bits = int.from_bytes(data, "big")
        self._left = len(data) * 8

    def read(self, count: int) -> int:
        """Return the next ``count`` bits as a number."""
        self._left -= count
        return self._bits >> max(self._left, 0) & ((1 << count) - 1)

    def read_golomb(self) -> int:
        """Return the next number in an exponential Golomb code, as H.264 writes them, of 32 bits at most."""
        zeros = 0
        while self._left > 0 and not self.read(1):
            zeros += 1
        if zeros > 32:
            raise IndexError("no number")
        return (1 << zeros) - 1 + self.read(zeros)


@dataclass
class _Packets:
    """What a pass over the packets found: time stamps, in order of decoding."""

    stamps: list[int] = field(default_factory=list)  # of all
    discarded: list[int] = field(default_factory=list)  # cut off by an edit list
    hidden: list[int] = field(default_factory=list)  # references only
    keys: list[int] = field(default_factory=list)
    all_idr: bool = True  # whether nothing is needed before what the container calls key frames


def prove(container: InputContainer, stream: VideoStream) -> Proof | str:
    """Return the frames of a file after a pass over its packets, or why packets and frames need not agree."""
    context = stream.codec_context
    codec, extradata = context.codec.canonical_name, context.extradata or b""
    if container.format.name not in EXACT_CONTAINERS:
        return f"is in a container ({container.format.name}) without an exact index"
    if codec not in SHOWN:
        return f"is in a format ({codec}) whose packets need not be frames"
    if codec == "h264" and not _is_progressive(extradata):
        return "may hold single fields"
    length_size = _length_size(codec, extradata)
    count_shown, find_start = SHOWN[codec], STARTS.get(codec, lambda *_: IDR)
    found = _Packets()
    for packet in container.demux(stream):
        size, pts = packet.size, packet.pts
        if not size and packet.dts is None:  # the end
            continue
        if not size or pts is None or packet.is_corrupt:
            return "has packets that are empty, damaged or without a time"
        data = memoryview(packet)
        shown = count_shown(data, length_size)
        if shown > 1 or (shown == 0 and codec != "vp8"):
            return "has packets that are not one frame each"
        start = find_start(data, length_size) if packet.is_keyframe else 0
        if start == TURNED:
            return "turns its frames one by one"
        if start < IDR:
            found.all_idr = found.all_idr and not packet.is_keyframe
            if not found.stamps:
                return "does not begin with a key frame"
        if start:
            found.keys.append(pts)
        if packet.is_discard:
            found.discarded.append(pts)
        elif not shown:
            found.hidden.append(pts)
        found.stamps.append(pts)
    end = max(found.stamps, default=0)
    return find_end(container, stream, len(found.stamps), end) or _put_in_order(container, stream, found)


def find_end(container: InputContainer, stream: VideoStream, packets: int, last: int) -> str:
    """Say where a file ends before the end that it announces; empty where it does not, or announces none."""
    name = container.format.name
    if name == EXACT_CONTAINERS[0] and packets < len(stream.index_entries):
        return f"is cut short: {packets} of {len(stream.index_entries)} frames are there"
    if name == "avi" and last + 1 < stream.frames - max(2, stream.frames // 50):
        return f"is cut short: {last + 1} of {stream.frames} frames are there"
    announced = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if name == EXACT_CONTAINERS[1] and announced:
        hours, minutes, seconds = map(float, announced.groups())
        end, whole = last * float(stream.time_base or 0), 3600 * hours + 60 * minutes + seconds
        if whole - end > 1 + 2 * end / max(1, packets - 1):  # the last frame's own duration is not known
            return f"is cut short: {end:.1f} of {whole:.1f} seconds are there"
    return ""


def _put_in_order(container: InputContainer, stream: VideoStream, found: _Packets) -> Proof | str:
    stamps, context = np.asarray(found.stamps, dtype=np.int64), stream.codec_context
    order = np.argsort(stamps, kind="stable")
    ascending = stamps[order]
    steps = np.diff(ascending)
    shown = ascending[~np.isin(ascending, found.discarded + found.hidden)]
    if not len(shown) or (steps == 0).any():
        return "has frames at the same time"
    if order[0] != 0:
        return "begins with frames whose references are missing"
    if found.discarded and any(shown[0] < stamp < shown[-1] for stamp in found.discarded):
        return "has an edit list that cuts inside"
    longest, usual = (float(steps.max()), float(np.median(steps))) if len(steps) else (0.0, 0.0)
    if longest > max(GAP * usual, 1 / float(stream.time_base or 1)):
        return "has gaps in its time"
    steady = longest < MISSING * usual
    # How many frames a decoder must hold back to show them in order. FFmpeg's drops what comes later than announced;
    # where none is ever held, times may be those of decoding.
    held, depth = int((np.arange(len(order)) - order.argsort()).max()), context.reorder_depth
    if context.codec.canonical_name in STARTS and (held > depth or (depth and not held and len(order) > depth)):
        return "has frames in another order than it announces"
    plain = ""
    latest_key = np.maximum.accumulate(np.where(np.isin(stamps, found.keys), stamps, stamps[0]))
    if len(shown) < len(stamps) or stamps[0] < 0:
        plain = "has frames that are not shown, or before time 0"
    elif len(container.streams.video) > 1:
        plain = "has several video streams"
    elif not found.all_idr or (stamps < latest_key).any():
        # A frame is stored after a key frame that is shown later: after a seek there, frames are miscounted.
        plain = "has open groups of pictures"
    # Without those that were dropped, a decoder may not show others either, and reports no error.
    sure = steady or len(stamps) == 1 or len(stamps) >= LONG or context.codec.canonical_name not in STARTS
    return Proof(shown.tolist(), sorted(found.keys), steady, sure, plain)


def _length_size(codec: str, extradata: bytes) -> int:
    """Return how many bytes state the length of a NAL unit; 0 where they are not separated by lengths."""
    place = {"h264": 4, "hevc": 21}.get(codec)
    return (extradata[place] & 3) + 1 if place and len(extradata) > place and extradata[0] == 1 else 0


def _nal_units(data: memoryview, length_size: int) -> list[memoryview]:
    """Split a packet of H.264 or HEVC; an empty list where its lengths make no sense."""
    units, place = [], 0
    while length_size and place + length_size < len(data):
        size = int.from_bytes(data[place : place + length_size], "big")
        place += length_size
        if not size or place + size > len(data):
            return []
        units.append(data[place : place + size])
        place += size
    return units


def _count_h264(data: memoryview, length_size: int) -> int:
    return any(unit[0] & 31 in H264_SLICES for unit in _nal_units(data, length_size))


def _count_hevc(data: memoryview, length_size: int) -> int:
    return any(unit[0] >> 1 & 63 in HEVC_SLICES for unit in _nal_units(data, length_size))


def _count_vp8(data: memoryview, _: int) -> int:
    return data[0] >> 4 & 1


def _count_vp9(data: memoryview, _: int) -> int:
    """Count the shown frames of a packet, which may be a superframe: several frames, their sizes at the end."""
    starts, last = [0], data[-1]
    if last & 0xE0 == 0xC0:
        count, width = (last & 7) + 1, (last >> 3 & 3) + 1
        table = data[-1 - count * width : -1]
        if len(data) > 2 + count * width and data[-2 - count * width] == last:
            sizes = [int.from_bytes(table[i * width : (i + 1) * width], "little") for i in range(count)]
            starts = [sum(sizes[:i]) for i in range(count) if sizes[i]]
    shown = 0
    for start in starts:
        # Its bits: 10, the profile (11 has a reserved bit after it), show_existing_frame, frame_type, show_frame.
        header = data[start] << (data[start] & 0b110000 == 0b110000)
        shown += bool(header & 0b1010)
    return shown


def _count_av1(data: memoryview, _: int) -> int:
    """Count the shown frames of a temporal unit: in their headers, show_existing_frame or show_frame is set."""
    shown = place = 0
    while place < len(data):
        header = data[place]
        place += 2 if header & 4 else 1
        size, shift = len(data) - place, 0
        if header & 2:
            size = 0
            while place < len(data):
                byte = data[place]
                size |= (byte & 127) << shift
                place, shift = place + 1, shift + 7
                if not byte & 128 or shift > 56:  # a number has at most eight bytes
                    break
        if header >> 3 & 15 in (3, 6) and place < len(data):  # a frame header, alone or with its frame
            shown += bool(data[place] & 0b10010000)
        place += size
    return shown


def _start_h264(data: memoryview, length_size: int) -> int:
    """Say what start it is: IDR needs nothing before, RECOVERY only for frames that are shown before, 0 is none."""
    found = 0
    for unit in _nal_units(data, length_size):
        if unit[0] & 31 == H264_IDR:
            found = max(found, IDR)
        for kind, message in _messages(unit[1:] if unit[0] & 31 == H264_SEI else b""):
            if kind == ORIENTATION:
                return TURNED
            # The first number of a recovery point is how many frames it takes; 0 is a single bit.
            if kind == RECOVERY_POINT and message[0] & 128:
                found = max(found, RECOVERY)
    return found


def _start_hevc(data: memoryview, length_size: int) -> int:
    found = 0
    for unit in _nal_units(data, length_size):
        kind = unit[0] >> 1 & 63
        found = IDR if kind in HEVC_KEYS else found
        if kind == HEVC_SEI and any(kind == ORIENTATION for kind, _ in _messages(unit[2:])):
            return TURNED
    return found


def _messages(data: memoryview | bytes) -> Iterator[tuple[int, memoryview | bytes]]:
    """Yield the kinds and contents of supplemental messages (SEI)."""
    place = 0
    while place + 2 < len(data):
        numbers = []
        for _ in range(2):  # kind and size; each 255 is to be added to what follows
            number = 0
            while place < len(data) - 1 and data[place] == 255:
                number, place = number + 255, place + 1
            numbers.append(number + data[place])
            place += 1
            if place >= len(data):
                return
        yield numbers[0], data[place:]
        place += numbers[1]


def _is_progressive(extradata: bytes) -> bool:
    """Say whether every picture of H.264 is a whole frame: frame_mbs_only_flag of its sequence parameter sets."""
    if len(extradata) < 8 or extradata[0] != 1 or not extradata[5] & 31:
        return False
    place = 6
    for _ in range(extradata[5] & 31):
        size = int.from_bytes(extradata[place : place + 2], "big")
        sps = extradata[place + 2 : place + 2 + size].replace(b"\0\0\3", b"\0\0")
        if not _has_frames_only(sps):
            return False
        place += 2 + size
    return True


def _has_frames_only(sps: bytes) -> bool:
    bits = BitReader(sps[4:])
    bits.read_golomb()  # seq_parameter_set_id
    if sps[1] in HIGH_PROFILES:
        if bits.read_golomb() == 3:  # chroma_format_idc
            bits.read(1)
        bits.read_golomb()  # bit depths
        bits.read_golomb()
        bits.read(1)
        if bits.read(1):  # scaling matrices: rare, and long to read
            return False
    bits.read_golomb()  # log2_max_frame_num
    order_type = bits.read_golomb()
    if order_type == 0:
        bits.read_golomb()
    elif order_type == 1:
        bits.read(1)
        bits.read_golomb()
        bits.read_golomb()
        for _ in range(min(bits.read_golomb(), 255)):
            bits.read_golomb()
    bits.read_golomb()  # max_num_ref_frames
    bits.read(1)
    bits.read_golomb()  # width and height
    bits.read_golomb()
    return bool(bits.read(1))


Count = Callable[[memoryview, int], int]
# How many frames a packet shows, for the formats whose packets tell.
SHOWN: dict[str, Count] = {
    "h264": _count_h264,
    "hevc": _count_hevc,
    "vp8": _count_vp8,
    "vp9": _count_vp9,
    "av1": _count_av1,
}
# How clean a start a packet is that the container marks as a key frame. In the other formats, each is.
STARTS: dict[str, Count] = {"h264": _start_h264, "hevc": _start_hevc}
