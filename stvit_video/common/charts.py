"""Charts of curves, confusions and costs: PNG files for run folders and images for pages, drawn by the same code."""

import math
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox
from numpy.typing import ArrayLike, NDArray

from stvit_video.common.accuracy import ACCURACIES, accuracy_key
from stvit_video.common.files import whole_file, write_atomically
from stvit_video.common.text import printable

matplotlib.use("Agg")
warnings.filterwarnings("ignore", "Glyph .* missing from font")  # one for each letter of other scripts, shown as boxes
Points = Sequence[tuple[float, float]]  # (x, y)
# Okabe and Ito's palette, distinct with any colour vision, without black and the lightest colour.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", "--", ":", "-.")  # for more runs than colours
SPLIT_NAMES = {"train": "training", "val": "validation"}
SPLIT_COLOURS = {"train": "#1f5fa8", "val": "#d1495b"}
SPLIT_STYLES: dict[str, dict[str, Any]] = {
    "train": {"linewidth": 1, "alpha": 0.6},
    "val": {"linewidth": 2.2, "marker": "o", "markersize": 5},
}
WEIGHTS_COLOURS = {"checkpoint": "#1f5fa8", "random": "#9aa0a6", "fine-tuned": "#d1495b"}
PAGE_SIZE = (5.4, 2.7)  # inches of a picture in a page
MAX_POINTS = 400  # of a curve
MAX_COUNTED_CLASSES = 30  # in a confusion matrix: with numbers in its cells
MAX_NAMED_CLASSES = 60  # more have no names at the matrix, which the most confused pairs follow
MAX_PAIRS = 15
MAX_NAME = 28  # characters of a class
MAX_NAMED_BARS = 200  # classes in a chart of average precision
BELOW: dict[str, Any] = {"loc": "outside lower center", "ncols": 3, "fontsize": "small", "frameon": False}  # a legend
PLAIN_TEXT = {"text.parse_math": False}  # names may contain a $
ON_LINE = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # a text that a line crosses
STYLE = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11, "axes.edgecolor": "#9aa3b2",
    "axes.spines.top": False, "axes.spines.right": False, "axes.labelcolor": "#1d2430", "xtick.color": "#566074",
    "ytick.color": "#566074", "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "svg.hashsalt": "stvit_video", **PLAIN_TEXT,
}  # fmt: skip


