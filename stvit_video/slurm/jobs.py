"""A submitted job: its records in OUTPUT_DIR/slurm, its state, and following it to its end.

``config.yaml`` is the resolved configuration, ``job.json`` how the job was submitted, ``owner.json`` which start of
which submission trains, ``history.jsonl`` the events of each start, ``failures/`` which task failed where. The last
three name the submission by a key of our own, because a SLURM that is set up anew counts its jobs from 1 again. The
logs, ``<job>_<rank>_log.out``, are submitit's.
"""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stvit_video.common.accuracy import ACCURACIES
from stvit_video.common.errors import UsageError, first_line
from stvit_video.common.files import open_to_append, tail, write_atomically, write_json
from stvit_video.common.tables import format_table, to_csv
from stvit_video.common.text import printable
from stvit_video.config.schema import flatten
from stvit_video.config.yaml_text import parse_yaml, read_text

# SLURM's final states of a job, although it may still queue the job again. All others (RUNNING, PENDING ...) go on.
GONE = "GONE"  # not SLURM's: it no longer knows the job
ENDED = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE",
    "REVOKED", "SPECIAL_EXIT", GONE,
}  # fmt: skip
NO_ANSWER = "NO ANSWER"
# Seconds until the end of a job without a result is believed: SLURM requeues a job some seconds after it reports
# NODE_FAIL, PREEMPTED or TIMEOUT.
SETTLE_S = {"COMPLETED": 10.0, "FAILED": 3.0, "CANCELLED": 3.0}
SETTLE_OTHERS_S = 20.0
SILENCE_S = 600.0  # without an answer from SLURM
PROGRESS_EVERY_S = 10.0
LAST_LINES = 20
# What a record may hold: SLURM's commands would take other words as more jobs, or as options.
RECORD = {
    "id": "[0-9]+(_[0-9]+)?|DEBUG_[0-9]+",
    "cluster": "slurm|local|debug",
    "submission": r"\w{1,64}",
    "logs": r"/.*",
}


@dataclass(frozen=True)
class ClusterJob:
    """A run that was submitted as a job."""

    run: Path
    cluster: str
    id: str
    logs: Path
    submission: str  # key of the submission in the records

    @property
    def path(self) -> Path:
        return self.run / "slurm"

    def log(self, rank: int = 0) -> Path:
        """Return the path of a task's output."""
        return self.logs / f"{self.id}_{rank}_log.out"

    def add_event(self, start: int, event: str, **more: Any) -> None:
        """Append a line to the history. Called on rank 0 only."""
        row = {"time": time.time(), "submission": self.submission, "start": start, "event": event, **more}
        with open_to_append(self.path / "history.jsonl") as file:
            file.write(json.dumps(row) + "\n")

    def events(self, name: str = "") -> list[dict[str, Any]]:
        """Return the history of this submission, or its events of one name, oldest first."""
        rows = [row for row in read_rows(self.path / "history.jsonl") if row.get("submission") == self.submission]
        return [row for row in rows if name in ("", row.get("event"))]

    def add_failure(self, start: int, rank: int, host: str, code: int, problem: str) -> None:
        """Record how a task failed; ``problem`` is empty where its log says more."""
        row = {"submission": self.submission, "start": start, "rank": rank, "host": host, "code": code}
        path = self.path / "failures" / f"{self.submission}.{start}.{rank}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, {**row, "problem": problem, "time": time.time()})

    def first_failure(self) -> dict[str, Any] | None:
        """Return the first failure of the last start that had any, from which its others follow."""
        found = filter(None, map(read_json, self.path.glob(f"failures/{self.submission}.*.json")))
        return min(found, key=lambda failure: (-failure["start"], failure["time"]), default=None)

    def newest_step(self) -> int:
        """Return the step of the newest checkpoint, 0 where there is none."""
        names = [path.stem.removeprefix("step_") for path in self.run.glob("checkpoints/step_*.pt")]
        return max((int(name) for name in names if name.isdigit()), default=0)

    def is_done(self) -> bool:
        """Say whether rank 0 recorded that the run is complete. SLURM's state alone does not tell."""
        return bool(self.events("done"))

    def state(self) -> tuple[str, str]:
        """Return the job's state and, where SLURM gives them, its nodes or a reason. Takes at most a minute."""
        if self.cluster != "slurm":
            with suppress(OSError):
                command = Path(f"/proc/{self.id}/cmdline").read_bytes()
                # Empty for a moment after the start. So is that of a zombie, which has ended though submit.py has not
                # noticed yet, and of a kernel thread, which may have got the number since: both are without memory.
                is_starting = not command and "VmSize:" in Path(f"/proc/{self.id}/status").read_text()
                if is_starting or b"submitit.local" in command:
                    return "RUNNING", ""
            return "COMPLETED" if self.is_done() else "FAILED", ""
        query = ("--noheader", f"--jobs={self.id}")
        ok, said = run_client("squeue", *query, "--array", "--states=all", "--format=%T|%r|%N")
        if ok and said:
            state, reason, nodes = said.splitlines()[0].split("|")
            return state, nodes or ("" if reason == "None" else reason)
        if not ok and "Invalid job id" not in said:
            return NO_ANSWER, said
        # The controller forgets old jobs; accounting, where there is any, does not.
        ok, said = run_client("sacct", *query, "--allocations", "--parsable2", "--format=State")
        return (said.split()[0], "") if ok and said else (GONE, "")

    def cancel(self) -> None:
        """End the job; its checkpoints stay."""
        if self.cluster == "slurm":
            ok, said = run_client("scancel", self.id)
            if not ok:
                raise UsageError(f"scancel {self.id}: {said.splitlines()[-1] if said else 'no answer'}; try again.")
        elif self.state()[0] == "RUNNING":
            # submitit's controller ends when its tasks do, and so does the shell around it that runs the profile's
            # setup, in which a signal would not reach the controller.
            children_file = Path(f"/proc/{self.id}/task/{self.id}/children")
            children = children_file.read_text().split() if children_file.is_file() else []
            for process in children or [self.id]:
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGTERM)


