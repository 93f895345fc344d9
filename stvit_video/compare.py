"""Say which run is better, and whether by chance: ``python -m stvit_video.compare RUN RUN ... [--target 90]``.

Each RUN is the folder of a run that was trained or tested. Differences are measured on the test videos that two runs
both scored, with a 95 % interval over those videos: of top-1 with McNemar's exact test, of mAP by a paired bootstrap.
Another seed may change an accuracy by more. Of training runs the learning curves are drawn, and the steps are printed
after which each reaches the target, in training accuracy, averaged over a window of steps, and in validation. In the
first epoch, training accuracy is on new clips. Exit codes: 0 done; 2 wrong use.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from stvit_video.common.cli import Parser, number, run_command
from stvit_video.common.errors import UsageError
from stvit_video.common.files import check_file


def compare(arguments: Sequence[str] | None) -> int:
    """Parse the arguments, draw the chart and print the answer and the tables; return the exit code."""
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--target", type=float, default=90.0, help="top-1 or mAP in percent (default: %(default)g)")
    parser.add_argument("--window", type=number(int, 1), default=64, help="steps of the average (default: %(default)s)")
    parser.add_argument(
        "--videos", type=number(int, 0), default=3, help="to list that only one of two has right (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("comparison.png"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    check_file("--output", options.output, suffix=".png")
    from stvit_video.common.accuracy import ACCURACIES
    from stvit_video.common.charts import plot_comparison
    from stvit_video.common.text import printable
    from stvit_video.evaluation.significance import describe_comparison
    from stvit_video.runs.record import RunRecord, describe_steps, name_runs, read_curves, readable

    tested, curves, kinds, notes, without = [], {}, {}, [], []  # kinds: a run of each kind of accuracy
    for path, name in zip(options.runs, name_runs(options.runs), strict=True):
        has_results = (path / "results.json").is_file()
        if has_results:
            with readable([path]):
                tested.append(RunRecord(path, name))
            kinds[tested[-1].accuracy_key] = name
        try:
            with readable([path]):
                key, curves[name] = read_curves(path, options.window)
            kinds[key] = name
        except UsageError:
            if not has_results:
                raise
            without.append(name)
        else:
            if not has_results:
                notes.append(f"note: {name} was not tested (no results.json), so its curve alone is compared")
            if key == "top1" and not curves[name]["train"]:
                few = f"fewer steps than --window {options.window} averages over; give a smaller --window"
                notes.append(f"note: {name} has {few}")
    if len(kinds) > 1:
        given = " and ".join(f"the {ACCURACIES[key]} of {name}" for key, name in kinds.items())
        raise UsageError(f"RUN: {given} are not comparable; give runs of one kind.")
    parts = describe_comparison(tested, options.videos) if tested else []
    if curves:
        plot_comparison(curves, options.target, options.output, f"{ACCURACIES[next(iter(kinds))]} (%)")
        parts.append(describe_steps(curves, options.target))
        notes += [f"note: {name} has no learning curve" for name in without]
        notes.append(f"picture in {options.output}")
    parts[-1] = "\n".join([parts[-1], *map(printable, notes)])
    print("\n\n".join(parts))
    return 0


main = partial(run_command, compare)


if __name__ == "__main__":
    sys.exit(main())
