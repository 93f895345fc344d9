"""Videos and pictures of others: content chooses no program, small files take little, damage is one line each."""

import json
import random
import socket
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import pytest
from PIL import Image

from stvit_video import check_videos, predict
from stvit_video.data import live
from stvit_video.data.clips.sampling import ClipSampler
from stvit_video.data.decode import formats
from stvit_video.data.decode.frames import Decoding, FrameRequest, open_video, read_file
from stvit_video.data.decode.pictures import image_suffix
from stvit_video.data.decode.types import IMAGE_SUFFIXES, DecodeError
from stvit_video.data.failures import read_ledger
from stvit_video.data.lists.annotations import Video
from stvit_video.data.live import read_windows
from stvit_video.data.short_videos import count_short
from tests.conftest import copy_packets, numbered_frames, read_number
from tests.security.mutations import mutate, run_unharmed, unharmed

CHOICE = partial(ClipSampler("dense", 4), clips=1)


@pytest.fixture
def clip(write_clip: Callable[..., Path]) -> Path:
    """A video in whose place other files must not be shown."""
    return write_clip(numbered_frames(20), g="5", bf="0")


def reason(path: Path, decoder: str = "pyav") -> str:
    """Return why a file is refused."""
    with pytest.raises(DecodeError) as caught:
        read_file(FrameRequest(str(path), CHOICE, None, decoder))
    assert "\n" not in str(caught.value)
    return caught.value.message


def playlist(segment: str) -> str:
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{segment}\n#EXT-X-ENDLIST\n"


FOREIGN = {
    "concat": "ffconcat version 1.0\nfile clip.mp4\n",
    "hls": playlist("{clip}"),
    "imf": '<?xml version="1.0"?><AssetMap/>',
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "ansi": "\x1b[2J\x1b[1;1H" + "frame\n" * 200,
    "rpl": "ARMovie\n",
}