def run_style(index: int) -> dict[str, Any]:
    """Return the colour and dashes of the run at ``index``, the same in every chart."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index // len(COLOURS) % len(DASHES)]}


def points_by_epoch(rows: Iterable[Mapping[str, Any]], value: str) -> dict[str, Points]:
    """Return the (epoch, value) points of each split, from rows of ``metrics.jsonl``."""
    found = [row for row in rows if value in row]
    return {split: [(row["epoch"], row[value]) for row in found if row["split"] == split] for split in SPLIT_STYLES}


@matplotlib.rc_context(STYLE)
def plot_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Write a PNG of a run's loss, accuracy and learning rate by epoch, from the rows of ``metrics.jsonl``.

    The title names the folder, and its last validation.
    """
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    names = set().union(*rows)
    key = accuracy_key(names)
    panels = {"loss": "loss", key: f"{ACCURACIES[key]} (%)", "lr": "learning rate"}
    if key not in names:  # a multi-label set has it in validation only
        del panels[key]
    for axes, (value, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        draw_curves(axes, [points_by_epoch(rows, value)])
        axes.set(xlabel="epoch", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    name, accuracy = path.resolve().parent.name, points_by_epoch(rows, key)
    ends = [f"{SPLIT_NAMES[split]} {accuracy[split][-1][1]:.1f} %" for split in ("val", "train") if accuracy[split]]
    _set_title(figure, f"{name}: {ACCURACIES[key]} at the end: {', '.join(ends)}" if ends else name)
    figure.legend(handles=_split_legend(), **BELOW)
    with whole_file(path, path.suffix) as temporary:
        figure.savefig(temporary, dpi=120)


@matplotlib.rc_context(STYLE)
def svg_of_curves(metrics: Mapping[str, list[dict[str, Any]]], value: str, label: str) -> bytes | None:
    """Return an SVG of one value by epoch, from the rows of ``metrics.jsonl`` of each run; None if no row has it."""
    curves = [points_by_epoch(rows, value) for rows in metrics.values()]
    if not any(points for run in curves for points in run.values()):
        return None
    figure = Figure(figsize=PAGE_SIZE, layout="constrained")
    axes = figure.subplots()
    draw_curves(axes, curves)
    axes.set(xlabel="epoch", ylim=(0, 102) if value in ACCURACIES else (0, None))
    _set_title(figure, label)
    handles = _split_legend()
    if len(metrics) > 1:
        handles = [Line2D([], [], linewidth=2.2, label=printable(run), **run_style(i)) for i, run in enumerate(metrics)]
        handles.append(Line2D([], [], color="#777777", linewidth=1, label="thin: training"))
    columns = 3 if max(map(len, metrics)) <= 20 else 1
    figure.legend(handles=handles, **{**BELOW, "ncols": columns})
    return _image(figure, "svg")


@matplotlib.rc_context(STYLE)
def plot_comparison(curves: Mapping[str, Mapping[str, Points]], target: float, path: Path, label: str) -> None:
    """Write a PNG of the accuracy of several runs by step, for training and validation, and a line at the target.

    The title names the run that is highest at its end, in validation where there is one.
    """
    columns = 2 if max(len(run) for run in curves) <= 40 else 1
    figure = Figure(figsize=(8, 4.5 + 0.2 * math.ceil(len(curves) / columns)), layout="constrained")
    axes = figure.subplots()
    draw_curves(axes, list(curves.values()))
    axes.axhline(target, color="black", linestyle="--", linewidth=1, zorder=0)
    axes.text(1.005, target, f"{target:g} %", transform=axes.get_yaxis_transform(), va="center", fontsize="small")
    axes.set(xlabel="step", ylabel=f"{label}; thin: training, with points: validation", ylim=(0, 102))
    for split in ("val", "train"):
        ends = {run: points[split][-1][1] for run, points in curves.items() if points[split]}
        if ends:
            best = max(ends, key=ends.__getitem__)
            highest = " ends highest" if len(ends) > 1 == list(ends.values()).count(ends[best]) else ""
            _set_title(figure, f"{best}{highest} in {SPLIT_NAMES[split]}: {label[:-4]} {ends[best]:.1f} %")
            break
    handles = [Line2D([], [], marker="o", label=printable(run), **run_style(i)) for i, run in enumerate(curves)]
    figure.legend(handles=handles, **{**BELOW, "ncols": columns})
    with whole_file(path, path.suffix) as temporary:
        figure.savefig(temporary, dpi=120)


def draw_curves(axes: Axes, runs: Sequence[Mapping[str, Points]]) -> None:
    """Draw the points of each run by split: training as a thin line, averaged, and validation with markers."""
    for i, curves in enumerate(runs):
        for split, style in SPLIT_STYLES.items():
            if curves[split]:
                x, y = thin_out(np.array(curves[split], float))
                marker = {"marker": "o"} if len(x) == 1 else {}  # a line of one point would be invisible
                axes.plot(x, y, **{**run_style(i), **style, **marker})
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)


def _split_legend() -> list[Line2D]:
    names = reversed(SPLIT_NAMES.items())
    return [Line2D([], [], label=name, **run_style(0), **SPLIT_STYLES[split]) for split, name in names]


def _set_title(figure: Figure, text: str) -> None:
    """Write what a picture shows above it, from its left edge, in as many lines as it takes."""
    lines = textwrap.wrap(printable(text, "\n"), int(9.5 * figure.get_figwidth()))
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=12, fontweight="bold")


