"""Reading every video of a list once, to find those that cannot be decoded."""

import json
import queue
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from stvit_video.common.errors import UsageError
from stvit_video.data.decode.process import Decoding
from stvit_video.data.decode.types import Choice, DecodeError, Indices, Reader

if TYPE_CHECKING:
    from stvit_video.data.lists.annotations import Video


SHORT_SIDE = 64  # nobody looks at the frames: they are reduced as they are decoded, and a block of them stays small
BLOCK_BYTES = 64 * 2**20  # frames that are held at once where all are read
FRAMES_FAIL = "frames cannot be decoded"
# What a message says, and the cause it is counted under. The first that fits, so those that say more come first.
CAUSES = (
    ("no such file", "no such file"),
    ("took more than", "took too long"),
    ("made its decoder crash", "crashed the decoder"),
    ("does not fit into memory", "does not fit into memory"),
    (FRAMES_FAIL, FRAMES_FAIL),
    (" is damaged", FRAMES_FAIL),
    ("the file ends before", FRAMES_FAIL),
    ("has no frames", "holds no video"),
    ("has no video stream", "holds no video"),
    ("cannot be opened as video", "cannot be opened"),
    ("cannot be read as an image", "cannot be opened"),
)


@dataclass(frozen=True)
class EveryFrame:
    """The choice that reads a whole video, block by block; only its first frame is sent back."""

    def __call__(self, video: Reader) -> Indices:
        """Return the index of the first frame (1,). Raises DecodeError where a frame cannot be read."""
        first = np.zeros(1, np.int64)
        block = max(1, BLOCK_BYTES // video.frames(first).nbytes)
        for start in range(0, video.length, block):
            video.frames(np.arange(start, min(start + block, video.length)))
        return first


@dataclass(frozen=True)
class Manner:
    """How videos are read: by how many processes at once, which frames, with which decoders, in how many seconds."""

    workers: int
    choice: Choice
    decoders: tuple[str, ...]
    deadline_s: float


class Listing(NamedTuple):
    """A list: its videos, the piece of the file that names each, and what stands before, between and after those."""

    videos: "list[Video]"
    pieces: list[bytes]
    head: bytes = b""
    between: bytes = b""
    tail: bytes = b""


def read_listing(path: Path, root: Path) -> Listing:
    """Read lines ``path label``, a Kinetics CSV or a Something-Something JSON whose videos lie under ``root``.

    Raises UsageError where the file is none of them.
    """
    from stvit_video.data.lists.annotations import LIST_FORM, read_list
    from stvit_video.data.lists.catalogues import find_videos, read_catalogue

    if path.is_dir():
        raise UsageError(f"List {path} is a folder; give {LIST_FORM}, for class folders one line for each file.")
    catalogue = read_catalogue(path)
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # Windows' mark is the file's, not its first line's
    lines = [line for line in content.splitlines(keepends=True) if line.decode().strip()]
    if catalogue is None:
        return Listing(read_list(path, root), lines)
    videos = find_videos(catalogue, root, catalogue.classes())
    if content.lstrip().startswith(b"["):
        pieces = [json.dumps(item).encode() for item in json.loads(content)]
        return Listing(videos, pieces, b"[\n", b",\n", b"\n]\n")
    if len(lines) != len(videos) + 1:
        raise UsageError(f"List {path} has rows that are empty or of several lines; write each row on one line.")
    return Listing(videos, lines[1:], head=lines[0])


def scan(paths: Sequence[str], manner: Manner) -> Iterator[DecodeError | None]:
    """Read each video; yield as many results in the order in which they come: None, or why it cannot be read.

    Each thread has a decoding process. The threads are daemons: one that waits for a slow video, up to the deadline,
    does not hold up Ctrl-C.
    """
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()
    for path in paths:
        todo.put(path)
    results: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    stopped = threading.Event()
    work = partial(threading.Thread, target=_work, args=(todo, results, stopped, manner), daemon=True)
    threads = [work() for _ in range(min(manner.workers, len(paths)))]
    for thread in threads:
        thread.start()
    try:
        for _ in paths:
            result = results.get()
            if result is not None and not isinstance(result, DecodeError):
                raise result
            yield result
    finally:
        stopped.set()  # so that no process is started for what nobody waits for any more
    for thread in threads:
        thread.join()


def _work(
    todo: "queue.SimpleQueue[str]",
    results: "queue.SimpleQueue[BaseException | None]",
    stopped: threading.Event,
    manner: Manner,
) -> None:
    """Read videos until there are no more. Errors are results, too: the main thread raises our own mistakes."""
    decoding = Decoding(manner.decoders, manner.deadline_s, SHORT_SIDE)
    while not stopped.is_set():
        try:
            path = todo.get_nowait()
        except queue.Empty:
            return
        try:
            decoding.read(decoding.request(path, manner.choice))
        except BaseException as error:
            results.put(error)
        else:
            results.put(None)


def cause(error: DecodeError) -> str:
    """Return what an error is counted under."""
    return next((name for part, name in CAUSES if part in error.message), error.message.partition(" (")[0])


def clean_list(listing: Listing, errors: dict[str, DecodeError]) -> bytes:
    """Return the list without the videos that have an error."""
    kept = [piece for video, piece in zip(listing.videos, listing.pieces, strict=True) if video.path not in errors]
    return listing.head + listing.between.join(kept) + listing.tail


def summarise(listing: Listing, errors: dict[str, DecodeError], output: Path) -> str:
    """Return lines for the user: how many videos can be read, and how many cannot for which cause."""
    counts = Counter(cause(errors[video.path]) for video in listing.videos if video.path in errors)
    total, failed = len(listing.videos), sum(counts.values())
    lines = [f"{total - failed:,} of {total:,} videos can be read: {output / 'clean.txt'}"]
    if failed:
        lines.append(f"{failed:,} cannot: {output / 'failures.csv'}")
        lines += [f"{count:>9,}  {name}" for name, count in counts.most_common()]
    return "\n".join(lines)
