"""Files as other people's cameras, converters, recorders and accidents leave them, made with FFmpeg's command line.

``ENCODED`` are written by the encoders themselves, ``EDITED`` are made of those by remuxing or by changing bytes. All
show ``COUNT`` frames that carry their number (``numbered_frames``) above a band of noise, unless said otherwise.
"""

import importlib.util
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from tests.conftest import numbered_frames

COUNT, RATE, HEIGHT, WIDTH = 50, 25, 64, 96
X264 = "-c:v libx264 -preset veryfast -threads 1"
X265 = "-c:v libx265 -preset ultrafast -x265-params log-level=none:pools=none:frame-threads=1"

# Name of the file: options of its encoding and its muxer.
ENCODED = {
    # Each container and codec, with frames stored in another order than shown where the codec allows it.
    "b_frames.mp4": f"{X264} -g 12 -bf 2",
    "pyramid.mkv": f"{X264} -g 25 -bf 5 -b_strategy 0 -x264-params b-pyramid=normal:ref=4",
    "open_groups.mp4": f"{X264} -g 12 -bf 2 -x264-params open-gop=1",
    "one_group.mp4": f"{X264} -g 1000 -bf 2",
    "key_frames_only.mov": f"{X264} -g 1",
    "refresh.mp4": f"{X264} -x264-params intra-refresh=1:keyint=20:scenecut=0",
    "fragments.mp4": f"{X264} -g 12 -bf 2 -movflags empty_moov+frag_keyframe+default_base_moof",
    "faststart.mp4": f"{X264} -g 12 -bf 0 -movflags faststart",
    "negative_offsets.mp4": f"{X264} -g 12 -bf 2 -movflags negative_cts_offsets",
    "interlaced.mp4": f"{X264} -g 12 -bf 2 -flags +ildct+ilme -x264-params tff=1",
    "stream.ts": f"{X264} -g 12 -bf 2",
    "camera.mts": f"{X264} -g 12 -bf 2 -f mpegts -mpegts_m2ts_mode 1",
    "tags.flv": f"{X264} -g 12 -bf 2",
    "b_frames.avi": f"{X264} -g 12 -bf 2",
    "bare.h264": f"{X264} -g 12 -bf 2",
    "live.mkv": f"{X264} -g 12 -bf 2 -f matroska -live 1",
    "open_groups_hevc.mp4": f"{X265}:keyint=12:bframes=3:open-gop=1:b-adapt=0 -tag:v hvc1",
    "ten_bits.mkv": f"{X265}:keyint=12:bframes=3 -pix_fmt yuv420p10le",
    "hevc.ts": f"{X265}:keyint=12:bframes=3:open-gop=1:b-adapt=0",
    "fields_hevc.mkv": f"{X265}:keyint=12:interlace=tff",
    "bare.hevc": f"{X265}:keyint=12:bframes=3",
    "av1.mp4": "-c:v libsvtav1 -preset 12 -g 12 -svtav1-params lp=1",
    "av1.webm": "-c:v libsvtav1 -preset 12 -g 24 -svtav1-params lp=1",
    "vp9.webm": "-c:v libvpx-vp9 -cpu-used 8 -deadline realtime -b:v 300k -g 12",
    "vp9_hidden.webm": "-c:v libvpx-vp9 -cpu-used 5 -b:v 300k -g 25 -auto-alt-ref 1 -lag-in-frames 16",
    "vp9.mp4": "-c:v libvpx-vp9 -cpu-used 5 -b:v 300k -g 12 -auto-alt-ref 1 -lag-in-frames 16",
    "vp9.ivf": "-c:v libvpx-vp9 -cpu-used 5 -b:v 300k -g 12 -auto-alt-ref 1 -lag-in-frames 16",
    "vp8.webm": "-c:v libvpx -cpu-used 5 -b:v 300k -g 12 -auto-alt-ref 1 -lag-in-frames 16",
    "mpeg4.avi": "-c:v mpeg4 -q 2 -g 12 -bf 0",
    "mpeg4_b_frames.avi": "-c:v mpeg4 -q 2 -g 12 -bf 2 -vtag DX50",
    "mpeg4_b_frames.mp4": "-c:v mpeg4 -q 2 -g 12 -bf 2",
    "xvid.avi": "-c:v libxvid -q 2 -g 12 -bf 2",
    "mpeg1.mpg": "-c:v mpeg1video -q 2 -g 12 -bf 2",
    "mpeg2.vob": "-c:v mpeg2video -q 2 -g 12 -bf 2 -f vob",
    "mpeg2.ts": "-c:v mpeg2video -q 2 -g 12 -bf 2 -flags +ildct+ilme",
    "mpeg2.mkv": "-c:v mpeg2video -q 2 -g 12 -bf 2 -flags -cgop",
    "mpeg2.mxf": "-c:v mpeg2video -q 2 -g 12 -bf 2",
    "windows.wmv": "-c:v wmv2 -q 2 -g 12",
    "windows.asf": "-c:v msmpeg4 -q 2 -g 12",
    "flash.flv": "-c:v flv -q 2 -g 12",
    "theora.ogv": "-c:v libtheora -q 8 -g 12",
    "phone.3gp": "-c:v h263 -q 2 -g 12 -s 176x144",
    "real.rm": "-c:v rv20 -q 2 -g 12 -s 176x144",
    "camera.dv": "-c:v dvvideo -s 720x576 -pix_fmt yuv420p -frames:v 6",
    "camera.avi": "-c:v mjpeg -q 2 -pix_fmt yuvj420p",
    "bare.mjpeg": "-c:v mjpeg -q 2 -pix_fmt yuvj422p",
    "prores.mov": "-c:v prores_ks -profile:v 3 -frames:v 20",
    "ffv1.mkv": "-c:v ffv1 -pix_fmt yuv444p",
    "huffyuv.avi": "-c:v huffyuv -pix_fmt rgb24",
    "animation.mov": "-c:v qtrle",
    "raw.avi": "-c:v rawvideo -pix_fmt bgr24",
    "raw.y4m": "-pix_fmt yuv420p",
    "animation.gif": "-frames:v 20",
    "animation.apng": "-frames:v 20",
    "zmbv.avi": "-c:v zmbv",
    "svq1.mov": "-c:v svq1 -q 2 -g 12 -pix_fmt yuv410p",
    "video1.avi": "-c:v msvideo1 -q 2",
    "utvideo.nut": "-c:v utvideo",
    "bare.m4v": "-c:v mpeg4 -q 2 -g 12 -bf 2 -f m4v",
    "recorder.wtv": "-c:v mpeg2video -q 2 -g 12 -bf 2",
    "dash.mp4": f"{X264} -g 12 -bf 2 -movflags dash+frag_keyframe+empty_moov+global_sidx",
    "timecode.mov": f"{X264} -g 12 -bf 2 -timecode 01:00:00:00",
    # Pictures of other kinds.
    "alpha.mov": "-c:v png -pix_fmt rgba",
    "alpha.webm": "-c:v libvpx-vp9 -cpu-used 8 -deadline realtime -b:v 300k -g 12 -pix_fmt yuva420p",
    "gray16.mkv": "-c:v ffv1 -pix_fmt gray16le",
    "bt2020.mp4": f"{X265}:keyint=12 -pix_fmt yuv420p10le -vf scale=out_color_matrix=bt2020 -colorspace bt2020nc",
    "gray.mp4": f"{X264} -pix_fmt gray",
    "full_colour.mp4": f"{X264} -pix_fmt yuv444p",
    "full_range.mp4": f"{X264} -pix_fmt yuvj420p",
    "rgb.mkv": "-c:v libx264rgb -preset veryfast -threads 1",
    "bt709.mp4": f"{X264} -vf scale=out_color_matrix=bt709 -colorspace bt709 -color_primaries bt709 -color_trc bt709",
    "odd_size.mp4": f"{X264} -g 12 -pix_fmt yuv444p -s 67x51",
    "odd_size.mkv": "-c:v ffv1 -pix_fmt yuv420p -s 67x51",
    "wide_pixels.mp4": f"{X264} -g 12 -vf setsar=16/11",
    # Clocks.
    "one_frame.mp4": f"{X264} -frames:v 1",
    "two_frames.avi": "-c:v mpeg4 -q 2 -frames:v 2",
    "fast.mp4": f"{X264} -g 12 -bf 2 -fps_mode passthrough -enc_time_base 1:120 -vf settb=1/120,setpts=N",
    "ntsc.mkv": f"{X264} -g 12 -bf 2 -r 30000/1001 -vf setpts=N*1001/30000/TB",
    "slow.mp4": f"{X264} -g 12 -bf 0 -r 1/10 -vf setpts=N*10/TB",
    # More frames than milliseconds, which are Matroska's unit.
    "faster.mkv": f"{X264} -g 12 -bf 0 -fps_mode passthrough -enc_time_base 1:2400 -vf settb=1/2400,setpts=N",
    "hourly.mp4": f"{X264} -g 12 -bf 0 -r 1/3600 -vf setpts=N*3600/TB",
    "variable.mp4": f"{X264} -g 12 -bf 2 -fps_mode vfr -enc_time_base 1:1000 -vf setpts=(N+0.4*mod(N\\,3))/25/TB",
    "variable.mkv": f"{X264} -g 12 -bf 2 -fps_mode vfr -enc_time_base 1:1000 -vf setpts=(N*N/10+N)/25/TB",
    "late.mp4": f"{X264} -g 12 -bf 2 -output_ts_offset 7.3",
    "late.ts": f"{X264} -g 12 -bf 2 -output_ts_offset 95442.5",  # the clock of 33 bits wraps
    # Sources of edited files only.
    "_plain.mp4": f"{X264} -g 12 -bf 0",
    "_again.ts": f"{X264} -g 12 -bf 2 -output_ts_offset 3600",
    "_again.flv": f"{X264} -g 12 -bf 2",
    "_pairs.avi": "-c:v mpeg4 -q 2 -g 24 -bf 1 -b_strategy 0 -sc_threshold 1000000000",
    "_halves.mp4": "-c:v mpeg4 -q 2 -g 12 -bf 0 -enc_time_base 1:50 -fps_mode passthrough",
    "_cover.mp4": "-c:v mjpeg -pix_fmt yuvj420p -frames:v 1 -s 320x240",
    "_small.mp4": f"{X264} -g 12 -s 32x24",
    "_chain_hevc.mp4": f"{X265}:keyint=250:bframes=0",
    "_pyramid.mov": f"{X264} -g 8 -bf 5 -b_strategy 0",
    "_small.h264": f"{X264} -g 12 -s 32x24",
    "_small.ts": f"{X264} -g 12 -s 32x24",
    "_small.webm": "-c:v libvpx -cpu-used 5 -b:v 300k -g 12 -s 32x24",
    "_other.mp4": f"{X264} -g 12 -bf 3 -x264-params cabac=0:ref=1",
    "_sound.m4a": "-map 1:a -t 3 -c:a aac",
}


