"""Decoding in a child process: a hanging or crashing decoder costs one video and nothing else."""

import contextlib
import copy
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stvit_video import run
from stvit_video.data.decode.frames import Decoding, read_file
from stvit_video.data.decode.process import kept_environment
from stvit_video.data.decode.types import DecodeError, DecoderKilled
from stvit_video.data.failures import read_ledger
from stvit_video.data.lists.annotations import Video
from stvit_video.data.short_videos import count_short
from stvit_video.runtime.stopping import STOP_SIGNALS
from tests.conftest import numbered_frames, read_number
from tests.data.choices import Crashing, FailingSampler, Frozen, Killed, Sleeping


@pytest.fixture
def path(write_clip: Callable[..., Path]) -> str:
    return str(write_clip(numbered_frames(60)))


def children() -> set[int]:
    """Return the running child processes of this one."""
    found = set()
    for process in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended while being looked at
            state, parent = process.read_text().rpartition(") ")[2].split()[:2]
            if int(parent) == os.getpid() and state != "Z":
                found.add(int(process.parent.name))
    return found


def test_the_child_returns_the_same_frames_as_this_process(path: str) -> None:
    decoding = Decoding("pyav", 60)
    for indices in ((3, 1, 1, 59), (0,), tuple(range(60))):  # less and more memory than before
        request = decoding.request(path, Frozen(indices))
        np.testing.assert_array_equal(decoding.read(request), read_file(request))
    first = decoding.read(decoding.request(path, Frozen((7,))))
    decoding.read(decoding.request(path, Frozen((8,))))
    assert read_number(first[0]) == 7  # the shared memory is reused, the frames read from it are copies


def test_batches_keep_order_and_failures(path: str) -> None:
    decoding = Decoding("pyav", 60)
    paths = [path, "/nowhere/a.mp4", path, path, "/nowhere/b.mp4"]
    results = list(decoding.read_all(decoding.request(name, Frozen((i,))) for i, name in enumerate(paths)))
    assert [isinstance(result, DecodeError) for result in results] == [False, True, False, False, True]
    assert [read_number(results[i][0]) for i in (0, 2, 3)] == [0, 2, 3]
    assert list(decoding.read_all([])) == []


def test_an_abandoned_batch_does_not_mix_up_later_answers(path: str) -> None:
    decoding = Decoding("pyav", 60)
    results = decoding.read_all(decoding.request(path, Frozen((i,))) for i in range(5))
    assert read_number(next(results)[0]) == 0
    with pytest.raises(AssertionError, match="still being answered"):
        decoding.read(decoding.request(path, Frozen((9,))))
    results.close()
    assert read_number(decoding.read(decoding.request(path, Frozen((9,))))[0]) == 9


def test_a_hanging_decoder_is_killed_and_its_file_not_retried(path: str, tmp_path: Path) -> None:
    decoding, others = Decoding("pyav", 1.0), children()
    other = tmp_path / "other.mp4"
    other.write_bytes(Path(path).read_bytes())
    decoding.read(decoding.request(path, Frozen((0,))))  # so that the child has started
    before, started = children() - others, time.monotonic()
    requests = [decoding.request(str(other), Sleeping()), *(decoding.request(path, Frozen((i,))) for i in (4, 5))]
    stuck, *rest = decoding.read_all(requests)
    assert 1.0 <= time.monotonic() - started < 20
    assert isinstance(stuck, DecodeError)
    assert "took more than 1 s (DATA.DEADLINE_S)" in stuck.message
    assert [read_number(frames[0]) for frames in rest] == [4, 5]
    assert before
    assert not before & children()  # it was killed, not left behind
    started = time.monotonic()
    with pytest.raises(DecodeError, match="is not tried again"):
        decoding.read(decoding.request(str(other), Frozen((0,))))
    assert time.monotonic() - started < 0.5
    assert read_number(decoding.read(decoding.request(path, Frozen((6,))))[0]) == 6


def test_a_crash_costs_one_video(path: str) -> None:
    decoding = Decoding("pyav", 60)
    choices = [Frozen((0,)), Crashing(), Frozen((2,))]
    first, crashed, last = decoding.read_all(decoding.request(path, choice) for choice in choices)
    assert isinstance(crashed, DecodeError)
    assert "crash (signal 11)" in crashed.message
    assert [read_number(first[0]), read_number(last[0])] == [0, 2]


def test_a_request_is_repeated_once_where_the_child_was_killed(path: str, tmp_path: Path) -> None:
    """By the system's OOM killer, for example, which may have taken it for the memory that others used."""
    count = tmp_path / "count"
    for deaths in (1, 2):
        decoding = Decoding("pyav", 60, cache=str(tmp_path))  # the only folder to which the child may write
        count.write_text(str(deaths))
        choices = [Frozen((0,)), Killed(str(count)), Frozen((2,))]
        first, killed, last = decoding.read_all(decoding.request(path, choice) for choice in choices)
        assert [read_number(first[0]), read_number(last[0])] == [0, 2]
        if deaths == 1:
            assert read_number(killed[0]) == 7
        else:
            assert isinstance(killed, DecoderKilled)
            assert killed.message == "does not fit into memory: its decoder was killed twice (signal 9)"


