"""Report the results of runs on one page: ``python -m stvit_video.report RUN [RUN ...] [--output FILE.html]``.

Each RUN is the folder of a run that was tested. The page works from a disk without a network, and shows figures,
learning curves, confusions, accuracy by class, the worst mistakes with their frames, and the settings that differ. Exit
codes: 0 done; 2 wrong use.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from stvit_video.common.cli import Parser, run_command
from stvit_video.common.errors import UsageError


def build_parser() -> Parser:
    """Return the parser of this command's options."""
    parser = Parser(
        prog="python -m stvit_video.report",
        form="RUN [RUN ...] [--output FILE.html]",
        description="Report the results of runs on one page.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run that was tested")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="default: %(default)s")
    return parser


def report(runs: Sequence[Path], output: Path, command: str) -> str:
    """Write the page of ``runs`` and return its headline. Raises UsageError."""
    if output.suffix.lower() not in (".html", ".htm") or output.is_dir() or not output.parent.is_dir():
        raise UsageError(f"--output {output}: give a .html file in a folder that exists.")
    from stvit_video.common.files import write_atomically
    from stvit_video.pages.run_page import find_warnings, headline, run_page
    from stvit_video.runs.record import name_runs, read_run

    names = name_runs(runs)
    try:
        records = [read_run(path, name) for path, name in zip(runs, names, strict=True)]
    except OSError as error:
        raise UsageError(f"RUN: {error.filename} cannot be read ({error.strerror}); check its permissions.") from error
    page = run_page(records, command)
    try:
        write_atomically(output, page.encode())
    except OSError as error:
        raise UsageError(f"--output {output} cannot be written ({error.strerror}); give another file.") from error
    return "\n".join([headline(records), *find_warnings(records), f"open {output}"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Report on runs from the command line; return the exit code."""
    return run_command(_main, arguments, stopped="stopped before the end: nothing was written")


def _main(arguments: Sequence[str] | None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    options = build_parser().parse_args(words)
    print(report(options.runs, options.output, shlex.join(["python", "-m", "stvit_video.report", *words])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
