"""A sweep: the runs of a plan as jobs, a given number at a time, and after each a table and a picture.

A run lives in OUTPUT/ROW/seedN; OUTPUT/ROW/seedN.txt beside it is a link to the log of its newest job.
"""

import json
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from submitit.helpers import environment_variables

from stvit_video.benchmarks.models import TimedModel, build_speeds
from stvit_video.benchmarks.rounds import describe_conditions
from stvit_video.common.accuracy import ACCURACIES, accuracy_key
from stvit_video.common.errors import Stopped, UsageError
from stvit_video.common.files import prepare_folder, write_json
from stvit_video.common.locks import Lock
from stvit_video.config.schema import flatten
from stvit_video.runs.folder import environment
from stvit_video.runs.lists import open_lists
from stvit_video.runtime.stopping import StopSignals
from stvit_video.runtime.world import World
from stvit_video.slurm.jobs import ENDED, ClusterJob, Follower, last_lines, read_job
from stvit_video.slurm.request import JobRequest, open_job_folders, submit
from stvit_video.sweeps.plan import COMMON_KEYS, Plan, SweepRow
from stvit_video.sweeps.rows import (
    SweepRun,
    build_costs,
    build_row_model,
    build_runs,
    check_recorded,
    choose_rows,
    choose_runs,
)
from stvit_video.sweeps.table import write_table

LOCK_S = 10.0  # a command that was killed just now may need a moment to end
POLL_S = {"local": 0.5, "slurm": 5.0}


def build_timed(row: SweepRow) -> TimedModel:
    """Return a row's model, to be timed. Raises UsageError where it cannot be built."""
    return TimedModel(row.name, build_row_model(row), (row.cfg.DATA.FRAMES, row.cfg.DATA.SIZE, row.cfg.DATA.SIZE))


def build_sweep(plan: Plan, output: Path, options: Namespace) -> int:
    """Train, measure, and write table and picture after each run, as the ``options`` of the command say.

    Return 1 where a run failed, else 0. Raises UsageError before anything is trained; Stopped after a signal.
    """
    chosen = [] if options.no_train else choose_rows(plan, options.rows)
    prepare_folder(output)
    lock = Lock(output / ".tradeoff.lock")
    if not lock.take(LOCK_S, lambda holder: f"waiting for {holder} to end, a tradeoff command that uses {output}"):
        raise UsageError(
            f"--output {output} is in use by another tradeoff command, {lock.holder()}; wait for it or end it, or give "
            f"another folder."
        )
    with closing(lock):
        runs = build_runs(plan, output)
        to_train = choose_runs(runs, chosen)
        rows = dict.fromkeys(run.row for run in runs)
        build_costs(rows)
        for row in dict.fromkeys(run.row for run in to_train):  # once, before several runs would generate the same data
            begun = all(run.folder.has_progress() for run in to_train if run.row is row)
            open_lists(row.cfg, World(0, 1, torch.device("cpu")), needs_weights=not begun)
        build_costs([row for row in rows if to_train and row.classes is None])  # now that the classes are known
        with reading(output / "tradeoff.json") as table:
            failed = {row["row"]: row["failures"] for row in table.get("rows", [])}
            for run in [run for run in runs if run not in to_train and not run.folder.is_finished()]:
                if why := failed.get(run.row.name, {}).get(str(run.seed)):
                    run.row.failures[run.seed] = why
        draw = partial(build_table, plan, runs, output, options.within)
        draw()
        if to_train:
            train_all(to_train, options, draw)
        if options.measure or (options.rounds and not options.no_train and not build_known_speeds(plan, output)):
            build_speed_file(plan, output, options)
        print(draw(), flush=True)
    print(f"table and plot in {output}: tradeoff.md, tradeoff.csv, tradeoff.json, tradeoff.png", flush=True)
    return 1 if any(run.seed in run.row.failures for run in to_train) else 0


