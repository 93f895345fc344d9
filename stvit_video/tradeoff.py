"""Accuracy beside speed in one table and one plot: ``python -m stvit_video.tradeoff --plan FILE [KEY VALUE ...]``.

Trains every row of a plan with every seed, measures the speed of all rows side by side, and writes tradeoff.md, .csv,
.json and .png. The same command continues where it was stopped. Exit codes are those of ``stvit_video.run``; 1 also
where a run failed, which the table then says.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from stvit_video.common.cli import Parser, run_command
from stvit_video.common.errors import Stopped, UsageError


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog="python -m stvit_video.tradeoff",
        form="--plan FILE [--output DIR] [KEY VALUE ...]",
        description="Train the rows of a plan, measure their speed, and set accuracy beside it.",
    )
    parser.add_argument("--plan", type=Path, required=True, metavar="FILE", help="as configs/tradeoff/*.yaml")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: runs/tradeoff_<name of the plan>")
    parser.add_argument(
        "--rows", nargs="+", default=["*"], metavar="PATTERN", help="train these rows only; the table has all"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, sharing the cores (default: %(default)s)")
    parser.add_argument(
        "--within",
        type=float,
        default=0.5,
        metavar="POINTS",
        help="how far below the twin is near (default: %(default)g)",
    )
    parser.add_argument("--list", action="store_true", help="print rows, costs and runs left; train nothing, and exit")
    parser.add_argument("--no-train", action="store_true", help="only draw table and plot from what is there")
    parser.add_argument("--measure", action="store_true", help="measure speeds again, also where all are known")
    parser.add_argument(
        "--rounds", type=int, default=5, help="of measuring speed; 0: do not measure (default: %(default)s)"
    )
    parser.add_argument("--largest-batch", type=int, default=64, help="to measure with (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="for all rows, as for stvit_video.run")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Raise UsageError for numbers and combinations that cannot be used."""
    for name, least in (("jobs", 1), ("rounds", 0), ("largest_batch", 1), ("within", 0)):
        if not least <= getattr(options, name) < float("inf"):
            given = f"--{name.replace('_', '-')} {getattr(options, name)}"
            raise UsageError(f"{given} is out of range; give a number from {least} on.")
    if options.measure and not options.rounds:
        raise UsageError("--measure with --rounds 0, which does not measure; leave one of them out.")
    if options.output is not None and options.output.exists() and not options.output.is_dir():
        raise UsageError(f"--output {options.output} is a file; give a folder.")


def tradeoff(arguments: Sequence[str] | None) -> int:
    """Parse the arguments and do what they ask for; return the exit code."""
    options = build_parser().parse_intermixed_args(arguments)
    check_options(options)
    from stvit_video.sweeps.plan import read_plan
    from stvit_video.sweeps.sweep import Wanted, list_rows, make_table

    plan = read_plan(options.plan, options.overrides)
    output = options.output or Path("runs") / f"tradeoff_{options.plan.stem}"
    if options.list:
        list_rows(plan, output, options.rows)
        return 0
    wanted = Wanted(
        patterns=() if options.no_train else tuple(options.rows),
        jobs=options.jobs,
        within=options.within,
        rounds=options.rounds,
        largest_batch=options.largest_batch,
        measure="always" if options.measure else "never" if options.no_train or not options.rounds else "missing",
    )
    return make_table(plan, output, wanted)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the table from the command line; return the exit code."""
    try:
        return run_command(
            tradeoff, arguments, stopped="stopped; the same command continues", again="the same command continues"
        )
    except Stopped as stopped:
        from stvit_video.runtime.stopping import EXIT_STOPPED

        print(f"{stopped}; the same command continues", file=sys.stderr)
        return EXIT_STOPPED


if __name__ == "__main__":
    sys.exit(main())
