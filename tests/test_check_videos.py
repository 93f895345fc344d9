"""Scanning lists: readable videos are kept verbatim, the others listed, and nothing is written before the end."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stvit_video import check_videos
from stvit_video.data.decode.frames import Decoding
from stvit_video.data.decode.types import BLOCK_BYTES, DecodeError, Reader
from stvit_video.data.failures import read_ledger
from stvit_video.data.scan import cause
from tests.conftest import REPOSITORY, numbered_frames, read_list

# A decord that hangs or crashes on files of these names, and first says in its process's name that it is there: the
# decoding process may write no files.
STUB = """
import ctypes, os, sys, time
sys.path.remove({folder!r})
del sys.modules["decord"]
import decord  # the real one
sys.path.insert(0, {folder!r})  # for the processes that this one starts

class VideoReader(decord.VideoReader):
    def __init__(self, path, **rest):
        if path.endswith(("stuck.mp4", "crash.mp4")):
            ctypes.CDLL(None).prctl(15, b"reading it", 0, 0, 0)
        while path.endswith("stuck.mp4"):
            time.sleep(1)
        if path.endswith("crash.mp4"):
            os.kill(os.getpid(), 11)  # as native code does
        super().__init__(path, **rest)

decord.VideoReader = VideoReader
"""


@pytest.fixture
def root(write_clip: Callable[..., Path], tmp_path: Path) -> Path:
    """Return a folder with two readable clips, one of them with spaces in its name, and unreadable files."""
    clip = write_clip(numbered_frames(20), "videos/good.mp4")
    (clip.parent / "so good.mp4").write_bytes(clip.read_bytes())
    (clip.parent / "page.mp4").write_bytes(b"<html>not found</html>")
    (clip.parent / "cut.mp4").write_bytes(clip.read_bytes()[:1000])
    return clip.parent


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "stub"
    folder.mkdir()
    (folder / "decord.py").write_text(STUB.format(folder=str(folder)))
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Scan ``list`` into ``tmp_path``/out with two workers, and return the lines said about it."""

    def run(path: Path, *options: str) -> list[str]:
        arguments = [str(path), "--output", str(tmp_path / "out"), "--workers", "2", *options]
        assert check_videos.main(arguments) == 0
        return [line for line in capsys.readouterr().out.splitlines() if not line.startswith("check ")]

    return run


def test_lines_are_kept_verbatim_or_listed(root: Path, tmp_path: Path, check: Callable[..., list[str]]) -> None:
    clean = [b"good.mp4 0\n", b'"so good.mp4",1\r\n', b"so good.mp4\t2\n", b"  ./good.mp4   3  \n", b"good.mp4 4"]
    lines = [b"\xef\xbb\xbf", clean[0], b"page.mp4 0\n", clean[1], b" \r\n", b"none.mp4 1\n", *clean[2:4]]
    lines += [b"page.mp4,7\n", b"cut.mp4 2\n", clean[4]]
    path = root / "list.txt"
    path.write_bytes(b"".join(lines))
    output = tmp_path / "out"
    assert check(path) == [
        f"5 of 9 videos can be read: {output / 'clean.txt'}",
        f"4 cannot: {output / 'failures.csv'}",
        "        3  cannot be opened",
        "        1  no such file",
    ]
    assert (output / "clean.txt").read_bytes() == b"".join(clean)
    rows = read_ledger(output / "failures.csv")
    assert [(Path(row.path).name, row.stage) for row in rows] == [
        ("cut.mp4", "check"),
        ("none.mp4", "check"),
        ("page.mp4", "check"),
    ]
    kept = [video.path for video in read_list(output / "clean.txt", root)]
    assert sorted({*kept, *(row.path for row in rows)}) == sorted({video.path for video in read_list(path, root)})
    assert not {row.path for row in rows} & set(kept)
    assert sorted(entry.name for entry in output.iterdir()) == ["clean.txt", "failures.csv"]


def test_paths_start_from_root_and_only_two_files_are_replaced(
    root: Path, tmp_path: Path, check: Callable[..., list[str]]
) -> None:
    path, output = tmp_path / "list.txt", tmp_path / "out"
    path.write_text("good.mp4 0\n")
    output.mkdir()
    for name in ("clean.txt", "failures.csv", "notes.txt"):
        (output / name).write_text("old")
    assert check(path) == [
        f"0 of 1 videos can be read: {output / 'clean.txt'}",
        f"1 cannot: {output / 'failures.csv'}",
        "        1  no such file",
    ]
    assert check(path, "--root", str(root)) == [f"1 of 1 videos can be read: {output / 'clean.txt'}"]
    assert (output / "clean.txt").read_text() == "good.mp4 0\n"
    assert read_ledger(output / "failures.csv") == []
    assert (output / "notes.txt").read_text() == "old"


