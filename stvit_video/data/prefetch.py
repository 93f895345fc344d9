"""Reading ahead: threads read files while the caller works on what they have read."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from stvit_video.data.decode.types import DecodeError

Piece = TypeVar("Piece")
JOIN_S = 2.0  # how long to wait for a thread to end
AHEAD = 2  # files begun beyond those that threads are busy with, and unread pieces of each file


def read_ahead(
    paths: Sequence[str], start: Callable[[], Callable[[str], Iterator[Piece]]], workers: int
) -> Iterator[tuple[int, Piece | DecodeError | None]]:
    """Read files piece by piece in ``workers`` threads; ``start`` makes a reader for each thread.

    Yields (index of the file, piece) in the order of the list, and at the end of each file (index, None), or (index,
    DecodeError) where it cannot be read any further. The threads end when the iterator is closed.
    """
    todo: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    results: list[queue.Queue[Piece | BaseException | None]] = [queue.Queue(AHEAD) for _ in paths]
    closed = threading.Event()

    def put(i: int, item: Piece | BaseException | None) -> bool:
        """Put a result where the caller takes it; return False once the iterator is closed."""
        while not closed.is_set():
            try:
                results[i].put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        read: Callable[[str], Iterator[Piece]] | None = None
        while (i := todo.get()) is not None:
            end: BaseException | None = None
            try:
                read = read or start()
                for piece in read(paths[i]):
                    if not put(i, piece):
                        return
            except BaseException as error:  # raised below, where the caller is
                end = error
            if not put(i, end):
                return

    # Daemons: a thread that waits for a slow file, up to its deadline, does not delay Ctrl-C.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(paths)))]
    for thread in threads:
        thread.start()
    ahead = len(threads) + AHEAD
    for i in range(min(ahead, len(paths))):
        todo.put(i)
    try:
        for i in range(len(paths)):
            while (item := results[i].get()) is not None and not isinstance(item, BaseException):
                yield i, item
            if item is not None and not isinstance(item, DecodeError):
                raise item
            yield i, item
            if i + ahead < len(paths):
                todo.put(i + ahead)
    finally:
        closed.set()
        for _ in threads:
            todo.put(None)
        for thread in threads:  # a thread still in native code at the end would abort the process
            thread.join(timeout=JOIN_S)