VOP = b"\0\0\1\xb6"  # what starts a frame of MPEG-4
Change = Callable[[list[av.Packet]], Iterable[av.Packet]]


@dataclass(frozen=True)
class Edited:
    """How a file is made of encoded ones, and what is to be known of it."""

    make: Callable[[Path, Path], object]  # called with the folder of the sources and the path to write
    sources: tuple[str, ...]
    stream: int = 0  # which of the file's video streams is meant
    starts: tuple[int, ...] | None = ()  # the frames before which time jumps; None: not to be told for sure
    versions: bool = False  # FFmpeg's versions do not agree on what can be shown
    damaged: bool | None = False  # not all frames can be shown as they were encoded; None: this need not be noticed


def find_command() -> str | None:
    """Return FFmpeg's command: the system's, or the one that comes with imageio-ffmpeg."""
    if importlib.util.find_spec("imageio_ffmpeg") and not shutil.which("ffmpeg"):
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    return shutil.which("ffmpeg")


COMMAND = find_command()


def ffmpeg(options: str, folder: Path, *more: str | Path, data: bytes = b"") -> None:
    """Run FFmpeg's command in a folder, with ``data`` as its input."""
    assert COMMAND is not None
    subprocess.run([COMMAND, "-v", "error", "-y", *options.split(), *more], cwd=folder, input=data, check=True)


