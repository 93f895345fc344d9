"""300 damaged files: each gives frames or a reason in one line, before the deadline and without leaks."""

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stvit_video.data.clips.sampling import ClipSampler
from stvit_video.data.decode.frames import Decoding
from stvit_video.data.decode.types import DecodeError, Frames
from tests.conftest import copy_packets, numbered_frames
from tests.data.choices import Frozen

DEADLINE_S = 20.0
SPREAD = partial(ClipSampler("dense", 1), clips=16)  # 16 frames, the first and the last among them
SOURCES = [
    ("h264.mp4", "libx264", {"g": "12"}),
    ("hevc.mp4", "libx265", {"x265-params": "log-level=none"}),
    ("vp9.webm", "libvpx-vp9", {"cpu-used": "8"}),
    ("mpeg4.avi", "mpeg4", {}),
    ("mpeg2.mpg", "mpeg2video", {"b": "400k"}),
]
TEXTS = {
    "empty.mp4": b"",
    "text.mp4": b"a list, not a video\n" * 20,
    "page.mp4": b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body>nothing here</body></html>\n",
    "pointer.mp4": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0f" * 32 + b"\nsize 1024\n",
    "zeros.mp4": bytes(5000),
    "noise.mp4": np.random.default_rng(1).bytes(5000),
}
Outcome = Frames | DecodeError


def cut(content: bytearray, rng: np.random.Generator) -> bytes:
    return bytes(content[: rng.integers(1, len(content))])


def flip(content: bytearray, rng: np.random.Generator, count: int) -> bytes:
    for place in rng.integers(0, len(content), count):
        content[place] ^= 1 << int(rng.integers(8))
    return bytes(content)


def flip_few(content: bytearray, rng: np.random.Generator) -> bytes:
    return flip(content, rng, 3)