@contextmanager
def reading(path: Path) -> Iterator[Any]:
    """Give the content of a JSON file, {} without one. Raises UsageError where what is done with it fails."""
    try:
        yield json.loads(path.read_text()) if path.is_file() else {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is not what this command wrote ({type(error).__name__}); delete it.") from error


def build_job(run: SweepRun, options: Namespace) -> ClusterJob:
    """Submit a run as a job, and link its log. On this machine, runs at the same time share the cores."""
    gpus = options.gpus_per_node
    profile = options.profile
    logs = run.log.parents[1].absolute() / ".jobs"
    if gpus is None:
        gpus = int(run.cfg.DEVICE != "cpu" and (options.cluster == "slurm" or torch.cuda.is_available()))
    cpus = profile.cpus_per_task or run.cfg.DATA.WORKERS + 1
    request = JobRequest(profile, 1, gpus, max(1, gpus), cpus, "stvit-tradeoff")
    folders = open_job_folders([run.cfg], request, options.cluster, logs)
    threads = max(1, len(os.sched_getaffinity(0)) // (1 if run.row.kind == "start" else options.jobs))
    with environment_variables(**({"OMP_NUM_THREADS": threads} if options.cluster == "local" else {})):
        job = submit(folders, request, options.cluster, logs)[0]
    run.log.unlink(missing_ok=True)
    run.log.symlink_to(os.path.relpath(job.log(), run.log.parent))
    return job


def describe_failure(job: ClusterJob) -> str:
    """Return in one line why a job ended without results: from its records, or else from its log."""
    if failure := job.first_failure():
        if failure["problem"]:
            return str(failure["problem"])
        if failure["code"] - 128 in signal.valid_signals():
            return f"ended by {signal.Signals(failure['code'] - 128).name}"
        lines = [line.strip() for line in last_lines(job.log(), sys.maxsize) if line.strip()]
        return ([line for line in lines if line.startswith("error: ")] or lines or ["it printed nothing"])[-1]
    if job.events("stopped"):
        return "stopped by a signal; the same command continues"
    return f"its job {job.id} ended as {job.state()[0]}"


def train_all(runs: Sequence[SweepRun], options: Namespace, draw: Callable[[], object]) -> None:
    """Train the runs that are not finished; after each, note in its row why it failed, if it did, and ``draw``.

    Jobs that a killed command left active are followed. A start runs alone, with all cores; where it fails, nothing
    follows. After a signal the jobs are cancelled, which has them write checkpoints, and Stopped is raised.
    """
    waiting = [run for run in runs if not run.folder.is_finished()]
    total = len(runs)
    done = len(runs) - len(waiting)
    ended = 0
    begun = time.monotonic()
    print(f"{done} of {total} runs are finished", flush=True)
    active: dict[SweepRun, Follower] = {}
    started = dict.fromkeys(waiting, begun)
    for run in list(waiting):
        job = read_job(run.folder.path.absolute())
        if job is not None and job.state()[0] not in ENDED:
            check_recorded(run)
            active[run] = Follower(job, silent=True)
            waiting.remove(run)
            print(f"{run.name}: is still running, output in {run.log}", flush=True)
    with StopSignals(launched=False) as signals:
        try:
            while (waiting or active) and signals.received is None:
                while waiting and len(active) < options.jobs and not any(run.row.kind == "start" for run in active):
                    run = waiting.pop(0)
                    print(f"{run.name}: starts, output in {run.log}", flush=True)
                    active[run] = Follower(build_job(run, options), silent=True)
                    started[run] = time.monotonic()
                for follower in active.values():
                    follower.update()
                for run in [run for run, follower in active.items() if follower.ended]:
                    job = active.pop(run).job
                    outcome = ""
                    if not run.folder.is_finished():
                        run.row.failures[run.seed] = describe_failure(job)
                        outcome = f"failed: {run.row.failures[run.seed]}; log {run.log}"
                        waiting = [] if run.row.kind == "start" else waiting
                    ended += 1
                    done += not outcome
                    left = len(waiting) + len(active)
                    minutes = (time.monotonic() - begun) / ended * left / 60  # jobs at the same time are counted in
                    draw()
                    key = run.row.accuracy_key
                    outcome = outcome or f"{run.row.accuracy[run.seed]:.2f} % {ACCURACIES[key]}"
                    taken = f"{(time.monotonic() - started[run]) / 60:.1f} minutes"
                    print(f"{run.name}: {outcome}, {taken}; {left} left, about {minutes:.0f} minutes", flush=True)
                time.sleep(POLL_S[options.cluster] if active else 0)
        finally:
            for follower in active.values():
                try:
                    follower.job.cancel()
                except UsageError as error:  # the job may have ended meanwhile
                    print(f"warning: {error}", file=sys.stderr, flush=True)
            while any(not follower.ended for follower in active.values()):
                time.sleep(POLL_S[options.cluster])
                for follower in active.values():
                    follower.update()
        if signals.received is not None:
            raise Stopped(signals.received, f"{done} of {total} runs")


def build_table(plan: Plan, runs: Sequence[SweepRun], output: Path, within: float) -> str:
    """Write table and picture of what is finished; return the table as text."""
    tested: dict[str, str] = {}  # one run of each test list that there was; the start may have another
    for run in [run for run in runs if run.folder.is_finished()]:
        with reading(run.folder.results) as results:
            if run.row is not plan.start and "test_list_sha256" in results:
                tested.setdefault(results["test_list_sha256"], run.name)
            row = run.row  # a run's own count: its data, and so its classes, may be gone
            row.parameters = int(results["parameters"])
            row.gflops = float(results["gflops"])
            row.accuracy_key = accuracy_key(results)
            row.accuracy[run.seed] = float(results[row.accuracy_key])
            row.coverage[run.seed] = float(results["coverage"])
    notes, start = [], runs[0]
    if plan.start and plan.start.failures:
        notes = [f"failed: {start.name}, from which all rows start: {start.row.failures[start.seed]}"]
    elif plan.start and plan.start.mean is not None:
        now, others = flatten(start.cfg), flatten(plan.twin.cfg)
        reached = start.cfg.MODEL.NAME
        if all(now[key] == others[key] for key in COMMON_KEYS):  # else its accuracy is of another test
            reached += f" ({plan.start.mean:.2f} % {ACCURACIES[plan.start.accuracy_key]})"
        notes = [f"every row starts from the weights of {start.name}, a {reached}"]
    if len(tested) > 1:
        notes.append(f"not to be compared: the test list has changed between the runs {' and '.join(tested.values())}")
    return write_table(plan, output, within, notes, build_known_speeds(plan, output))


def _build_settings(plan: Plan) -> dict[str, Any]:
    """Return what the speed of each row depends on."""
    conditions = {key: plan.twin.cfg[key] for key in ("DEVICE", "PRECISION", "COMPILE")}  # the same for all
    return {
        row.name: {"model": row.cfg.MODEL, "frames": row.cfg.DATA.FRAMES, "size": row.cfg.DATA.SIZE, **conditions}
        for row in plan.rows
    }


def build_known_speeds(plan: Plan, output: Path) -> str:
    """Take the rows' speeds from speed.json, and return the conditions; "" where some were not measured as now."""
    with reading(output / "speed.json") as speeds:
        if not _build_settings(plan).items() <= speeds.get("settings", {}).items():
            return ""
        for row in plan.rows:
            row.rate = float(speeds["clips_per_second"][row.name])
        return str(speeds["machine"])


def build_speed_file(plan: Plan, output: Path, options: Namespace) -> None:
    """Measure all rows in interleaved rounds, the baseline first and under its conditions, and write speed.json."""
    models = [build_timed(row) for row in sorted(plan.rows, key=lambda row: row.kind != "twin")]
    how: dict[str, Any] = {"training": False, "rounds": options.rounds, "largest_batch": options.largest_batch}
    figures = build_speeds(plan.twin.cfg, models, **how)
    machine = environment()
    where = ", ".join(machine["gpus"][:1]) if figures["device"] == "cuda" else f"{machine['cpus']} CPU cores"
    conditions = f"{describe_conditions(figures)}, torch {machine['packages']['torch']}"
    rounds = f"median of {options.rounds} interleaved rounds at the best batch of each"
    content = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "machine": f"speeds: {where}, {conditions}, {rounds}",
        "settings": _build_settings(plan),
        "clips_per_second": {row["name"]: row["clips_per_second"] for row in figures["models"]},
        **figures,
        "environment": machine,
    }
    write_json(output / "speed.json", content)
