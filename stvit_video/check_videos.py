"""Find the videos of a list that cannot be read: ``python -m stvit_video.check_videos LIST --output DIR``.

Every video of LIST is decoded as in a test. DIR/clean.txt gets the lines of LIST whose videos can be read, unchanged
and in the same order; DIR/failures.csv the other videos, each path once with the reason. Both are written only when the
scan is complete. No video is changed. Exit codes: 0 scan complete, also with failures; 2 wrong use; 130 Ctrl-C.
"""

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from stvit_video.common.cli import Parser, run_command
from stvit_video.common.errors import UsageError
from stvit_video.common.files import prepare_folder, write_atomically
from stvit_video.common.progress import Progress
from stvit_video.data.clips.sampling import ClipSampler, read_every_frame
from stvit_video.data.decode.frames import DECODERS, find_decoders
from stvit_video.data.decode.types import DecodeError
from stvit_video.data.failures import Failure, failures_csv


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


def check(arguments: Sequence[str] | None) -> int:
    """Parse the arguments, scan the list, write the results and print a summary. Raises UsageError."""
    options = build_parser().parse_args(arguments)
    for name, low, high in (("workers", 1, 1_000), ("frames", 1, 10_000), ("deadline", 0.1, 1_000_000)):
        if not low <= getattr(options, name) <= high:
            raise UsageError(f"--{name} {getattr(options, name)} is out of range; give {low} to {high:,}.")
    decoders = find_decoders(options.decoder, "--decoder")
    root = options.list.parent if options.root is None else options.root
    if options.root is not None and not root.is_dir():
        raise UsageError(f"--root {root} is not a folder; give the one where the paths of {options.list} start.")
    from stvit_video.data.scan import clean_list, read_listing, scan, summarise

    listing = read_listing(options.list, root)
    clean = options.output / "clean.txt"
    if clean.exists() and clean.samefile(options.list):
        raise UsageError(f"--output {options.output} would replace the list itself; give another folder.")
    prepare_folder(options.output)  # before a scan that may take hours
    # Clips of one frame, from the first to the last.
    spread = partial(ClipSampler("dense", 1), clips=options.frames)
    choice = read_every_frame if options.all_frames else spread
    errors: dict[str, DecodeError] = {}
    paths = list(dict.fromkeys(video.path for video in listing.videos))
    with Progress("check", len(paths)) as progress:
        for found in scan(paths, options.workers, choice, decoders, options.deadline):
            if found is not None:
                errors[found.path] = found
            progress.advance(f"{len(errors):,} cannot be read")
    # Failures first, so that what clean.txt leaves out is always listed.
    failures = failures_csv(Failure.of(error, "check") for error in errors.values())
    write_atomically(options.output / "failures.csv", failures)
    write_atomically(clean, clean_list(listing, errors))
    print(summarise(listing, errors, options.output))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Check a list from the command line; return the exit code."""
    stopped = "stopped before the end: nothing was written; the same command starts again"
    return run_command(check, arguments, stopped=stopped)


if __name__ == "__main__":
    sys.exit(main())
