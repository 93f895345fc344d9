"""Reading every video of a list once, to find those that cannot be decoded."""

import json
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

from stvit_video.common.errors import UsageError
from stvit_video.data.decode.frames import Decoding
from stvit_video.data.decode.types import Choice, DecodeError
from stvit_video.data.lists.annotations import (
    LIST_FORM,
    Video,
    find_clips,
    find_videos,
    read_catalogue,
    read_list,
)

SHORT_SIDE = 64  # frames are only decoded, not used: reduced to this, a block of them stays small
FRAMES_FAIL = "frames cannot be decoded"
# Part of an error's message, and the cause to count it under. The first match counts: more specific parts come first.
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


class Listing(NamedTuple):
    """The videos of a list, the part of the file for each, and the text before, between and after these parts."""

    videos: list[Video]
    pieces: list[bytes]
    head: bytes = b""
    between: bytes = b""
    tail: bytes = b""


def read_listing(path: Path, root: Path) -> Listing:
    """Read lines ``path label``, a Kinetics CSV or a Something-Something JSON; UsageError for any other file."""
    if path.is_dir():
        raise UsageError(f"List {path} is a folder; give {LIST_FORM}, for class folders one line for each file.")
    catalogue = read_catalogue(path)
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # the byte order mark is not part of the first line
    lines = [line for line in content.splitlines(keepends=True) if line.decode().strip()]
    if catalogue is None:
        return Listing(read_list(path, root), lines)
    videos = find_videos(catalogue, root, catalogue.classes(), find_clips(root, catalogue.clip_folder))
    if content.lstrip().startswith(b"["):
        pieces = [json.dumps(item).encode() for item in json.loads(content)]
        return Listing(videos, pieces, b"[\n", b",\n", b"\n]\n")
    if len(lines) != len(videos) + 1:
        raise UsageError(f"List {path} has rows that are empty or of several lines; write each row on one line.")
    return Listing(videos, lines[1:], head=lines[0])


def scan(
    paths: Sequence[str], workers: int, choice: Choice, decoders: tuple[str, ...], deadline_s: float
) -> Iterator[DecodeError | None]:
    """Read the chosen frames of each video; yield a result as each is done, in any order: None, or why it failed."""
    thread = threading.local()

    def start() -> None:
        thread.decoding = Decoding(decoders, deadline_s, SHORT_SIDE)

    def read(path: str) -> DecodeError | None:
        try:
            thread.decoding.read(thread.decoding.request(path, choice))
        except DecodeError as error:
            return error
        return None

    # A thread for each decoding process. The pool's threads are daemons, so that one that waits for a slow video, up to
    # the deadline, does not delay Ctrl-C. Other errors than DecodeError are raised here.
    with ThreadPool(max(1, min(workers, len(paths))), start) as pool:
        yield from pool.imap_unordered(read, paths)


def cause(error: DecodeError) -> str:
    """Return the cause under which an error is counted."""
    return next((name for part, name in CAUSES if part in error.message), error.message.partition(" (")[0])


def clean_list(listing: Listing, errors: dict[str, DecodeError]) -> bytes:
    """Return the list without the videos that have an error."""
    kept = [piece for video, piece in zip(listing.videos, listing.pieces, strict=True) if video.path not in errors]
    return listing.head + listing.between.join(kept) + listing.tail


def summarise(listing: Listing, errors: dict[str, DecodeError], output: Path) -> str:
    """Return lines for the user: how many videos can be read, and how many cannot, by cause."""
    counts = Counter(cause(errors[video.path]) for video in listing.videos if video.path in errors)
    total, failed = len(listing.videos), sum(counts.values())
    lines = [f"{total - failed:,} of {total:,} videos can be read: {output / 'clean.txt'}"]
    if failed:
        lines.append(f"{failed:,} cannot: {output / 'failures.csv'}")
        lines += [f"{count:>9,}  {name}" for name, count in counts.most_common()]
    return "\n".join(lines)
