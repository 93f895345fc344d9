"""Pictures of runs say which run and what came out, and stay readable with many classes and long names."""

import io
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from stvit_video.common.charts import plot_curves, plot_transfer, png_of_confusion, png_of_precision


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collect the figures that are saved."""
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    return figures


def title(figure: Figure) -> str:
    return figure.get_suptitle().replace("\n", " ")


@pytest.mark.parametrize("count", [2, 8, 51, 400])
def test_a_confusion_is_readable_with_any_number_of_classes(count: int, drawn: list[Figure]) -> None:
    names = [f"playing the instrument with the long name {i}" for i in range(count)]
    counts = np.eye(count, dtype=int) * 9
    counts[0, 1] = 3
    picture = Image.open(io.BytesIO(png_of_confusion(counts, names, "my run")))
    assert picture.width <= 1000
    (figure,) = drawn
    total = 9 * count + 3
    assert title(figure) == f"my run: top-1 {900 * count / total:.1f} % of {total:,} videos"
    FigureCanvasAgg(figure).draw()
    axes, *others = (one for one in figure.axes if one.get_label() != "<colorbar>")
    if count == 400:
        assert [text.get_text().split(": ")[0] for text in others[0].texts] == ["3 of 12"]
        return
    assert not others
    labels = axes.get_yticklabels()
    assert len(labels) == count
    boxes = [label.get_window_extent() for label in labels]
    assert not any(one.overlaps(two) for one, two in pairwise(boxes))
    assert min(box.height for box in boxes) * 800 / picture.width > 5, "the font would be too small in a README"
    assert {text.get_text() for text in axes.texts} == ({"9", "3"} if count <= 30 else set())


def test_names_in_scripts_without_glyphs_warn_nobody() -> None:
    program = "from stvit_video.common import charts as c; c.png_of_precision([1.0], ['走る'], '走る')"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stderr == ""


def test_a_picture_names_its_run_and_what_came_out(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [
        {"step": 8, "epoch": 1.0, "split": split, "loss": 1.0, "top1": top1, "lr": 0.1}
        for split, top1 in (("train", 40.0), ("val", 35.5))
    ]
    folder = tmp_path / "a $run$"
    folder.mkdir()
    plot_curves(rows, folder / "curves.png")
    results = [
        {"method": "linear probe (weight decay 1)", "weights": "checkpoint", "top1": 46.9},
        {"method": "random weights, linear probe (weight decay 1)", "weights": "random", "top1": 17.2},
    ]
    plot_transfer(results, 12.5, folder / "transfer.png")
    png_of_precision([50.0, float("nan")], ["a", "b"], "a $run$, 7 videos")
    png_of_precision([50.0], ["a"], os.fsdecode(b"run \xff"))
    assert [title(figure) for figure in drawn] == [
        "a $run$: top-1 at the end: validation 35.5 %, training 40.0 %",
        "a $run$: best is linear probe, top-1 46.9 % (chance 12.5 %)",
        "a $run$, 7 videos: mAP 25.0 % of 2 classes, 1 of them without a positive",
        "run \\udcff: mAP 50.0 % of 1 classes",
    ]
    for figure in drawn[1:]:
        (axes,) = figure.axes
        (line,) = axes.lines
        assert line.get_zorder() < min(bar.get_zorder() for bar in axes.patches), "a line is drawn over bars"
    for figure in drawn[:2]:
        (legend,) = figure.legends
        figure.draw_without_rendering()
        assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for axes in figure.axes)
