"""The table of accuracy beside speed: its figures, verdicts and picture."""

import json
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stvit_video.sweeps.plan import Plan, SweepRow
from stvit_video.sweeps.table import plot_tradeoff, verdicts, write_table


def row(name: str, *top1: float | None, kind: str = "control", of: str = "fast", gflops: float = 1.0) -> SweepRow:
    kind, of = {"full": ("twin", ""), "fast": ("preset", "")}.get(name, (kind, of))
    return SweepRow(name, kind, tuple(of.split()), dict(enumerate(top1)), gflops=gflops)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            [row("full", 98.0, 99.0), row("fast", 98.5, 97.9)],
            "0.30 points below full, within the 0.5 asked (spread 0.60; full: spread 1.00)",
        ),
        (
            [row("full", 98.9, 98.9), row("fast", 98.4, 98.4)],  # half a point, whatever floats make of it
            "0.50 points below full, within the 0.5 asked (spread 0.00; full: spread 0.00)",
        ),
        (
            [row("full", 98.9, 98.9), row("fast", 98.4, 98.3)],
            "0.55 points below full, NOT within the 0.5 asked (spread 0.10; full: spread 0.00)",
        ),
        (
            [row("full", 90.0, 90.0), row("fast", 90.0, 92.0)],
            "1.00 points above full, within the 0.5 asked (spread 2.00; full: spread 0.00)",
        ),
        (
            [row("full", 90.0, 91.0), row("fast", 91.0, 90.0)],
            "equal to full, within the 0.5 asked (spread 1.00; full: spread 1.00)",
        ),
        (
            [row("full", 90.0, None), row("fast", None, 89.0)],
            "89.00 % (one seed only), and full has none of these seeds trained",
        ),
        (
            [row("full", 90.0, 90.0, 90.0), row("fast", 90.0, 89.8, None)],
            "0.10 points below full, within the 0.5 asked (2 of 3 seeds; full: spread 0.00)",
        ),
        (
            [row("full", None, None), row("fast", 89.0, 89.5)],
            "89.25 % (spread 0.50), and full has none of these seeds trained",
        ),
        ([row("full", 90.0, 90.0), row("fast", None, None)], "no seed is trained, so nothing can be said"),
        (
            [
                *(row("full", 90.0, 90.0), row("fast", 90.0, 90.0), row("fast-random", 70.0, 71.0)),
                *(
                    row("fast-mean", 90.25, 90.25),
                    row("few", 90.0, 90.0, of="other fast"),
                    row("fast-late", None, None),
                ),
                *(row("fast-half", 89.0, None), row("tome", 91.0, 90.0, kind="neighbour")),
                row("other-random", 95.0, 95.0, of="other"),
            ],
            "equal to full, within the 0.5 asked (spread 0.00; full: spread 0.00); above random (by 19.50), half "
            "(by 1.00, one seed only); NOT above mean (by 0.25), few (by 0.00, less than the spread); neighbours: "
            "tome (+0.50, less than the spread); not compared, no seed being trained for both: late",
        ),
    ],
)
def test_verdicts(rows: list[SweepRow], sentence: str) -> None:
    assert verdicts(Plan(rows, rows[0]), 0.5) == [f"fast: {sentence}"]


def test_missing_figures_are_none(tmp_path: Path) -> None:
    rows = [row("full", 90.0, None, gflops=2.0), row("fast", None, None)]
    text = write_table(Plan(rows, rows[0]), tmp_path, 0.5)
    full, fast = json.loads((tmp_path / "tradeoff.json").read_text())["rows"]
    assert (full["mean"], full["spread"], full["points"]) == (90.0, None, 0.0)
    assert (fast["mean"], fast["points"], fast["speed_of_twin"], fast["gflops_of_twin"]) == (None, None, None, 0.5)
    assert "None" not in text


def test_names_and_kinds_are_aligned_left_and_figures_right(tmp_path: Path) -> None:
    rows = [row("full", 90.0), row("fast", 89.0), row("fast-mean", 88.0)]
    printed = write_table(Plan(rows, rows[0]), tmp_path, 0.5).partition("\n\n- ")[0]
    assert max(map(len, printed.splitlines())) <= 100
    dashes = (tmp_path / "tradeoff.md").read_text().splitlines()[1].strip("|").split("|")
    assert [cell.strip().endswith(":") for cell in dashes] == [False, False, *[True] * 9]


def test_names_in_the_picture_do_not_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    plot_tradeoff([row("full", None)], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    controls = [row(f"paper-control-{i}", 90 + i % 3 / 10, 90.5, gflops=0.3 + i / 100) for i in range(18)]
    rows = [row("full", 97.0, 98.0, gflops=1.3), row("fast", 96.0, gflops=0.3), *controls]
    plot_tradeoff(rows, tmp_path / "plot.png")
    (axes,) = drawn[0].axes
    FigureCanvasAgg(drawn[0]).draw()  # at the size on the screen, no longer that of the file
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert len(boxes) == 20
    for i, box in enumerate(boxes):
        assert axes.bbox.padded(1).contains(*box.min)
        assert axes.bbox.padded(1).contains(*box.max)
        assert not any(box.overlaps(other) for other in boxes[:i])