@pytest.mark.parametrize("suffix", [".mp4", ".m3u8", ".ffconcat", ".ans"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_is_never_read_as_a_list_of_others_or_a_rare_format(clip: Path, name: str, suffix: str) -> None:
    path = clip.with_name(f"given{suffix}")
    path.write_text(FOREIGN[name].replace("{clip}", str(clip)))
    for decoder in ("pyav", "decord"):
        assert reason(path, decoder).startswith(("cannot be opened as video", "has no video stream"))
    if name == "concat":
        assert reason(path) == (
            "cannot be opened as video (its content is concat, which is not read; give MP4, MKV, AVI or another video)"
        )
    assert open_video(clip).length == 20


@pytest.mark.parametrize(
    "name", ["concat:a|b.mp4", "file:a.mp4", "subfile,,start,0,end,9,,:a.mp4", "-i.mp4", "http:a.mp4", "%05d.mp4"]
)
def test_a_path_is_a_file_whatever_its_name(clip: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clip.parent)
    clip.rename(name)
    for decoder in ("pyav", "decord"):
        assert read_number(open_video(name, decoder=decoder).frames([7])[0]) == 7


def test_rare_codecs_are_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "rare.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("targa", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr24"
        frame = av.VideoFrame(64, 48, "bgr24")
        frame.pts = 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert reason(path) == "has no video stream that can be decoded (targa); convert it to H.264"


def test_what_this_ffmpeg_has_of_the_named_formats_and_codecs() -> None:
    """A name that FFmpeg does not know would refuse what it is meant to allow."""
    known = {name for form in av.formats_available for name in form.split(",")}
    named = set(f"{formats.FILE_FORMATS},{formats.PLAYLISTS}".split(","))
    assert named - known <= {"kux", "imf"}, named - known
    assert {av.Codec(name, "r").canonical_name for name in formats.DECODERS.split(",")} == formats.CODECS


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The address of a local server for the files of ``tmp_path``."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_playlists_are_read_from_streams_alone_and_only_over_their_own_protocol(clip: Path, served: str) -> None:
    segment = copy_packets(clip, clip.with_name("segment.ts"))
    (clip.parent / "own.m3u8").write_text(playlist("segment.ts"))
    (clip.parent / "disk.m3u8").write_text(playlist(f"file://{segment}"))
    (clip.parent / "web.m3u8").write_text(playlist(f"{served}/segment.ts"))

    def count(address: str) -> int:
        return sum(len(window.frames) for window in read_windows(address, 10.0, 10.0, 64))

    assert count(f"{served}/own.m3u8") == count(f"file://{clip.parent}/own.m3u8") == 20
    for address in (f"{served}/disk.m3u8", f"file://{clip.parent}/web.m3u8", f"concat:{clip}|file://{clip}"):
        with pytest.raises(DecodeError, match=r"cannot be read as a stream|has no"):
            count(address)


def test_a_camera_is_opened_as_one_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(formats.av, "open", lambda *words, **options: asked.append((words, options)))
    for address in ("/dev/video0", "pipe:0", "rtsp://camera/1", "udp://@:5004"):
        formats.open_stream(address, 5.0)
    lists = [options["container_options"] for _, options in asked]
    assert asked[0][0] == ("/dev/video0", "r", "v4l2")
    assert [given["format_whitelist"].rpartition(",")[2] for given in lists] == ["v4l2", "png_pipe", "rtsp", ""]
    assert [given["protocol_whitelist"] for given in lists] == ["file", "pipe", formats.RTSP, "udp"]
    assert {options["timeout"] for _, options in asked} == {5.0}


def test_a_stream_over_udp_and_tcp_still_opens(clip: Path) -> None:
    segment = copy_packets(clip, clip.with_name("segment.ts")).read_bytes()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def send() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(segment)

        threading.Thread(target=send, daemon=True).start()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        assert sum(len(window.frames) for window in read_windows(address, 10.0, 10.0, 64)) == 20


def with_counts(content: bytes, samples: int, size: int) -> bytes:
    """Return an MP4 that states so many samples of one size, all in one chunk."""
    changed = bytearray(content)
    for box, *numbers in ((b"stsz", 0, size, samples), (b"stts", 0, 1, samples, 512), (b"stsc", 0, 1, 1, samples, 1)):
        place = changed.index(box) + 4
        changed[place : place + 4 * len(numbers)] = struct.pack(f">{len(numbers)}I", *numbers)
    return bytes(changed)


def compressed(content: bytes, length: int | None = None) -> bytes:
    """Return an MP4 whose index, here of too many samples, is compressed, as QuickTime once did."""
    content = with_counts(content, 20_000_000, 1)
    place = content.index(b"moov") - 4
    index = content[place:]
    method, packed = b"\0\0\0\x0cdcomzlib", zlib.compress(index)
    data = struct.pack(">I4sI", 12 + len(packed), b"cmvd", len(index) if length is None else length) + packed
    inner = struct.pack(">I4s", 8 + len(method + data), b"cmov") + method + data
    return content[:place] + struct.pack(">I4s", 8 + len(inner), b"moov") + inner


def hidden(content: bytes) -> bytes:
    """Return an MP4 whose index, here of too many samples, lies where none is expected, but found."""
    content = with_counts(content, 20_000_000, 1)
    place = content.index(b"moov") - 4
    return content[:place] + struct.pack(">I4s", 8 + len(content) - place, b"udta") + content[place:]


def with_edits(content: bytes, count: int) -> bytes:
    """Return an MP4 whose list of edits states so many."""
    place = content.index(b"elst") + 8
    return content[:place] + struct.pack(">I", count) + content[place + 4 :]


@pytest.mark.parametrize(
    "change",
    [
        partial(with_counts, samples=20_000_000, size=1),
        partial(with_counts, samples=20_000_000, size=0),
        partial(with_counts, samples=2**32 - 1, size=1),
        partial(with_edits, count=20_000_000),
        compressed,
        partial(compressed, length=2**31),
        hidden,
    ],
    ids=["samples", "sizes", "most", "edits", "compressed", "long", "hidden"],
)
def test_counts_are_bounded_by_the_size_of_the_file(clip: Path, change: Callable[[bytes], bytes]) -> None:
    read_file(FrameRequest(str(clip), CHOICE))
    clip.write_bytes(change(clip.read_bytes()))
    with unharmed(clip.parent, seconds=2):
        for decoder in ("pyav", "decord"):
            assert "frames and samples in" in reason(clip, decoder)


def test_fragments_state_no_more_samples_than_the_file_has_bytes(clip: Path) -> None:
    path = copy_packets(clip, clip.with_name("parts.mp4"), movflags="empty_moov+frag_keyframe")
    assert open_video(path).length == 20
    content = path.read_bytes()
    place = content.index(b"trun") + 4
    path.write_bytes(content[:place] + struct.pack(">II", 1, 2**28) + content[place + 8 :])  # no table: all alike
    with unharmed(clip.parent, seconds=2):
        assert "frames and samples in" in reason(path)


def test_times_far_apart_take_neither_memory_nor_time(clip: Path) -> None:
    path = copy_packets(clip, clip.with_name("apart.mkv"), spread)
    with unharmed(clip.parent, seconds=5):
        for rate in (None, 12.5):
            read_file(FrameRequest(str(path), partial(ClipSampler("dense", 4, rate=rate), clips=3)))
        assert len(list(read_windows(f"file://{path}", 1.0, 0.01, 64))) < 3000


def test_a_stream_of_too_many_frames_per_second_does_not_fill_the_memory(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MAX_RATE", 10)
    with pytest.raises(DecodeError, match="it shows more than 10 frames per second"):
        list(read_windows(f"file://{clip}", 1.0, 1.0, 64))


def spread(packet: av.Packet) -> av.Packet:
    packet.pts = packet.dts = packet.pts // 512 * 10**14
    return packet


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a picture of black and white pixels, which takes some bytes for thousands of them."""
    rows = zlib.compress(bytes((1 + (width + 7) // 8) * height))
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), *chunks, (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


@pytest.mark.parametrize("size", [(9_460, 9_460), (20_000, 20_000), (100_000, 100), (2**31 - 1, 2)])
def test_pictures_that_fill_the_memory_are_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(
        png(*size) if size[0] < 2**31 - 1 else png(8, 8).replace(struct.pack(">II", 8, 8), struct.pack(">II", *size))
    )
    with unharmed(tmp_path, seconds=2):
        assert reason(path).startswith("cannot be read as an image")


def test_videos_at_the_limit_of_ffmpeg_are_refused(tmp_path: Path) -> None:
    for name, size in (("large.mov", (12_000, 8_000)), ("strip.mov", (40_000, 48))):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("png", rate=25)
            stream.width, stream.height, stream.pix_fmt = *size, "monob"
            packet = av.Packet(png(*size))
            packet.pts = packet.dts = 0
            packet.stream = stream
            container.mux(packet)
        with unharmed(tmp_path, seconds=5):
            assert f"a frame has {size[0]}x{size[1]} pixels; give at most" in reason(tmp_path / name)


def test_text_and_profiles_of_pictures_are_bounded_and_animations_read_for_one_frame(tmp_path: Path) -> None:
    zeros = b"a\0\0" + zlib.compress(bytes(50_000_000))
    (tmp_path / "text.png").write_bytes(png(64, 48, (b"zTXt", zeros)))
    (tmp_path / "profile.png").write_bytes(png(64, 48, (b"iCCP", zeros)))
    frames = [Image.new("RGB", (64, 48), (number, 0, 0)) for number in range(256)]
    frames[9].save(tmp_path / "many.webp", save_all=True, append_images=frames, lossless=True)
    with unharmed(tmp_path, seconds=3):
        for name in ("text.png", "profile.png"):
            assert reason(tmp_path / name).startswith("cannot be read as an image (Decompressed data too large")
        assert open_video(tmp_path / "many.webp").frames([0])[0, 0, 0].tolist() == [9, 0, 0]


@pytest.mark.parametrize("form", ["ICO", "PCX", "TGA", "JPEG2000", "SGI", "DDS", "IM", "EPS", "PDF"])
def test_pictures_of_other_formats_are_refused(tmp_path: Path, form: str) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "given.jpg", form)
    message = "cannot be read as an image (its content is none of JPEG, PNG, WEBP, BMP, PPM, TIFF, GIF, or damaged)"
    assert reason(tmp_path / "given.jpg") == message


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "MPO"])
def test_pictures_of_named_formats_open_whatever_their_ending(tmp_path: Path, form: str) -> None:
    Image.new("RGB", (64, 48), (255, 255, 255)).save(tmp_path / "given.jpg", form)
    assert open_video(tmp_path / "given.jpg").frames([0]).mean() == 255


MUTATED = (".mp4", ".avi", ".mkv", ".png", ".jpg")


@pytest.fixture
def originals(write_clip: Callable[..., Path], tmp_path: Path) -> dict[str, bytes]:
    """The content of a small file of each kind."""
    frames = numbered_frames(12)
    found = {
        suffix: write_clip(frames, f"a{suffix}", codec, g="5")
        for suffix, codec in zip(MUTATED, ("libx264", "mpeg4", "libx264"), strict=False)
    }
    for suffix in MUTATED[3:]:
        found[suffix] = tmp_path / f"a{suffix}"
        Image.fromarray(frames[7]).save(found[suffix])
    return {suffix: path.read_bytes() for suffix, path in found.items()}


def write_mutated(folder: Path, originals: dict[str, bytes], count: int, seed: int) -> list[str]:
    """Write mutated files of each kind in turn, and return their names."""
    rng = random.Random(seed)
    folder.mkdir()
    names = [f"{number}{MUTATED[number % len(MUTATED)]}" for number in range(count)]
    for name in names:
        (folder / name).write_bytes(mutate(originals[Path(name).suffix], rng))
    return names


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.long)])
def test_mutated_files_are_read_or_refused_and_do_no_harm(
    originals: dict[str, bytes], count: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "given", tmp_path / "out"
    names = write_mutated(folder, originals, count, seed=19)
    (folder / "list.txt").write_text("".join(f"{name} 0\n" for name in names))
    words = [str(folder / "list.txt"), "--output", str(out), "--workers", "1", "--deadline", "20"]
    with unharmed(tmp_path, apart_from=[out], seconds=20 + count / 10):
        assert run_unharmed(check_videos.main, words, capfd) == 0
    failures = read_ledger(out / "failures.csv")
    assert 0.2 * count < len(failures) < 0.9 * count
    for failure in failures:
        assert "\n" not in failure.message
        assert "exit code" not in failure.message  # an error in Python, which no content may raise
        assert "took more than" not in failure.message


@pytest.mark.parametrize("count", [25, pytest.param(1000, marks=pytest.mark.long)])
def test_mutated_files_are_predicted_or_refused_and_do_no_harm(
    originals: dict[str, bytes], trained: Path, count: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "given", tmp_path / "found.json"
    write_mutated(folder, originals, count, seed=20)
    words = [f"{folder}/*", "--checkpoint", str(trained), "--output", str(out)]
    assert run_unharmed(predict.main, words, capfd) == 1  # imports and buffers count the first time
    with unharmed(tmp_path, apart_from=[out], seconds=20 + count / 10):
        assert run_unharmed(predict.main, words, capfd) == 1
    found = json.loads(out.read_text())
    assert len(found) == count
    errors = [entry["error"] for entry in found if entry.get("error")]
    assert 0.2 * count < len(errors) < 0.9 * count
    assert not [error for error in errors if "exit code" in error or "took more than" in error or "\n" in error]


def test_an_avi_that_states_a_thousand_million_frames_is_read_for_those_it_has(
    write_clip: Callable[..., Path],
) -> None:
    path = write_clip(numbered_frames(20), "clip.avi", "mpeg4")
    content = bytearray(path.read_bytes())
    for box, place in ((b"avih", 24), (b"strh", 40)):
        start = content.index(box) + place
        content[start : start + 4] = struct.pack("<I", 10**9)
    path.write_bytes(content)
    sampler = ClipSampler("dense", 4)
    with unharmed(path.parent, seconds=5):
        assert read_file(FrameRequest(str(path), CHOICE)).shape == (4, 48, 64, 3)
        (short,) = count_short([Video(str(path), 0)], "train", [sampler], Decoding("pyav", 20.0))
    assert short.looked_at == 1


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "ICO"])
def test_standard_input_is_told_by_its_first_bytes_without_decoding_it_here(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "given", form)
    with Image.open(tmp_path / "given") as file:
        suffix = f".{(file.format or '').lower()}"
    monkeypatch.delattr(Image, "open")
    assert image_suffix(str(tmp_path / "given")) == (suffix if suffix in IMAGE_SUFFIXES else "")
