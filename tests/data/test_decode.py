"""Readers, on files whose frames show their number: each gives the requested frames, or a reason why not."""

import importlib.util
import struct
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest

from stvit_video.data.clips.sampling import ClipSampler
from stvit_video.data.decode import index, readers
from stvit_video.data.decode.frames import DECODERS, FrameRequest, find_decoder, open_video, read_file
from stvit_video.data.decode.types import DecodeError, Frames
from tests.conftest import numbered_frames, read_number
from tests.data.choices import Frozen

INSTALLED = tuple(name for name in DECODERS if name != "torchcodec" or importlib.util.find_spec("torchcodec"))


def read(path: Path, *indices: int, side: int | None = None, decoder: str = "pyav") -> Frames:
    return read_file(FrameRequest(str(path), Frozen(indices), side, decoder))


GROUPS = [{}, {"g": "250", "bf": "3", "b-pyramid": "normal"}, {"g": "12", "flags": "-cgop", "bf": "2"}, {"g": "1"}]


@pytest.mark.parametrize("decoder", INSTALLED)
@pytest.mark.parametrize("options", GROUPS, ids=str)
def test_requested_frames_are_returned_in_order(write_clip: Callable[..., Path], options: dict, decoder: str) -> None:
    path = write_clip(numbered_frames(250), **options)
    rng = np.random.default_rng(0)
    orders = [range(250), [249], [60, 3, 3, 77, 0, 60], range(0, 250, 7), range(249, -1, -11)]
    orders += [rng.integers(0, 250, 16).tolist() for _ in range(8)]
    if decoder != "pyav" and "-cgop" in options.values():
        with pytest.raises(DecodeError, match=f"where {decoder} finds wrong frames"):
            read(path, 249, decoder=decoder)
        decoder = "pyav"  # the next one
    assert open_video(str(path), decoder=decoder).length == 250
    for indices in orders:
        frames = read(path, *indices, decoder=decoder)
        assert [read_number(frame) for frame in frames] == list(indices)


@pytest.mark.parametrize(("codec", "name"), [("libx264", "clip.mp4"), ("mpeg4", "clip.avi"), ("mpeg2video", "clip.ts")])
def test_a_file_read_in_pieces_is_opened_once(
    write_clip: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, codec: str, name: str
) -> None:
    """Reading goes on where it was, also where frames are counted from the start: a long video costs one pass."""
    paths = [str(write_clip(numbered_frames(200), name=f"{i}/{name}", codec=codec)) for i in range(2)]
    opened, open_av, cache = [], readers.open_av, {}
    for module in (index, readers):
        monkeypatch.setattr(module, "open_av", lambda path, *number: opened.append(path) or open_av(path, *number))

    def numbers(path: str, first: int, more: bool) -> list[int]:
        wanted = tuple(range(first, first + 10, 3))
        request = FrameRequest(path, Frozen(wanted), None, "pyav", keep_open=more)
        return [read_number(frame) for frame in read_file(request, cache)]

    for first in range(0, 200, 10):
        assert numbers(paths[0], first, first < 150) == list(range(first, first + 10, 3))
        if first == 100:
            assert len(opened) <= 3  # to prove that packets are frames, to count frames, and to begin
    assert numbers(paths[0], 30, True) == numbers(paths[0], 30, True) == [30, 33, 36, 39]  # back again
    assert numbers(paths[1], 50, True) == [50, 53, 56, 59]  # another one comes in between
    assert numbers(paths[0], 50, False) == [50, 53, 56, 59]


