"""Compare the learning curves of runs in one chart: ``python -m stvit_video.compare RUN RUN ... [--target 90]``.

Each RUN is the folder of a training run. Prints the number of steps after which each reaches the target, in training
accuracy, averaged over a window of steps, and in validation. In the first epoch, training accuracy is on new clips.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from stvit_video.common.cli import Parser, number, run_command
from stvit_video.common.errors import UsageError
from stvit_video.common.files import check_file


def compare(arguments: Sequence[str] | None) -> int:
    """Parse the arguments, draw the chart and print the table; return the exit code."""
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a training run")
    parser.add_argument("--target", type=float, default=90.0, help="top-1 or mAP in percent (default: %(default)g)")
    parser.add_argument("--window", type=number(int, 1), default=64, help="steps of the average (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("comparison.png"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    check_file("--output", options.output, suffix=".png")
    from stvit_video.common.accuracy import ACCURACIES
    from stvit_video.common.charts import plot_comparison
    from stvit_video.common.tables import format_table
    from stvit_video.runs.record import first_step, read_curves

    found = {run: read_curves(Path(run), options.window) for run in options.runs}
    kinds = {key: run for run, (key, _) in found.items()}
    if len(kinds) > 1:
        given = " and ".join(f"the {ACCURACIES[key]} of {run}" for key, run in kinds.items())
        raise UsageError(f"RUN: {given} are not comparable; give runs of one kind.")
    curves = {run: splits for run, (_, splits) in found.items()}
    (key,) = kinds
    plot_comparison(curves, options.target, options.output, f"{ACCURACIES[key]} (%)")
    rows = []
    short = [run for run, splits in curves.items() if key == "top1" and not splits["train"]]
    for run, splits in curves.items():
        cells = [first_step(splits[split], options.target) if splits[split] else "-" for split in ("train", "val")]
        rows.append([run, *("never" if cell is None else cell for cell in cells)])
    print(format_table([f"steps to {options.target:g} %", "training", "validation"], rows))
    for run in short:
        print(f"note: {run} has fewer steps than --window {options.window} averages over; give a smaller --window")
    print(f"picture in {options.output}")
    return 0


main = partial(run_command, compare)


if __name__ == "__main__":
    sys.exit(main())
