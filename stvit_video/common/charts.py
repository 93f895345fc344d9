"""Drawings of a report, as SVG or PNG for its page."""

import math
from collections.abc import Sequence
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
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox
from numpy.typing import NDArray
from torch import Tensor

from stvit_video.common.files import write_atomically

matplotlib.use("Agg")
SPLIT_COLOURS = {"train": "#1f5fa8", "val": "#d1495b"}
CURVES = {"loss": "loss", "top1": "top-1 (%)", "lr": "learning rate"}
AS_IT_IS = {"text.parse_math": False}  # names may hold a $
WEIGHTS_COLOURS = {"checkpoint": "#1f5fa8", "random": "#9aa0a6", "fine-tuned": "#d1495b"}


def plot_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw loss, top-1 and learning rate by epoch, training beside validation, from the rows of ``metrics.jsonl``."""
    figure = Figure(figsize=(14, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, (name, label) in zip(panels, CURVES.items(), strict=True):
        for split, colour in SPLIT_COLOURS.items():
            points = [(row["epoch"], row[name]) for row in rows if row["split"] == split and name in row]
            if points:
                title = "training" if split == "train" else "validation"
                marker = "o" if split == "val" or len(points) == 1 else None  # a line of one point is none
                axes.plot(*zip(*points, strict=True), color=colour, label=title, marker=marker)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0)
    panels[1].legend(loc="lower right")
    figure.savefig(path, dpi=120)


@matplotlib.rc_context(AS_IT_IS)
def plot_comparison(curves: dict[str, dict[str, list[tuple[int, float]]]], target: float, path: Path) -> None:
    """Draw training (lines) and validation (points) top-1 by step of several runs, and a line at the target."""
    columns = 2 if max(len(run) for run in curves) <= 40 else 1
    figure = Figure(figsize=(8, 4.5 + 0.2 * math.ceil(len(curves) / columns)), layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["tab10" if len(curves) <= 10 else "tab20"]
    for i, (run, splits) in enumerate(curves.items()):
        colour = colours(i % colours.N)
        for split, style in (("train", "-"), ("val", "o")):
            axes.plot([x for x, _ in splits[split]], [y for _, y in splits[split]], style, color=colour)
        axes.plot([], [], "o-", color=colour, label=run)  # for the legend, which names each run once
    axes.axhline(target, color="black", linestyle="--", linewidth=1)
    axes.set_title("lines: training, points: validation", fontsize="medium")
    axes.set_xlabel("step")
    axes.set_ylabel("top-1 (%)")
    axes.set_ylim(0, 102)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=columns, fontsize="small")  # below the curves, however many
    figure.savefig(path, dpi=120)


@matplotlib.rc_context(AS_IT_IS)
def plot_confusion(counts: Tensor, classes: list[str], path: Path) -> None:
    """Draw the share of each label's videos by predicted class; counts (classes, classes), rows are labels."""
    shares = counts.numpy() / np.maximum(counts.sum(dim=1, keepdim=True).numpy(), 1)
    few = len(classes) <= 30
    side = max(4.5, 1.5 + 0.55 * len(classes)) if few else 10
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the label's videos", shrink=0.8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    if few:
        axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
        axes.set_yticks(range(len(classes)), classes)
        for row, column in zip(*np.nonzero(counts.numpy()), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", color=colour, fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight", pad_inches=0.1)


