"""A sweep: from a plan to runs, speeds, a table and a picture of accuracy beside speed."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import torch

from stvit_video.benchmarks.models import build_conditions, describe_speeds, figures_of, measure
from stvit_video.benchmarks.peers import CLASSES, TimedModel
from stvit_video.common.errors import UsageError
from stvit_video.common.files import write_json
from stvit_video.common.tables import format_table
from stvit_video.config.schema import value_of
from stvit_video.models.zoo import build_model
from stvit_video.runs.folder import environment
from stvit_video.runs.preflight import open_lists
from stvit_video.runtime.world import World
from stvit_video.sweeps.plan import COMMON_KEYS, Plan, PlanRow, RowCost, build_class_count, build_row_cost
from stvit_video.sweeps.runs import (
    LOCK_S,
    JobRunner,
    SweepRun,
    build_runs,
    lock_output,
    read_results,
    start_to_train,
    train_all,
)
from stvit_video.sweeps.table import Table, TableRow, describe_kind, markdown, plot_tradeoff, write_table

T = TypeVar("T")


@dataclass(frozen=True)
class SweepOptions:
    """What the command line asks for."""

    patterns: tuple[str, ...]  # of the rows to train
    within: float = 0.5  # points below the baseline
    rounds: int = 5  # of measuring speed
    largest_batch: int = 64  # to measure with
    measure: str = "missing"  # or never, always


@dataclass
class Sweep:
    """A plan's runs in one output folder, and what is known of them."""

    plan: Plan
    output: Path
    within: float
    start: SweepRun | None
    runs: list[SweepRun]
    costs: dict[str, RowCost]
    failures: dict[tuple[str, int], str] = field(default_factory=dict)  # why a run failed, by row and seed

    def draw(self) -> str:
        """Write table and picture of what is finished; return the table as text."""
        speeds = build_known_speeds(self.plan, self.output)
        results = {run.key: read_results(run) for run in self.runs if run.folder.is_finished()}
        rows = []
        for row in self.plan.rows:
            found = {seed: results[row.name, seed] for seed in self.plan.seeds if (row.name, seed) in results}
            # A run's own count where there is one: its data, and so its classes, may be gone.
            cost = next(iter(found.values()), asdict(self.costs[row.name]))
            rows.append(
                TableRow(
                    name=row.name,
                    kind=row.kind,
                    of=row.of,
                    parameters=cost["parameters"],
                    tokens=self.costs[row.name].tokens,
                    gflops=cost["gflops"],
                    top1={seed: found[seed]["top1"] if seed in found else None for seed in self.plan.seeds},
                    rate=speeds["clips_per_second"][row.name] if speeds else None,
                    coverage={seed: result["coverage"] for seed, result in found.items()},
                    failures={seed: why for (name, seed), why in self.failures.items() if name == row.name},
                )
            )
        start = build_start_note(self.plan, self.start, self.failures)
        table = Table(tuple(rows), self.within, speeds["machine"] if speeds else "", start)
        write_table(table, self.output)
        plot_tradeoff(rows, self.output / "tradeoff.png")
        return markdown(table)


def choose_rows(plan: Plan, patterns: Sequence[str]) -> list[PlanRow]:
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
    return {row.name: build_row_cost(row) for row in (*plan.rows, *([plan.start] if plan.start else []))}


def list_rows(plan: Plan, output: Path, patterns: Sequence[str]) -> None:
    """Print the rows that match, what they cost, and how many of their runs are done; nothing is written."""
    chosen = choose_rows(plan, patterns)
    (start, runs), costs = build_runs(plan, output), count_costs(plan)
    table = []
    for row in chosen:
        cost, own = costs[row.name], [run for run in runs if run.row is row]
        share = f"{cost.gflops / costs[plan.baseline.name].gflops:.2f}x"
        done = f"{sum(run.folder.is_finished() for run in own)} of {len(own)}"
        size = f"{cost.parameters / 1e6:.2f} M"
        table.append((row.name, describe_kind(row), str(cost.tokens), f"{cost.gflops:.3f}", share, size, done))
    print(format_table(("row", "kind", "tokens", "GFLOPs", "of twin", "parameters", "runs done"), table, left=2))
    if any(build_class_count(row) is None for row in chosen):
        print(f"no data there yet: GFLOPs and parameters with {CLASSES} classes")
    unfinished = [run for run in runs if run.row in chosen and not run.folder.is_finished()]
    first = start_to_train(start, unfinished, runs)
    if start is not None:
        print(f"all start from {start.name}{', which is trained first' if first else ''}")
    print(f"{len(unfinished) + (first is not None)} runs left, in {output}", flush=True)


