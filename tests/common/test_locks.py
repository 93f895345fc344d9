"""Locks between processes: held, left, inherited by nobody, and where the file system has none."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stvit_video.common import locks
from stvit_video.common.locks import Lock

HOLD = "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"


@contextmanager
def held_elsewhere(path: Path) -> Iterator[None]:
    """Have another process hold the system's lock of a file."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        process.kill()


@contextmanager
def forked(path: Path, host: str = socket.gethostname()) -> Iterator[int]:
    """Take a lock in a process of its own, which is killed at the end; give the number of that process."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        socket.gethostname = lambda: host
        lock = Lock(path)
        os.write(writer, b"." * lock.take(0, told))
        time.sleep(600)
    os.read(reader, 1)
    yield child
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)


def refuse(*given: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.fixture(params=["locks", "none", "local"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system with locks, one without, and one whose locks hold on each machine alone."""
    monkeypatch.setattr(locks, "BEAT_S", 0.05)
    monkeypatch.setattr(locks, "DEAD_S", 0.3)
    if request.param != "locks":
        monkeypatch.setattr(fcntl, "lockf", refuse if request.param == "none" else lambda *given: None)
    return request.param


def told(holder: str) -> str:
    return f"waiting for {holder}"


def test_a_lock_is_of_one_process_until_it_ends(system: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / ".lock"
    host = "node2" if system == "local" else socket.gethostname()
    lock = Lock(path)
    with forked(path, host) as child:
        holder = f"process {child} on {host}"
        assert not lock.take(0.6, told)  # for longer than it takes to find that a holder is gone
        assert capfd.readouterr().out == f"waiting for {holder}\n"
        assert lock.holder() == holder
    assert lock.take(0 if system == "locks" else 10, told)
    lock.close()
    assert sorted(os.listdir(path.parent)) == [".lock", ".lock.2"]  # since one has died
    assert lock.take(0, told)
    lock.close()
    assert sorted(os.listdir(path.parent)) == [".lock", ".lock.3"]


def test_a_closed_lock_leaves_nothing(system: str, tmp_path: Path) -> None:
    for _ in range(2):
        lock = Lock(tmp_path / ".lock")
        assert lock.take(0, told)
        lock.close()
        assert os.listdir(tmp_path) == []


def test_a_process_that_was_taken_for_dead_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It was stopped, on a file system where nothing tells that from dead."""
    monkeypatch.setattr(locks, "BEAT_S", 0.05)
    monkeypatch.setattr(locks, "DEAD_S", 0.3)
    monkeypatch.setattr(fcntl, "lockf", refuse)
    with forked(tmp_path / ".lock") as child:
        os.kill(child, signal.SIGSTOP)
        lock = Lock(tmp_path / ".lock")
        assert lock.take(10, told)
        os.kill(child, signal.SIGCONT)
        for _ in range(200):
            if f"process {os.getpid()} on" in (said := capfd.readouterr().err):
                break
            time.sleep(0.05)
        assert said.endswith(f"has taken over {tmp_path}: ending here\n")
        lock.close()


@pytest.mark.parametrize("has_locks", [True, False])
def test_of_many_processes_one_gets_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_locks: bool) -> None:
    """Each counts alone: two at once would lose a number."""
    if not has_locks:
        monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(locks, "POLL_S", 0.001)
    counter = tmp_path / "count"
    counter.write_text("0")
    children = []
    for _ in range(8):
        if (child := os.fork()) == 0:
            for _ in range(10):
                lock = Lock(tmp_path / "folder" / ".lock")
                if lock.take(60, told):
                    number = int(counter.read_text())
                    time.sleep(0.001)
                    counter.write_text(str(number + 1))
                    lock.close()
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    assert counter.read_text() == "80"