def test_published_lists_keep_their_format(root: Path, tmp_path: Path, check: Callable[..., list[str]]) -> None:
    (root / "abseiling").mkdir()
    for name in ("-0good_000001_000011.mp4", "7.webm"):
        (root / "abseiling" / name).write_bytes((root / "good.mp4").read_bytes())
    header = "label,youtube_id,time_start,time_end,split\n"
    kept = '"abseiling",-0good,1,11,val\n'
    (root / "val.csv").write_text(f"{header}abseiling,absent,3,13,val\n\n{kept}")
    clean = tmp_path / "out" / "clean.txt"
    assert check(root / "val.csv")[0] == f"1 of 2 videos can be read: {clean}"
    assert clean.read_text() == header + kept
    entries = [{"id": str(number), "template": "Holding [something]", "label": "käse"} for number in (6, 7, 8)]
    (root / "val.json").write_text(json.dumps(entries))
    assert check(root / "val.json")[0] == f"1 of 3 videos can be read: {clean}"
    assert json.loads(clean.read_text()) == entries[1:2]
    assert check(clean, "--root", str(root), "--output", str(tmp_path / "again"))[0].startswith("1 of 1 videos")


@pytest.mark.parametrize(
    ("options", "readable"),
    [(["--sample"], 1), (["--frames", "2"], 1), (["--frames", "60"], 0), (["--all-frames"], 0), ([], 0)],
)
def test_the_requested_number_of_frames_is_read(
    tmp_path: Path, options: list[str], readable: int, check: Callable[..., list[str]]
) -> None:
    (tmp_path / "frames").mkdir()
    for number in range(60):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "frames" / f"{number}.png")
    (tmp_path / "frames" / "58.png").write_bytes(b"damaged")  # 16 frames from 0 to 59 pass over it
    (tmp_path / "list.txt").write_text("frames 0\n")
    assert check(tmp_path / "list.txt", *options)[0].startswith(f"{readable} of 1 videos")


def test_the_module_as_a_command_reads_all_frames(root: Path) -> None:
    (root / "list.txt").write_text("good.mp4 0\n")
    # The decoding process unpickles the choice by the name of its module, which must not be __main__.
    command = [sys.executable, "-m", "stvit_video.check_videos", "list.txt", "--output", "out"]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    found = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.endswith("\n1 of 1 videos can be read: out/clean.txt\n")


class Blocks(Reader):
    """A video that records which frames are read together."""

    path, length = "blocks", 1000

    def __init__(self, side: int) -> None:
        self.side, self.read = side, list[list[int]]()

    def times(self) -> np.ndarray:
        raise AssertionError

    def _read(self, indices: np.ndarray) -> np.ndarray:
        self.read.append(indices.tolist())
        return np.broadcast_to(np.uint8(0), (len(indices), self.side, self.side, 3))


@pytest.mark.parametrize(("side", "block"), [(8, 1000), (1000, 22), (6000, 1)])
def test_all_frames_are_read_in_blocks_of_limited_size(side: int, block: int) -> None:
    video = Blocks(side)
    video.check()
    first, *blocks = video.read
    assert first == [0]
    assert list(itertools.chain(*blocks)) == list(range(1000))
    assert max(map(len, blocks)) == block
    assert block == 1 or block * side**2 * 3 <= BLOCK_BYTES


def test_hangs_and_crashes_are_counted(root: Path, stub: Path, check: Callable[..., list[str]]) -> None:
    for name in ("stuck.mp4", "crash.mp4"):
        (root / name).write_bytes((root / "good.mp4").read_bytes())
    (root / "list.txt").write_text("".join(f"{name}.mp4 0\n" for name in ("good", "stuck", "crash", "so good")))
    lines = check(root / "list.txt", "--deadline", "2", "--decoder", "decord")
    assert lines[0].startswith("2 of 4 videos can be read")
    assert sorted(lines[2:]) == ["        1  crashed the decoder", "        1  took too long"]


def find_readers(process: int) -> list[str]:
    """Return the children of a process in which the stub reads a file."""
    lists = [path.read_text() for path in Path("/proc", str(process), "task").glob("*/children")]
    return [child for child in " ".join(lists).split() if Path("/proc", child, "comm").read_text() == "reading it\n"]


