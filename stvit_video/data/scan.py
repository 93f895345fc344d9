"""Reading every video of a list once, to find those that cannot be decoded."""

import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path

from stvit_video.common.errors import UsageError
from stvit_video.common.files import prepare_folder, write_atomically
from stvit_video.common.progress import Progress
from stvit_video.data.decode.frames import Decoding
from stvit_video.data.decode.types import Choice, DecodeError
from stvit_video.data.failures import Failure, failures_csv
from stvit_video.data.lists.annotations import LIST_FORM, Video, read_list
from stvit_video.data.lists.catalogues import find_clips, find_videos, read_catalogue

SHORT_SIDE = 64  # frames are only decoded, not used: reduced to this, a block of them stays small
# Causes to count errors under, and a pattern of their messages. The first match counts: more specific ones come first.
CAUSES = {
    "no such file": "no such file",
    "took too long": "took more than",
    "crashed the decoder": "made its decoder crash",
    "does not fit into memory": "does not fit into memory",
    "frames cannot be decoded": "cannot be decoded| damaged|the file ends before|shows [0-9]+ of",
    "cut short": "is cut short",
    "changes its size": "changes its size",
    "holds no video": "has no frames|has no video stream",
    "cannot be opened": "cannot be opened as video|cannot be read as an image",
}


def read_listing(path: Path, root: Path) -> tuple[list[Video], list[bytes], Callable[[list[bytes]], bytes]]:
    """Read lines ``path label``, a Kinetics CSV or a Something-Something JSON; UsageError for any other file.

    Return its videos, the part of the file for each, and the function from some of these parts to a list of the format.
    """
    if path.is_dir():
        raise UsageError(f"List {path} is a folder; give {LIST_FORM}, for class folders one line for each file.")
    catalogue = read_catalogue(path)
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # the byte order mark is not part of the first line
    lines = [line for line in content.splitlines(keepends=True) if line.decode().strip()]
    if catalogue is None:
        return read_list(path, root), lines, b"".join
    videos = find_videos(catalogue, root, catalogue.classes(), find_clips(root, catalogue.clip_folder))
    if content.lstrip().startswith(b"["):
        pieces = [json.dumps(item).encode() for item in json.loads(content)]
        return videos, pieces, lambda kept: b"[\n" + b",\n".join(kept) + b"\n]\n"
    if len(lines) != len(videos) + 1:
        raise UsageError(f"List {path} has rows that are empty or of several lines; write each row on one line.")
    return videos, lines[1:], lambda kept: b"".join([lines[0], *kept])


def cause(error: DecodeError) -> str:
    """Return the cause under which an error is counted."""
    found = (name for name, pattern in CAUSES.items() if re.search(pattern, error.message))
    return next(found, error.message.partition(" (")[0])


def check_list(
    path: Path, root: Path, output: Path, workers: int, choice: Choice, decoders: tuple[str, ...], deadline_s: float
) -> None:
    """Read the chosen frames of each video of a list; write ``clean.txt`` and ``failures.csv``, and print a summary."""
    videos, pieces, join = read_listing(path, root)
    clean, ledger = output / "clean.txt", output / "failures.csv"
    if clean.exists() and clean.samefile(path):
        raise UsageError(f"--output {output} would replace the list itself; give another folder.")
    prepare_folder(output)  # before a scan that may take hours
    thread = threading.local()

    def start() -> None:
        thread.decoding = Decoding(decoders, deadline_s, SHORT_SIDE)

    def read(path: str) -> DecodeError | None:
        (answer,) = thread.decoding.read_all([thread.decoding.request(path, choice)])
        return answer if isinstance(answer, DecodeError) else None

    errors: dict[str, DecodeError] = {}
    paths = list(dict.fromkeys(video.path for video in videos))
    # A thread for each decoding process. The pool's threads are daemons, so that one that waits for a slow video, up to
    # the deadline, does not delay Ctrl-C. Other errors than DecodeError are raised here.
    with Progress("check", len(paths)) as progress, ThreadPool(min(workers, len(paths)), start) as pool:
        for error in pool.imap_unordered(read, paths):
            if error is not None:
                errors[error.path] = error
            progress.advance(f"{len(errors):,} cannot be read")
    # Failures first, so that what clean.txt leaves out is always listed.
    write_atomically(ledger, failures_csv(Failure.of(error, "check") for error in errors.values()))
    kept = [piece for video, piece in zip(videos, pieces, strict=True) if video.path not in errors]
    write_atomically(clean, join(kept))
    print(f"{len(kept):,} of {len(videos):,} videos can be read: {clean}")
    if errors:
        print(f"{len(videos) - len(kept):,} cannot: {ledger}")
        counts = Counter(cause(errors[video.path]) for video in videos if video.path in errors)
        print("\n".join(f"{count:>9,}  {name}" for name, count in counts.most_common()))
