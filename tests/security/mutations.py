"""Files changed at random from a fixed seed, and a check that reading them did no harm."""

import hashlib
import os
import random
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

NUMBERS = (0, 1, -1, 127, 255, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**62, 2**63 - 1)  # at limits of formats
DIGITS = re.compile(rb"[0-9]+")
OWN_FILES = ("__pycache__", ".pytest_cache", ".lock", ".done")  # which Python and pytest write beside the tests

State = dict[str, tuple[object, ...]]


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Return ``content`` with one to eight changes of bytes, numbers, lengths and order, mostly in its header."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        rng.choice(CHANGES)(changed, _place(changed, rng), rng)
    return bytes(changed)


def _place(content: bytearray, rng: random.Random) -> int:
    """Return where to change it. Headers lie at the start of most files, and at the end of others."""
    start, stop = rng.choice(((0, 512), (0, len(content)), (len(content) - 512, len(content)), (0, 64)))
    return rng.randrange(max(0, min(start, len(content) - 1)), max(1, min(stop, len(content))))


def _flip(content: bytearray, place: int, rng: random.Random) -> None:
    if content:
        content[place] ^= 1 << rng.randrange(8)


def _overwrite(content: bytearray, place: int, rng: random.Random) -> None:
    noise = rng.randbytes(rng.randrange(1, 9))
    content[place : place + len(noise)] = noise


def _write_number(content: bytearray, place: int, rng: random.Random) -> None:
    size = rng.choice((1, 2, 4, 8))
    number = rng.choice(NUMBERS) % 256**size
    content[place : place + size] = number.to_bytes(size, rng.choice(("big", "little")))


def _write_digits(content: bytearray, place: int, rng: random.Random) -> None:
    """Put another number in the place of one that is written in digits, as in YAML, JSON and lists."""
    if found := DIGITS.search(content, place):
        content[found.start() : found.end()] = rng.choice((*map(str, NUMBERS), "1e999", "nan", "9" * 400)).encode()


def _remove(content: bytearray, place: int, rng: random.Random) -> None:
    del content[place : place + rng.randrange(1, 64)]


def _repeat(content: bytearray, place: int, rng: random.Random) -> None:
    part = content[place : place + rng.randrange(1, 64)]
    content[place:place] = part * rng.choice((1, 1, 2, 50))


def _move(content: bytearray, place: int, rng: random.Random) -> None:
    size = rng.randrange(1, 64)
    part = content[place : place + size]
    del content[place : place + size]
    other = rng.randrange(len(content) + 1)
    content[other:other] = part


def _truncate(content: bytearray, place: int, rng: random.Random) -> None:
    del content[place:]


CHANGES: tuple[Callable[[bytearray, int, random.Random], None], ...] = (
    _flip, _overwrite, _write_number, _write_number, _write_digits, _remove, _repeat, _move, _truncate,
)  # fmt: skip


@contextmanager
def unharmed(
    folder: Path, *, peak_mb: float = 50, seconds: float = 30, apart_from: Sequence[Path] = ()
) -> Iterator[None]:
    """Check that a tree of files stays as it is, except below ``apart_from``, and what memory and time are taken.

    ``peak_mb`` is by how much this process's resident memory may grow meanwhile; its children's does not count. What
    imports and caches take the first time counts too: call once before what is to be measured.
    """
    before, resident = _read_tree(folder, apart_from), reset_peak()
    started = time.monotonic()
    yield
    took, grown = time.monotonic() - started, memory_mb("VmHWM") - resident
    after = _read_tree(folder, apart_from)
    assert after == before, sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    assert grown <= peak_mb, f"the peak of memory grew by {grown:.0f} MB"
    assert took <= seconds, f"it took {took:.1f} s"


def run_unharmed(main: Callable[[Sequence[str]], int], arguments: Sequence[str], capfd: pytest.CaptureFixture) -> int:
    """Call a command in this process, check that it ends as it may, and return its exit code: 0, 1 or 2.

    On stderr it may print one line of error, notes, and no traceback, also of its children. Where it fails it says so.
    """
    capfd.readouterr()
    code = main(arguments)
    printed, said = capfd.readouterr()
    assert code in (0, 1, 2), (code, said)
    assert "Traceback" not in said, said
    assert sum(line.startswith("error: ") for line in said.splitlines()) <= 1, said
    assert code == 0 or said or printed
    return code


def _read_tree(folder: Path, apart_from: Iterable[Path]) -> State:
    """Return of each path below a folder its kind, rights, size and time of change, and its content's hash or target.

    Times and number of links of folders are left out: pytest writes files of its own beside those of the tests.
    """
    left_out = {os.path.abspath(path) for path in apart_from}
    found: State = {}
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _is_left_out(root, name, left_out)]
        for name in (*folders, *files):
            path = os.path.join(root, name)
            if _is_left_out(root, name, left_out):
                continue
            state = os.lstat(path)
            content: str | None = None
            if stat.S_ISLNK(state.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(state.st_mode):
                content = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            written = None if stat.S_ISDIR(state.st_mode) else (state.st_size, state.st_mtime_ns, state.st_nlink)
            found[path] = (state.st_mode, written, content)
    return found


def _is_left_out(root: str, name: str, left_out: set[str]) -> bool:
    return name.endswith(OWN_FILES) or os.path.abspath(os.path.join(root, name)) in left_out


def reset_peak() -> float:
    """Have the kernel count the peak of resident memory from now on; returns what is resident, in MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory_mb("VmRSS")


def memory_mb(field: str) -> float:
    """Return a field of this process's memory in MB."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024
