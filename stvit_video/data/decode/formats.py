"""What FFmpeg may open and decode: a file's content chooses among these formats, and not among all that FFmpeg knows.

Formats that name other files (playlists, lists of segments, sequences of pictures) are read only from streams whose
address the user gave, and only over the protocols of that address.
"""

import contextlib
import os
import re
import zlib
from collections.abc import Callable
from functools import partial

import av
import av.logging
from av.container import InputContainer

# FFmpeg's names, with commas between them. jpeg_pipe and png_pipe are single pictures.
FILE_FORMATS = (
    "mov,matroska,avi,flv,live_flv,mpegts,mpegtsraw,mpeg,mpegvideo,asf,asf_o,ogg,mxf,gxf,nut,rm,ivr,dv,gif,apng,"
    "yuv4mpegpipe,wtv,dhav,nsv,nuv,pva,ty,vivo,kux,lmlm4,ivf,obu,h264,hevc,vvc,m4v,h263,h261,vc1,vc1test,dirac,"
    "cavsvideo,avs2,avs3,mjpeg,mjpeg_2000,mpjpeg,dnxhd,jpeg_pipe,png_pipe"
)
CODEC_NAMES = (
    "h264,hevc,vvc,av1,vp3,vp4,vp5,vp6,vp6a,vp6f,vp7,vp8,vp9,mpeg1video,mpeg2video,mpeg4,msmpeg4v1,msmpeg4v2,msmpeg4v3,"
    "wmv1,wmv2,wmv3,vc1,mss1,mss2,h261,h263,h263i,h263p,flv1,theora,dirac,cavs,rv10,rv20,rv30,rv40,rv60,svq1,svq3,"
    "cinepak,indeo2,indeo3,indeo4,indeo5,msvideo1,msrle,qtrle,rpza,smc,8bps,mjpeg,mjpegb,jpeg2000,jpegls,png,apng,gif,"
    "webp,dvvideo,dnxhd,prores,prores_raw,cfhd,hap,hqx,hq_hqa,aic,ffv1,ffvhuff,huffyuv,utvideo,magicyuv,lagarith,"
    "fraps,asv1,asv2,amv,mimic,snow,speedhq,notchlc,mszh,zlib,zmbv,cscd,tscc,tscc2,g2m,vmnc,flashsv,flashsv2,dxtory,"
    "screenpresso,rawvideo,v210,v308,v408,v410,yuv4,y41p,r210,r10k,012v"
)
CODECS = frozenset(CODEC_NAMES.split(","))
WEB = "http,https,httpproxy,tcp,tls,crypto,data"  # the segments of a playlist may be encrypted
RTSP = "rtsp,rtsps,rtp,srtp,udp,tcp,tls,http,https"
RTMP = "rtmp,rtmpe,rtmps,rtmpt,rtmpte,rtmpts,ffrtmphttp,ffrtmpcrypt,tcp,tls,http,https"
PLAYLISTS = "hls,dash"
# The schemes of streams: the protocols over which one may be read, and its formats beside those of files.
SCHEMES = {
    "file": ("file,crypto,data", PLAYLISTS),
    **dict.fromkeys(("http", "https"), (WEB, PLAYLISTS)),
    **dict.fromkeys(("rtsp", "rtsps"), (RTSP, "rtsp")),
    **dict.fromkeys(("rtp", "srtp"), ("rtp,srtp,udp", "rtp")),
    **dict.fromkeys(("rtmp", "rtmpe", "rtmps", "rtmpt", "rtmpte", "rtmpts"), (RTMP, "")),
    **{name: (name, "") for name in ("udp", "tcp", "srt", "rist", "ftp", "sftp", "unix", "mmst")},
    "tls": ("tls,tcp", ""),
    "mmsh": ("mmsh,tcp,http", ""),
}
SAMPLES_PER_BYTE = 8  # some old sound counts single values, of which a byte holds several
# Boxes of an MP4 that hold its index, or parts of it.
BOXES = (b"moov", b"moof", b"trak", b"edts", b"mdia", b"minf", b"stbl", b"traf", b"udta", b"meta", b"mvex", b"dinf")
# How many samples a table and a fragment state, entries a list of edits, and bytes a compressed index.
SAMPLES = re.compile(rb"(?:(?:stsz|stz2).{8}|trun.{4})(.{4})", re.DOTALL)
EDITS = re.compile(rb"elst.{4}(.{4})", re.DOTALL)
COMPRESSED = re.compile(rb"cmvd(.{4})", re.DOTALL)


