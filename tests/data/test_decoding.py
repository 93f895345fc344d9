"""Decoding in its own process: what hangs or crashes costs one video, and nothing else is lost."""

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
from stvit_video.data.decode.frames import read_frames
from stvit_video.data.decode.process import Decoding
from stvit_video.data.decode.types import DecodeError
from stvit_video.data.failures import read_ledger
from stvit_video.runtime.signals import STOP_SIGNALS
from tests.conftest import numbered_frames, read_number
from tests.data.choices import Crashing, Frozen, Sleeping

BOTH = ("pyav", "decord")


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


def test_frames_are_those_of_this_process(path: str) -> None:
    decoding = Decoding(BOTH, 60)
    for indices in ((3, 1, 1, 59), (0,), tuple(range(60))):  # less and more memory than before
        request = decoding.request(path, Frozen(indices))
        np.testing.assert_array_equal(decoding.read(request), read_frames(request))
    first = decoding.read(decoding.request(path, Frozen((7,))))
    decoding.read(decoding.request(path, Frozen((8,))))
    assert read_number(first[0]) == 7  # the memory that both share is used again, what was read from it is not


def test_a_batch_is_decoded_ahead_in_order_with_its_failures(path: str) -> None:
    decoding = Decoding(BOTH, 60)
    paths = [path, "/nowhere/a.mp4", path, path, "/nowhere/b.mp4"]
    results = list(decoding.read_all(decoding.request(name, Frozen((i,))) for i, name in enumerate(paths)))
    assert [isinstance(result, DecodeError) for result in results] == [False, True, False, False, True]
    assert [read_number(results[i][0]) for i in (0, 2, 3)] == [0, 2, 3]
    assert list(decoding.read_all([])) == []


def test_what_hangs_is_stopped_at_the_deadline_and_not_tried_again(path: str, tmp_path: Path) -> None:
    decoding, others = Decoding(BOTH, 1.0), children()
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


def test_what_crashes_costs_one_video(path: str) -> None:
    decoding = Decoding(BOTH, 60)
    choices = [Frozen((0,)), Crashing(), Frozen((2,))]
    first, crashed, last = decoding.read_all(decoding.request(path, choice) for choice in choices)
    assert isinstance(crashed, DecodeError)
    assert "crash (signal 11)" in crashed.message
    assert [read_number(first[0]), read_number(last[0])] == [0, 2]


def test_a_child_that_was_killed_in_between_is_replaced(path: str) -> None:
    decoding = Decoding(BOTH, 60)
    before = children()
    decoding.read(decoding.request(path, Frozen((0,))))
    (child,) = children() - before
    os.kill(child, 9)
    time.sleep(0.2)
    assert read_number(decoding.read(decoding.request(path, Frozen((1,))))[0]) == 1


def test_signals_that_ask_a_run_to_stop_leave_its_child_at_work(path: str) -> None:
    decoding = Decoding(BOTH, 60)
    before = children()
    decoding.read(decoding.request(path, Frozen((0,))))
    (child,) = children() - before
    for number in STOP_SIGNALS:
        os.kill(child, number)
        assert read_number(decoding.read(decoding.request(path, Frozen((1,))))[0]) == 1
    assert children() - before == {child}  # the same: a killed one would have been replaced


def test_no_process_is_left_behind(path: str) -> None:
    before = children()
    decoding = Decoding(BOTH, 60)
    decoding.read(decoding.request(path, Frozen((0,))))
    another = copy.copy(decoding)  # pickled as it is for a loader's workers, it starts a child of its own
    another.read(another.request(path, Frozen((0,))))
    assert len(children() - before) == 2
    del decoding, another
    gc.collect()
    assert children() <= before


def test_a_hanging_child_dies_with_its_parent(path: str) -> None:
    code = f"""
import os, sys
from stvit_video.data.decode.process import Decoding
from tests.data.choices import Sleeping
decoding = Decoding(("decord",), 1e6)
decoding._send(decoding.request({path!r}, Sleeping()), alone=True)
print(decoding._child._process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    child = Path(f"/proc/{int(found.stdout)}")
    for _ in range(100):
        if not child.exists() or ") Z " in (child / "stat").read_text():
            return
        time.sleep(0.05)
    pytest.fail("the decoder outlives the process that asked for it")


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
def test_a_decoder_that_sleeps_for_ever_does_not_end_training(
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
