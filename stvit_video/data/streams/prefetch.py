"""Reading ahead: threads that read files while the caller works on what they have read."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from stvit_video.data.decode.types import DecodeError

Piece = TypeVar("Piece")
PATIENCE_S = 2.0  # for a thread to come to its end
AHEAD = 2  # files that are begun beyond those that threads are busy with, and pieces that wait of each


class ReadAhead(Generic[Piece]):
    """Reads files piece by piece in ``workers`` threads, each with a reader that ``start`` makes.

    Iterating gives (place in the list, piece), in the order of the list, and after the last piece of each file (place,
    None), or (place, DecodeError) where it cannot be read on. Threads that nobody waits for any more come to an end.
    """

    def __init__(
        self, paths: Sequence[str], start: Callable[[], Callable[[str], Iterator[Piece]]], workers: int
    ) -> None:
        self.paths, self.start = paths, start
        self.workers = min(workers, len(paths))
        self._todo: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._read: list[queue.Queue[Piece | BaseException | None]] = [queue.Queue(AHEAD) for _ in paths]
        self._stopped = threading.Event()

    def __iter__(self) -> Iterator[tuple[int, Piece | DecodeError | None]]:
        # Daemons: one that waits for a slow file, up to its deadline, does not hold up Ctrl-C.
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self.workers)]
        for thread in threads:
            thread.start()
        begun = min(self.workers + AHEAD, len(self.paths))
        for i in range(begun):
            self._todo.put(i)
        try:
            for i in range(len(self.paths)):
                while True:
                    item = self._read[i].get()
                    if isinstance(item, BaseException) and not isinstance(item, DecodeError):
                        raise item
                    yield i, item
                    if item is None or isinstance(item, DecodeError):
                        break
                if begun < len(self.paths):
                    self._todo.put(begun)
                    begun += 1
        finally:
            self._stopped.set()
            for _ in threads:
                self._todo.put(None)
            for thread in threads:  # one that is cut off in native code would abort the process at its end
                thread.join(timeout=PATIENCE_S)

    def _work(self) -> None:
        try:
            read = self.start()
        except BaseException as error:  # the main thread raises it, at the first file
            for place in self._read:
                self._put(place, error)
            return
        while (i := self._todo.get()) is not None:
            end: BaseException | None = None
            try:
                for piece in read(self.paths[i]):
                    if not self._put(self._read[i], piece):
                        return
            except BaseException as error:
                end = error
            if not self._put(self._read[i], end):
                return

    def _put(self, place: "queue.Queue[Piece | BaseException | None]", item: Piece | BaseException | None) -> bool:
        """Put an item where the main thread takes it; return False once nobody does any more."""
        while not self._stopped.is_set():
            try:
                place.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False
