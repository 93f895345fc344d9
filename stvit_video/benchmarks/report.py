"""Tables and pictures of measured speed."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stvit_video.benchmarks.speed import Conditions, Speed
from stvit_video.errors import UsageError

COLUMNS = ("clip", "GFLOPs", "p50 ms", "p95 ms", "batch", "clips/s", "least to most", "share", "GB", "ratio")


def describe_speeds(speeds: Sequence[Speed], product: float, conditions: Conditions) -> str:
    """Return the table of what was measured, and below it what fvcore did not count."""
    rows = [("", *COLUMNS), *(_row(speed) for speed in speeds)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    aligned = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    what = "training steps" if conditions.training else "inference"
    lines = [
        f"{what}: {conditions.device.type}, {conditions}; a matrix product runs at {product:.0f} G multiply-adds/s",
        *aligned,
    ]
    lines.append(
        "p50, p95: of a call at batch 1; share: of the matrix product's rate; ratio: clips/s of the first row's"
    )
    for speed in speeds:
        left = ", ".join(f"{name.removeprefix('aten::')} {n}" for name, n in sorted(speed.unsupported.items()))
        lines.append(f"not counted by fvcore in {speed.name}: {left or 'nothing'}")
    return "\n".join(lines)


def _row(speed: Speed) -> tuple[str, ...]:
    return (
        speed.name,
        "x".join(map(str, speed.input_size)),
        f"{speed.gflops:.1f}",
        f"{speed.latency(0.5):.1f}",
        f"{speed.latency(0.95):.1f}",
        str(speed.batch),
        f"{speed.rate:.2f}",
        f"{min(speed.rates):.2f} to {max(speed.rates):.2f}",
        f"{speed.share:.2f}",
        "-" if speed.memory is None else f"{speed.memory:.2f}",
        f"{speed.ratio:.2f}",
    )


def figures_of(speeds: Sequence[Speed], product: float, conditions: Conditions) -> dict[str, Any]:
    """Return what was measured as plain data."""
    models = [
        {**asdict(speed), "clips_per_second": speed.rate, "p50_ms": speed.latency(0.5), "p95_ms": speed.latency(0.95)}
        for speed in speeds
    ]
    return {
        **conditions.figures,
        "training": conditions.training,
        "matrix_product_gmacs_per_second": product,
        "models": models,
    }


def read_accuracy(path: Path) -> float:
    """Return the top-1 of a run's results.json. Raises UsageError where there is none."""
    try:
        return float(json.loads(path.read_text())["top1"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--results {path} holds no top1 ({type(error).__name__}); give the results.json of a run for each --cfg."
        ) from error


def plot_speeds(speeds: Sequence[Speed], accuracies: Sequence[float | None], path: Path) -> None:
    """Draw accuracy (of those that have one) or else GFLOPs against clips a second."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    known = any(accuracy is not None for accuracy in accuracies)
    for i, (speed, accuracy) in enumerate(zip(speeds, accuracies, strict=True)):
        height = accuracy if known else speed.gflops
        if height is None:
            continue
        spread = [[speed.rate - min(speed.rates)], [max(speed.rates) - speed.rate]]
        axes.errorbar(speed.rate, height, xerr=spread, marker="o", color=f"C{i % 10}", capsize=3)
        place, beside = (speed.rate, height), (6, 6)
        axes.annotate(speed.name, place, beside, textcoords="offset points", fontsize=8, parse_math=False)
    axes.set_xlabel("clips a second")
    axes.set_ylabel("top-1 (%)" if known else "GFLOPs a clip")
    axes.set_xlim(0, 1.35 * max(max(speed.rates) for speed in speeds))  # room for the names
    if not known:
        axes.set_ylim(0, 1.15 * max(speed.gflops for speed in speeds))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
