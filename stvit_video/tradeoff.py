"""Accuracy beside speed in one table and one plot: ``python -m stvit_video.tradeoff --plan FILE [KEY VALUE ...]``.

Trains every row of a plan with every seed, measures the speed of all rows side by side, and writes tradeoff.md, .csv,
.json and .png. The same command continues where it was stopped. Exit codes are those of ``stvit_video.run``; 1 also
where a run failed, which the table then says.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from stvit_video.common.cli import Parser, number, run_command
from stvit_video.common.errors import UsageError

AGAIN = "the same command continues"
NO_LIMIT = "365-00"  # days; runs on this machine have no time limit


def tradeoff(arguments: Sequence[str] | None) -> int:
    """Parse the arguments and do what they ask for; return the exit code."""
    from stvit_video.config.schema import BY_NAME

    parser = Parser(__doc__, BY_NAME)
    add = parser.add_argument
    add("--plan", type=Path, required=True, metavar="FILE", help="as configs/tradeoff/*.yaml")
    add("--output", type=Path, metavar="DIR", help="default: runs/tradeoff_<name of the plan>")
    add("--rows", nargs="+", default=["*"], metavar="PATTERN", help="train these rows only; the table has all")
    add("--jobs", type=number(int, 1), help="runs at a time; here they share cores (default: 1; all with slurm)")
    add("--cluster", default="local", choices=("local", "slurm"), help="where to train (default: %(default)s)")
    add("--profile", type=Path, metavar="FILE", help="what the cluster needs: slurm/profiles/NAME.yaml")
    add("--gpus-per-node", type=number(int, 0), metavar="G", help="GPUs of each run (default: 1 unless DEVICE is cpu)")
    about = "points of top-1 below the dense baseline that a preset may lose (default: %(default)g)"
    add("--within", type=number(float, 0), default=0.5, metavar="POINTS", help=about)
    add("--list", action="store_true", help="print rows, costs and runs left; train nothing, and exit")
    add("--no-train", action="store_true", help="only draw table and plot from what is there")
    add("--measure", action="store_true", help="measure speeds again, also where all are known")
    add("--rounds", type=number(int, 0), default=5, help="of measuring speed; 0: do not measure (default: %(default)s)")
    add("--largest-batch", type=number(int, 1), default=64, help="to measure with (default: %(default)s)")
    add("overrides", nargs="*", metavar="KEY VALUE", help="for all rows, as for stvit_video.run")
    options = parser.parse_intermixed_args(arguments)
    if options.measure and not options.rounds:
        raise UsageError("--measure with --rounds 0, which does not measure; leave one of them out.")
    if options.profile and options.cluster == "local":
        raise UsageError("--profile is for --cluster slurm; leave it out.")
    if options.output and options.output.is_file():
        raise UsageError(f"--output {options.output} is a file; give a folder.")
    from stvit_video.sweeps.plan import open_plan
    from stvit_video.sweeps.rows import list_rows

    plan = open_plan(options.plan, options.overrides)
    output = options.output or Path("runs") / f"tradeoff_{options.plan.stem}"
    if options.list:
        list_rows(plan, output, options.rows)
        return 0
    from stvit_video.slurm.request import JobRequest, check_cluster, read_profile  # not needed for --list, and slow
    from stvit_video.sweeps.sweep import build_sweep

    options.jobs = options.jobs or (1 if options.cluster == "local" else sys.maxsize)
    options.profile = read_profile(options.profile, time=NO_LIMIT if options.cluster == "local" else None)
    check_cluster(options.cluster, 1, JobRequest(options.profile, 1, 0, 1, 1, "stvit-tradeoff"))
    return build_sweep(plan, output, options)


main = partial(run_command, tradeoff, stopped=f"stopped; {AGAIN}", again=AGAIN)

if __name__ == "__main__":
    sys.exit(main())