def run_client(*command: str, given: str | None = None) -> tuple[bool, str]:
    """Run one of SLURM's clients, with ``given`` as its input; return whether it succeeded, and its output or error."""
    try:
        found = subprocess.run(command, input=given, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    return found.returncode == 0, (found.stderr if found.returncode else found.stdout).strip()


def read_job(run: Path) -> ClusterJob | None:
    """Return the job that was last submitted for a run folder, None where none was."""
    if not (run / "slurm" / "job.json").is_file():
        return None
    record = read_record(run)
    return ClusterJob(run, record["cluster"], record["id"], Path(record["logs"]), record["submission"])


def read_record(run: Path) -> dict[str, Any]:
    """Return how the job of a run folder was submitted. Raises UsageError where the record is not as we write it."""
    path = run / "slurm" / "job.json"
    record = read_json(path)
    for key, form in RECORD.items():
        value = record.get(key) if isinstance(record, dict) else None
        if not isinstance(value, str) or not re.fullmatch(form, value):
            raise UsageError(
                f"{printable(path)}: {key} is {printable(repr(value))}, which no submission writes; delete the file if "
                f"no job of this run is queued, and submit the run again."
            )
    return dict(record)


def check_owner(*paths: Path) -> None:
    """Raise UsageError where a file or folder, or what it links to, belongs to another user."""
    for path in paths:
        for found in (path.stat(), path.lstat()) if path.exists() else ():
            if found.st_uid != os.geteuid():
                raise UsageError(
                    f"{printable(path)} belongs to user {found.st_uid}, and its jobs would run as you; look at what is "
                    f"in it, and act on a copy of the folder, or submit its config.yaml with an OUTPUT_DIR of yours."
                )


def find_jobs(folder: Path) -> list[ClusterJob]:
    """Return the jobs of a run folder, or of all run folders of an array. Raises UsageError where there is none."""
    runs, array = [folder], folder / "slurm" / "array.json"
    if array.is_file() and not array.with_name("job.json").is_file():
        found = read_json(array)
        runs = [Path(run) for run in found] if isinstance(found, list) and all(map(_is_text, found)) else []
        if outside := [run for run in runs if ".." in run.parts or folder not in run.parents]:
            remedy = "give the folder of one run, or, if it was moved, move it back"
            raise UsageError(f"{printable(array)} names {printable(outside[0])}, which is not in {folder}; {remedy}.")
    jobs = [job for run in runs if (job := read_job(run)) is not None]
    if not jobs:
        raise UsageError(f"{folder} holds no submitted job; give the OUTPUT_DIR that submit.py printed.")
    return jobs


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, None where it is absent or cannot be read at this moment."""
    with suppress(OSError, ValueError, RecursionError):
        return json.loads(path.read_text())
    return None


def read_rows(path: Path, last: int = 0) -> list[dict[str, Any]]:
    """Return the lines at the end of a JSON-lines file, or its ``last`` ones, that are complete; none without it."""
    rows = []
    for line in tail(path)[-last:] if path.is_file() else []:
        with suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def last_lines(path: Path, count: int) -> list[str]:
    """Return a file's last lines, or why it cannot be read."""
    try:
        return [printable(line, "\t") for line in tail(path)[-count:]]
    except OSError as error:
        return [f"({path}: {error.strerror})"]


class Follower:
    """The last known state of one job, and since when; what is new is printed, unless ``silent``."""

    def __init__(self, job: ClusterJob, silent: bool = False) -> None:
        self.job, self.state, self.detail, self.progress = job, "", "", ""
        self.state_since = self.last_answer = self.last_progress = time.monotonic()
        self.ended, self.silent = False, silent

    def update(self) -> None:
        """Ask for the state once, and decide whether the job has ended."""
        now, (state, detail) = time.monotonic(), self.job.state()
        if state == NO_ANSWER:
            state, detail = self.state, self.detail
        else:
            self.last_answer = now
        if (state, detail) != (self.state, self.detail):
            self.state_since = now if state != self.state else self.state_since
            self.state, self.detail = state, detail
            self.report(f"{state} {detail}".strip())
        is_due = not self.silent and now - self.last_progress >= PROGRESS_EVERY_S
        if is_due and (progress := describe_progress(self.job)) != self.progress:
            self.progress, self.last_progress = progress, now
            self.report(progress)
        if state in ENDED:
            self.ended = self.job.is_done() or now - self.state_since >= SETTLE_S.get(state, SETTLE_OTHERS_S)
        elif now - self.last_answer > SILENCE_S:
            self.ended = True
            self.report(f"no answer from SLURM for {SILENCE_S:.0f} s; the job may go on")

    def report(self, text: str) -> None:
        if not self.silent:
            print(f"{time.strftime('%H:%M:%S')}  job {self.job.id}  {printable(text)}", flush=True)


def follow(jobs: Sequence[ClusterJob]) -> bool:
    """Print state and progress of jobs until all have ended; return whether all are done."""
    followers, begun = [Follower(job) for job in jobs], time.monotonic()
    while running := [follower for follower in followers if not follower.ended]:
        for follower in running:
            follower.update()
        # Often at first, so that errors show soon; later rarely, to spare SLURM's controller.
        time.sleep(min(30.0, 1.0 + (time.monotonic() - begun) / 60))
    for job in jobs:
        print(describe_end(job), flush=True)
    return all(job.is_done() for job in jobs)


def describe_progress(job: ClusterJob) -> str:
    """Return the newest complete line of the metrics, empty where there is none."""
    rows = read_rows(job.run / "metrics.jsonl", last=2)
    if not rows:
        return ""
    row = rows[-1]
    values = [f"{name} {row[name]:.4g}" for name in ("loss", *ACCURACIES, "clips_per_second") if name in row]
    return f"step {row['step']}  epoch {row['epoch']:.2f}  {'  '.join(values)}"


def describe_end(job: ClusterJob) -> str:
    """Return how a job ended: its result, or which task failed first, where, and its last lines."""
    if job.is_done():
        results = read_json(job.run / "results.json") or {}
        accuracy = [f", {name} {results[key]:.2f} %" for key, name in ACCURACIES.items() if key in results]
        return f"job {job.id} is done: {job.run}{''.join(accuracy)}"
    state = " ".join(job.state()).strip()
    reason = "is unknown to SLURM, and left no result" if state == GONE else f"ended without a result ({state})"
    lines = [f"job {job.id} {reason}: {job.run}"]
    first = job.first_failure()
    if first:
        lines.append(f"rank {first['rank']} on {first['host']} failed first, with exit code {first['code']}")
    log = job.log(first["rank"] if first else 0)
    end = [f"the last lines of {log}:", *last_lines(log, LAST_LINES)]
    shown = [first["problem"]] if first and first["problem"] else end
    return "\n".join(printable(line, "\t") for line in lines + shown)


def describe_status(job: ClusterJob) -> str:
    """Return state, starts, progress, newest checkpoint and log of a job. Raises UsageError for damaged records."""
    try:
        return _describe_status(job)
    except (LookupError, TypeError, ValueError) as error:
        problem = f"its records or metrics are damaged ({first_line(error)})"
        raise UsageError(f"{job.run}: {problem}; restore history.jsonl and metrics.jsonl, or delete them.") from error


def _describe_status(job: ClusterJob) -> str:
    stops = ", ".join(f"{row['reason']} at step {row['step']}" for row in job.events("stopped"))
    lines = [
        str(job.run),
        f"job {job.id} ({job.cluster}): {'done' if job.is_done() else ' '.join(job.state()).strip()}",
        f"{len(job.events('started'))} start(s){': stopped by ' if stops else ''}{stops}",
        describe_progress(job),
        f"checkpoint of step {job.newest_step()}",
        f"log {job.log()}",
    ]
    return "\n  ".join(printable(line) for line in lines if line)


def summarise(jobs: Sequence[ClusterJob], to: Path) -> str:
    """Write a table of an array's runs, their different settings and their results as CSV; return it as text."""
    configs = [flatten(parse_yaml(read_text(job.path / "config.yaml"))) for job in jobs]
    keys = [key for key in configs[0] if key != "OUTPUT_DIR" and len({str(c.get(key)) for c in configs}) > 1]
    rows = []
    found = [read_json(job.run / "results.json") or {} for job in jobs]
    names = ("map",) if any("map" in results for results in found) else ("top1", "top5")
    for job, config, results in zip(jobs, configs, found, strict=True):
        state = "done" if job.is_done() else job.state()[0]
        accuracy = {name: f"{results[name]:.2f}" if name in results else "" for name in names}
        settings = {key: config.get(key, "") for key in keys}
        rows.append({"run": job.run.name, "job": job.id, "state": state, **settings, **accuracy})
    write_atomically(to, to_csv(rows, list(rows[0])))
    return f"{format_table(list(rows[0]), [list(row.values()) for row in rows])}\ntable in {to}"
