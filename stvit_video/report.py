"""Report runs on one page: ``python -m stvit_video.report RUN [RUN ...] [--output FILE.html] [--videos FOLDER]``.

Each RUN is the folder of a run that was tested. The page works from a disk without a network, and shows figures,
learning curves, confusions, accuracy by class, the worst mistakes with their frames, and the settings that differ. Exit
codes: 0 done; 2 wrong use.
"""

import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from stvit_video.common.cli import Parser, run_command
from stvit_video.common.errors import UsageError


def report(arguments: Sequence[str] | None) -> int:
    """Parse the arguments, write the page and print its headline; return the exit code. Raises UsageError."""
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run that was tested")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="default: %(default)s")
    allowed = "show frames of videos below this folder only (default: below each run's DATA.ROOT, if the run is yours)"
    parser.add_argument("--videos", type=Path, metavar="FOLDER", help=allowed)
    words = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(words)
    output: Path = options.output
    if output.suffix.lower() not in (".html", ".htm") or output.is_dir() or not output.parent.is_dir():
        raise UsageError(f"--output {output}: give a .html file in a folder that exists.")
    from stvit_video.common.files import write_atomically
    from stvit_video.common.text import printable
    from stvit_video.pages.run_page import headline, list_notes, list_sources, run_page
    from stvit_video.runs.record import RunRecord, name_runs, readable

    if options.videos is not None and not options.videos.is_dir():
        raise UsageError(f"--videos {options.videos} is not a folder; give the one that holds the tested videos.")
    named = zip(options.runs, name_runs(options.runs), strict=True)
    with readable(options.runs):
        records = [RunRecord(path, name, options.videos) for path, name in named]
        page = run_page(records, shlex.join(["python", "-m", "stvit_video.report", *words]))
        said = [headline(records), *list_notes(records), *list_sources(records), f"open {output}"]
    write_atomically(output, page.encode())
    print("\n".join(map(printable, said)))
    return 0


main = partial(run_command, report, stopped="stopped before the end: nothing was written")


if __name__ == "__main__":
    sys.exit(main())
