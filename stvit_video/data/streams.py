"""What commands read, and how: files that arguments name, and threads that read ahead."""

import glob
import os
import queue
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

from stvit_video.common.errors import UsageError
from stvit_video.data.decode.pictures import image_suffix
from stvit_video.data.decode.types import (
    MEDIA_SUFFIXES,
    VIDEO_SUFFIXES,
    DecodeError,
    natural_order,
)
from stvit_video.data.lists.folders import describe_passed_over, find_media

JOIN_S = 2.0  # how long to wait for a thread to end
STDIN = "-"
AHEAD = 2  # files begun beyond those that threads are busy with, and unread pieces of each file

Source = TypeVar("Source")
Piece = TypeVar("Piece")


def find_sources(
    names: Sequence[str], images: bool = False, watch_stdin: bool = False
) -> tuple[list[str], str | None, str]:
    """Return the files that ``names`` stand for, without duplicates, or else the one camera, stream or pipe.

    The third value says what folders hold that is not used, or is "". A file is itself, whatever its ending. A folder
    stands for the videos in it and below, which folders of frames are too, with ``images`` for each image instead; a
    folder of images alone is one video, its frames. A pattern (``*``, ``?``, ``[...]``, ``**``) stands
    for what it matches. Standard input is a file, or with ``watch_stdin`` a stream. Any other name is returned as it
    is: reading it fails later, with an error of its own. Raises UsageError for a folder or pattern without files, and
    for a stream or standard input beside other names.
    """
    live = next((name for name in names if name == STDIN or is_live(name)), None)
    if live is not None:
        if len(names) > 1:
            what = "standard input" if live == STDIN else "a camera or stream, which does not end"
            raise UsageError(f"{live} is {what}; give it alone.")
        return ([STDIN], None, "") if live == STDIN and not watch_stdin else ([], live, "")
    found: list[str] = []
    unused: list[str] = []
    for name in names:
        is_pattern = not os.path.lexists(name) and glob.has_magic(name)
        matching = sorted(glob.glob(name, recursive=True), key=natural_order) if is_pattern else [name]
        inside = [file for match in matching for file in _in_folder(match, images, unused)]
        if not inside and is_pattern:
            raise UsageError(f"Nothing matches {name}; give a pattern that does, or a file or folder.")
        if not inside:
            kinds = MEDIA_SUFFIXES if images else VIDEO_SUFFIXES
            raise UsageError(f"Folder {name} holds no videos; give one with files ending in {', '.join(kinds)}.")
        found += inside
    return list(dict.fromkeys(found)), None, describe_passed_over(unused, os.curdir) if unused else ""


def stdin_is_file() -> bool:
    """Say whether standard input is a regular file. Raises UsageError where nobody gives any."""
    try:
        mode = os.fstat(0).st_mode if sys.stdin else 0  # what is opened next takes the place of a closed one
    except OSError:
        mode = 0
    if not mode or os.isatty(0):
        raise UsageError(f"{STDIN} is standard input, which is {'a terminal' if mode else 'closed'}; pipe a video in.")
    return stat.S_ISREG(mode)


@contextmanager
def spooled_stdin() -> Iterator[str]:
    """Provide standard input as a temporary file: most videos are not read from their start to their end.

    Raises UsageError where it does not fit.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "stdin")
        try:
            with open(0, "rb", closefd=False) as given, open(path, "wb") as file:
                shutil.copyfileobj(given, file, 2**20)
        except OSError as error:
            raise UsageError(
                f"standard input cannot be copied to {folder} ({error.strerror}); set TMPDIR to a larger folder, or "
                f"give --window to read it as a stream"
            ) from error
        suffix = image_suffix(path)
        os.rename(path, path + suffix)
        yield path + suffix


def _in_folder(folder: str, images: bool, unused: list[str]) -> list[str]:
    """Return the videos, or with ``images`` the images too, of a folder; what is no folder is returned as it is.

    Appends to ``unused`` what is passed over.
    """
    if not os.path.isdir(folder):
        return [folder]
    found = find_media(folder, frames=1 if images else 2)
    unused += found.passed_over
    if images:
        return sorted([*found.videos, *found.pictures], key=natural_order)
    if found.pictures and not found.videos:
        return [folder]  # a video that was cut into its frames
    unused += found.pictures
    return sorted(found.videos, key=natural_order)


def is_live(name: str) -> bool:
    """Say whether a command's argument is a camera's number, a stream's address, a device or a pipe."""
    exists = os.path.exists(name)
    mode = os.stat(name).st_mode if exists else 0
    is_number = name.isascii() and name.isdigit() and not exists
    return "://" in name or is_number or stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def read_ahead(
    sources: Sequence[Source],
    read: Callable[[Source], Iterator[Piece]],
    workers: int,
    is_live: Callable[[Piece], bool] = lambda piece: False,
) -> Iterator[tuple[int, Piece | DecodeError | None]]:
    """Read sources piece by piece in ``workers`` threads.

    Yields (index of the source, piece) in the order of the list, and at the end of each (index, None), or (index,
    DecodeError) where it cannot be read any further. A piece that ``is_live`` and finds no place takes that of the
    oldest one that waits, which is dropped; else its reader waits. The threads end when the iterator is closed.
    """
    todo: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    results: list[queue.Queue[Piece | BaseException | None]] = [queue.Queue(AHEAD) for _ in sources]
    closed = threading.Event()

    def work() -> None:
        while (i := todo.get()) is not None and not closed.is_set():
            end: BaseException | None = None
            try:
                for piece in read(sources[i]):
                    while results[i].full() and is_live(piece):
                        with suppress(queue.Empty):  # taken meanwhile
                            results[i].get_nowait()
                    results[i].put(piece)
                    if closed.is_set():
                        return
            except BaseException as error:  # raised below, where the caller is
                end = error
            results[i].put(end)

    # Daemons: a thread that waits for a slow file, up to its deadline, does not delay Ctrl-C.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(sources)))]
    for thread in threads:
        thread.start()
    ahead = len(threads) + AHEAD
    for i in range(min(ahead, len(sources))):
        todo.put(i)
    try:
        for i in range(len(sources)):
            while (item := results[i].get()) is not None and not isinstance(item, BaseException):
                yield i, item
            if item is not None and not isinstance(item, DecodeError):
                raise item
            yield i, item
            if i + ahead < len(sources):
                todo.put(i + ahead)
    finally:
        closed.set()
        for result in results:  # a thread that waits for a place in a queue goes on, and sees that it is over
            while not result.empty():
                result.get_nowait()
        for _ in threads:
            todo.put(None)
        for thread in threads:  # a thread still in native code at the end would abort the process
            thread.join(timeout=JOIN_S)
