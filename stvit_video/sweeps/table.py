"""The table of accuracy beside speed: its figures, a verdict on each preset, its files and its picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stvit_video.common.accuracy import ACCURACIES, accuracy_key
from stvit_video.common.charts import SPLIT_COLOURS, WEIGHTS_COLOURS, Point, plot_points
from stvit_video.common.files import write_atomically, write_json
from stvit_video.common.tables import format_table, three_digits, to_csv
from stvit_video.sweeps.plan import Plan, SweepRow

STYLES: dict[str, dict[str, Any]] = {  # of the picture, by kind of row
    "twin": {"kind": "full twin", "marker": "s", "size": 8, "colour": "black"},
    "preset": {"kind": "preset", "marker": "o", "size": 9, "colour": SPLIT_COLOURS["val"]},
    "control": {"kind": "control", "marker": "v", "size": 6, "colour": WEIGHTS_COLOURS["random"]},
    "neighbour": {"kind": "neighbour", "marker": "D", "size": 6, "colour": SPLIT_COLOURS["train"]},
}


def compare(row: SweepRow, other: SweepRow) -> tuple[float | None, str]:
    """Return by how many points a row is above another over the seeds that both have, None without any; and a doubt."""
    found = [(one, other.accuracy.get(seed)) for seed, one in row.accuracy.items()]
    pairs = [(one, two) for one, two in found if one is not None and two is not None]
    if not pairs:
        return None, ""
    by = round(sum(one - two for one, two in pairs) / len(pairs), 9) + 0.0  # no rounding noise, no -0.0
    spreads = [max(values) - min(values) for values in zip(*pairs, strict=True)]
    # The doubt: several seeds of one of the two differ by as much as the rows do.
    return by, "less than the spread" if len(pairs) > 1 and abs(by) <= max(spreads) else ""


def verdicts(plan: Plan, within: float) -> list[str]:
    """Return a sentence on each preset: against the baseline, against its controls, beside its neighbours."""
    twin, sentences, unknown = plan.twin, [], "not compared, no seed being trained for both: "
    for row in [row for row in plan.rows if row.kind == "preset"]:
        spread, spread_of_twin = (one.seeds or f"spread {one.spread:.2f}" for one in (row, twin))
        points, _ = compare(row, twin)
        if row.mean is None:
            sentences.append(f"{row.name}: no seed is trained, so nothing can be said")
            continue
        if points is None:
            parts = [f"{row.mean:.2f} % ({spread}), and {twin.name} has none of these seeds trained"]
        else:
            where = "equal to" if not points else f"{abs(points):.2f} points {'above' if points > 0 else 'below'}"
            reached = f"{'within' if points >= -within else 'NOT within'} the {within:g} asked"
            parts = [f"{where} {twin.name}, {reached} ({spread}; {twin.name}: {spread_of_twin})"]
        related: dict[str, list[str]] = {"above ": [], "NOT above ": [], "neighbours: ": [], unknown: []}
        for other in [other for other in plan.rows if row.name in other.of]:
            name = other.name.removeprefix(f"{row.name}-")
            by, doubt = compare(row, other)
            if by is None:
                related[unknown].append(name)
                continue
            title, figure = "neighbours: ", f"{0.0 - by:+.2f}"
            if other.kind == "control":
                title = "above " if by > 0 else "NOT above "
                figure = f"by {abs(by):.2f}"
            related[title].append(f"{name} ({', '.join(filter(None, (figure, doubt, other.seeds)))})")
        parts += [title + ", ".join(names) for title, names in related.items() if names]
        sentences.append(f"{row.name}: {'; '.join(parts)}")
    return sentences


def columns(row: SweepRow, twin: SweepRow, key: str) -> list[tuple[str, str, str, Any]]:
    """Return the key, the heading and format in the table, where it is shown there, and the value of each figure.

    ``key`` is that of the accuracy.
    """
    return [
        ("row", "", "", row.name),
        ("kind", "", "", row.kind),
        ("of", "", "", ", ".join(row.of)),
        ("parameters", "", "", row.parameters),
        ("tokens", "tokens", "{}", row.tokens),
        ("gflops", "GFLOPs", three_digits(row.gflops, 3), row.gflops),
        ("gflops_of_twin", "of twin", "{:.2f}x", row.gflops / twin.gflops),
        ("clips_per_second", "clips/s", "{:.1f}", row.rate),
        ("speed_of_twin", "of twin", "{:.2f}x", row.rate and twin.rate and row.rate / twin.rate),
        *((f"{key}_seed{seed}", f"seed {seed}", "{:.2f}", value) for seed, value in row.accuracy.items()),
        ("mean", f"mean {ACCURACIES[key]}", "{:.2f}", row.mean),
        ("spread", "spread", "{:.2f}", row.spread),
        ("points", "points", "{:+.2f}", compare(row, twin)[0]),
    ]


def write_table(plan: Plan, output: Path, within: float, notes: Sequence[str] = (), machine: str = "") -> str:
    """Write tradeoff.json, .csv, .md and .png; return the table as text, with verdicts and notes below it."""
    records: list[dict[str, Any]] = []
    lines = []
    key = accuracy_key([row.accuracy_key for row in plan.rows])
    notes = list(notes)
    for row in plan.rows:
        found = columns(row, plan.twin, key)
        records.append({key: value for key, _, _, value in found})
        cells = {key: "-" if value is None else form.format(value) for key, heading, form, value in found if heading}
        cells |= {f"{key}_seed{seed}": "failed" for seed in row.failures}
        lines.append([row.name, row.describe_kind(), *cells.values()])
        notes += [f"failed: {row.name}, seed {seed}: {why}" for seed, why in row.failures.items()]
        for seed, share in row.coverage.items():
            if share < 1:
                read = f"{ACCURACIES[key]} of the {100 * share:.1f} % of the test videos that could be read"
                notes.append(f"{row.name}, seed {seed}: {read}")
    said = verdicts(plan, within)
    head = ["row", "kind", *(heading for _, heading, _, _ in found if heading)]
    below = "".join(f"- {line}\n" for line in (*said, *notes, machine) if line)
    text = f"{format_table(head, lines, style='pipe', left=2)}\n\n{below}"
    rows = [{**record, "failures": row.failures} for record, row in zip(records, plan.rows, strict=True)]
    content = {"rows": rows, "verdicts": said, "notes": notes, "within": within, "machine": machine}
    write_json(output / "tradeoff.json", content)
    write_atomically(output / "tradeoff.csv", to_csv(records, list(records[0])))
    write_atomically(output / "tradeoff.md", text.encode())
    plot_tradeoff(plan.rows, output / "tradeoff.png", ACCURACIES[key])
    return f"{format_table(head, lines, left=2)}\n\n{below}"


def plot_tradeoff(rows: Sequence[SweepRow], path: Path, accuracy: str = "top-1") -> None:
    """Draw mean accuracy and its range over the seeds by clips per second, or by GFLOPs where not all are measured."""
    known = [row for row in rows if row.found]
    measured = all(row.rate is not None for row in known)
    points = []
    for row in known:
        x = row.rate if measured and row.rate else row.gflops
        mean = row.mean or 0.0  # there is one, of every row that is known
        points.append(Point(row.name, x, mean, y_range=(min(row.found), max(row.found)), **STYLES[row.kind]))
    if points:
        across = "clips per second" if measured else "GFLOPs per clip"
        best = max(points, key=lambda point: point.y)
        title = f"{path.resolve().parent.name}: best is {best.name}, {accuracy} {best.y:.1f} % at {best.x:.3g} {across}"
        plot_points(points, across, f"{accuracy} (%), mean of the seeds and their range", path, title)