def flip_many(content: bytearray, rng: np.random.Generator) -> bytes:
    return flip(content, rng, len(content) // 100)


def clear(content: bytearray, rng: np.random.Generator) -> bytes:
    start, size = rng.integers(len(content)), rng.integers(1, len(content) // 4)
    content[start : start + size] = bytes(len(content[start : start + size]))
    return bytes(content)


DAMAGES = (cut, flip_few, flip_many, clear)


def put_index_first(path: Path) -> Path:
    """Return a copy of an MP4 with its index at the front, as on the web: truncated, it can still be opened."""
    return copy_packets(path, path.with_stem(f"{path.stem}_web"), movflags="faststart")


def write_odd_files(folder: Path, clip: Path, web: Path, sound: Path) -> dict[str, Path]:
    """Write files whose names do not match their content."""
    for name, content in TEXTS.items():
        (folder / name).write_bytes(content)
    picture = folder / "picture.png"
    Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(picture)
    picture.rename(folder / "picture.mp4")
    content = web.read_bytes()
    (folder / "head.mp4").write_bytes(content[:64])
    (folder / "index.mp4").write_bytes(content[: content.index(b"mdat")])
    (folder / "clip.png").write_bytes(clip.read_bytes())
    (folder / "clip.avi").write_bytes(clip.read_bytes())
    names = [*TEXTS, "picture.mp4", "head.mp4", "index.mp4", "clip.png", "clip.avi"]
    return {"sound": sound, **{name: folder / name for name in names}}


@pytest.fixture
def damaged(write_clip: Callable[..., Path], write_sound: Callable[..., Path], tmp_path: Path) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    noise = rng.integers(-20, 20, (60, 48, 64, 3))  # else a file has little content to damage
    frames = np.clip(numbered_frames(60) + noise, 0, 255).astype(np.uint8)
    clips = [write_clip(frames, name, codec, **options) for name, codec, options in SOURCES]
    clips.append(put_index_first(clips[0]))
    files = write_odd_files(tmp_path, clips[0], clips[-1], write_sound("sound.mp4"))
    for clip in clips:
        for damage in DAMAGES:
            for number in range(12):
                path = clip.with_stem(f"{clip.stem}_{damage.__name__}_{number}")
                path.write_bytes(damage(bytearray(clip.read_bytes()), rng))
                files[path.name] = path
    assert len(files) == 300
    return files


def read_files(paths: Sequence[Path], decoder: str) -> dict[Path, Outcome]:
    """Read 16 frames of each, in two threads."""
    outcomes: dict[Path, Outcome] = {}

    def work(share: Sequence[Path]) -> None:
        decoding = Decoding(decoder, DEADLINE_S)
        results = decoding.read_all(decoding.request(str(path), SPREAD) for path in share)
        outcomes.update(zip(share, results, strict=True))

    threads = [threading.Thread(target=work, args=(paths[start::2],)) for start in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def check_outcome(path: Path, outcome: Outcome) -> None:
    if isinstance(outcome, DecodeError):
        assert outcome.path == str(path)
        assert outcome.message
        assert "\n" not in str(outcome)
        assert "took more than" not in outcome.message, outcome
        assert "decoder fail" not in outcome.message, outcome  # an exception that is no DecodeError
    else:
        assert outcome.dtype == np.uint8
        assert outcome.ndim == 4, path
        assert outcome.shape[::3] == (16, 3), path
        assert outcome.size, path


def test_damaged_files_give_frames_or_a_reason(damaged: dict[str, Path]) -> None:
    readable: dict[str, set[str]] = {}
    for decoder in ("decord", "pyav"):
        outcomes = read_files(list(damaged.values()), decoder)
        assert len(outcomes) == 300
        for path, outcome in outcomes.items():
            check_outcome(path, outcome)
        errors = {path.name: str(outcome) for path, outcome in outcomes.items() if isinstance(outcome, DecodeError)}
        readable[decoder] = damaged.keys() - errors.keys()
        assert "clip.avi" in readable[decoder]  # the content counts, not the name
        for part in ("cannot be opened as video", "frames cannot be decoded", "has no video stream"):
            assert any(part in message for message in errors.values()), part
        assert "cannot be read as an image" in errors["clip.png"]
        assert errors.keys() >= {*TEXTS, "head.mp4", "index.mp4"}
    assert readable["decord"] < readable["pyav"]


def resident(process: int) -> float:
    """Return the memory that a process holds, in MB."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="the system does not say how much memory is held")
# Of five files, three are damaged, and decord leaves AVI to others.
@pytest.mark.parametrize(("decoder", "fail"), [("decord", 160), ("pyav", 120)])
def test_opening_thousands_of_files_leaks_no_memory(
    write_clip: Callable[..., Path], tmp_path: Path, decoder: str, fail: int
) -> None:
    clips = [write_clip(numbered_frames(8), name, codec, **options) for name, codec, options in SOURCES[:4:3]]
    flipped, half, text = tmp_path / "flipped.mp4", tmp_path / "half.avi", tmp_path / "text.mp4"
    flipped.write_bytes(flip_many(bytearray(clips[0].read_bytes()), np.random.default_rng(0)))
    half.write_bytes(clips[1].read_bytes()[: clips[1].stat().st_size // 2])
    text.write_bytes(TEXTS["text.mp4"])
    decoding = Decoding(decoder, DEADLINE_S)

    def read(count: int) -> int:
        files = itertools.islice(itertools.cycle([*clips, flipped, half, text]), count)
        requests = (decoding.request(str(path), Frozen((0, 3))) for path in files)
        return sum(isinstance(result, DecodeError) for result in decoding.read_all(requests))

    assert read(200) == fail
    child = decoding._child
    assert child is not None
    before = resident(os.getpid()), resident(child.process.pid)
    assert read(2000) == 10 * fail
    assert decoding._child is child  # it did not crash
    grown = resident(os.getpid()) - before[0], resident(child.process.pid) - before[1]
    assert grown[0] < 16
    assert grown[1] < 50
