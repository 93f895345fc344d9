"""Accuracy beside speed: from a plan to runs, speeds, a table and a plot."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from stvit_video.benchmarks.models import build_conditions, describe_speeds, figures_of, measure
from stvit_video.benchmarks.peers import TimedModel
from stvit_video.common.errors import UsageError
from stvit_video.common.files import write_json
from stvit_video.config.schema import value_of
from stvit_video.models.zoo import build_model
from stvit_video.runs.environment import environment
from stvit_video.runs.preflight import open_lists
from stvit_video.runtime.world import World
from stvit_video.sweeps.plan import ASSUMED_CLASSES, COMMON_KEYS, Plan, Row, RowCost, count_classes, measure_row
from stvit_video.sweeps.runs import (
    ORPHANS_S,
    Lock,
    Run,
    build_runs,
    build_start,
    read_results,
    start_to_train,
    train_all,
)
from stvit_video.sweeps.table import Line, Table, markdown, plot_tradeoff, read_failures, write_table


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for: rows to train by ``patterns``; to ``measure`` never, what is missing, always."""

    patterns: tuple[str, ...]
    jobs: int
    within: float
    rounds: int
    largest_batch: int
    measure: str


def choose_rows(plan: Plan, patterns: Sequence[str]) -> list[Row]:
    """Return the rows that match any shell pattern. Raises UsageError for a pattern that matches none."""
    for pattern in patterns:
        if not any(fnmatchcase(row.name, pattern) for row in plan.rows):
            names = ", ".join(row.name for row in plan.rows)
            raise UsageError(
                f"--rows {pattern} matches no row of {plan.path}; those are {names}. Give one, or '*'; KEY VALUE words "
                f"stand before --rows."
            )
    return [row for row in plan.rows if any(fnmatchcase(row.name, pattern) for pattern in patterns)]


def count_costs(plan: Plan) -> dict[str, RowCost]:
    """Return what each row costs. Raises UsageError where a model cannot be built."""
    return {row.name: measure_row(row, count_classes(row.cfg) or ASSUMED_CLASSES) for row in plan.trained}


def list_rows(plan: Plan, output: Path, patterns: Sequence[str]) -> None:
    """Print the rows that match, what they cost, and how many of their runs are done; nothing is written."""
    chosen = choose_rows(plan, patterns)
    start, runs, costs = build_start(plan, output), build_runs(plan, output), count_costs(plan)
    table = [("row", "kind", "tokens", "GFLOPs", "of twin", "parameters", "runs done")]
    for row in chosen:
        cost, own = costs[row.name], [run for run in runs if run.row is row]
        share = cost.gflops / costs[plan.twin.name].gflops
        kind = f"{row.kind} of {', '.join(row.of)}" if row.of else row.kind
        done = f"{sum(run.is_finished() for run in own)} of {len(own)}"
        table.append((row.name, kind, str(cost.tokens), f"{cost.gflops:.3f}", f"{share:.2f}x",
                      f"{cost.parameters / 1e6:.2f} M", done))  # fmt: skip
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        words = [*map(str.ljust, line[:2], widths[:2]), *map(str.rjust, line[2:], widths[2:])]
        print("  ".join(words))
    if any(count_classes(row.cfg) is None for row in chosen):
        print(f"no data there yet: GFLOPs and parameters with {ASSUMED_CLASSES} classes")
    unfinished = [run for run in runs if run.row in chosen and not run.is_finished()]
    first = start_to_train(start, unfinished, runs)
    if start is not None:
        print(f"all start from {start.name}{', which is trained first' if first else ''}")
    print(f"{len(unfinished) + (first is not None)} runs left, in {output}", flush=True)


def make_table(plan: Plan, output: Path, wanted: Wanted) -> int:
    """Train, measure, and write table and plot after each run; return 1 where a run failed, else 0.

    Raises UsageError, before anything is trained, where a row could not be; Stopped after a signal.
    """
    chosen = choose_rows(plan, wanted.patterns)
    runs = build_runs(plan, output)  # what is wrong is found before data are generated
    known = all(count_classes(row.cfg) is not None for row in plan.rows)
    costs = count_costs(plan)
    output.mkdir(parents=True, exist_ok=True)
    only_draw = not chosen and wanted.measure == "never"
    with Lock(output, patience=0 if only_draw else ORPHANS_S) as lock:
        runs = build_runs(plan, output)  # again: another command may have had the folder until now
        to_train = [run for run in runs if run.row in chosen]
        first = start_to_train(build_start(plan, output), to_train, runs)
        if first is not None:
            to_train.insert(0, first)
        if chosen:
            prepare_data(to_train)
            if not known:
                costs = count_costs(plan)  # of the classes that are known now
        failures = _earlier_failures(output, runs)
        for run in to_train:
            failures.pop((run.row.name, run.seed), None)

        def finished(run: Run, failure: str | None) -> None:
            if failure is not None:
                failures[run.row.name, run.seed] = failure
            draw(plan, output, costs, runs, failures, wanted.within)

        draw(plan, output, costs, runs, failures, wanted.within)
        if to_train:
            train_all(to_train, wanted.jobs, lock, finished)
        if wanted.measure == "always" or (wanted.measure == "missing" and read_speeds(plan, output) is None):
            measure_speeds(plan, output, wanted)
        print(draw(plan, output, costs, runs, failures, wanted.within), flush=True)
    print(f"table and plot in {output}: tradeoff.md, tradeoff.csv, tradeoff.json, tradeoff.png", flush=True)
    return 1 if any((run.row.name, run.seed) in failures for run in to_train) else 0