def thin_out(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return x and y of points (N, 2), averaged over consecutive points where there are more than MAX_POINTS."""
    parts = np.array_split(points, min(MAX_POINTS, len(points)))
    return tuple(np.array([part.mean(axis=0) for part in parts]).T)


@matplotlib.rc_context(STYLE)
def png_of_confusion(counts: ArrayLike, classes: Sequence[str], run: str) -> bytes:
    """Return a PNG of the share of each label's videos by predicted class; counts (classes, classes), rows are labels.

    Colours are on a square-root scale, which shows rare confusions too. Few classes have their counts and names in it;
    of more than MAX_NAMED_CLASSES, the most confused pairs are named below.
    """
    counts = np.asarray(counts)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [one if len(one) <= MAX_NAME else f"{one[: MAX_NAME - 1]}…" for one in map(printable, classes)]
    count, total = len(classes), counts.sum()
    named = count <= MAX_NAMED_CLASSES
    side = min(8.0, 4 + 0.5 * count)
    figure = Figure(figsize=(side, side if named else 11), layout="compressed")
    axes, *below = figure.subplots(1 if named else 2, height_ratios=[1] if named else [2, 1], squeeze=False)[:, 0]
    image = axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, label="share of the label's videos", shrink=0.6)
    bar.set_ticks([0, 0.1**0.5, 0.5**0.5, 1], labels=["0", "0.1", "0.5", "1"])
    unit = "" if named else " (index of the class)"
    axes.set(xlabel=f"predicted{unit}", ylabel=f"label{unit}")
    axes.spines[:].set_visible(False)
    _set_title(figure, f"{run}: top-1 {100 * counts.trace() / max(total, 1):.1f} % of {total:,} videos")
    cell = 380 / count  # about its side in points
    if named:
        turned: dict[str, Any] = {"rotation": 45, "ha": "right"} if count <= 12 else {"rotation": 90}
        axes.set_xticks(range(count), names, fontsize=min(10, 0.85 * cell), **turned)
        axes.set_yticks(range(count), names, fontsize=min(10, 0.85 * cell))
    if count <= MAX_COUNTED_CLASSES:
        size = min(10, cell / max(1.6, 0.65 * len(str(counts.max()))))
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.3 else "black"
            text = str(int(counts[row, column]))
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size)
    for part in below:
        _draw_confused_pairs(part, counts, names)
    return _image(figure, "png", bbox_inches="tight", pad_inches=0.1)


def _draw_confused_pairs(axes: Axes, counts: NDArray[Any], names: Sequence[str]) -> None:
    """Draw a bar for each of the most frequent confusions."""
    wrong = counts * ~np.eye(len(counts), dtype=bool)
    cells = np.argsort(-wrong, axis=None, kind="stable")[:MAX_PAIRS]
    pairs = [pair for pair in zip(*np.unravel_index(cells, wrong.shape), strict=True) if wrong[pair]]
    bars = axes.barh(range(len(pairs)), [wrong[pair] for pair in pairs], color=COLOURS[1], height=0.7)
    texts = [f"{wrong[i, j]} of {counts[i].sum()}: {names[i]} → {names[j]}" for i, j in pairs]
    axes.bar_label(bars, texts, padding=4, fontsize=10)
    axes.set_xlim(0, 3 * max(1, wrong.max()))  # room for the texts
    axes.invert_yaxis()
    axes.set_axis_off()
    title = "most frequent confusions: label → prediction" if pairs else "no confusions"
    axes.set_title(title, fontsize="medium")


@matplotlib.rc_context(STYLE)
def png_of_precision(values: Sequence[float], classes: Sequence[str], run: str) -> bytes:
    """Return a PNG of the average precision of each class in percent, the highest first; NaN without a positive.

    Up to MAX_NAMED_BARS classes, names are written.
    """
    order = sorted(range(len(values)), key=lambda i: (math.isnan(values[i]), -values[i], i))
    lengths = np.array([values[i] for i in order])
    named = len(order) <= MAX_NAMED_BARS
    figure = Figure(figsize=(9, max(2.0, 1.2 + 0.18 * len(order)) if named else 8), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(range(len(order)), np.nan_to_num(lengths), height=0.7 if named else 1.0, color=COLOURS[0])
    axes.set_yticks([])
    if named:
        axes.set_yticks(range(len(order)), [printable(classes[i]) for i in order], fontsize=9)
        texts = ["no positive" if math.isnan(value) else f"{value:.1f}" for value in lengths]
        axes.bar_label(bars, texts, padding=3, fontsize=9, bbox=ON_LINE)
    without = int(np.isnan(lengths).sum())
    axes.set(ylim=(len(order) - 0.5, -0.5), xlim=(0, 112), xlabel="average precision (%)")
    axes.set_xticks(range(0, 101, 20))
    mean = float(np.nan_to_num(lengths).mean())
    axes.axvline(mean, color="black", linestyle="--", linewidth=1, zorder=0)
    counted = f", {without} of them without a positive" if without else ""
    _set_title(figure, f"{run}: mAP {mean:.1f} % of {len(order)} classes{counted}")
    return _image(figure, "png", bbox_inches="tight", pad_inches=0.1)


@matplotlib.rc_context(STYLE)
def plot_transfer(rows: list[dict[str, Any]], chance: float, path: Path) -> None:
    """Write a PNG of accuracy by method, with a line at chance; a row has ``method``, ``weights`` and an accuracy.

    The title names the folder and the best method.
    """
    key = accuracy_key(rows[0])
    figure = Figure(figsize=(10, 2.2 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [row["method"].replace(" (", "\n(") for row in rows]
    values = [row[key] for row in rows]
    bars = axes.barh(range(len(rows)), values, color=[WEIGHTS_COLOURS[row["weights"]] for row in rows], height=0.65)
    axes.bar_label(bars, labels=[f"{value:.1f}" for value in values], padding=4, bbox=ON_LINE)
    axes.axvline(chance, color="black", linestyle="--", linewidth=1, zorder=0)
    axes.text(chance, 1.01, f"chance {chance:.3g} %", transform=axes.get_xaxis_transform(), ha="center", va="bottom")
    best = max(rows, key=lambda row: row[key])
    what = f"{best['method'].split(' (')[0]}, {ACCURACIES[key]} {best[key]:.1f} %"
    _set_title(figure, f"{path.resolve().parent.name}: best is {what} (chance {chance:.3g} %)")
    kinds = {kind: colour for kind, colour in WEIGHTS_COLOURS.items() if any(row["weights"] == kind for row in rows)}
    figure.legend(handles=[Patch(color=colour, label=f"weights: {kind}") for kind, colour in kinds.items()], **BELOW)
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 108)  # room for the value of a bar that reaches 100
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel(f"{ACCURACIES[key]} (%)")
    with whole_file(path, path.suffix) as temporary:
        figure.savefig(temporary, dpi=100)


@dataclass(frozen=True)
class Point:
    """A named point of ``plot_points``."""

    name: str
    x: float
    y: float
    x_range: tuple[float, float] | None = None  # min and max, drawn as a bar
    y_range: tuple[float, float] | None = None
    kind: str = ""  # its name in the legend, which has none where empty
    marker: str = "o"
    size: float = 6
    colour: str = "C0"


def plot_points(points: Sequence[Point], x_label: str, y_label: str, path: Path, title: str) -> None:
    """Write the PNG of ``image_of_points``."""
    write_atomically(path, image_of_points(points, x_label, y_label, title, "png", (8, 5.5)))


@matplotlib.rc_context(STYLE)
def image_of_points(
    points: Sequence[Point],
    x_label: str,
    y_label: str,
    title: str,
    kind: str = "svg",
    size: tuple[float, float] = PAGE_SIZE,
) -> bytes:
    """Draw named points, such as accuracy over speed, with their ranges as bars; return a PNG or SVG.

    Names are written near their points, clear of each other, of points and of bars, each with a line to its point.
    """
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    legend: dict[str, Any] = {}
    for point in points:
        bars = {"x": (point.x, point.x_range), "y": (point.y, point.y_range)}
        errors = {f"{axis}err": [[at - ends[0]], [ends[1] - at]] for axis, (at, ends) in bars.items() if ends}
        style: dict[str, Any] = {"fmt": point.marker, "markersize": point.size, "color": point.colour, **errors}
        legend[point.kind] = axes.errorbar(point.x, point.y, capsize=3, elinewidth=1, zorder=3, **style)
    axes.set(xlabel=printable(x_label), ylabel=printable(y_label))
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.margins(0.15)  # room for the names
    axes.grid(alpha=0.25)
    _set_title(figure, title)
    legend.pop("", None)
    if legend:
        figure.legend(legend.values(), map(printable, legend), **{**BELOW, "ncols": len(legend)})
    figure.draw_without_rendering()  # the layout is fixed here, before names are placed in it
    figure.set_layout_engine("none")
    texts, taken = [], []
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
    for point in points:
        texts.append(
            axes.text(point.x, point.y, printable(point.name), fontsize=9 if len(points) <= 6 else 7.5, bbox=box)
        )
        (left, right), (low, high) = point.x_range or (point.x, point.x), point.y_range or (point.y, point.y)
        drawn = Bbox([(left, low), (right, high)]).transformed(axes.transData).padded(8)
        taken.append(drawn.transformed(axes.transData.inverted()))
    # Larger steps and more room than adjustText's own, which leave names on each other where many points are close.
    how: dict[str, Any] = {"force_text": (0.1, 0.5), "max_move": (20, 20), "expand": (1.1, 1.3), "iter_lim": 200}
    line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6}
    adjust_text(texts, objects=taken, ax=axes, prevent_crossings=False, arrowprops=line, **how)
    return _image(figure, kind)


def _image(figure: Figure, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    metadata = {"Date": None} if kind == "svg" else None  # equal charts are equal files
    figure.savefig(file, format=kind, dpi=120, metadata=metadata, **options)
    return file.getvalue()