def copied(options: str, **about: Any) -> Edited:
    """Describe a file that FFmpeg writes from others without encoding."""
    sources = tuple(re.findall(r"-i (\S+)", options))
    return Edited(lambda folder, path: ffmpeg(options, folder, "-c", "copy", path), sources, **about)


def changed(name: str, change: Callable[[bytes], bytes], **about: Any) -> Edited:
    """Describe a file whose bytes are those of another, changed."""
    return Edited(lambda folder, path: path.write_bytes(change((folder / name).read_bytes())), (name,), **about)


def joined(*names: str, skip: int = 0, **about: Any) -> Edited:
    """Describe a file that holds others one after the other, the later ones without their first bytes."""

    def make(folder: Path, path: Path) -> None:
        first, *rest = ((folder / name).read_bytes() for name in names)
        path.write_bytes(first + b"".join(content[skip:] for content in rest))

    return Edited(make, names, **about)


def repacked(name: str, change: Change, **about: Any) -> Edited:
    """Describe a file with the packets of another, changed."""

    def make(folder: Path, path: Path) -> None:
        with av.open(str(folder / name)) as given, av.open(str(path), "w") as written:
            stream = written.add_stream_from_template(given.streams.video[0])
            for packet in change([packet for packet in given.demux(video=0) if packet.size]):
                packet.stream = stream
                written.mux(packet)

    return Edited(make, (name,), **about)


