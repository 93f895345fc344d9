"""The runs behind a table: ordinary training runs in processes of their own, several at once, which can be continued.

A run lives in OUTPUT/ROW/seedN, and what it printed since it was last started in OUTPUT/ROW/seedN.txt: a run refuses a
folder that already holds files of others.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from stvit_video.common.errors import Stopped, UsageError
from stvit_video.common.files import wait_for_lock
from stvit_video.config.load import load_config
from stvit_video.runs.folder import RunFolder, describe_changes
from stvit_video.runtime.stopping import EXIT_STOPPED, StopSignals
from stvit_video.sweeps.plan import START, Plan, Row

POLL_S = 0.1
ORPHANS_S = 60.0  # how long runs of a command that was killed may take to write their checkpoints
PR_SET_PDEATHSIG = 1  # of Linux's prctl
# What runs are stopped with: should whoever ends this command signal them too, that is another kind, not a second one.
STOP = signal.SIGUSR2


@dataclass(frozen=True, eq=False)  # one is itself: a configuration has no hash
class Run:
    """One row trained with one seed."""

    row: Row
    seed: int
    path: Path
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.row.name}, seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.path.with_name(f"{self.path.name}.txt")

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.path)

    def is_finished(self) -> bool:
        return self.folder.is_finished()


def build_start(plan: Plan, output: Path) -> Run | None:
    """Return the run that all others start from, of the plan's first seed; None where each starts by itself.

    Raises UsageError where its folder holds a run of other settings.
    """
    return None if plan.start is None else _build_run(plan, plan.start, plan.seeds[0], output)


def build_runs(plan: Plan, output: Path) -> list[Run]:
    """Return the runs of a plan's rows, all rows with the first seed before the next.

    Raises UsageError where a folder holds a run of other settings.
    """
    start = build_start(plan, output)
    init = () if start is None else ("MODEL.INIT", str(start.folder.weights))
    return [_build_run(plan, row, seed, output, init) for seed in plan.seeds for row in plan.rows]


def start_to_train(start: Run | None, chosen: Sequence[Run], runs: Sequence[Run]) -> Run | None:
    """Return the start where ``chosen`` ones of all ``runs`` wait for it; None where there is none, or it is done.

    Raises UsageError where its weights are gone, or begun runs would be of another start than those that follow.
    """
    if start is None or all(run.folder.has_progress() for run in chosen):
        return None
    if start.is_finished() and start.folder.weights.is_file():
        return None
    begun = [run for run in runs if run.folder.has_progress()]
    if start.is_finished() or begun:
        folders = ", ".join(dict.fromkeys(str(run.path.parent) for run in begun))
        raise UsageError(
            f"{start.folder.weights} is not there, and what is trained now would not have the start of the rest; "
            f"put it back, or delete {', '.join(filter(None, (str(start.path), folders)))}."
        )
    return start


def _build_run(plan: Plan, row: Row, seed: int, output: Path, init: Sequence[str] = ()) -> Run:
    path = output / row.name / f"seed{seed}"
    words = [*row.words, *init, "OUTPUT_DIR", str(path), "SEED", str(seed)]
    _check_folder(row, path, load_config(plan.cfg_file, words), moves=bool(init))
    return Run(row, seed, path, (sys.executable, "-m", "stvit_video.run", "--cfg", str(plan.cfg_file), *words))


def _check_folder(row: Row, path: Path, cfg: CfgNode, moves: bool) -> None:
    """Raise UsageError for a run of other settings; where its start ``moves`` with it, both may lie elsewhere now."""
    folder = RunFolder(path)
    recorded, begun = folder.recorded_config(), folder.has_progress()
    if begun and recorded is None:
        raise UsageError(
            f"Row {row.name}: {path} holds a run without a config.yaml that can be read, so it may be any; "
            f"delete that folder, or give another --output."
        )
    if moves and begun and recorded is not None:
        model = recorded.get("MODEL")
        if isinstance(model, dict) and Path(str(model.get("INIT"))).parts[-3:] == Path(cfg.MODEL.INIT).parts[-3:]:
            model["INIT"] = cfg.MODEL.INIT
    changed = describe_changes(recorded, yaml.safe_load(cfg.dump())) if begun and recorded is not None else ""
    if changed:
        raise UsageError(
            f"Row {row.name}: {path} holds a run with other settings than the plan's: {changed}. Delete that folder, "
            f"give another --output, or put the plan back."
        )


class Lock:
    """While entered, the output folder is this command's; runs that it starts keep it until they end.

    A command that was killed leaves runs that are then writing their checkpoints: they are waited for, ``patience``
    seconds. Raises UsageError after that.
    """

    def __init__(self, output: Path, patience: float = ORPHANS_S) -> None:
        self.path, self.patience = output / ".tradeoff.lock", patience

    def __enter__(self) -> TextIOWrapper:
        self.file = open(self.path, "a+")
        taken = wait_for_lock(
            lambda: fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB),
            self.patience,
            lambda: f"waiting for another command that uses {self.path.parent} to end",
        )
        if not taken:
            self.file.close()
            raise UsageError(
                f"--output {self.path.parent} is in use by another tradeoff command, or by runs that one "
                f"started; wait for it or end it (fuser {self.path} tells which), or give another folder."
            )
        return self.file

    def __exit__(self, *error: object) -> None:
        self.file.close()


def train_all(runs: Sequence[Run], jobs: int, lock: TextIOWrapper, finished: Callable[[Run, str | None], None]) -> None:
    """Run what is not finished, ``jobs`` at once; after each, call ``finished`` with why it failed or None.

    A start runs alone, with all cores; where it fails, nothing follows. Raises Stopped after a signal to stop, which is
    passed on to the runs: they write their checkpoints first.
    """
    waiting = [run for run in runs if not run.is_finished()]
    total, done = len(runs), len(runs) - len(waiting)
    print(f"{done} of {total} runs are finished", flush=True)
    active: dict[Run, subprocess.Popen] = {}
    started: dict[Run, float] = {}
    begun, ended = time.monotonic(), 0
    with StopSignals(launched=False) as signals, _ending(active):
        while waiting or active:
            alone = any(run.row.kind == START for run in active)
            while waiting and len(active) < jobs and not alone and signals.received is None:
                run = waiting.pop(0)
                alone = run.row.kind == START
                print(f"{run.name}: starts, output in {run.log}", flush=True)
                active[run], started[run] = _start(run, 1 if alone else jobs, lock), time.monotonic()
            if signals.received is not None:
                _stop(active)
                raise Stopped(signals.received, f"{done} of {total} runs")
            for run, process in list(active.items()):
                if process.poll() is None:
                    continue
                del active[run]
                ended += 1
                failure = None if run.is_finished() else describe_failure(run, process)
                done += failure is None
                if failure is not None and run.row.kind == START:
                    waiting.clear()
                left = len(waiting) + len(active)
                seconds = (time.monotonic() - begun) / ended * left  # the jobs side by side are in it
                minutes = (time.monotonic() - started[run]) / 60
                finished(run, failure)
                outcome = f"failed: {failure}" if failure else _read_top1(run)
                print(
                    f"{run.name}: {outcome}, {minutes:.1f} minutes; {left} left, about {seconds / 60:.0f} minutes",
                    flush=True,
                )
            time.sleep(POLL_S)
        if signals.received is not None:  # as the last run ended
            raise Stopped(signals.received, f"{done} of {total} runs")


def _start(run: Run, jobs: int, lock: TextIOWrapper) -> subprocess.Popen:
    """Start a run in a session of its own: Ctrl-C of the terminal reaches it once, through this process."""
    run.log.parent.mkdir(parents=True, exist_ok=True)
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    on_linux, parent = sys.platform == "linux", os.getpid()
    prctl = ctypes.CDLL(None).prctl if on_linux else lambda *_: 0  # found before the fork

    def end_with_parent() -> None:
        """Have the kernel send STOP, as this process would, when this process is killed."""
        prctl(PR_SET_PDEATHSIG, STOP)
        if os.getppid() != parent:  # it is dead already
            os._exit(EXIT_STOPPED)

    with open(run.log, "w") as log:
        return subprocess.Popen(
            run.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            start_new_session=True,
            pass_fds=[lock.fileno()],
            preexec_fn=end_with_parent if on_linux else None,
        )


@contextlib.contextmanager
def _ending(active: dict[Run, subprocess.Popen]) -> Iterator[None]:
    """Leave no run behind, whatever ends the block."""
    try:
        yield
    finally:
        _stop(active)


def _stop(active: dict[Run, subprocess.Popen]) -> None:
    """Ask the runs once to stop, and wait for their checkpoints."""
    for process in active.values():
        process.send_signal(STOP)
    for process in active.values():
        process.wait()
    active.clear()


def describe_failure(run: Run, process: subprocess.Popen) -> str:
    """Return in one line why a run ended without results."""
    if process.returncode < 0:
        return f"ended by {signal.Signals(-process.returncode).name}"
    if process.returncode == EXIT_STOPPED:
        return "stopped by a signal; the same command continues"
    lines = [line.strip() for line in run.log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"exit code {process.returncode}, without a word"])[-1]


def _read_top1(run: Run) -> str:
    return f"{read_results(run)['top1']:.2f} % top-1"


def read_results(run: Run) -> dict[str, Any]:
    """Return a finished run's results.json. Raises UsageError where it cannot be read."""
    path = run.folder.results
    try:
        results = json.loads(path.read_text())
        [float(results[name]) for name in ("top1", "coverage", "gflops", "parameters")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} lacks figures ({type(error).__name__}), so it is not a run's; delete {run.path}, "
            f"and the run is made again."
        ) from error
    return results
