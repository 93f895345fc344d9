"""The picture of accuracy beside speed: a point a row, each with its name where no other text or point is."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from stvit_video.benchmarks.tradeoff_table import Line, Table
from stvit_video.engine.plots import COLOURS, WEIGHTS_COLOURS

matplotlib.use("Agg")
Side = Literal["left", "right"]
GROUPS = {  # kind: marker, size, colour, name in the legend
    "twin": ("s", 8, "black", "full twin"),
    "preset": ("o", 9, COLOURS["val"], "preset"),
    "control": ("v", 6, WEIGHTS_COLOURS["random"], "control"),
    "neighbour": ("D", 6, COLOURS["train"], "neighbour"),
}
POINT = 7.0  # half the room that a marker needs, in points of type


def plot_tradeoff(table: Table, path: Path) -> bool:
    """Draw mean top-1, with bars from the least to the most seed, by clips a second, or by GFLOPs where not measured.

    Returns False, and draws nothing, where no row has a figure yet.
    """
    lines = [line for line in table.lines if line.mean is not None]
    if not lines:
        return False
    measured = all(line.rate is not None for line in lines)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for kind, (marker, size, colour, legend) in GROUPS.items():
        group = [line for line in lines if line.kind == kind]
        if not group:
            continue
        means = [sum(line.found) / len(line.found) for line in group]
        below = [mean - min(line.found) for mean, line in zip(means, group, strict=True)]
        above = [max(line.found) - mean for mean, line in zip(means, group, strict=True)]
        places = [_x(line, measured) for line in group]
        bars: dict[str, Any] = {"yerr": [below, above], "capsize": 3, "elinewidth": 1}
        axes.errorbar(places, means, fmt=marker, markersize=size, color=colour, label=legend, zorder=3, **bars)
    axes.set_xlabel("clips a second" if measured else "GFLOPs a clip")
    axes.set_ylabel("top-1 (%), mean of the seeds and their range")
    axes.margins(0.1)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(GROUPS), fontsize="small", frameon=False)
    figure.draw_without_rendering()  # places are only known then
    figure.set_layout_engine("none")  # and stay, whatever is written
    _write_names(axes, [(line.name, _x(line, measured), line.mean) for line in lines if line.mean is not None])
    figure.savefig(path, dpi=120)
    return True


def _x(line: Line, measured: bool) -> float:
    return line.rate if measured and line.rate is not None else line.gflops


def _write_names(axes: Axes, points: list[tuple[str, float, float]]) -> None:
    """Write each name at the nearest free place around its point, with a thin line where that is not beside it."""
    scale = axes.figure.dpi / 72
    places = [axes.transData.transform((x, y)) for _, x, y in points]
    taken = [Bbox.from_extents(x - POINT * scale, y - POINT * scale, x + POINT * scale, y + POINT * scale)
             for x, y in places]  # fmt: skip
    for name, x, y in sorted(points, key=lambda point: (point[2], point[1])):
        text = axes.annotate(
            name, (x, y), textcoords="offset points", xytext=(0, 0), fontsize=7.5, va="center", parse_math=False
        )
        best: tuple[float, tuple[float, float], Side] | None = None
        for offset, side in _offsets():
            overlap = _overlap(_move(text, offset, side), taken, axes)
            if best is None or overlap < best[0]:
                best = (overlap, offset, side)
            if not overlap:
                break
        assert best is not None
        taken.append(_move(text, best[1], best[2]))
        if math.hypot(*best[1]) > 2 * POINT:
            line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
            axes.annotate("", (x, y), textcoords="offset points", xytext=best[1], arrowprops=line)


def _offsets() -> Iterator[tuple[tuple[float, float], Side]]:
    """Yield offsets in points of type, the nearest first, and on which side of the text the point then is."""
    for distance in (9, 15, 22, 30, 40, 52, 66, 82):
        for degrees in (0, 180, 40, -40, 140, -140, 75, -75, 105, -105):
            angle = math.radians(degrees)
            side: Side = "left" if abs(degrees) < 90 else "right"
            yield (distance * math.cos(angle), distance * math.sin(angle)), side


def _move(text: Annotation, offset: tuple[float, float], side: Side) -> Bbox:
    text.set_position(offset)
    text.set_horizontalalignment(side)
    return text.get_window_extent().padded(1)


def _overlap(box: Bbox, taken: list[Bbox], axes: Axes) -> float:
    """Return the area, in pixels, of a text that lies on something else or outside the axes."""
    inside = Bbox.intersection(box, axes.bbox)
    outside = box.width * box.height - (inside.width * inside.height if inside is not None else 0)
    shared = [Bbox.intersection(box, other) for other in taken]
    return max(0.0, outside) + sum(part.width * part.height for part in shared if part is not None)