def run_sweep(plan: Plan, output: Path, options: SweepOptions, runner: JobRunner) -> int:
    """Train, measure, and write table and picture after each run; return 1 where a run failed, else 0.

    Raises UsageError, before anything is trained, where a row could not be; Stopped after a signal.
    """
    chosen = choose_rows(plan, options.patterns)
    build_runs(plan, output)  # refuses folders of other settings before data are generated
    costs, known = count_costs(plan), all(build_class_count(row) is not None for row in plan.rows)
    output.mkdir(parents=True, exist_ok=True)
    only_draw = not chosen and options.measure == "never"
    with lock_output(output, patience=0 if only_draw else LOCK_S):
        start, runs = build_runs(plan, output)  # again: another command may have had the folder until now
        sweep = Sweep(plan, output, options.within, start, runs, costs)
        to_train = [run for run in runs if run.row in chosen]
        first = start_to_train(start, to_train, runs)
        to_train = [first, *to_train] if first else to_train
        build_data(to_train)
        if chosen and not known:
            sweep.costs = count_costs(plan)  # now that the classes are known
        again = {run.key for run in to_train}
        unfinished = {run.key for run in runs if not run.folder.is_finished()}
        sweep.failures = {
            key: why for key, why in read_failures(output).items() if key in unfinished and key not in again
        }

        def finished(run: SweepRun, failure: str | None) -> None:
            if failure is not None:
                sweep.failures[run.key] = failure
            sweep.draw()

        sweep.draw()
        if to_train:
            train_all(to_train, runner, finished)
        missing = options.measure == "missing" and build_known_speeds(plan, output) is None
        if missing or options.measure == "always":
            build_speeds(plan, output, options)
        print(sweep.draw(), flush=True)
    print(f"table and plot in {output}: tradeoff.md, tradeoff.csv, tradeoff.json, tradeoff.png", flush=True)
    return 1 if again & sweep.failures.keys() else 0


def build_data(runs: Sequence[SweepRun]) -> None:
    """Generate the data before several runs would generate the same. Raises UsageError for missing files."""
    for row in dict.fromkeys(run.row for run in runs):
        begun = all(run.folder.has_progress() for run in runs if run.row is row)
        open_lists(row.cfg, World(0, 1, torch.device("cpu")), needs_weights=not begun)


def build_start_note(plan: Plan, start: SweepRun | None, failures: dict[tuple[str, int], str]) -> str:
    """Return what the rows started from, or why they cannot; empty without a start, or before it is trained."""
    if start is None:
        return ""
    if failure := failures.get(start.key):
        return f"failed: {start.name}, from which all rows start: {failure}"
    if not start.folder.is_finished():
        return ""
    same_test = all(value_of(start.cfg, key) == value_of(plan.baseline.cfg, key) for key in COMMON_KEYS)
    reached = f" ({read_results(start)['top1']:.2f} % top-1)" if same_test else ""
    return f"every row starts from the weights of {start.name}, a {start.cfg.MODEL.NAME}{reached}"


def read_failures(output: Path) -> dict[tuple[str, int], str]:
    """Return why runs failed when they were last tried, by row and seed, from the table of the last time."""

    def use(table: Any) -> dict[tuple[str, int], str]:
        return {(row["row"], int(seed)): str(why) for row in table["rows"] for seed, why in row["failures"].items()}

    return _read_own(output / "tradeoff.json", use, {})


def _read_own(path: Path, use: Callable[[Any], T], default: T) -> T:
    """Return what ``use`` makes of a JSON file, ``default`` without a file. Raises UsageError for another's file."""
    if not path.is_file():
        return default
    try:
        return use(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is not what this command wrote ({type(error).__name__}); delete it.") from error


def _build_settings(row: PlanRow) -> dict[str, Any]:
    """Return what the speed of a row depends on."""
    conditions = {name: row.cfg[name] for name in ("DEVICE", "PRECISION", "COMPILE")}
    size = {"frames": row.cfg.DATA.FRAMES, "size": row.cfg.DATA.SIZE}
    return {"model": json.loads(json.dumps(row.cfg.MODEL)), **size, **conditions}


def build_known_speeds(plan: Plan, output: Path) -> dict[str, Any] | None:
    """Return speed.json; None where it is missing, or not of these rows as they are now."""

    def use(speeds: Any) -> dict[str, Any] | None:
        known = all(speeds["settings"].get(row.name) == _build_settings(row) for row in plan.rows)
        return speeds if known and isinstance(speeds["clips_per_second"], dict) and speeds["machine"] else None

    return _read_own(output / "speed.json", use, None)


def build_speeds(plan: Plan, output: Path, options: SweepOptions) -> None:
    """Measure all rows in interleaved rounds, the baseline first and under its conditions, and write speed.json."""
    models = []
    for row in sorted(plan.rows, key=lambda row: row.kind != "twin"):
        size = (row.cfg.DATA.FRAMES, row.cfg.DATA.SIZE, row.cfg.DATA.SIZE)
        models.append(TimedModel(row.name, build_model(row.cfg, build_class_count(row) or CLASSES), size))
    conditions = build_conditions(plan.baseline.cfg, False, options.largest_batch)
    speeds, product = measure(models, conditions, options.rounds)
    print(describe_speeds(speeds, product, conditions), flush=True)
    machine = environment()
    where = ", ".join(machine["gpus"][:1]) if conditions.device.type == "cuda" else f"{machine['cpus']} CPU cores"
    content = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "machine": f"speeds: {where}, {conditions}, torch {machine['packages']['torch']}, median of {options.rounds} "
        f"interleaved rounds at the best batch of each",
        "settings": {row.name: _build_settings(row) for row in plan.rows},
        "clips_per_second": {speed.name: speed.rate for speed in speeds},
        **figures_of(speeds, product, conditions),
        "environment": machine,
    }
    write_json(output / "speed.json", content)
