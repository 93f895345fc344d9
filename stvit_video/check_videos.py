"""Which videos of a list can be read: ``python -m stvit_video.check_videos LIST --output DIR``.

Every video of LIST is read as a test would. DIR/clean.txt gets what LIST says of those that can be read, unchanged and
in the same order, and DIR/failures.csv the others, each path once with the reason. Neither is written unless the scan
is complete, and no video is touched. Exit codes: 0 the scan is complete, also with failures; 2 wrong use; 130 Ctrl-C.
"""

import argparse
import json
import os
import queue
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from stvit_video.data.decode import DECODERS, find_decoders
from stvit_video.data.decoding import Decoding
from stvit_video.data.frames import Choice, DecodeError, Indices, Reader
from stvit_video.data.ledger import Failure, to_csv
from stvit_video.data.sampling import ClipSampler, EvenClips
from stvit_video.errors import Parser, UsageError, run_command, try_folder, writing
from stvit_video.progress import Progress

if TYPE_CHECKING:  # decoding processes import this module too: what brings torch is imported where it is used
    from stvit_video.data.annotations import Video

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
    from stvit_video.data.annotations import LIST_FORM, read_list
    from stvit_video.data.catalogues import find_videos, read_catalogue

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


def build_parser() -> Parser:
    """Return the parser of this command's options."""
    parser = Parser(
        prog="python -m stvit_video.check_videos",
        form="LIST --output DIR",
        description="Find the videos that cannot be read.",
    )
    parser.add_argument("list", type=Path, metavar="LIST", help="lines `path label`, a Kinetics CSV or an SSv2 JSON")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for clean.txt and failures.csv")
    parser.add_argument("--root", type=Path, help="where relative paths start (default: the folder of LIST)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--deadline", type=float, default=60.0, help="seconds a video may take (default: %(default)g)")
    parser.add_argument("--decoder", default="auto", choices=("auto", *DECODERS), help="auto (default): each in turn")
    frames = parser.add_mutually_exclusive_group()
    frames.add_argument("--frames", type=int, default=16, help="frames to read, evenly spread (default: %(default)s)")
    frames.add_argument("--all-frames", action="store_true", help="read every frame; give long ones a longer deadline")
    return parser


def build_manner(options: argparse.Namespace) -> Manner:
    """Return how the options ask for videos to be read. Raises UsageError for what cannot be done."""
    for name, least, most in (("workers", 1, 1_000), ("frames", 1, 10_000), ("deadline", 0.1, 1_000_000)):
        if not least <= getattr(options, name) <= most:
            raise UsageError(f"--{name} {getattr(options, name)} is out of range; give {least} to {most:,}.")
    try:
        decoders = find_decoders(options.decoder)
    except ValueError as error:
        raise UsageError(f"--decoder: {error}") from error
    spread = EvenClips(ClipSampler("dense", 1), options.frames)  # clips of one frame, from the first to the last
    return Manner(options.workers, EveryFrame() if options.all_frames else spread, decoders, options.deadline)


def check(arguments: Sequence[str] | None) -> int:
    """Parse the arguments, scan the list, write the results and print a summary. Raises UsageError."""
    from stvit_video.engine.checkpoint import write_atomically

    options = build_parser().parse_args(arguments)
    manner = build_manner(options)
    root = options.list.parent if options.root is None else options.root
    if options.root is not None and not root.is_dir():
        raise UsageError(f"--root {root} is not a folder; give the one where the paths of {options.list} start.")
    listing = read_listing(options.list, root)
    clean = options.output / "clean.txt"
    if clean.exists() and clean.samefile(options.list):
        raise UsageError(f"--output {options.output} would replace the list itself; give another folder.")
    with writing(options.output):  # tried before a scan of hours
        try_folder(options.output)
    errors: dict[str, DecodeError] = {}
    paths = list(dict.fromkeys(video.path for video in listing.videos))
    with Progress("check", len(paths)) as progress:
        for error in scan(paths, manner):
            if error is not None:
                errors[error.path] = error
            progress.advance(f"{len(errors):,} cannot be read")
    with writing(options.output):  # the ledger first: what the clean list leaves out is always accounted for
        ledger = to_csv(Failure.of(error, "check") for error in errors.values())
        write_atomically(options.output / "failures.csv", ledger.encode("utf-8", "surrogateescape"))
        write_atomically(clean, clean_list(listing, errors))
    print(summarise(listing, errors, options.output))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Check a list from the command line; return the exit code."""
    stopped = "stopped before the end: nothing was written; the same command starts again"
    return run_command(check, arguments, stopped=stopped)


if __name__ == "__main__":
    # By its own name, under which a decoding process finds ``EveryFrame``; here the module is called __main__.
    from stvit_video.check_videos import main as named_main

    sys.exit(named_main())