# Codec, container, pixel format, options.
FORMATS = [
    ("libx264", "mp4", "yuv420p10le", {}),
    ("libx264", "mp4", "yuv444p", {}),
    ("libx264", "mp4", "gray", {}),
    ("libx264", "mkv", "yuvj420p", {"bf": "2"}),
    ("libx265", "mp4", "yuv420p", {"x265-params": "log-level=none"}),
    ("libvpx-vp9", "webm", "yuv420p", {"cpu-used": "8"}),
    ("libsvtav1", "mp4", "yuv420p", {"preset": "10"}),
    ("mpeg4", "avi", "yuv420p", {"bf": "2"}),
    ("mpeg4", "mp4", "yuv420p", {"bf": "2"}),
    ("mpeg2video", "mpg", "yuv420p", {"bf": "2"}),
    ("mpeg2video", "mpg", "yuv420p", {}),
    ("mpeg2video", "ts", "yuv420p", {}),
    ("mpeg1video", "mpg", "yuv420p", {}),
    ("libx264", "ts", "yuv420p", {}),
    ("libx264", "avi", "yuv420p", {}),
    ("libx264", "avi", "yuv420p", {"bf": "0"}),
    ("libx264", "flv", "yuv420p", {}),
    ("mpeg4", "avi", "yuv420p", {"g": "250"}),
    ("wmv2", "wmv", "yuv420p", {}),
    ("mjpeg", "mov", "yuvj420p", {}),
]


@pytest.mark.parametrize(("codec", "container", "pixels", "options"), FORMATS, ids=lambda value: str(value))
def test_frames_are_exact_in_all_formats(
    write_clip: Callable[..., Path], codec: str, container: str, pixels: str, options: dict
) -> None:
    path = write_clip(numbered_frames(120), f"clip.{container}", codec, pixels=pixels, **options)
    rng = np.random.default_rng(0)
    orders = [[7, 119, 0, 30, 31], range(60, 92, 2), *(rng.integers(0, 120, 16).tolist() for _ in range(6))]
    for indices in orders:
        understood = 0
        for decoder in INSTALLED:
            try:
                frames = read(path, *indices, decoder=decoder)
            except DecodeError:  # decord has no AV1, and refuses what it would get wrong
                continue
            understood += 1
            assert [read_number(frame) for frame in frames] == list(indices)
        assert understood >= 1


