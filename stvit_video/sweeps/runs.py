"""The training runs of a plan: submitted as jobs, a given number at a time, and followed until they end.

A run lives in OUTPUT/ROW/seedN; OUTPUT/ROW/seedN.txt beside it is a link to the log of its newest job.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fvcore.common.config import CfgNode

from stvit_video.common.errors import Stopped, UsageError
from stvit_video.common.files import wait_for_lock
from stvit_video.config.load import override
from stvit_video.runs.folder import RunFolder, build_run_folder, describe_changes
from stvit_video.runtime.stopping import StopSignals
from stvit_video.sweeps.plan import START, Plan, PlanRow

LOCK_S = 10.0  # a command that was killed just now may need a moment to end


class RunJob(Protocol):
    """A submitted run."""

    @property
    def log(self) -> Path: ...
    def is_active(self) -> bool: ...  # whether it waits or works
    def cancel(self) -> None: ...  # asks it to end; training writes a checkpoint first
    def describe_failure(self) -> str: ...  # why it ended without results; empty where only its log says it


@dataclass(frozen=True)
class JobRunner:
    """Where runs are trained: on this machine or on a cluster, through submitit. Tests use one of their own."""

    submit: Callable[[CfgNode, int], RunJob]  # the run's configuration, and how many runs share this machine's cores
    find: Callable[[Path], RunJob | None]  # the job of a run folder that an earlier command left active
    jobs: int  # at a time
    poll_s: float  # between two questions to a job


@dataclass(frozen=True, eq=False)  # hashed by identity: a configuration has no hash
class SweepRun:
    """One row trained with one seed."""

    row: PlanRow
    seed: int
    cfg: CfgNode
    folder: RunFolder

    @property
    def name(self) -> str:
        return f"{self.row.name}, seed {self.seed}"

    @property
    def key(self) -> tuple[str, int]:
        return self.row.name, self.seed

    @property
    def log(self) -> Path:
        return self.folder.path.with_name(f"{self.folder.path.name}.txt")


def build_runs(plan: Plan, output: Path) -> tuple[SweepRun | None, list[SweepRun]]:
    """Return the run that all others start from, if the plan has one, and all others: each seed's rows after another.

    The start has the first seed. Raises UsageError where a folder holds a run of other settings.
    """
    start = _build_run(plan.start, plan.seeds[0], output, []) if plan.start is not None else None
    init = [("MODEL.INIT", str(start.folder.weights))] if start is not None else []
    return start, [_build_run(row, seed, output, init) for seed in plan.seeds for row in plan.rows]


def _build_run(row: PlanRow, seed: int, output: Path, init: list[tuple[str, Any]]) -> SweepRun:
    path = output / row.name / f"seed{seed}"
    cfg = override(row.cfg, [*init, ("OUTPUT_DIR", str(path)), ("SEED", seed)], "a plan")
    run = SweepRun(row, seed, cfg, build_run_folder(cfg))
    if run.folder.has_progress():
        _check_recorded(run, moved=bool(init))
    return run


def _check_recorded(run: SweepRun, moved: bool) -> None:
    """Raise UsageError where the folder holds a run of other settings. A start may have ``moved`` with the runs."""
    folder, recorded = run.folder, run.folder.recorded_config()
    if recorded is None:
        raise UsageError(
            f"Row {run.row.name}: {folder.path} holds a run without a config.yaml that can be read, so it may be any; "
            f"delete that folder, or give another --output."
        )
    model, init = recorded["MODEL"], folder.settings["MODEL"]["INIT"]
    if moved and isinstance(model, dict) and Path(str(model.get("INIT"))).parts[-3:] == Path(init).parts[-3:]:
        model["INIT"] = init
    if changed := describe_changes(recorded, folder.settings):
        raise UsageError(
            f"Row {run.row.name}: {folder.path} holds a run with other settings than the plan's: {changed}. Delete "
            f"that folder, give another --output, or put the plan back."
        )


def start_to_train(start: SweepRun | None, chosen: Sequence[SweepRun], runs: Sequence[SweepRun]) -> SweepRun | None:
    """Return the start where ``chosen`` ones of all ``runs`` wait for it; None without a start, or where it is done.

    Raises UsageError where its weights are gone, or begun runs would have another start than those that follow.
    """
    if start is None or start.folder.is_finished() or all(run.folder.has_progress() for run in chosen):
        return None
    if begun := [run for run in runs if run.folder.has_progress()]:
        folders = dict.fromkeys([str(start.folder.path), *(str(run.folder.path.parent) for run in begun)])
        raise UsageError(
            f"{start.folder.weights} is not there, and what is trained now would not have the start of the rest; "
            f"put it back, or delete {', '.join(folders)}."
        )
    return start


@contextmanager
def lock_output(output: Path, patience: float = LOCK_S) -> Iterator[None]:
    """Keep other tradeoff commands out of an output folder. Raises UsageError after ``patience`` seconds of waiting."""
    path = output / ".tradeoff.lock"
    with open(path, "a+") as file:
        taken = wait_for_lock(
            lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB),
            patience,
            lambda: f"waiting for another command that uses {output} to end",
        )
        if not taken:
            raise UsageError(
                f"--output {output} is in use by another tradeoff command; wait for it or end it (fuser {path} tells "
                f"which), or give another folder."
            )
        yield


def train_all(runs: Sequence[SweepRun], runner: JobRunner, finished: Callable[[SweepRun, str | None], None]) -> None:
    """Train the runs that are not finished; after each, call ``finished`` with why it failed, or None.

    Jobs that a killed command left active are followed, not submitted again. A start runs alone, with all cores; where
    it fails, nothing follows. After a signal the jobs are cancelled, which has them write checkpoints, and Stopped is
    raised.
    """
    waiting, active = [run for run in runs if not run.folder.is_finished()], {}
    total, done, ended, begun = len(runs), len(runs) - len(waiting), 0, time.monotonic()
    print(f"{done} of {total} runs are finished", flush=True)
    for run in list(waiting):
        if (job := runner.find(run.folder.path)) is not None:
            _check_recorded(run, moved=False)
            active[run] = job
            waiting.remove(run)
            print(f"{run.name}: is still running, output in {run.log}", flush=True)
    started = dict.fromkeys(active, begun)
    with StopSignals(launched=False) as signals, _cancelling(active, runner.poll_s):
        while (waiting or active) and signals.received is None:
            while waiting and len(active) < runner.jobs and not any(run.row.kind == START for run in active):
                run = waiting.pop(0)
                print(f"{run.name}: starts, output in {run.log}", flush=True)
                active[run], started[run] = build_job(run, runner), time.monotonic()
            for run in [run for run, job in active.items() if not job.is_active()]:
                job = active.pop(run)
                failure = None if run.folder.is_finished() else describe_failure(run, job)
                ended, done = ended + 1, done + (failure is None)
                if failure is not None and run.row.kind == START:
                    waiting.clear()
                left = len(waiting) + len(active)
                minutes = (time.monotonic() - begun) / ended * left / 60  # jobs at the same time are counted in
                finished(run, failure)
                outcome = f"failed: {failure}; log {run.log}" if failure else f"{read_results(run)['top1']:.2f} % top-1"
                print(
                    f"{run.name}: {outcome}, {(time.monotonic() - started[run]) / 60:.1f} minutes; {left} left, "
                    f"about {minutes:.0f} minutes",
                    flush=True,
                )
            time.sleep(runner.poll_s if active else 0)
        if signals.received is not None:
            raise Stopped(signals.received, f"{done} of {total} runs")


@contextmanager
def _cancelling(active: dict[SweepRun, RunJob], poll_s: float) -> Iterator[None]:
    """Cancel the jobs that are active when the block ends for whatever reason, and wait for their checkpoints."""
    try:
        yield
    finally:
        for job in active.values():
            job.cancel()
        while any(job.is_active() for job in active.values()):
            time.sleep(poll_s)


def build_job(run: SweepRun, runner: JobRunner) -> RunJob:
    """Submit a run, and link its log."""
    run.log.parent.mkdir(parents=True, exist_ok=True)
    job = runner.submit(run.cfg, 1 if run.row.kind == START else runner.jobs)
    run.log.unlink(missing_ok=True)
    run.log.symlink_to(os.path.relpath(job.log, run.log.parent))
    return job


def describe_failure(run: SweepRun, job: RunJob) -> str:
    """Return in one line why a run ended without results."""
    if failure := job.describe_failure():
        return failure
    try:
        lines = [line.strip() for line in run.log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError as error:
        return f"its log cannot be read ({error.strerror})"
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it printed nothing"])[-1]


def read_results(run: SweepRun) -> dict[str, Any]:
    """Return a finished run's results.json. Raises UsageError where it cannot be read."""
    path = run.folder.results
    try:
        results = json.loads(path.read_text())
        [float(results[name]) for name in ("top1", "coverage", "gflops", "parameters")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} lacks figures ({type(error).__name__}), so it is not a run's; delete {run.folder.path}, "
            f"and the run is made again."
        ) from error
    return results
