"""Pictures of a run: learning curves, confusion matrix, and scores before and after training."""

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

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