def chained(*names: str, **about: Any) -> Edited:
    """Describe a file with the packets of several, one file after the other, which has the settings of the first."""

    def make(folder: Path, path: Path) -> None:
        with av.open(str(folder / names[0])) as first, av.open(str(path), "w") as written:
            stream = written.add_stream_from_template(first.streams.video[0])
            for number, name in enumerate(names):
                with av.open(str(folder / name)) as given:
                    for packet in given.demux(video=0):
                        if packet.size:
                            delay = round(number * COUNT / RATE / packet.time_base)
                            packet.pts, packet.dts = packet.pts + delay, packet.dts + delay
                            packet.stream = stream
                            written.mux(packet)

    return Edited(make, names, **about)


def replaced(packet: av.Packet, content: bytes) -> av.Packet:
    """Return a packet with the times of another."""
    copy = av.Packet(content)
    copy.pts, copy.dts, copy.duration, copy.time_base = packet.pts, packet.dts, packet.duration, packet.time_base
    copy.is_keyframe = packet.is_keyframe
    return copy


def part(start: float, stop: float = 1.0, unit: int = 1) -> Callable[[bytes], bytes]:
    """Cut out a share of a file's bytes, a multiple of ``unit``."""
    return lambda content: content[int(len(content) * start) // unit * unit : int(len(content) * stop) // unit * unit]


def halve(packets: list[av.Packet]) -> list[av.Packet]:
    """Set the second half of the largest dependent packet in the middle of the file to zero."""
    middle = [number for number in range(15, 35) if not packets[number].is_keyframe] or [20]
    number = max(middle, key=lambda number: packets[number].size)
    content = bytes(packets[number])
    half = len(content) // 2
    packets[number] = replaced(packets[number], content[:half] + bytes(len(content) - half))
    return packets


def without(*numbers: int) -> Change:
    return lambda packets: [packet for number, packet in enumerate(packets) if number not in numbers]


def shift(first: int, seconds: float, last: int = COUNT) -> Change:
    """Show the frames from ``first`` to before ``last`` later."""

    def change(packets: list[av.Packet]) -> list[av.Packet]:
        order = sorted(packet.pts for packet in packets)
        for packet in packets:
            if first <= order.index(packet.pts) < last:
                packet.pts += round(seconds / packet.time_base)
                packet.dts += round(seconds / packet.time_base)
        return packets

    return change


def jump(packets: list[av.Packet]) -> list[av.Packet]:
    """Add 100 s from the twentieth packet on, which lies between frames that are shown before and after it."""
    for packet in packets[19:]:
        packet.pts += round(100 / packet.time_base)
        packet.dts += round(100 / packet.time_base)
    return packets


def turn_back(packets: list[av.Packet]) -> list[av.Packet]:
    """Show frame 25 and those after it 0.6 s earlier, without storing them elsewhere."""
    for number, packet in enumerate(packets):
        packet.pts -= round(0.6 / packet.time_base) * (number >= 25)
        packet.dts = number - len(packets)
    return packets


def twice(packets: list[av.Packet]) -> list[av.Packet]:
    """Give frame 20 the time of frame 19."""
    order = sorted(packet.pts for packet in packets)
    for packet in packets:
        if packet.pts == order[20]:
            packet.pts = order[19]
    return packets


def pack(*first: bytes) -> Change:
    """Store each B-frame in one packet with the frame that it follows, as DivX does for AVI.

    Where the B-frame was stands a frame that says "not coded". ``first`` are placeholders after the first packet.
    """

    def change(packets: list[av.Packet]) -> Iterable[av.Packet]:
        contents = [re.sub(rb"Lavc[0-9.]+", b"DivX503b1393p", bytes(packet)) for packet in packets]
        packed = [contents[0], *first]
        for anchor, inner in zip(contents[1::2], contents[2::2], strict=False):
            packed += [anchor + inner, not_coded(anchor, 5)]
        for number, content in enumerate(packed):
            packet = av.Packet(content)
            packet.pts, packet.dts, packet.time_base = number, number, Fraction(1, RATE)
            packet.is_keyframe = VOP in content and content[content.index(VOP) + 4] < 64
            yield packet

    return change


def not_coded(content: bytes, width: int) -> bytes:
    """Return the header of an MPEG-4 frame, changed to say that there is no picture; its time has ``width`` bits."""
    start = content.index(VOP) + 4
    bits = "".join(f"{byte:08b}" for byte in content[start : start + 8])
    end = bits.index("0", 2) + 1 + 1 + width + 1  # the seconds, a marker, their parts, a marker
    bits = "01" + bits[2:end] + "0" + "0"
    return VOP + int(bits + "1" * (-len(bits) % 8), 2).to_bytes((len(bits) + 7) // 8, "big")


def fill(packets: list[av.Packet]) -> Iterable[av.Packet]:
    """Put a frame that says "not coded" after every fifth, at half a frame's distance; there are 6 bits of time."""
    for number, packet in enumerate(packets):
        yield packet
        if number % 5 == 3:
            content = bytes(packet)
            start = content.index(VOP) + 4
            bits = int.from_bytes(content[start : start + 8], "big")
            seconds = f"{bits:064b}".index("0", 2) - 2
            content = content[:start] + (bits + (1 << (64 - 2 - seconds - 1 - 1 - 6))).to_bytes(8, "big")
            half = replaced(packet, not_coded(content, 6))
            half.is_keyframe = False
            half.pts, half.dts = packet.pts + packet.duration // 2, packet.dts + packet.duration // 2
            yield half


def hide(*numbers: int) -> Change:
    """Mark frames of VP8 as references that are not shown: their fifth bit."""

    def change(packets: list[av.Packet]) -> list[av.Packet]:
        for number in numbers:
            content = bytes(packets[number])
            packets[number] = replaced(packets[number], bytes([content[0] & ~16]) + content[1:])
        return packets

    return change


def matrix(
    a: float, b: float, c: float, d: float, place: tuple[bytes, int] = (b"tkhd", 44)
) -> Callable[[bytes], bytes]:
    """Set the display matrix of an MP4's first track, or of all of it."""

    def change(content: bytes) -> bytes:
        start = content.index(place[0]) + place[1]
        values = struct.pack(">9i", *(round(65536 * value) for value in (a, b, 0, c, d, 0, 0, 0)), 1 << 30)
        return content[:start] + values + content[start + 36 :]

    return change


def edits(*entries: tuple[float, float]) -> Callable[[bytes], bytes]:
    """Set the edit list of an MP4: (seconds to show, from where, or -1 for nothing). Its index is at the end."""

    def change(content: bytes) -> bytes:
        moov, trak, edts = (content.index(name) - 4 for name in (b"moov", b"trak", b"edts"))
        size = int.from_bytes(content[edts : edts + 4], "big")
        rows = [(round(1000 * span), -1 if start < 0 else round(12800 * start), 1 << 16) for span, start in entries]
        table = struct.pack(">II", 0, len(rows)) + b"".join(struct.pack(">IiI", *row) for row in rows)
        box = struct.pack(">I4sI4s", len(table) + 16, b"edts", len(table) + 8, b"elst") + table
        result = bytearray(content[:edts] + box + content[edts + size :])
        for place in (moov, trak):
            old = int.from_bytes(content[place : place + 4], "big")
            result[place : place + 4] = (old + len(box) - size).to_bytes(4, "big")
        return bytes(result)

    return change


def hole(content: bytes) -> bytes:
    """Set 600 bytes in the middle to zero, as a bad sector or a lost part of a download does."""
    middle = len(content) // 2
    return content[:middle] + bytes(600) + content[middle + 600 :]


def swap(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content.replace(old, new)


EDITED = {
    # A1: packets that are no frames, and frames that cannot be decoded where the file starts.
    "packed.avi": repacked("_pairs.avi", pack(b"\x7f")),
    "packed_evenly.avi": repacked("_pairs.avi", pack()),
    "packed.mkv": copied("-fflags +genpts -i packed.avi", starts=None),
    "packed.mp4": copied("-i packed.avi", starts=None),
    "unpacked.avi": copied("-i packed.avi -bsf:v mpeg4_unpack_bframes"),
    "not_coded.avi": repacked("_halves.mp4", fill),
    "not_coded.mp4": repacked("_halves.mp4", fill),
    "not_coded.mkv": repacked("_halves.mp4", fill),
    "empty_chunks.avi": copied("-i variable.mp4"),
    "empty_chunks_mjpeg.avi": repacked("camera.avi", without(10, 11, 30)),
    "hidden_vp8.webm": repacked("vp8.webm", hide(7, 8, 29)),
    "hidden_vp9.mkv": copied("-i vp9_hidden.webm -bsf:v vp9_superframe_split"),
    "middle.ts": changed("stream.ts", part(0.35, unit=188)),
    "middle_unaligned.ts": changed("stream.ts", part(0.4)),
    "middle_mpeg2.ts": changed("mpeg2.ts", part(0.35, unit=188)),
    "middle_hevc.ts": changed("hevc.ts", part(0.35, unit=188), versions=True),
    "middle.mpg": changed("mpeg1.mpg", part(0.35, unit=2048)),
    "middle.vob": changed("mpeg2.vob", part(0.35)),
    "middle.h264": changed("bare.h264", part(0.35)),
    "middle.flv": repacked("tags.flv", without(*range(17))),
    "middle.mkv": repacked("_plain.mp4", without(*range(17))),
    "middle.mp4": repacked("_plain.mp4", without(*range(17))),
    "middle_vp8.webm": repacked("vp8.webm", without(*range(17))),
    "middle_vp9.webm": repacked("vp9.webm", without(*range(17)), versions=True, damaged=None),
    "middle_hevc.mkv": repacked("_chain_hevc.mp4", without(0), versions=True, damaged=None),
    "cut.mp4": copied("-ss 0.7 -i b_frames.mp4"),
    "cut.mkv": copied("-ss 0.7 -i b_frames.mp4"),
    "cut.ts": copied("-ss 0.7 -i stream.ts"),
    "cut_anywhere.mp4": copied("-ss 0.7 -i b_frames.mp4 -copyinkf"),
    "cut_open.mp4": copied("-ss 0.7 -i open_groups.mp4"),
    "cut_open.mkv": copied("-ss 0.7 -i open_groups.mp4"),
    "cut_open_hevc.mp4": copied("-ss 0.7 -i open_groups_hevc.mp4"),
    "cut_open_hevc.mkv": copied("-ss 0.7 -i open_groups_hevc.mp4"),
    "cut_open_mpeg2.mkv": copied("-ss 0.7 -i mpeg2.mkv"),
    "cut_refresh.mkv": copied("-ss 0.9 -i refresh.mp4"),
    "cut_mpeg4.mp4": copied("-ss 0.7 -i mpeg4_b_frames.mp4"),
    "cut_end.mp4": copied("-i b_frames.mp4 -t 1.1"),
    "edited.mp4": changed("_plain.mp4", edits((1.0, 0.6))),
    "edited_twice.mp4": changed("_plain.mp4", edits((0.6, 0.2), (0.6, 1.2)), starts=None),
    "delayed.mp4": changed("_plain.mp4", edits((1.5, -1), (2.0, 0))),
    "edited_b_frames.mp4": changed("b_frames.mp4", edits((1.0, 0.6))),
    "cut_turned.mp4": changed("cut.mp4", matrix(0, 1, -1, 0)),
    "no_offsets.mp4": changed("b_frames.mp4", swap(b"ctts", b"free"), starts=None),
    "edited_inside.mov": changed("_pyramid.mov", edits((0.5, 0.22), (0.7, 1.09)), starts=None),
    "no_key_table_mpeg4.mp4": changed("mpeg4_b_frames.mp4", swap(b"stss", b"free")),
    "no_key_table.mp4": changed("b_frames.mp4", swap(b"stss", b"free")),
    "no_index.avi": changed("b_frames.avi", swap(b"idx1", b"JUNK")),
    "no_index_mpeg4.avi": changed("mpeg4_b_frames.avi", lambda content: content[: content.index(b"idx1")]),
    # A2: damage.
    "half_zero.mp4": repacked("_plain.mp4", halve, damaged=True),
    "half_zero_hevc.mp4": repacked("open_groups_hevc.mp4", halve, damaged=None),
    "half_zero.avi": repacked("mpeg4.avi", halve, damaged=True),
    "half_zero.ts": repacked("mpeg2.ts", halve, damaged=True),
    "half_zero.webm": repacked("vp9.webm", halve, damaged=None),
    "half_zero_mjpeg.avi": repacked("camera.avi", halve, versions=True, damaged=True),
    "missing.mp4": repacked("_plain.mp4", without(20), damaged=None),
    "missing.ts": changed("stream.ts", lambda content: content[: 188 * 60] + content[188 * 66 :], damaged=None),
    "missing.avi": repacked("mpeg4.avi", without(20), damaged=None),
    "missing_hevc.mp4": repacked("open_groups_hevc.mp4", without(16), damaged=None),
    "missing_chain_hevc.mkv": repacked("_chain_hevc.mp4", without(20), versions=True, damaged=None),
    "missing_b_frames.flv": repacked("tags.flv", without(20, 27), damaged=None),
    "missing_b_frames.mp4": repacked("pyramid.mkv", without(20, 27), damaged=None),
    "other_settings.mkv": chained("b_frames.mp4", "_other.mp4", damaged=None),
    "other_size.mkv": chained("b_frames.mp4", "_small.mp4", damaged=None, starts=None),
    "crashed.mkv": changed("live.mkv", part(0, 0.6), damaged=None),
    "crashed_fragments.mp4": changed("fragments.mp4", part(0, 0.6), damaged=None),
    **{
        f"hole{name[name.index('.') :]}": changed(name, hole, damaged=None)
        for name in ("b_frames.mp4", "ten_bits.mkv", "mpeg4.avi", "stream.ts", "tags.flv", "mpeg1.mpg", "vp8.webm")
    },
    "truncated.mp4": changed("faststart.mp4", part(0, 0.6), damaged=True),
    "truncated.ts": changed("stream.ts", part(0, 0.6), damaged=None),
    "truncated.mkv": changed("ten_bits.mkv", part(0, 0.6), damaged=None),
    "truncated.avi": changed("mpeg4.avi", part(0, 0.6), damaged=None),
    "truncated.flv": changed("tags.flv", part(0, 0.6), damaged=None),
    "truncated.mpg": changed("mpeg1.mpg", part(0, 0.6), damaged=None),
    "truncated.webm": changed("vp9.webm", part(0, 0.6), damaged=None),
    "no_moov.mp4": changed("b_frames.mp4", lambda content: content[: content.index(b"moov") - 4], damaged=True),
    "nothing.mp4": copied("-i b_frames.mp4 -frames:v 0", damaged=True),
    "only_b_frames.mkv": repacked("mpeg4_b_frames.mp4", lambda packets: packets[2:4], damaged=True),
    "sound.m4a": copied("-i _sound.m4a", damaged=True),
    # A3: time.
    "joined.ts": joined("stream.ts", "stream.ts", starts=(50,)),
    "joined_later.ts": joined("stream.ts", "_again.ts", starts=(50,)),
    "joined.mpg": joined("mpeg1.mpg", "mpeg1.mpg", starts=(50,)),
    "joined.h264": joined("bare.h264", "bare.h264"),
    "joined.mkv": joined("pyramid.mkv", "pyramid.mkv", starts=None, damaged=None),
    "joined.ogv": joined("theora.ogv", "theora.ogv", starts=None, damaged=None),  # the second header is no frame
    "joined.mp4": joined("b_frames.mp4", "_small.mp4"),
    "joined.avi": joined("mpeg4.avi", "mpeg4.avi"),
    "joined.wmv": joined("windows.wmv", "windows.wmv", starts=None, damaged=None),
    "joined.mjpeg": joined("bare.mjpeg", "bare.mjpeg"),
    "joined.ivf": joined("vp9.ivf", "vp9.ivf", skip=32, starts=(50,)),
    "restarted.flv": joined("tags.flv", "_again.flv", skip=13, starts=(50,)),
    "hour.mp4": repacked("_plain.mp4", shift(25, 3600), starts=(25,)),
    "hour.mkv": repacked("_plain.mp4", shift(25, 3600), starts=(25,)),
    "hours.mkv": repacked("slow.mp4", lambda packets: packets),
    "duplicate.mkv": repacked("variable.mp4", twice),
    "duplicate.mp4": repacked("variable.mp4", twice),
    "jump.mp4": repacked("b_frames.mp4", jump, starts=None),
    "backwards.mkv": repacked("_plain.mp4", turn_back, starts=(25,)),
    # A4: geometry.
    **{
        f"{name}.mp4": changed("b_frames.mp4", matrix(*values))
        for name, values in {
            "turned_90": (0, 1, -1, 0),
            "turned_180": (-1, 0, 0, -1),
            "turned_270": (0, -1, 1, 0),
            "mirrored": (-1, 0, 0, 1),
            "flipped": (1, 0, 0, -1),
            "transposed": (0, 1, 1, 0),
            "transversed": (0, -1, -1, 0),
            "stretched": (2, 0, 0, 1),
        }.items()
    },
    "turned_30.mp4": changed("b_frames.mp4", matrix(0.866, 0.5, -0.5, 0.866), damaged=None),  # may be refused
    "turned_movie.mp4": changed("b_frames.mp4", matrix(0, 1, -1, 0, (b"mvhd", 40))),
    "turned_sei.mp4": copied("-i b_frames.mp4 -bsf:v h264_metadata=display_orientation=insert:rotate=90"),
    "mirrored_sei.ts": copied("-i b_frames.mp4 -bsf:v h264_metadata=display_orientation=insert:flip=horizontal"),
    "cropped.mp4": copied("-i b_frames.mp4 -bsf:v h264_metadata=crop_right=16:crop_bottom=8"),
    "size_changes.ts": joined("stream.ts", "_small.ts", starts=None),
    "size_changes.webm": chained("vp8.webm", "_small.webm"),
    "size_changes.h264": joined("bare.h264", "_small.h264"),
    # A5: streams.
    "cover_first.mp4": copied("-i _cover.mp4 -i b_frames.mp4 -map 0:v -map 1:v", stream=1),
    "cover_first.mkv": copied("-i _cover.mp4 -i b_frames.mp4 -map 0:v -map 1:v", stream=1),
    "still_first.mp4": copied("-i one_frame.mp4 -i b_frames.mp4 -map 0:v -map 1:v", stream=1),
    "cover_last.mov": copied("-i _cover.mp4 -i b_frames.mp4 -map 1:v -map 0:v"),
    "cover_flagged.mp4": copied("-i _cover.mp4 -i b_frames.mp4 -map 0:v -map 1:v -disposition:v:0 attached_pic"),
    "second_default.mkv": copied(
        "-i _small.mp4 -i b_frames.mp4 -map 0:v -map 1:v -disposition:v:0 0 -disposition:v:1 default", stream=1
    ),
    "second_default.mp4": copied(
        "-i _small.mp4 -i b_frames.mp4 -map 0:v -map 1:v -disposition:v:0 0 -disposition:v:1 default", stream=1
    ),
    "small_second.mp4": copied("-i b_frames.mp4 -i _small.mp4 -map 0:v -map 1:v"),
    "sound_first.mp4": copied("-i _sound.m4a -i b_frames.mp4 -map 0:a -map 1:v"),
    "sound_first.mkv": copied("-itsoffset 0.5 -i b_frames.mp4 -i _sound.m4a -map 1:a -map 0:v"),
    "sound_first.ts": copied("-itsoffset 0.5 -i b_frames.mp4 -i _sound.m4a -map 1:a -map 0:v"),
}


def paint() -> bytes:
    """Return the frames in yuv420p: their numbers, above a band of noise that moves in colours that change."""
    rng = np.random.default_rng(0)
    rows, columns = np.arange(HEIGHT) * 48 // HEIGHT, np.arange(WIDTH) * 64 // WIDTH
    luma = (16 + numbered_frames(COUNT)[:, rows][:, :, columns, 0] * (219 / 255)).astype(np.uint8)
    noise = rng.integers(60, 200, (20, WIDTH), np.uint8)
    for number in range(COUNT):
        luma[number, -20:] = np.roll(noise, 2 * number, 1)
    slope = np.add.outer(np.arange(HEIGHT // 2), np.arange(WIDTH // 2))
    chroma = np.stack([(96 + (slope + 3 * number) % 64, 160 - slope // 2) for number in range(COUNT)]).astype(np.uint8)
    return b"".join(y.tobytes() + uv.tobytes() for y, uv in zip(luma, chroma, strict=True))


def find_sources(names: Iterable[str]) -> set[str]:
    """Return the encoded files from which files are made."""
    edited = {name for name in names if name in EDITED}
    sources = {source for name in edited for source in EDITED[name].sources}
    return {*names} - edited | (find_sources(sources) if sources else set())


def write_encoded(folder: Path, names: Iterable[str]) -> None:
    """Write encoded files, all in one call."""
    outputs: list[str] = []
    for name in names:
        options = ENCODED[name]
        outputs += [*("" if "-map" in options else "-map 0:v").split(), *options.split(), name]
    given = f"-f rawvideo -pix_fmt yuv420p -s {WIDTH}x{HEIGHT} -r {RATE} -i - -f lavfi -i anoisesrc"
    ffmpeg(given, folder, *outputs, data=paint())


def find_file(folder: Path, name: str) -> Path:
    """Return a file; an edited one is written when it is first asked for."""
    path = folder / name
    if not path.exists():
        for source in EDITED[name].sources:
            find_file(folder, source)
        written = folder / f"{os.getpid()}_{name}"  # another process may do the same
        EDITED[name].make(folder, written)
        written.replace(path)
    return path
