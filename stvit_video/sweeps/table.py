"""The table of accuracy beside speed: its figures, a verdict on each preset, its files and its picture."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stvit_video.common.charts import SPLIT_COLOURS, WEIGHTS_COLOURS, Point, plot_points
from stvit_video.common.files import write_atomically, write_json
from stvit_video.common.tables import format_table, to_csv
from stvit_video.sweeps.plan import PlanRow

STYLES: dict[str, dict[str, Any]] = {  # of the picture, by kind of row
    "twin": {"kind": "full twin", "marker": "s", "size": 8, "colour": "black"},
    "preset": {"kind": "preset", "marker": "o", "size": 9, "colour": SPLIT_COLOURS["val"]},
    "control": {"kind": "control", "marker": "v", "size": 6, "colour": WEIGHTS_COLOURS["random"]},
    "neighbour": {"kind": "neighbour", "marker": "D", "size": 6, "colour": SPLIT_COLOURS["train"]},
}


@dataclass(frozen=True)
class TableRow:
    """One row of the table."""

    name: str
    kind: str  # twin (the dense baseline), preset, control or neighbour
    of: tuple[str, ...]
    parameters: int
    tokens: int
    gflops: float
    top1: dict[int, float | None]  # percent by seed, None where that run is not finished
    rate: float | None = None  # clips per second, None where it was not measured
    coverage: dict[int, float] = field(default_factory=dict)  # share of the test videos that could be read, by seed
    failures: dict[int, str] = field(default_factory=dict)  # why a run failed, by seed

    @property
    def found(self) -> list[float]:
        return [value for value in self.top1.values() if value is not None]

    @property
    def mean(self) -> float | None:
        return sum(self.found) / len(self.found) if self.found else None

    @property
    def spread(self) -> float | None:
        """From the lowest to the highest seed; None for a single one."""
        return max(self.found) - min(self.found) if len(self.found) > 1 else None

    @property
    def seeds(self) -> str:
        """Which seeds are in the mean; empty where all are, and there are several."""
        if len(self.found) == 1:
            return "one seed only"
        return "" if len(self.found) == len(self.top1) else f"{len(self.found)} of {len(self.top1)} seeds"


@dataclass(frozen=True)
class Table:
    """All rows, the dense baseline among them."""

    rows: tuple[TableRow, ...]
    within: float  # how far below the baseline a preset may be, in points of top-1
    machine: str = ""  # where speed was measured
    start: str = ""  # which weights all rows were trained from

    @property
    def baseline(self) -> TableRow:
        return next(row for row in self.rows if row.kind == "twin")


def describe_kind(row: TableRow | PlanRow) -> str:
    return f"{row.kind} of {', '.join(row.of)}" if row.of else row.kind


def compare(row: TableRow, other: TableRow) -> tuple[float | None, bool]:
    """Return how many points a row is above another, averaged over the seeds that both have; None without any.

    Return also whether the seeds of one of the two differ by as much as the rows do, given several seeds of both.
    """
    found = [(one, other.top1.get(seed)) for seed, one in row.top1.items()]
    pairs = [(one, two) for one, two in found if one is not None and two is not None]
    if not pairs:
        return None, False
    by = round(sum(one - two for one, two in pairs) / len(pairs), 9) + 0.0  # no rounding noise, no -0.0
    spreads = [max(values) - min(values) for values in zip(*pairs, strict=True)]
    return by, len(pairs) > 1 and abs(by) <= max(spreads)


def verdicts(table: Table) -> list[str]:
    """Return a sentence on each preset: against the baseline, against its controls, beside its neighbours."""
    return [f"{row.name}: {'; '.join(_verdict(table, row))}" for row in table.rows if row.kind == "preset"]


def _verdict(table: Table, row: TableRow) -> list[str]:
    if row.mean is None:
        return ["no seed is trained, so nothing can be said"]
    baseline, spread = table.baseline, row.seeds or f"spread {row.spread:.2f}"
    points, _ = compare(row, baseline)
    if points is None:
        parts = [f"{row.mean:.2f} % ({spread}), and {baseline.name} has none of these seeds trained"]
    else:
        where = "equal to" if not points else f"{abs(points):.2f} points {'above' if points > 0 else 'below'}"
        verdict = "within" if points >= -table.within else "NOT within"
        its = baseline.seeds or f"spread {baseline.spread:.2f}"
        parts = [f"{where} {baseline.name}, {verdict} the {table.within:g} asked ({spread}; {baseline.name}: {its})"]
    unknown = "not compared, no seed being trained for both: "
    related: dict[str, list[str]] = {"above ": [], "NOT above ": [], "neighbours: ": [], unknown: []}
    for other in [other for other in table.rows if row.name in other.of]:
        name, (by, doubtful) = other.name.removeprefix(f"{row.name}-"), compare(row, other)
        if by is None:
            related[unknown].append(name)
            continue
        control = other.kind == "control"
        title = ("above " if by > 0 else "NOT above ") if control else "neighbours: "
        figure = f"by {abs(by):.2f}" if control else f"{0.0 - by:+.2f}"
        doubt = "less than the spread" if doubtful else ""
        related[title].append(f"{name} ({', '.join(filter(None, (figure, doubt, other.seeds)))})")
    return parts + [title + ", ".join(names) for title, names in related.items() if names]


def notes(table: Table) -> list[str]:
    """Return what else belongs below the table: the common start, failed runs, tests that could not read all videos."""
    found = [table.start] if table.start else []
    for row in table.rows:
        found += [f"failed: {row.name}, seed {seed}: {why}" for seed, why in row.failures.items()]
        found += [
            f"{row.name}, seed {seed}: top-1 of the {100 * share:.1f} % of the test videos that could be read"
            for seed, share in row.coverage.items()
            if share < 1
        ]
    return found


def records(table: Table) -> list[dict[str, Any]]:
    """Return the rows as plain data, a column per figure; None where there is none."""
    twin = table.baseline
    return [
        {
            "row": row.name,
            "kind": row.kind,
            "of": ", ".join(row.of),
            "parameters": row.parameters,
            "tokens": row.tokens,
            "gflops": row.gflops,
            "gflops_of_twin": row.gflops / twin.gflops,
            "clips_per_second": row.rate,
            "speed_of_twin": None if row.rate is None or twin.rate is None else row.rate / twin.rate,
            **{f"top1_seed{seed}": value for seed, value in row.top1.items()},
            "mean": row.mean,
            "spread": row.spread,
            "points": compare(row, twin)[0],
        }
        for row in table.rows
    ]


def markdown(table: Table) -> str:
    """Return the table for a README, verdicts and notes below it."""
    columns = [  # heading, column of ``records``, format
        ("tokens", "tokens", "{}"),
        ("GFLOPs", "gflops", "{:.3f}"),
        ("of twin", "gflops_of_twin", "{:.2f}x"),
        ("clips/s", "clips_per_second", "{:.1f}"),
        ("of twin", "speed_of_twin", "{:.2f}x"),
        *((f"seed {seed}", f"top1_seed{seed}", "{:.2f}") for seed in table.baseline.top1),
        ("mean top-1", "mean", "{:.2f}"),
        ("spread", "spread", "{:.2f}"),
        ("points", "points", "{:+.2f}"),
    ]
    lines = []
    for row, record in zip(table.rows, records(table), strict=True):
        record |= {f"top1_seed{seed}": "failed" for seed in row.failures}
        cells = (_cell(record[key], form) for _, key, form in columns)
        lines.append([row.name, describe_kind(row), *cells])
    head = ["row", "kind", *(heading for heading, _, _ in columns)]
    below = [*verdicts(table), *notes(table), *([table.machine] if table.machine else [])]
    return "\n".join([format_table(head, lines, style="pipe", left=2), "", *(f"- {line}" for line in below)]) + "\n"


def _cell(value: float | str | None, form: str) -> str:
    if isinstance(value, str):
        return value
    return "-" if value is None else form.format(value)


def write_table(table: Table, output: Path) -> None:
    """Write tradeoff.json, tradeoff.csv and tradeoff.md, each atomically."""
    rows = records(table)
    content = {
        "rows": [{**record, "failures": row.failures} for record, row in zip(rows, table.rows, strict=True)],
        "verdicts": verdicts(table),
        "notes": notes(table),
        "within": table.within,
        "machine": table.machine,
    }
    write_json(output / "tradeoff.json", content)
    write_atomically(output / "tradeoff.csv", to_csv(rows, list(rows[0])))
    write_atomically(output / "tradeoff.md", markdown(table).encode())


def plot_tradeoff(rows: Sequence[TableRow], path: Path) -> bool:
    """Draw mean top-1, and its range over the seeds, by clips per second, or by GFLOPs where not all are measured.

    Returns False, and draws nothing, where no row has a figure yet.
    """
    known = [row for row in rows if row.found]
    measured = all(row.rate is not None for row in known)
    points = [
        Point(
            row.name,
            row.rate if measured and row.rate is not None else row.gflops,
            sum(row.found) / len(row.found),
            y_range=(min(row.found), max(row.found)),
            **STYLES[row.kind],
        )
        for row in known
    ]
    if points:
        across = "clips per second" if measured else "GFLOPs per clip"
        plot_points(points, across, "top-1 (%), mean of the seeds and their range", path)
    return bool(points)