def prepare_data(runs: Sequence[Run]) -> None:
    """Generate the data here, so that no two runs generate the same files. Raises UsageError for files that lack."""
    for row in dict.fromkeys(run.row for run in runs):
        begun = all(run.folder.has_progress() for run in runs if run.row is row)
        open_lists(row.cfg, World(0, 1, torch.device("cpu")), needs_weights=not begun)


def _earlier_failures(output: Path, runs: Sequence[Run]) -> dict[tuple[str, int], str]:
    return read_failures(output, [(run.row.name, run.seed) for run in runs if not run.is_finished()])


def draw(
    plan: Plan,
    output: Path,
    costs: dict[str, RowCost],
    runs: Sequence[Run],
    failures: dict[tuple[str, int], str],
    within: float,
) -> str:
    """Write table and plot of what is finished; return the table as text."""
    speeds = read_speeds(plan, output)
    results = {(run.row.name, run.seed): read_results(run) for run in runs if run.is_finished()}
    lines = []
    for row in plan.rows:
        found = {seed: results.get((row.name, seed)) for seed in plan.seeds}
        # What a run itself counted, where there is one: its data, and so its classes, may be gone.
        cost = next(filter(None, found.values()), asdict(costs[row.name]))
        lines.append(
            Line(
                name=row.name,
                kind=row.kind,
                of=row.of,
                parameters=cost["parameters"],
                tokens=costs[row.name].tokens,
                gflops=cost["gflops"],
                top1={seed: result["top1"] if result else None for seed, result in found.items()},
                rate=speeds["clips_per_second"][row.name] if speeds else None,
                coverage={seed: result["coverage"] for seed, result in found.items() if result},
                failures={seed: failures[row.name, seed] for seed in plan.seeds if (row.name, seed) in failures},
            )
        )
    table = Table(tuple(lines), within, speeds["machine"] if speeds else "", describe_start(plan, output, failures))
    write_table(table, output)
    plot_tradeoff(table, output / "tradeoff.png")
    return markdown(table)


def describe_start(plan: Plan, output: Path, failures: dict[tuple[str, int], str]) -> str:
    """Return what the rows started from, or why they cannot; "" where each starts by itself, or it is to come."""
    run = build_start(plan, output)
    if run is None:
        return ""
    if failure := failures.get((run.row.name, run.seed)):
        return f"failed: {run.name}, from which all rows start: {failure}"
    if not run.is_finished():
        return ""
    same_test = all(value_of(run.row.cfg, key) == value_of(plan.twin.cfg, key) for key in COMMON_KEYS)
    reached = f" ({read_results(run)['top1']:.2f} % top-1)" if same_test else ""
    return f"every row starts from the weights of {run.name}, a {run.row.cfg.MODEL.NAME}{reached}"


def _settings(row: Row) -> dict[str, Any]:
    """Return what the speed of a row depends on."""
    conditions = {name: row.cfg[name] for name in ("DEVICE", "PRECISION", "COMPILE")}
    size = {"frames": row.cfg.DATA.FRAMES, "size": row.cfg.DATA.SIZE}
    return {"model": json.loads(json.dumps(row.cfg.MODEL)), **size, **conditions}


def read_speeds(plan: Plan, output: Path) -> dict[str, Any] | None:
    """Return speed.json; None where it is not there, or not of these rows as they now are."""
    path = output / "speed.json"
    if not path.is_file():
        return None
    try:
        speeds = json.loads(path.read_text())
        known = all(speeds["settings"].get(row.name) == _settings(row) for row in plan.rows)
        return speeds if known and isinstance(speeds["clips_per_second"], dict) and speeds["machine"] else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is not what this command wrote ({type(error).__name__}); delete it.") from error


def measure_speeds(plan: Plan, output: Path, wanted: Wanted) -> None:
    """Measure all rows in turn in the same rounds, the twin first, under its conditions, and write speed.json."""
    rows = sorted(plan.rows, key=lambda row: row.kind != "twin")
    contestants = []
    for row in rows:
        size = (row.cfg.DATA.FRAMES, row.cfg.DATA.SIZE, row.cfg.DATA.SIZE)
        model = build_model(row.cfg, count_classes(row.cfg) or ASSUMED_CLASSES)
        contestants.append(TimedModel(row.name, model, size))
    conditions = build_conditions(plan.twin.cfg, False, wanted.largest_batch)
    speeds, product = measure(contestants, conditions, wanted.rounds, say=lambda line: print(line, flush=True))
    print(describe_speeds(speeds, product, conditions), flush=True)
    machine = environment()
    where = ", ".join(machine["gpus"][:1]) if conditions.device.type == "cuda" else f"{machine['cpus']} CPU cores"
    content = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "machine": f"speeds: {where}, {conditions}, torch "
        f"{machine['packages']['torch']}, median of {wanted.rounds} interleaved rounds at the best batch of each",
        "settings": {row.name: _settings(row) for row in plan.rows},
        "clips_per_second": {speed.name: speed.rate for speed in speeds},
        **figures_of(speeds, product, conditions),
        "environment": machine,
    }
    write_json(output / "speed.json", content)