@pytest.mark.parametrize("decoder", INSTALLED)
def test_frames_are_upright(write_clip: Callable[..., Path], decoder: str) -> None:
    stored = numbered_frames(8).repeat(2, axis=1).repeat(2, axis=2)  # (96, 128): its sides differ, and its corners
    path = write_clip(stored)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44
    for turns, (a, b, c, d) in {1: (0, 1, -1, 0), 2: (-1, 0, 0, -1), 3: (0, -1, 1, 0)}.items():
        data[matrix : matrix + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
        path.write_bytes(data)
        (frame,) = read(path, 7, decoder=decoder)
        assert frame.shape == ((128, 96, 3) if turns % 2 else (96, 128, 3))
        assert read_number(np.rot90(frame, turns)) == 7  # as clockwise quarter turns, undone
        (small,) = read(path, 7, side=64, decoder=decoder)
        assert abs(small.shape[0] / small.shape[1] - frame.shape[0] / frame.shape[1]) < 0.05
        assert read_number(np.rot90(small, turns)) == 7


@pytest.mark.parametrize("decoder", INSTALLED)
@pytest.mark.parametrize(("height", "width"), [(240, 320), (320, 240), (183, 107)])
def test_only_large_frames_are_resized(write_clip: Callable[..., Path], height: int, width: int, decoder: str) -> None:
    frames = numbered_frames(12).repeat(height // 48 + 1, axis=1).repeat(width // 64 + 1, axis=2)
    path = write_clip(frames[:, :height, :width], pixels="yuv444p")  # odd sizes have no 4:2:0
    if decoder != "torchcodec":
        small = read(path, 1, 5, side=60, decoder=decoder)
        assert min(small.shape[1:3]) == 60
        assert small.shape[1] / small.shape[2] == pytest.approx(height / width, rel=0.02)
    assert read(path, 0, side=400, decoder=decoder).shape == (1, height, width, 3)


@pytest.mark.parametrize("decoder", INSTALLED)
def test_a_variable_frame_rate_is_sampled_by_time(tmp_path: Path, decoder: str) -> None:
    # 20 frames at 10 a second, then 40 at 40 a second: 3 seconds.
    stamps = np.concatenate([np.arange(20) * 100, 2000 + np.arange(40) * 25])
    path = tmp_path / "variable.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=40, options={"bf": "2", "crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for stamp, picture in zip(stamps, numbered_frames(60), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = int(stamp), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    reader = open_video(str(path), decoder=decoder)
    np.testing.assert_allclose(reader.times(), stamps / 1000, atol=1e-4)
    clip = ClipSampler("dense", 6, 5, rate=10)  # a frame each half second: 2.5 s of the 2.975
    frames = read_file(FrameRequest(str(path), partial(clip, clips=1), None, decoder))
    moments = (2975 - 2500) / 2 + 500 * np.arange(6)
    expected = [int(np.searchsorted(stamps, moment, side="right")) - 1 for moment in moments]
    assert [read_number(frame) for frame in frames] == expected
    by_number = ClipSampler("dense", 6, 5)
    frames = read_file(FrameRequest(str(path), partial(by_number, clips=1), None, decoder))
    assert [read_number(frame) for frame in frames] == [17, 22, 27, 32, 37, 42]


# A clock that starts below zero; one of 33 bits that begins again in the middle; one that starts late.
CLOCKS = [("mkv", -2, {"avoid_negative_ts": "disabled"}), ("ts", 95440, {}), ("mp4", 5, {})]


@pytest.mark.parametrize(("container", "start", "options"), CLOCKS, ids=["negative", "wrapped", "late"])
def test_frames_are_numbered_from_the_first_at_any_time(
    tmp_path: Path, container: str, start: int, options: dict
) -> None:
    path = tmp_path / f"clip.{container}"
    with av.open(str(path), "w", options=options) as file:
        stream = file.add_stream("libx264", rate=25, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        packets = []
        for i, picture in enumerate(numbered_frames(200)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            packets += stream.encode(frame)
        for packet in [*packets, *stream.encode()]:
            packet.pts += int(start / packet.time_base)
            packet.dts += int(start / packet.time_base)
            file.mux(packet)
    for indices in ([0], [66, 100, 3], [199, 0], range(0, 200, 9)):
        assert [read_number(frame) for frame in read(path, *indices)] == list(indices)


def test_unreadable_files_give_a_reason(write_clip: Callable[..., Path], write_sound: Callable[..., Path]) -> None:
    path = write_clip(numbered_frames(60))
    whole, folder = path.read_bytes(), path.parent
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, len(whole), dtype=np.uint8).tobytes()
    write_sound("sound.mp4")
    cases = {
        "empty.mp4": b"",
        "text.mp4": b"not a video\n" * 50,
        "cut.mp4": whole[: len(whole) // 2],  # the index stands at the end
        "header.mp4": whole[:40],
        "noise.mp4": noise,
        "sound.mp4": (folder / "sound.mp4").read_bytes(),
    }
    for name, content in cases.items():
        (folder / name).write_bytes(content)
        for decoder in INSTALLED:
            with pytest.raises(DecodeError) as error:
                read(folder / name, 0, 4, side=32, decoder=decoder)
            assert error.value.path == str(folder / name)
            assert error.value.message
            assert "\n" not in error.value.message
    (folder / "folder").mkdir()
    for name, says in {"absent.mp4": "no such file", "folder": "without images", "/dev/null": "not a regular"}.items():
        with pytest.raises(DecodeError, match=says):
            read(folder / name, 0)


def test_errors_name_their_decoder(write_clip: Callable[..., Path], tmp_path: Path) -> None:
    path = write_clip(numbered_frames(20), "av1.mp4", "libsvtav1", preset="10")
    with pytest.raises(DecodeError, match="cannot be opened as video") as error:
        read(path, 5, decoder="decord")
    assert error.value.decoder == "decord"
    assert read_number(read(path, 5)[0]) == 5
    (tmp_path / "text.mp4").write_bytes(b"text" * 100)
    with pytest.raises(DecodeError) as error:
        read(tmp_path / "text.mp4", 0)
    assert error.value.decoder == "pyav"


def test_decoders_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_decoder("pyav") == find_decoder("auto") == "pyav"
    assert find_decoder("decord") == "decord"
    with pytest.raises(ValueError, match="'gstreamer' is unknown; choose auto, pyav, decord, torchcodec"):
        find_decoder("gstreamer")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("decord", "torchcodec"):
        with pytest.raises(ValueError, match=f"'{name}' is not installed; pip install {name}, or choose auto, pyav"):
            find_decoder(name)
