"""The runs of a plan: which there are, which are left, and what their rows cost. Nothing is trained or written here."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from fvcore.common.config import CfgNode
from torch import nn

from stvit_video.common.errors import UsageError
from stvit_video.common.tables import format_table, three_digits
from stvit_video.config.load import override
from stvit_video.config.schema import flatten
from stvit_video.models.cost import measure_cost
from stvit_video.models.zoo import build_model
from stvit_video.runs.folder import RunFolder, build_run_folder, describe_changes
from stvit_video.runs.lists import KINETICS_CLASSES, build_class_count
from stvit_video.sweeps.plan import Plan, SweepRow

LIST_FREE_KEYS = ("FRAMES", "STRIDE", "SIZE", "SHORT_SIDE")  # of DATA: they do not change which videos there are


@dataclass(eq=False)  # hashed by identity: a configuration has no hash
class SweepRun:
    """One row trained with one seed."""

    row: SweepRow
    seed: int
    name: str
    cfg: CfgNode
    folder: RunFolder
    log: Path


def choose_rows(plan: Plan, patterns: Sequence[str]) -> list[SweepRow]:
    """Return the rows that match any shell pattern. Raises UsageError for a pattern that matches none."""
    for pattern in patterns:
        if not any(fnmatchcase(row.name, pattern) for row in plan.rows):
            names = ", ".join(row.name for row in plan.rows)
            raise UsageError(f"--rows {pattern} matches no row: {names}. Give one, and KEY VALUE words before --rows.")
    return [row for row in plan.rows if any(fnmatchcase(row.name, pattern) for pattern in patterns)]


def build_row_model(row: SweepRow) -> nn.Module:
    """Return a row's model. Raises UsageError where it cannot be built."""
    try:
        return build_model(row.cfg, row.classes or KINETICS_CLASSES)
    except UsageError as error:
        raise UsageError(f"Row {row.name}: {error}") from error


def build_costs(rows: Iterable[SweepRow]) -> None:
    """Note in rows how many classes their data have, and what their models cost; rows of equal lists read them once."""
    known: dict[str, int | None] = {}
    for row in rows:
        data = {key: value for key, value in row.cfg.DATA.items() if key not in LIST_FREE_KEYS}
        lists = repr((data, row.cfg.DATA.FRAMES > 1, row.cfg.MODEL.NUM_CLASSES))
        if lists not in known:
            known[lists] = build_class_count(row.cfg)
        row.classes = known[lists]
        model = build_row_model(row)
        cost = measure_cost(model, (row.cfg.DATA.FRAMES, row.cfg.DATA.SIZE, row.cfg.DATA.SIZE))
        image_tokens, reduced = model.token_counts()  # type: ignore[operator]
        row.parameters, row.gflops, row.tokens = cost.parameters, cost.gflops, reduced or image_tokens


def build_runs(plan: Plan, output: Path) -> list[SweepRun]:
    """Return the start's run, if any, then those of the rows, seed by seed; UsageError where a folder holds another."""
    init: dict[str, str] = {}
    seeds = list(plan.twin.accuracy)
    runs = []
    starts = [(plan.start, seeds[0])] if plan.start else []
    for row, seed in [*starts, *((row, seed) for seed in seeds for row in plan.rows)]:
        path = output / row.name / f"seed{seed}"
        cfg = override(row.cfg, {**init, "OUTPUT_DIR": str(path), "SEED": seed}.items(), "a plan")
        run = SweepRun(row, seed, f"{row.name}, seed {seed}", cfg, build_run_folder(cfg), path.with_suffix(".txt"))
        if run.folder.has_progress():
            check_recorded(run)
        if row is plan.start:
            init = {"MODEL.INIT": os.path.abspath(run.folder.weights)}
        runs.append(run)
    return runs


def check_recorded(run: SweepRun) -> None:
    """Raise UsageError where the folder holds a run of other settings. Its start may have moved with it."""
    recorded = run.folder.recorded_config()
    settings = run.folder.settings
    place = f"{run.folder.path} holds a run"
    if recorded is None:
        remedy = "delete that folder, or give another --output"
        raise UsageError(f"Row {run.row.name}: {place} without a config.yaml that can be read; {remedy}.")
    before, now = (flatten(config).get("MODEL.INIT") or "." for config in (recorded, settings))
    place_before = os.path.relpath(str(before), str(recorded["OUTPUT_DIR"]))
    if isinstance(recorded["MODEL"], dict) and place_before == os.path.relpath(now, settings["OUTPUT_DIR"]):
        recorded["MODEL"]["INIT"] = settings["MODEL"]["INIT"]
    if changed := describe_changes(recorded, settings):
        remedy = "Delete that folder, give another --output, or put the plan back."
        raise UsageError(f"Row {run.row.name}: {place} with other settings than the plan's: {changed}. {remedy}")


def choose_runs(runs: Sequence[SweepRun], rows: Sequence[SweepRow]) -> list[SweepRun]:
    """Return the runs of ``rows``, after the start where they wait for it; UsageError where its weights are gone."""
    start = runs[0]
    chosen = [run for run in runs if run.row in rows]
    if start.row.kind != "start" or start.folder.is_finished() or all(run.folder.has_progress() for run in chosen):
        return chosen
    if begun := [run.folder.path.parent for run in runs[1:] if run.folder.has_progress()]:
        folders = ", ".join(map(str, dict.fromkeys([start.folder.path, *begun])))
        what = "is not there, and what is trained now would not have the start of the rest"
        raise UsageError(f"{start.folder.weights} {what}; put it back, or delete {folders}.")
    return [start, *chosen]


def list_rows(plan: Plan, output: Path, patterns: Sequence[str]) -> None:
    """Print the rows that match, what they cost, and how many of their runs are done; nothing is written."""
    chosen = choose_rows(plan, patterns)
    runs = build_runs(plan, output)
    table = []
    build_costs(dict.fromkeys([*chosen, plan.twin]))
    for row in chosen:
        finished = [run.folder.is_finished() for run in runs if run.row is row]
        cost = three_digits(row.gflops, 3), f"{row.gflops / plan.twin.gflops:.2f}x", f"{row.parameters / 1e6:.2f} M"
        table.append((row.name, row.describe_kind(), row.tokens, *cost, f"{sum(finished)} of {len(finished)}"))
    print(format_table(("row", "kind", "tokens", "GFLOPs", "of twin", "parameters", "runs done"), table, left=2))
    if any(row.classes is None for row in chosen):
        print(f"no data there yet: GFLOPs and parameters with {KINETICS_CLASSES} classes")
    left = [run for run in choose_runs(runs, chosen) if not run.folder.is_finished()]
    if plan.start:
        print(f"all start from {runs[0].name}{', which is trained first' if runs[0] in left else ''}")
    print(f"{len(left)} runs left, in {output}", flush=True)
