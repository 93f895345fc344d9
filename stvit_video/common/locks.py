"""One process at a time in a folder, also on file systems without locks and between machines."""

import fcntl
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from stvit_video.common.files import check_own, open_to_append

POLL_S = 0.2
BEAT_S = 5.0  # between two signs of life of a holder
DEAD_S = 15.0  # without one, a holder whose lock this machine cannot see is gone
ENDED = "ended"


class Lock:
    """The lock of a file ``path``, whose folder is made if need be.

    The system's lock ends with its process. But some file systems have none, and others none between machines. So a
    holder also has a record, the highest of ``path.1``, ``path.2`` ...: a file that one process alone can make, and
    makes once the record before says that its holder ended, or that holder is gone. Once a holder died, the highest
    record stays, so that none is made twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None
        self._number = 0  # of the record
        self._stopped = threading.Event()
        self._seen, self._since = (0, 0), 0.0  # number and time of another's record, and since when it is so old

    def take(self, patience: float, note: Callable[[str], str]) -> bool:
        """Return whether the lock was taken within ``patience`` seconds.

        If it has to wait, ``note(holder)`` is printed. Raises OSError where the file cannot be written.
        """
        until, told = time.monotonic() + patience, False
        while not self._try():
            if time.monotonic() > until:
                return False
            if not told:
                print(note(self.holder()), flush=True)
            told = True
            time.sleep(POLL_S)
        return True

    def holder(self) -> str:
        """Return which process has the lock, as in "process 7 on node2"."""
        with suppress(OSError):
            return _read(_record(self.path, _newest(self.path))) or "another process"
        return "another process"

    def close(self) -> None:
        """Let others take the lock. No file is left, unless an earlier holder died without this."""
        if self._file is None:
            return
        self._stopped.set()
        record = _record(self.path, self._number)
        with suppress(OSError):
            if self._number == 1:
                record.unlink()
                self.path.unlink()
            else:
                record.write_text(ENDED)
                for number in range(1, self._number):
                    _record(self.path, number).unlink(missing_ok=True)
        self._file.close()
        self._file = None

    def _try(self) -> bool:
        """Return whether the lock could be taken at once."""
        file = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = open_to_append(self.path)
            if self._take_record(_lock_file(file)):
                self._file, file = file, None
                return True
        except (BlockingIOError, FileNotFoundError, FileExistsError):  # held, or another process was quicker
            if os.path.lexists(self.path.parent) and not self.path.parent.is_dir():
                raise
        finally:
            if file is not None:
                file.close()
        return False

    def _take_record(self, is_locked: bool) -> bool:
        newest = _newest(self.path)
        if newest and not self._has_ended(newest, is_locked):
            return False
        record = _record(self.path, newest + 1)
        with open(record, "x") as file:
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
        if _newest(self.path) != newest + 1:  # the list was read long ago
            record.unlink()
            return False
        self._number, self._stopped = newest + 1, threading.Event()
        beat = (self.path, self._number, self._stopped)
        threading.Thread(target=_beat, args=beat, daemon=True).start()
        return True

    def _has_ended(self, number: int, is_locked: bool) -> bool:
        record = _record(self.path, number)
        said = _read(record)
        if said == ENDED or (is_locked and said.endswith(f" on {socket.gethostname()}")):  # where it held that lock
            return True
        seen = number, record.stat().st_mtime_ns
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        return time.monotonic() - self._since > DEAD_S


def _lock_file(file: TextIO) -> bool:
    """Take the system's lock; return whether there is such a thing. Raises BlockingIOError where it is held.

    It is a lock of the process, not of the open file, which the loader's workers would inherit.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows both
        raise BlockingIOError from None
    except OSError:
        return False
    if not os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
        raise BlockingIOError  # its holder has removed it
    return True


def _record(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def _read(record: Path) -> str:
    check_own(record)
    return record.read_text()


def _newest(path: Path) -> int:
    names = (name.rpartition(".") for name in os.listdir(path.parent))
    return max((int(end) for start, _, end in names if start == path.name and end.isdecimal()), default=0)


def _beat(path: Path, number: int, stopped: threading.Event) -> None:
    """Give signs of life; end this process where another took it for dead, since it was stopped for DEAD_S."""
    while not stopped.wait(BEAT_S):
        with suppress(OSError):
            os.utime(_record(path, number))
            if (newest := _newest(path)) > number:
                other = _read(_record(path, newest))
                if not other.startswith(f"process {os.getpid()} "):
                    print(f"error: {other} has taken over {path.parent}: ending here", file=sys.stderr, flush=True)
                    os._exit(1)
