"""The picture of accuracy beside speed: a point a row, each with its name where no other text or point is."""

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from stvit_video.benchmarks.tradeoff_table import Line, Table
from stvit_video.engine.checkpoint import write_atomically
from stvit_video.engine.plots import SPLIT_COLOURS, WEIGHTS_COLOURS

matplotlib.use("Agg")
Side = Literal["left", "right"]
GROUPS = {  # kind: marker, size, colour, name in the legend
    "twin": ("s", 8, "black", "full twin"),
    "preset": ("o", 9, SPLIT_COLOURS["val"], "preset"),
    "control": ("v", 6, WEIGHTS_COLOURS["random"], "control"),
    "neighbour": ("D", 6, SPLIT_COLOURS["train"], "neighbour"),
}
WORST = 100  # a name on a name, or outside, beside a name on a bar
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
        means = [_height(line) for line in group]
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
    _write_names(axes, [(line, _x(line, measured)) for line in lines])
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    write_atomically(path, picture.getvalue())
    return True


def _x(line: Line, measured: bool) -> float:
    return line.rate if measured and line.rate is not None else line.gflops


def _write_names(axes: Axes, points: list[tuple[Line, float]]) -> None:
    """Write each name at the best place around its point (x beside it), with a thin line where that is not near."""
    taken = [box for line, x in points for box in _boxes(axes, line, x)]
    names: list[Bbox] = []
    for line, x in sorted(points, key=lambda point: (_height(point[0]), point[1])):
        place: dict[str, Any] = {"xy": (x, _height(line)), "textcoords": "offset points"}
        text = axes.annotate(line.name, xytext=(0, 0), fontsize=7.5, va="center", parse_math=False, **place)
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])
        best, least = next(_offsets()), math.inf
        for candidate in _offsets():
            distance = math.hypot(*candidate[0])
            if distance >= least:
                break
            box = _move(text, *candidate)
            penalty = distance + _overlap(box, taken) + WORST * (_overlap(box, names) + _outside(box, axes))
            if penalty < least:
                best, least = candidate, penalty
        names.append(_move(text, *best))
        if math.hypot(*best[0]) > 2 * POINT:
            thin = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
            axes.annotate("", xytext=best[0], arrowprops=thin, **place)


def _boxes(axes: Axes, line: Line, x: float) -> list[Bbox]:
    """Return where, in pixels, a point and its bar are."""
    half = POINT * axes.figure.dpi / 72
    place = axes.transData.transform((x, _height(line)))
    ends = axes.transData.transform([(x, min(line.found)), (x, max(line.found))])
    return [Bbox([place - half, place + half]), Bbox([ends[0] - 1, ends[1] + 1])]


def _height(line: Line) -> float:
    assert line.mean is not None  # those without are left out
    return line.mean


def _offsets() -> Iterator[tuple[tuple[float, float], Side]]:
    """Yield offsets in points of type, the nearest first, and on which side of the text the point then is."""
    for distance in (9, 14, 20, 27, 35, 44, 54, 66, 80, 96, 114, 134, 156, 180):
        for degrees in (0, 180, 40, -40, 140, -140, 75, -75, 105, -105):
            angle = math.radians(degrees)
            side: Side = "left" if abs(degrees) < 90 else "right"
            yield (distance * math.cos(angle), distance * math.sin(angle)), side


def _move(text: Annotation, offset: tuple[float, float], side: Side) -> Bbox:
    text.set_position(offset)
    text.set_horizontalalignment(side)
    return text.get_window_extent().padded(1)


def _overlap(box: Bbox, taken: list[Bbox]) -> float:
    """Return the area, in pixels, of a text that lies on something else."""
    shared = [Bbox.intersection(box, other) for other in taken]
    return sum(part.width * part.height for part in shared if part is not None)


def _outside(box: Bbox, axes: Axes) -> float:
    return max(0.0, box.width * box.height - _overlap(box, [axes.bbox.padded(-4)]))
