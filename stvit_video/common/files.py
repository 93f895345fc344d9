"""Files and folders: atomic writing, and errors in one line where a folder cannot be written."""

import errno
import json
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TextIO

from stvit_video.common.errors import UsageError, find_nearest

LARGEST_RECORD = 2**28  # bytes
MOST_NAMES = 2000  # that a name is compared with


def nearest_path(missing: str | Path, pattern: str = "*", folders: Iterable[str | Path] = ()) -> str:
    """Return " Did you mean X?" for the paths beside a missing one, and in ``folders``, that are named most like it."""
    missing = Path(missing)
    paths = (path for folder in dict.fromkeys([missing.parent, *map(Path, folders)]) for path in folder.glob(pattern))
    found = sorted(islice(paths, MOST_NAMES))
    stems = [path.stem for path in found]
    meant = [missing.stem] if missing.stem in stems else find_nearest(missing.stem, stems)
    near = [str(path) for path in found if path.stem in meant]
    return f" Did you mean {' or '.join(near[:3])}?" if near else ""


@contextmanager
def whole_file(path: Path, suffix: str = "") -> Iterator[Path]:
    """Provide a new file beside ``path``, and rename it to that at the end: a file is complete or not there.

    Nobody knows its name before, so that no link can lie there. ``suffix`` ends the name, for writers that take their
    format from it.
    """
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.tmp{suffix}")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that readers, also after a crash, find it complete or not at all."""
    try:
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # with the name that a user knows
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must survive a power cut
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove the temporary files of killed writes of a file ``name``; no other process may be writing there."""
    random = 8 * "[0-9a-f]"
    for old in (*folder.glob(f".{name}.tmp"), *folder.glob(f".{name}.{random}.tmp*")):
        if not old.is_dir() or old.is_symlink():
            old.unlink(missing_ok=True)


def open_to_append(path: Path) -> TextIO:
    """Open a text file to append to; its ``name`` is the path.

    Raises OSError for a link in its place, which another user may have put there, and for a pipe or device.
    """
    check_own(path)
    safely = os.O_NOFOLLOW | os.O_NONBLOCK
    return open(path, "a+", encoding="utf-8", opener=lambda name, flags: os.open(name, flags | safely, 0o666))


def check_own(path: str | Path) -> None:
    """Raise OSError where something else than a file lies at ``path``: a link, or a pipe, which holds a reader up."""
    if os.path.islink(path):
        raise OSError(errno.ELOOP, "it is a link, and is not followed", str(path))
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EPERM, "it is no regular file", str(path))


def has_record(path: str | Path) -> bool:
    """Return whether a file of a run is there. Raises UsageError where it is no file or larger than any run writes."""
    if not os.path.lexists(path):
        return False
    if not os.path.isfile(path):
        raise UsageError(f"{path} is no file; remove it, or leave the run out.")
    if (size := os.path.getsize(path)) > LARGEST_RECORD:
        raise UsageError(f"{path} has {size:,} bytes; allowed: {LARGEST_RECORD:,}. Remove it, or leave the run out.")
    return True


def tail(path: str | Path, most: int = 2**20) -> list[str]:
    """Return the whole lines in the last ``most`` bytes of a text file. Raises OSError where it cannot be read."""
    check_own(path)
    with open(path, "rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - most)
        file.seek(start)
        lines = file.read(most).decode(errors="replace").splitlines()
    return lines[1:] if start else lines


def write_json(path: Path, content: object) -> None:
    """Write ``content`` as indented JSON, atomically."""
    write_atomically(path, json.dumps(content, indent=2).encode())


def prepare_folder(folder: Path) -> None:
    """Make the folder of an option and check that it can be written to, before the work. Raises UsageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(
            f"folder {folder} cannot be written to ({error.strerror}); set its permissions, free space or give another."
        ) from error


def check_file(option: str, path: Path | None, suffix: str = "") -> None:
    """Raise UsageError where the file of an option, if given, cannot be written: before the work that makes it."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise UsageError(f"{option} {path}: {path.parent} is not a folder; make it first.")
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder; name a file in it.")
    if path.suffix != (suffix or path.suffix):
        raise UsageError(f"{option} {path} is no {suffix} file; name one that is.")
    prepare_folder(path.parent)
