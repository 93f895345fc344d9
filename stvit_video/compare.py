"""Learning curves of several runs in one picture: ``python -m stvit_video.compare RUN RUN ... [--target 90]``.

Each RUN is the folder of a training run. Says after how many steps each reaches the target, in training accuracy
averaged over a window of steps (in the first epoch these are clips never seen before) and in validation.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stvit_video.errors import Parser, UsageError, run_command

Points = list[tuple[int, float]]  # step, top-1 in percent


def smooth(rows: list[dict[str, Any]], window: int) -> Points:
    """Return training top-1 averaged over the last ``window`` steps, from where there are as many."""
    points = [(row["step"], row["top1"]) for row in rows if row["split"] == "train" and "top1" in row]
    smoothed = []
    for i, (step, _) in enumerate(points):
        if step < window:
            continue
        recent = [top1 for earlier, top1 in points[: i + 1] if earlier > step - window]
        smoothed.append((step, sum(recent) / len(recent)))
    return smoothed


def first_step(points: Points, target: float) -> int | None:
    """Return the first step at which the target is reached, None where it never is."""
    return next((step for step, top1 in points if top1 >= target), None)


def read_run(folder: str, window: int) -> dict[str, Points]:
    """Return the smoothed training curve and the validation points of a run; raises UsageError where it has none."""
    from stvit_video.engine.logging import read_metrics

    rows = [row for row in read_metrics(Path(folder) / "metrics.jsonl") if {"split", "step"} <= set(row)]
    if not any(row["split"] == "train" for row in rows):
        raise UsageError(f"{folder} has no metrics.jsonl with training rows; give the OUTPUT_DIR of a training run.")
    validation = [(row["step"], row["top1"]) for row in rows if row["split"] == "val"]
    return {"train": smooth(rows, window), "val": validation}


def compare(arguments: Sequence[str] | None) -> int:
    """Parse the arguments, draw the picture and print the table."""
    parser = Parser(
        prog="python -m stvit_video.compare", form="RUN RUN ... [--target 90]", description="Compare learning curves."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a training run")
    parser.add_argument("--target", type=float, default=90.0, help="top-1 in percent (default: %(default)g)")
    parser.add_argument("--window", type=int, default=64, help="steps of the average (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("comparison.png"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.window < 1:
        raise UsageError(f"--window {options.window} averages over no step; give a whole number from 1 on.")
    if options.output.suffix != ".png" or not options.output.parent.is_dir():
        raise UsageError(f"--output {options.output}: give a .png file in a folder that exists.")
    from stvit_video.engine.plots import plot_comparison

    curves = {run: read_run(run, options.window) for run in options.runs}
    plot_comparison(curves, options.target, options.output)
    width = max(len(run) for run in curves)
    print(f"{'steps to ' + f'{options.target:g} %':{width}}  training  validation")
    for run, splits in curves.items():
        cells = [
            first_step(points, options.target) or "never" if points else "-"
            for points in (splits["train"], splits["val"])
        ]
        print(f"{run:{width}}  {cells[0]:>8}  {cells[1]:>10}")
        if not splits["train"]:
            print(f"note: {run} has fewer steps than --window {options.window} averages over; give a smaller --window")
    print(f"picture in {options.output}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare runs from the command line; return the exit code."""
    return run_command(compare, arguments)


if __name__ == "__main__":
    sys.exit(main())
