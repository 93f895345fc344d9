"""Following jobs to their end, and what is told of them."""

import csv
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from stvit_video.slurm.jobs import ENDED, GONE, NO_ANSWER, Job

SETTLE_S = {
    "COMPLETED": 10.0,
    "FAILED": 3.0,
    "CANCELLED": 3.0,
}  # until an end is believed that the run does not confirm
SETTLE_OTHERS_S = 20.0  # SLURM queues a job again some seconds after NODE_FAIL, PREEMPTED or TIMEOUT
SILENCE_S = 600.0  # without an answer from SLURM
PROGRESS_EVERY_S = 10.0
LAST_LINES = 20


class Follower:
    """What is known of one job, and since when."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.state, self.detail = "", ""
        self.since = self.heard = self.told = time.monotonic()
        self.progress = ""
        self.ended = False

    def look(self) -> None:
        """Ask once, print what is new, and decide whether the job has ended."""
        now, (state, detail) = time.monotonic(), self.job.state()
        if state == NO_ANSWER:
            self.ended = now - self.heard > SILENCE_S
            state, detail = self.state, self.detail
            if self.ended:
                self.say(f"no answer from SLURM for {SILENCE_S:.0f} s; the job may go on")
        else:
            self.heard = now
        if (state, detail) != (self.state, self.detail):
            self.since = now if state != self.state else self.since
            self.state, self.detail = state, detail
            self.say(f"{state} {detail}".strip())
        self.tell_progress(now)
        if state in ENDED:
            patience = SETTLE_S.get(state, SETTLE_OTHERS_S)
            self.ended = self.job.is_done() or now - self.since >= patience

    def tell_progress(self, now: float) -> None:
        """Print the newest figures of training, where there are any, but not too often."""
        if now - self.told >= PROGRESS_EVERY_S and (progress := describe_progress(self.job)) != self.progress:
            self.progress, self.told = progress, now
            self.say(progress)

    def say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')}  job {self.job.id}  {text}", flush=True)


def follow(jobs: Sequence[Job]) -> bool:
    """Return whether all jobs were done, once they have ended; print what happens to them meanwhile."""
    followers, begun = [Follower(job) for job in jobs], time.monotonic()
    while running := [follower for follower in followers if not follower.ended]:
        for follower in running:
            follower.look()
        # Often at first, for those who wait for an error; seldom later, for the sake of SLURM's controller.
        time.sleep(min(30.0, 1.0 + (time.monotonic() - begun) / 60))
    for job in jobs:
        print(describe_end(job), flush=True)
    return all(job.is_done() for job in jobs)


def describe_progress(job: Job) -> str:
    """Return the newest line of the metrics, empty where there is none."""
    row = _last_row(job.run / "metrics.jsonl")
    values = [f"{name} {row[name]:.4g}" for name in ("loss", "top1", "clips_per_second") if name in row]
    return f"step {row['step']}  epoch {row['epoch']:.2f}  {'  '.join(values)}" if row else ""


def _last_row(path: Path) -> dict[str, Any]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    for line in reversed(lines[-2:]):  # the last may be half written
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            continue
    return {}


def describe_end(job: Job) -> str:
    """Return how a job ended: its result, or which task failed first, where, and its last lines."""
    if job.is_done():
        found = read_results(job)
        return f"job {job.id} is done: {job.run}" + (f", top-1 {found['top1']:.2f} %" if "top1" in found else "")
    failures = job.folder.failures(job.submission)
    first = failures[0] if failures else None
    log = job.log(first.rank if first else 0)
    state, detail = job.state()
    lines = [f"job {job.id} ended without a result ({state} {detail}): {job.run}".replace(" )", ")")]
    if state == GONE:
        lines = [f"job {job.id} is unknown to SLURM, and left no result: {job.run}"]
    if first:
        lines.append(f"rank {first.rank} on {first.host} failed first, with exit code {first.code}")
    if first and first.problem:
        lines.append(first.problem)
    else:
        lines += [f"the last lines of {log}:", *tail(log, LAST_LINES)]
    return "\n".join(lines)


def tail(path: Path, count: int) -> list[str]:
    """Return a file's last lines."""
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        return [f"({path}: {error.strerror})"]
    return text.splitlines()[-count:]


def read_results(job: Job) -> dict[str, Any]:
    """Return results.json of a run, nothing where there is none."""
    try:
        return json.loads((job.run / "results.json").read_text())
    except (OSError, ValueError):
        return {}


def describe_status(job: Job) -> str:
    """Return state, starts, progress and logs of a job."""
    state, detail = job.state()
    events = job.folder.events(job.submission)
    stops = [f"{row['reason']} at step {row['step']}" for row in events if row["event"] == "stopped"]
    lines = [
        f"{job.run}",
        f"  job {job.id} ({job.cluster}): {'done' if job.is_done() else f'{state} {detail}'.strip()}",
    ]
    starts = sum(row["event"] == "started" for row in events)
    lines.append(f"  {starts} start(s){': stopped by ' if stops else ''}{', '.join(stops)}")
    progress = describe_progress(job)
    lines += [f"  {progress}"] if progress else []
    return "\n".join([*lines, f"  checkpoint of step {job.folder.newest_step()}", f"  log {job.log()}"])


def summarise(jobs: Sequence[Job], to: Path) -> str:
    """Write a table of an array's runs, with what differs between them and what came out; return it as text."""
    configs = [_flat(yaml.safe_load(job.folder.config.read_text())) for job in jobs]
    differing = [key for key in configs[0] if key != "OUTPUT_DIR" and len({str(c.get(key)) for c in configs}) > 1]
    rows = []
    for job, config in zip(jobs, configs, strict=True):
        found, state = read_results(job), "done" if job.is_done() else job.state()[0]
        figures = {name: f"{found[name]:.2f}" if name in found else "" for name in ("top1", "top5")}
        rows.append(
            {"run": job.run.name, "job": job.id, "state": state, **{k: config[k] for k in differing}, **figures}
        )
    with to.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    table = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    text = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table)
    return f"{text}\ntable in {to}"


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def print_log(job: Job, rank: int, count: int) -> None:
    """Print the last lines of a task's log."""
    print(f"==> {job.log(rank)} <==")
    print("\n".join(tail(job.log(rank), count)))
    sys.stdout.flush()