def plot_transfer(rows: list[dict[str, Any]], chance: float, path: Path) -> None:
    """Draw top-1 by method (``method``, ``weights``, ``top1`` of each row), the first on top, and a line at chance."""
    figure = Figure(figsize=(10, 1.4 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [row["method"].replace(" (", "\n(") for row in rows]
    values = [row["top1"] for row in rows]
    bars = axes.barh(range(len(rows)), values, color=[WEIGHTS_COLOURS[row["weights"]] for row in rows], height=0.65)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # readable where the line crosses it
    axes.bar_label(bars, labels=[f"{value:.1f}" for value in values], padding=4, bbox=box)
    axes.axvline(chance, color="black", linestyle="--", linewidth=1)
    axes.text(chance, 1.01, f"chance {chance:.3g} %", transform=axes.get_xaxis_transform(), ha="center", va="bottom")
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 108)  # room for the value of a bar that reaches 100
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("top-1 (%)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


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


@matplotlib.rc_context(AS_IT_IS)
def plot_points(points: Sequence[Point], x_label: str, y_label: str, path: Path) -> None:
    """Draw named points, such as accuracy over speed, with their ranges as bars."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    legend: dict[str, Any] = {}
    for point in points:
        bars = {"x": (point.x, point.x_range), "y": (point.y, point.y_range)}
        errors = {f"{axis}err": [[at - ends[0]], [ends[1] - at]] for axis, (at, ends) in bars.items() if ends}
        style: dict[str, Any] = {"fmt": point.marker, "markersize": point.size, "color": point.colour, **errors}
        drawn = axes.errorbar(point.x, point.y, capsize=3, elinewidth=1, zorder=3, **style)
        legend[point.kind] = drawn
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.margins(0.15)  # room for the names
    axes.grid(alpha=0.3)
    legend.pop("", None)
    if legend:
        place: dict[str, Any] = {"loc": "outside upper center", "ncols": len(legend)}
        figure.legend(legend.values(), legend.keys(), fontsize="small", frameon=False, **place)
    figure.draw_without_rendering()  # the layout is fixed here, before names are placed in it
    figure.set_layout_engine("none")
    _write_names(axes, points)
    file = BytesIO()
    figure.savefig(file, dpi=120, format="png")
    write_atomically(path, file.getvalue())


def _write_names(axes: Axes, points: Sequence[Point]) -> None:
    """Write the names near their points, clear of each other, of points and of bars, each with a line to its point."""
    texts, taken = [], []
    for point in points:
        texts.append(axes.text(point.x, point.y, point.name, fontsize=7.5))
        texts[-1].set_path_effects([withStroke(linewidth=2, foreground="white")])
        (left, right), (low, high) = point.x_range or (point.x, point.x), point.y_range or (point.y, point.y)
        drawn = Bbox([(left, low), (right, high)]).transformed(axes.transData).padded(8)
        taken.append(drawn.transformed(axes.transData.inverted()))
    # Larger steps and more room than adjustText's own, which leave names on each other where many points are close.
    how: dict[str, Any] = {"force_text": (0.1, 0.5), "max_move": (20, 20), "expand": (1.1, 1.3), "iter_lim": 200}
    line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6}
    adjust_text(texts, objects=taken, ax=axes, prevent_crossings=False, arrowprops=line, **how)


# Okabe and Ito's colours, which people with any colour vision can tell apart, less black and the palest.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", "--", ":")  # for more runs than colours
MOST_POINTS = 400  # of a curve
STYLE = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11, "axes.edgecolor": "#9aa3b2",
    "axes.spines.top": False, "axes.spines.right": False, "axes.labelcolor": "#1d2430", "xtick.color": "#566074",
    "ytick.color": "#566074", "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "svg.hashsalt": "stvit_video", **AS_IT_IS,
}  # fmt: skip


def line_style(number: int) -> dict[str, Any]:
    """Return colour and dashes of the ``number``-th run; the same in every drawing."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number // len(COLOURS) % len(DASHES)]}


def draw_curves(metrics: dict[str, list[dict[str, Any]]], value: str, label: str) -> bytes | None:
    """Return an SVG of one value by epoch: training as a thin line, averaged; validation as a line with points.

    ``metrics`` holds the rows of ``metrics.jsonl`` by run. None where no row has the value.
    """
    drawn = False
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 3.5), layout="constrained")
        axes = figure.subplots()
        for number, (run, rows) in enumerate(metrics.items()):
            style = line_style(number)
            for split in ("train", "val"):
                points = [(row["epoch"], row[value]) for row in rows if row["split"] == split and value in row]
                if not points:
                    continue
                drawn = True
                epochs, values = thin_out(np.array(points, float))
                if split == "val":
                    axes.plot(epochs, values, marker="o", markersize=5, linewidth=2.2, label=run, **style)
                else:
                    axes.plot(epochs, values, linewidth=1, alpha=0.45, **style)
        axes.set(xlabel="epoch", title=label, ylim=(0, 102) if value.startswith("top") else (0, None))
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        if not drawn:
            return None
        _mark(axes, list(metrics))
        return _svg(figure)


def _mark(axes: Axes, runs: Sequence[str]) -> None:
    """Say which line is which: by run, or of a single run by what it is of."""
    if len(runs) == 1:
        lines = [
            Line2D([], [], marker="o", linewidth=2.2, label="validation", **line_style(0)),
            Line2D([], [], linewidth=1, alpha=0.45, label="training", **line_style(0)),
        ]
    else:
        lines = [Line2D([], [], linewidth=2.2, label=run, **line_style(i)) for i, run in enumerate(runs)]
        lines.append(Line2D([], [], color="#777777", linewidth=1, label="thin: training"))
    axes.legend(handles=lines, frameon=False, fontsize=9, loc="best")


def thin_out(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return x and y of points (N, 2), averaged in order so that no more than ``MOST_POINTS`` are left."""
    parts = np.array_split(points, min(MOST_POINTS, len(points)))
    x, y = np.array([part.mean(axis=0) for part in parts]).T
    return x, y


def draw_trade(figures: Sequence[tuple[str, float, float]], label: str) -> bytes:
    """Return an SVG of top-1 over cost, a point for each (run, cost, top-1 in percent); ``label`` names the cost."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 3.5), layout="constrained")
        axes = figure.subplots()
        for number, (run, cost, top1) in enumerate(figures):
            colour = line_style(number)["color"]
            axes.plot([cost], [top1], "o", markersize=11, color=colour)
            left = cost > 0.6 * max(cost for _, cost, _ in figures)
            axes.annotate(
                run, (cost, top1), xytext=(-9 if left else 9, -14), textcoords="offset points",
                ha="right" if left else "left", fontsize=9,
            )  # fmt: skip
        axes.set(xlabel=label, title="Top-1 (%) over cost", ylim=(0, 105))
        axes.set_xlim(0, 1.12 * max(cost for _, cost, _ in figures))
        axes.grid(alpha=0.25)
        return _svg(figure)


def draw_matrix(shares: NDArray[np.float64]) -> bytes:
    """Return a PNG of a confusion matrix of many classes: rows are labels; dark is a share of 1, on a root scale."""
    with matplotlib.rc_context(STYLE):
        side = min(12.0, 4 + 0.02 * len(shares))
        figure = Figure(figsize=(side, side * 0.92), layout="constrained")
        axes = figure.subplots()
        picture = axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        bar = figure.colorbar(picture, ax=axes, shrink=0.7, label="share of the label's videos")
        bar.set_ticks([0, 0.1**0.5, 0.5**0.5, 1], labels=["0", "0.1", "0.5", "1"])
        axes.set(xlabel="predicted (number of the class)", ylabel="label (number of the class)")
        file = BytesIO()
        figure.savefig(file, format="png", dpi=110)
        return file.getvalue()


def _svg(figure: Figure) -> bytes:
    file = BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