def test_ctrl_c_ends_at_once_and_writes_nothing(root: Path, stub: Path, tmp_path: Path) -> None:
    (root / "stuck.mp4").write_bytes((root / "good.mp4").read_bytes())
    (root / "list.txt").write_text("stuck.mp4 0\n" + "good.mp4 0\n")
    command = [sys.executable, "-m", "stvit_video.check_videos", str(root / "list.txt"), "--output", str(tmp_path)]
    command += ["--decoder", "decord"]
    env = {**os.environ, "PYTHONPATH": f"{stub}{os.pathsep}{REPOSITORY}"}
    scan = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(1200):
        if readers := find_readers(scan.pid):
            break
        assert scan.poll() is None
        time.sleep(0.05)
    scan.send_signal(signal.SIGINT)
    _, said = scan.communicate(timeout=20)  # the deadline is 60 s
    assert scan.returncode == 130
    assert said == "stopped before the end: nothing was written; the same command starts again\n"
    assert not (tmp_path / "clean.txt").exists()
    assert not (tmp_path / "failures.csv").exists()
    for _ in range(100):
        if not Path("/proc", readers[0]).exists():
            return
        time.sleep(0.05)
    pytest.fail("a decoding process is left behind")


def test_other_errors_are_not_counted_as_damage(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Decoding, requests: object) -> None:
        raise RuntimeError("no process can be started")

    monkeypatch.setattr(Decoding, "read_all", fail)
    (root / "list.txt").write_text("good.mp4 0\n")
    with pytest.raises(RuntimeError, match="no process can be started"):
        check_videos.main([str(root / "list.txt"), "--output", str(tmp_path / "out")])
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("message", "name"),
    [
        ("no such file", "no such file"),
        ("took more than 60 s (DATA.DEADLINE_S); its decoder was stopped", "took too long"),
        ("decord: cannot be opened as video (x); pyav: frame 3 is damaged", "frames cannot be decoded"),
        ("decord: cannot be opened as video (x); pyav: has no frames", "holds no video"),
        ("does not fit into memory", "does not fit into memory"),
        ("cannot be read as an image (x)", "cannot be opened"),
        ("cannot be listed (Permission denied)", "cannot be listed"),
    ],
)
def test_messages_are_counted_by_cause(message: str, name: str) -> None:
    assert cause(DecodeError("a.mp4", message)) == name


REFUSED = {
    "a folder is given": ([".", "--output", "out"], "is a folder"),
    "no list": (["absent.txt", "--output", "out"], "is not a file"),
    "no folder of a list": (["absent/list.txt", "--output", "out"], "List absent/list.txt is not a file"),
    "no label": (["bare.txt", "--output", "out"], "has no label"),
    "a video": (["good.mp4", "--output", "out"], "is not UTF-8 text"),
    "rows of several lines": (["split.csv", "--output", "out"], "rows of several lines"),
    "no output": (["list.txt"], "--output"),
    "output is a file": (["list.txt", "--output", "good.mp4"], "File exists"),
    "output is in a file": (["list.txt", "--output", "good.mp4/out"], "Not a directory"),
    "output would replace the list": (["old/clean.txt", "--output", "old"], "would replace the list itself"),
    "no root": (["list.txt", "--output", "out", "--root", "absent"], "--root absent is not a folder"),
    "no workers": (["list.txt", "--output", "out", "--workers", "0"], "--workers 0 is out of range; give 1 to 1,000"),
    "no frames": (["list.txt", "--output", "out", "--frames", "0"], "--frames 0 is out of range; give 1 to 10,000"),
    "no time": (["list.txt", "--output", "out", "--deadline", "nan"], "--deadline nan is out of range"),
    "no end": (["list.txt", "--output", "out", "--deadline", "inf"], "--deadline inf is out of range"),
    "unknown decoder": (["list.txt", "--output", "out", "--decoder", "ffmpeg"], "invalid choice"),
    "two kinds of reading": (["list.txt", "--output", "out", "--frames", "3", "--all-frames"], "not allowed with"),
}


@pytest.mark.parametrize(("arguments", "part"), REFUSED.values(), ids=REFUSED)
def test_wrong_use_is_one_line(
    root: Path, arguments: list[str], part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    Path("old").mkdir()
    for name in ("list.txt", "old/clean.txt"):
        Path(name).write_text("good.mp4 0\n")
    Path("bare.txt").write_text("good.mp4 0\ncut.mp4\n")
    Path("split.csv").write_text('label,youtube_id,time_start,time_end\n"ab\nc",x,1,11\n')
    assert check_videos.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert part in said
    assert not Path("out").exists()


def test_a_decoding_process_does_not_import_torch() -> None:
    code = "import sys, stvit_video.check_videos; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0