def _find_decoders() -> str:
    """Return FFmpeg's names of the decoders for CODECS, of which some have several."""
    found = []
    for name in av.codecs_available:
        with contextlib.suppress(ValueError):  # it only encodes
            found += [name] if av.Codec(name, "r").canonical_name in CODECS else []
    return ",".join(sorted(found))


DECODERS = _find_decoders()


def open_file(path: str, again: bool = False) -> InputContainer:
    """Open a video file. Raises ValueError for formats and counts that are refused, else what PyAV raises.

    ``again`` says that it was opened before, which saves a pass over the fragments of a long recording.
    """
    if not again:
        _check_counts(path)
    return _open(os.path.abspath(path), None, FILE_FORMATS, "file")  # "a:b.mp4" alone would be a protocol


def open_stream(address: str, timeout: float) -> InputContainer:
    """Open a camera, stream, device or pipe; ``pipe:0`` is standard input. Raises as ``open_file``."""
    scheme, is_url, _ = address.partition("://")
    if is_url:
        if scheme.lower() not in SCHEMES:
            raise ValueError(f"{scheme}:// is not read; give a file, or a stream of {', '.join(SCHEMES)}")
        protocols, formats = SCHEMES[scheme.lower()]
        return _open(address, None, f"{FILE_FORMATS},{formats}", protocols, timeout)
    if address.startswith("/dev/video"):
        return _open(address, "v4l2", "v4l2", "file", timeout)
    if address == "pipe:0":
        return _open(address, None, FILE_FORMATS, "pipe", timeout)
    return _open(os.path.abspath(address), None, FILE_FORMATS, "file", timeout)


def _open(
    location: str, form: str | None, formats: str, protocols: str, timeout: float | None = None
) -> InputContainer:
    lists = {"format_whitelist": formats, "protocol_whitelist": protocols, "codec_whitelist": DECODERS}
    open_it = partial(av.open, location, "r", form, container_options=lists, timeout=timeout, metadata_errors="ignore")
    try:
        return open_it()
    except av.ArgumentError as error:
        found = _find_format(open_it) if os.path.isfile(location) else ""
        if not found:
            raise
        raise ValueError(f"its content is {found}, which is not read; give MP4, MKV, AVI or another video") from error


def _find_format(open_it: Callable[[], InputContainer]) -> str:
    """Return the name of the format that a file was refused for, which only FFmpeg's log says; or an empty text."""
    level, skips = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # the same as for the file before
    try:
        with av.logging.Capture() as said, contextlib.suppress(av.FFmpegError):
            open_it()
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skips)
    return next((name for _, name, text in said if text.startswith("Format not on whitelist")), "")


def _check_counts(path: str) -> None:
    """Raise ValueError where an MP4 states many more samples than it has bytes: FFmpeg's index has them all."""
    size = os.path.getsize(path)
    most, samples, edits, place = SAMPLES_PER_BYTE * size, 0, 1, 0
    with open(path, "rb") as file:
        while len(head := file.read(16)) >= 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:8]
            length = int.from_bytes(head[8:], "big") if length == 1 else length or size - place
            if kind in BOXES or SAMPLES.match(head + bytes(8), 4):
                content = head + file.read(min(length, size))
                if packed := COMPRESSED.search(content):
                    samples += max(0, _number(packed[1]) - most)
                    with contextlib.suppress(zlib.error):
                        content = zlib.decompressobj().decompress(content[packed.end() :], most)
                samples += sum(map(_number, SAMPLES.findall(content)))
                edits = max([edits, *map(_number, EDITS.findall(content))])
            if length < 8 or place + length >= size:
                break
            place += length
            file.seek(place)
    if samples * edits > most:
        raise ValueError(f"it states {samples * edits:,} frames and samples in {size:,} bytes; write it anew")


def _number(field: bytes) -> int:
    return int.from_bytes(field, "big")
