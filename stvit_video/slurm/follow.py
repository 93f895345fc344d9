"""Following jobs to their end, and describing their state."""

import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from stvit_video.common.files import write_atomically
from stvit_video.common.tables import format_table, to_csv
from stvit_video.config.schema import flatten
from stvit_video.slurm.jobs import ENDED, GONE, NO_ANSWER, ClusterJob
from stvit_video.slurm.records import parse_json, read_json

# Seconds until the end of a job without a result is believed: SLURM requeues a job some seconds after it reports
# NODE_FAIL, PREEMPTED or TIMEOUT.
SETTLE_S = {"COMPLETED": 10.0, "FAILED": 3.0, "CANCELLED": 3.0}
SETTLE_OTHERS_S = 20.0
SILENCE_S = 600.0  # without an answer from SLURM
PROGRESS_EVERY_S = 10.0
LAST_LINES = 20


class Follower:
    """The last known state of one job, and since when."""

    def __init__(self, job: ClusterJob) -> None:
        self.job = job
        self.state, self.detail, self.progress = "", "", ""
        self.state_since = self.last_answer = self.last_progress = time.monotonic()
        self.ended = False

    def update(self) -> None:
        """Ask for the state once, print what is new, and decide whether the job has ended."""
        now, (state, detail) = time.monotonic(), self.job.state()
        if state == NO_ANSWER:
            self.ended = now - self.last_answer > SILENCE_S
            state, detail = self.state, self.detail
            if self.ended:
                self.report(f"no answer from SLURM for {SILENCE_S:.0f} s; the job may go on")
        else:
            self.last_answer = now
        if (state, detail) != (self.state, self.detail):
            self.state_since = now if state != self.state else self.state_since
            self.state, self.detail = state, detail
            self.report(f"{state} {detail}".strip())
        if now - self.last_progress >= PROGRESS_EVERY_S and (progress := describe_progress(self.job)) != self.progress:
            self.progress, self.last_progress = progress, now
            self.report(progress)
        if state in ENDED:
            settle_s = SETTLE_S.get(state, SETTLE_OTHERS_S)
            self.ended = self.job.is_done() or now - self.state_since >= settle_s

    def report(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')}  job {self.job.id}  {text}", flush=True)


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
    rows = [parse_json(line) for line in tail(job.run / "metrics.jsonl", 2)]
    row = next((row for row in reversed(rows) if row is not None), None)
    if row is None:
        return ""
    values = [f"{name} {row[name]:.4g}" for name in ("loss", "top1", "clips_per_second") if name in row]
    return f"step {row['step']}  epoch {row['epoch']:.2f}  {'  '.join(values)}"


def describe_end(job: ClusterJob) -> str:
    """Return how a job ended: its result, or which task failed first, where, and its last lines."""
    if job.is_done():
        results = read_json(job.run / "results.json") or {}
        return f"job {job.id} is done: {job.run}" + (f", top-1 {results['top1']:.2f} %" if "top1" in results else "")
    state, detail = job.state()
    reason = f"ended without a result ({f'{state} {detail}'.strip()})"
    lines = [f"job {job.id} {'is unknown to SLURM, and left no result' if state == GONE else reason}: {job.run}"]
    first = next(iter(job.folder.failures(job.submission)), None)  # the others follow from it
    if first:
        lines.append(f"rank {first.rank} on {first.host} failed first, with exit code {first.code}")
    if first and first.problem:
        lines.append(first.problem)
    else:
        log = job.log(first.rank if first else 0)
        lines += [f"the last lines of {log}:", *tail(log, LAST_LINES)]
    return "\n".join(lines)


def tail(path: Path, count: int) -> list[str]:
    """Return a file's last lines, or why it cannot be read."""
    try:
        return path.read_text(errors="replace").splitlines()[-count:]
    except OSError as error:
        return [f"({path}: {error.strerror})"]


def describe_status(job: ClusterJob) -> str:
    """Return state, starts, progress, newest checkpoint and log of a job."""
    state, detail = job.state()
    events = job.folder.events(job.submission)
    starts = sum(row["event"] == "started" for row in events)
    stops = [f"{row['reason']} at step {row['step']}" for row in events if row["event"] == "stopped"]
    progress = describe_progress(job)
    lines = [
        f"job {job.id} ({job.cluster}): {'done' if job.is_done() else f'{state} {detail}'.strip()}",
        f"{starts} start(s){': stopped by ' if stops else ''}{', '.join(stops)}",
        *([progress] if progress else []),
        f"checkpoint of step {job.folder.newest_step()}",
        f"log {job.log()}",
    ]
    return "\n  ".join([str(job.run), *lines])


def summarise(jobs: Sequence[ClusterJob], to: Path) -> str:
    """Write a table of an array's runs, their different settings and their results as CSV; return it as text."""
    configs = [flatten(yaml.safe_load(job.folder.config.read_text())) for job in jobs]
    keys = [key for key in configs[0] if key != "OUTPUT_DIR" and len({str(c.get(key)) for c in configs}) > 1]
    columns = ["run", "job", "state", *keys, "top1", "top5"]
    rows = []
    for job, config in zip(jobs, configs, strict=True):
        results, state = read_json(job.run / "results.json") or {}, "done" if job.is_done() else job.state()[0]
        accuracy = [f"{results[name]:.2f}" if name in results else "" for name in ("top1", "top5")]
        rows.append([job.run.name, job.id, state, *(config.get(key, "") for key in keys), *accuracy])
    write_atomically(to, to_csv([dict(zip(columns, row, strict=True)) for row in rows], columns))
    return f"{format_table(columns, rows)}\ntable in {to}"
