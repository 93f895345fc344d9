"""The table of accuracy beside speed: its figures, what they say of each preset in words, and its files."""

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from stvit_video.common.charts import SPLIT_COLOURS, WEIGHTS_COLOURS
from stvit_video.common.errors import UsageError
from stvit_video.common.files import write_atomically, write_json


@dataclass(frozen=True)
class Line:
    """One row of the table. Accuracies are top-1 in percent by seed, None where that run is not finished.

    ``rate`` is in clips a second, None where speed was not measured; ``failures`` say by seed why a run ended.
    """

    name: str
    kind: str
    of: tuple[str, ...]
    parameters: int
    tokens: int
    gflops: float
    top1: dict[int, float | None]
    rate: float | None = None
    coverage: dict[int, float] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)

    @property
    def found(self) -> list[float]:
        return [value for value in self.top1.values() if value is not None]

    @property
    def mean(self) -> float | None:
        return sum(self.found) / len(self.found) if self.found else None

    @property
    def spread(self) -> float | None:
        """From the least to the most of the seeds; one seed has none."""
        return max(self.found) - min(self.found) if len(self.found) > 1 else None

    @property
    def seeds(self) -> str:
        """What a reader has to know of a mean: nothing where all seeds are in it, and there are several."""
        if len(self.found) == 1:
            return "one seed only"
        return "" if len(self.found) == len(self.top1) else f"{len(self.found)} of {len(self.top1)} seeds"


@dataclass(frozen=True)
class Table:
    """All rows, the twin among them, and how far below it a preset may be, in points of top-1."""

    lines: tuple[Line, ...]
    within: float
    machine: str = ""  # what the speeds were measured on
    start: str = ""  # what all rows were trained from

    @property
    def twin(self) -> Line:
        return next(line for line in self.lines if line.kind == "twin")

    def points(self, line: Line) -> float | None:
        """Return how many points of top-1 a row is above the twin, None where they have no seed in common."""
        return difference(line, self.twin)


def difference(line: Line, other: Line) -> float | None:
    """Return how many points a row is above another, in the mean of the seeds that both have; None without any."""
    values = _pairs(line, other)
    if not values:
        return None
    return round(sum(one - two for one, two in values) / len(values), 9) + 0.0  # without the noise of floating point


def within_spread(line: Line, other: Line) -> bool:
    """Say whether the seeds of one of two rows, several being known of both, lie as far apart as the rows do."""
    pairs, by = _pairs(line, other), difference(line, other)
    spreads = [max(values) - min(values) for values in zip(*pairs, strict=True)]
    return len(pairs) > 1 and by is not None and abs(by) <= max(spreads)


def _pairs(line: Line, other: Line) -> list[tuple[float, float]]:
    found = ((one, other.top1.get(seed)) for seed, one in line.top1.items())
    return [(one, two) for one, two in found if one is not None and two is not None]


def verdicts(table: Table) -> list[str]:
    """Return a sentence on each preset: against the twin, against its controls, beside its neighbours."""
    return [_verdict(table, line) for line in table.lines if line.kind == "preset"]


def _verdict(table: Table, line: Line) -> str:
    if line.mean is None:
        return f"{line.name}: no seed is trained, so nothing can be said"
    parts = [_against_twin(table, line)]
    controls, neighbours = (
        [other for other in table.lines if line.name in other.of and other.kind == kind]
        for kind in ("control", "neighbour")
    )
    known = [(other, by) for other in controls if (by := difference(line, other)) is not None]
    for word, chosen in (
        ("above", [(other, by) for other, by in known if by > 0]),
        ("NOT above", [(other, by) for other, by in known if by <= 0]),
    ):
        if chosen:
            parts.append(f"{word} " + ", ".join(_name(line, other, f"by {abs(by):.2f}") for other, by in chosen))
    beside = [(other, by) for other in neighbours if (by := difference(other, line)) is not None]
    if beside:
        parts.append("neighbours: " + ", ".join(_name(line, other, f"{by:+.2f}") for other, by in beside))
    unknown = [_short(line, other) for other in (*controls, *neighbours) if difference(line, other) is None]
    if unknown:
        parts.append(f"not compared, no seed being trained for both: {', '.join(unknown)}")
    return f"{line.name}: {'; '.join(parts)}"


