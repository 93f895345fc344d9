"""Find the videos of a list that cannot be read: ``python -m stvit_video.check_videos LIST --output DIR``.

Every frame of every video of LIST is decoded; with --sample, those that a test would read. DIR/clean.txt gets the lines
of LIST whose videos can be read, unchanged and in the same order; DIR/failures.csv the other videos, each path once
with the reason. Both are written only when the scan is complete. No video is changed. Exit codes: 0 scan complete, also
with failures; 2 wrong use; 130 Ctrl-C.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from stvit_video.common.cli import Parser, number, run_command
from stvit_video.common.errors import UsageError
from stvit_video.data.clips.sampling import ClipSampler
from stvit_video.data.decode.frames import DECODERS, check_whole, find_decoder
from stvit_video.runtime.limits import usable_cores


def check(arguments: Sequence[str] | None) -> int:
    """Parse the arguments, scan the list, write the results and print a summary. Raises UsageError."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("list", type=Path, metavar="LIST", help="lines `path label`, or a CSV or JSON as published")
    add("--output", type=Path, required=True, metavar="DIR", help="for clean.txt and failures.csv")
    add("--root", type=Path, help="where relative paths start (default: the folder of LIST)")
    workers = number(int, 1, 1_000)
    deadline = number(float, 0.1, 1_000_000)
    most = number(int, 1, 10_000)
    add("--workers", type=workers, default=usable_cores(), help="processes (default: %(default)s)")
    add("--deadline", type=deadline, default=60.0, help="seconds a video may take (default: %(default)g)")
    add("--decoder", default="auto", choices=("auto", *DECODERS), help="auto (default): pyav")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--sample", action="store_const", const=16, dest="frames", help="read 16 frames of each, as a test does")
    add("--frames", type=most, help="read so many frames of each, evenly spread")
    add("--all-frames", action="store_true", help="read every frame (the default)")
    options = parser.parse_args(arguments)
    decoder = find_decoder(options.decoder, "--decoder")
    root = options.list.parent if options.root is None else options.root
    if options.root is not None and not root.is_dir():
        raise UsageError(f"--root {root} is not a folder; give the one where the paths of {options.list} start.")
    from stvit_video.data.scan import check_list

    # Clips of one frame, from the first to the last.
    choice = partial(ClipSampler("dense", 1), clips=options.frames) if options.frames else check_whole
    check_list(options.list, root, options.output, options.workers, choice, decoder, options.deadline)
    return 0


STOPPED = "stopped before the end: nothing was written; the same command starts again"
main = partial(run_command, check, stopped=STOPPED)


if __name__ == "__main__":
    sys.exit(main())
