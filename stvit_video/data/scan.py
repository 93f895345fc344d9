"""Reading every video of a list once, to find those that cannot be decoded."""

import codecs
import re
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

from stvit_video.common.errors import UsageError
from stvit_video.common.files import prepare_folder, write_atomically
from stvit_video.common.progress import Progress
from stvit_video.common.text import printable
from stvit_video.data.clips.sections import within
from stvit_video.data.decode.frames import Decoding
from stvit_video.data.decode.types import Choice, DecodeError
from stvit_video.data.failures import Failure, failures_csv
from stvit_video.data.lists.annotations import LIST_FORM, Video
from stvit_video.data.lists.catalogues import find_clips, find_videos
from stvit_video.data.lists.formats import read_catalogue
from stvit_video.data.lists.json_lists import keep_entries
from stvit_video.data.lists.text import read_lines

SHORT_SIDE = 64  # frames are only decoded, not used: reduced to this, a block of them stays small
# Causes to count errors under, and a pattern of their messages. The first match counts: more specific ones come first.
CAUSES = {
    "no such file": "no such file",
    "took too long": "took more than",
    "crashed the decoder": "made its decoder crash",
    "does not fit into memory": "does not fit into memory",
    "frames cannot be decoded": "cannot be decoded| damaged|the file ends before|shows [0-9]+ of",
    "cut short": "is cut short",
    "section outside of the video": "its section",
    "holds no video": "has no frames|has no video stream",
    "cannot be opened": "cannot be opened as video|cannot be read as an image",
}


def read_listing(path: Path, root: Path) -> tuple[list[Video], list[int], Callable[[set[int]], bytes]]:
    """Read any list that is one file; UsageError for what is none.

    Return its videos, the place of each in the file, and the function that returns the file without some places.
    """
    if path.is_dir() or not path.is_file():
        problem = "is a folder" if path.is_dir() else "is not a file"
        raise UsageError(f"List {path} {problem}; give {LIST_FORM}, for class folders one line for each file.")
    catalogue = read_catalogue(path, root)
    videos = find_videos(catalogue, root, None, partial(find_clips, root))
    places = [entry.place for entry in catalogue.entries]
    text = "".join(read_lines(path, "List", LIST_FORM))
    if text.lstrip().startswith(("[", "{")):
        return videos, places, lambda failed: keep_entries(text, path, lambda place: place not in failed)
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)  # the mark is not part of the first line
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        content = text.encode()
    lines = content.splitlines(keepends=True)
    if any(line.count(b'"') % 2 for line in lines):
        raise UsageError(f"List {path} has rows of several lines; write each row on one line.")

    def without(failed: set[int]) -> bytes:
        return b"".join(line for place, line in enumerate(lines) if place not in failed and line.strip())

    return videos, places, without


def cause(error: DecodeError) -> str:
    """Return the cause under which an error is counted."""
    found = (name for name, pattern in CAUSES.items() if re.search(pattern, error.message))
    return next(found, error.message.partition(" (")[0])


def check_list(
    path: Path, root: Path, output: Path, workers: int, choice: Choice, decoder: str, deadline_s: float
) -> None:
    """Read the chosen frames of each video of a list; write ``clean.txt`` and ``failures.csv``, and print a summary."""
    videos, places, without = read_listing(path, root)
    clean, ledger = output / "clean.txt", output / "failures.csv"
    if clean.exists() and clean.samefile(path):
        raise UsageError(f"--output {output} would replace the list itself; give another folder.")
    prepare_folder(output)  # before a scan that may take hours
    thread = threading.local()

    def start() -> None:
        thread.decoding = Decoding(decoder, deadline_s, SHORT_SIDE)

    def read(samples: list[Video]) -> list[tuple[str, DecodeError]]:
        """Read the sections of one file, which stays open from one to the next."""
        requests = [
            thread.decoding.request(one.path, within(choice, one.section, one.path), keep_open=one is not samples[-1])
            for one in samples
        ]
        answers = zip(samples, thread.decoding.read_all(requests), strict=True)
        return [(one.name, answer) for one, answer in answers if isinstance(answer, DecodeError)]

    errors: dict[str, DecodeError] = {}
    by_path: dict[str, dict[str, Video]] = {}
    for video in videos:
        by_path.setdefault(video.path, {}).setdefault(video.name, video)
    # A thread for each decoding process. The pool's threads are daemons, so that one that waits for a slow video, up to
    # the deadline, does not delay Ctrl-C. Other errors than DecodeError are raised here.
    with Progress("check", len(by_path)) as progress, ThreadPool(min(workers, len(by_path)), start) as pool:
        for found in pool.imap_unordered(read, [list(samples.values()) for samples in by_path.values()]):
            errors.update(found)
            progress.advance(f"{len(errors):,} cannot be read")
    # Failures first, so that what clean.txt leaves out is always listed.
    write_atomically(ledger, failures_csv(Failure.of(error, "check", name) for name, error in errors.items()))
    failed = [video.name for video in videos if video.name in errors]
    write_atomically(
        clean, without({place for video, place in zip(videos, places, strict=True) if video.name in errors})
    )
    print(f"{len(videos) - len(failed):,} of {len(videos):,} videos can be read: {clean}")
    if failed:
        print(f"{len(failed):,} cannot: {ledger}")
        counts = Counter(cause(errors[name]) for name in failed)
        print("\n".join(f"{count:>9,}  {printable(name)}" for name, count in counts.most_common()))