def _against_twin(table: Table, line: Line) -> str:
    twin, points = table.twin, table.points(line)
    spread = line.seeds or f"spread {line.spread:.2f}"
    if points is None:
        return f"{line.mean:.2f} % ({spread}), and {twin.name} has none of these seeds trained"
    where = "equal to" if not points else f"{abs(points):.2f} points {'above' if points > 0 else 'below'}"
    verdict = "within" if points >= -table.within else "NOT within"
    other = twin.seeds or f"spread {twin.spread:.2f}"
    return f"{where} {twin.name}, {verdict} the {table.within:g} asked ({spread}; {twin.name}: {other})"


def _name(line: Line, other: Line, by: str) -> str:
    doubt = "less than the spread" if within_spread(line, other) else ""
    return f"{_short(line, other)} ({', '.join(filter(None, (by, doubt, other.seeds)))})"


def _short(line: Line, other: Line) -> str:
    return other.name.removeprefix(f"{line.name}-")


def notes(table: Table) -> list[str]:
    """Return what else belongs below the table: the common start, runs that failed, tests that left videos out."""
    said = [table.start] if table.start else []
    for line in table.lines:
        said += [f"failed: {line.name}, seed {seed}: {why}" for seed, why in line.failures.items()]
        said += [
            f"{line.name}, seed {seed}: top-1 of the {100 * share:.1f} % of the test videos that could be read"
            for seed, share in line.coverage.items()
            if share < 1
        ]
    return said


def records(table: Table) -> list[dict[str, Any]]:
    """Return the rows as plain data, one column a figure; None where there is none."""
    twin = table.twin
    return [
        {
            "row": line.name,
            "kind": line.kind,
            "of": ", ".join(line.of),
            "parameters": line.parameters,
            "tokens": line.tokens,
            "gflops": line.gflops,
            "gflops_of_twin": line.gflops / twin.gflops,
            "clips_per_second": line.rate,
            "speed_of_twin": None if line.rate is None or twin.rate is None else line.rate / twin.rate,
            **{f"top1_seed{seed}": value for seed, value in line.top1.items()},
            "mean": line.mean,
            "spread": line.spread,
            "points": table.points(line),
        }
        for line in table.lines
    ]


def markdown(table: Table) -> str:
    """Return the table for a README, verdicts and notes below it."""
    seeds = list(table.twin.top1)
    head = ["row", "kind", "tokens", "GFLOPs", "of twin", "clips/s", "of twin"]
    head += [*(f"seed {seed}" for seed in seeds), "mean top-1", "spread", "points"]
    rows = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for line, record in zip(table.lines, records(table), strict=True):
        cells = [line.name, f"{line.kind} of {', '.join(line.of)}" if line.of else line.kind, str(line.tokens)]
        cells += [f"{line.gflops:.3f}", f"{record['gflops_of_twin']:.2f}x"]
        cells += [_cell(line.rate, ".1f"), _cell(record["speed_of_twin"], ".2f", "x")]
        cells += ["failed" if seed in line.failures else _cell(line.top1[seed], ".2f") for seed in seeds]
        cells += [_cell(line.mean, ".2f"), _cell(line.spread, ".2f"), _cell(record["points"], "+.2f")]
        rows.append(cells)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
            for row in rows]  # fmt: skip
    below = [*verdicts(table), *notes(table), *([table.machine] if table.machine else [])]
    return "\n".join([*text, "", *(f"- {sentence}" for sentence in below)]) + "\n"


def _cell(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def write_table(table: Table, output: Path) -> None:
    """Write tradeoff.json, tradeoff.csv and tradeoff.md, each whole or not at all."""
    rows = records(table)
    content = {
        "rows": [{**row, "failures": line.failures} for row, line in zip(rows, table.lines, strict=True)],
        "verdicts": verdicts(table),
        "notes": notes(table),
        "within": table.within,
        "machine": table.machine,
    }
    write_json(output / "tradeoff.json", content)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(output / "tradeoff.csv", text.getvalue().encode())
    write_atomically(output / "tradeoff.md", markdown(table).encode())


def read_failures(output: Path, unfinished: Sequence[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """Return why the (row, seed) that are not finished ended when they were last tried.

    Raises UsageError where the table of the last time cannot be read.
    """
    path = output / "tradeoff.json"
    if not path.is_file():
        return {}
    try:
        known = {
            (row["row"], int(seed)): str(why)
            for row in json.loads(path.read_text())["rows"]
            for seed, why in row["failures"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is not what this command wrote ({type(error).__name__}); delete it.") from error
    return {key: why for key, why in known.items() if key in unfinished}


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