def test_files_that_hang_or_crash_are_left_out_of_the_count_of_short_videos(
    write_clip: Callable[..., Path],
) -> None:
    paths = [write_clip(numbered_frames(length), f"{length}.mp4") for length in (5, 6, 7, 20)]
    videos = [Video(str(path), 0) for path in [*paths, "/nowhere/a.mp4"]]
    ((short, looked_at, line),) = count_short(
        videos, "train", [FailingSampler("dense", 8, crashes=5, hangs=6)], Decoding("pyav", 1.0)
    )
    assert (short, looked_at) == (1, 2)
    assert line.startswith("1 of 2 training videos looked at are shorter than a clip of 8 frames;")


def test_a_killed_child_is_replaced(path: str) -> None:
    decoding = Decoding("pyav", 60)
    before = children()
    decoding.read(decoding.request(path, Frozen((0,))))
    (child,) = children() - before
    os.kill(child, 9)
    time.sleep(0.2)
    assert read_number(decoding.read(decoding.request(path, Frozen((1,))))[0]) == 1


def test_the_child_ignores_stop_signals(path: str) -> None:
    decoding = Decoding("pyav", 60)
    before = children()
    decoding.read(decoding.request(path, Frozen((0,))))
    (child,) = children() - before
    for number in STOP_SIGNALS:
        os.kill(child, number)
        assert read_number(decoding.read(decoding.request(path, Frozen((1,))))[0]) == 1
    assert children() - before == {child}  # the same child: a killed one would have been replaced


def test_children_end_with_their_owner(path: str) -> None:
    before = children()
    decoding = Decoding("pyav", 60)
    decoding.read(decoding.request(path, Frozen((0,))))
    another = copy.copy(decoding)  # a pickled copy, as in a loader's workers, starts its own child
    another.read(another.request(path, Frozen((0,))))
    assert len(children() - before) == 2
    del decoding, another
    gc.collect()
    assert children() <= before


def test_a_hanging_child_dies_with_its_parent(path: str) -> None:
    code = f"""
import os, sys
from stvit_video.data.decode.frames import Decoding
from tests.data.choices import Sleeping
decoding = Decoding("decord", 1e6)
decoding._send(decoding.request({path!r}, Sleeping()))
print(decoding._child.process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    child = Path(f"/proc/{int(found.stdout)}")
    for _ in range(100):
        if not child.exists() or ") Z " in (child / "stat").read_text():
            return
        time.sleep(0.05)
    pytest.fail("the decoder outlives the process that asked for it")


def test_modules_in_the_current_folder_are_not_run(path: str, tmp_path: Path) -> None:
    """A folder of uploads may hold a numpy.py."""
    script = tmp_path / "script.py"
    script.write_text(f"""
from stvit_video.data.decode.frames import Decoding
from tests.data.choices import Frozen
decoding = Decoding("pyav", 60)
print(decoding.read(decoding.request({path!r}, Frozen((0,)))).shape)
""")
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    for name in ("numpy", "av", "decord", "json", "socket"):
        (uploads / f"{name}.py").write_text("open('RAN', 'w').close()")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    found = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=uploads, env=env)
    assert found.stdout.endswith(", 3)\n"), found.stderr
    assert not (uploads / "RAN").exists()


STUB = """
import sys, time
sys.path.remove({folder!r})
del sys.modules["decord"]
import decord  # the real one

class VideoReader(decord.VideoReader):
    def __init__(self, path, **rest):
        while path.endswith({stuck!r}):
            time.sleep(1)
        super().__init__(path, **rest)

decord.VideoReader = VideoReader
"""


@pytest.mark.parametrize("workers", ["0", pytest.param("2", marks=pytest.mark.long)])
def test_training_survives_a_hanging_decoder(
    small_run: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    folder = tmp_path / "stub"
    folder.mkdir()
    stuck = ("train_00003.mp4", "test_00005.mp4")
    (folder / "decord.py").write_text(STUB.format(folder=str(folder), stuck=stuck))
    monkeypatch.syspath_prepend(folder)
    assert (
        run.main(
            small_run("DATA.DECODER", "decord", "DATA.DEADLINE_S", "3", "DATA.WORKERS", workers, "DATA.VAL_LIST", "")
        )
        == 0
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["videos"], results["scored"], results["failed"]) == (16, 15, 1)
    rows = read_ledger(tmp_path / "run" / "failures.csv")
    assert [(Path(row.path).name, row.stage) for row in rows] == [(stuck[1], "test"), (stuck[0], "train")]
    assert all("took more than 3 s" in row.message and row.decoder and row.first_seen for row in rows)


def test_a_child_keeps_the_memory_that_it_frees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the system would clear memory for each clip anew; what the user sets counts."""
    assert int(kept_environment()["MALLOC_TRIM_THRESHOLD_"]) > 2**20
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "7")
    assert kept_environment()["MALLOC_TRIM_THRESHOLD_"] == "7"
