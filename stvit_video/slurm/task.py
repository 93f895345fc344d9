"""What runs on the nodes: a small process beside each training process, which looks after it.

It catches SLURM's warning from the first moment on, passes it on, and has the job queued again when all processes have
saved. Training itself is ``python -m stvit_video.run``, as by hand.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import submitit
import yaml

from stvit_video.runtime.stopping import EXIT_STOPPED
from stvit_video.slurm.records import Failure, JobFolder

POLL_S = 0.2
OWNER_EVERY_S = 5.0
EARLY_WARNING_S = 65  # SLURM may send its warning a minute before it is due
REQUEUE_S = 20  # kept for asking SLURM, out of the seconds between its warning and the end

NO_SCONTROL = (
    "warning: no scontrol on this node's PATH, so the job cannot have itself queued again: after a time limit, go on "
    "with slurm/submit.py resume. In a container, bring SLURM's commands in (slurm/profiles/container.yaml)."
)
TOLD_TO_END = "told to end"

# What starts Python in a task. A warning that comes before Python can catch it would kill the task: it is held back,
# or, with an `env` of before 2019, ignored.
GUARD = (
    "env --block-signal=USR1,USR2 true 2>/dev/null && "
    'exec env --block-signal=USR1,USR2 "$@"; trap "" USR1 USR2; exec "$@"'
)
HELD_BACK = (signal.SIGUSR1, signal.SIGUSR2)


class Warnings:
    """Signals that announce the end of the job. They set ``received``, and nothing else."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.passed_on = False
        self.at = 0.0
        for number in (*HELD_BACK, signal.SIGTERM):  # in place of submitit's, which requeue at once
            signal.signal(number, self._handle)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self.at = signal.Signals(number), time.monotonic()


@dataclass(frozen=True)
class Task:
    """The callable that submitit starts once a task. ``run`` is the run folder, all paths are absolute."""

    run: str
    submission: str  # its key in the run folder
    minutes: int
    warning_s: int
    max_timeouts: int

    def __call__(self) -> None:
        """Train, and end the process with a code that tells SLURM what to do."""
        warnings, environment, folder = Warnings(), submitit.JobEnvironment(), JobFolder(self.run)
        begun = time.monotonic()
        key, rank = self.submission, environment.global_rank
        start = sum(row["event"] == "started" for row in folder.events(key))
        if environment.cluster == "slurm":
            start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        # submitit takes a result of an earlier start, which another task may have left, for this one's.
        if environment.cluster != "debug":
            environment.paths.result_pickle.unlink(missing_ok=True)
        if rank == 0:
            folder.write(folder.owner, {"submission": key, "start": start})
            folder.note(
                key,
                start,
                "started",
                job=environment.job_id,
                hosts=list(environment.hostnames),
                step=folder.newest_step(),
            )
            if environment.cluster == "slurm" and shutil.which("scontrol") is None:
                print(NO_SCONTROL, file=sys.stderr, flush=True)
        problem = check_paths(self.run) if environment.local_rank == 0 else ""
        if problem:
            self._fail(folder, Failure(key, start, rank, _host(), 2, problem, time.time()))
        code = self._look_after(folder, warnings, {"submission": key, "start": start} if rank == 0 else None)
        if code == 0:
            if rank == 0:
                folder.note(key, start, "done")
            return
        # Once the job was told to end, whatever ended this process, the run goes on from its newest checkpoint.
        if code != EXIT_STOPPED and warnings.received is None:
            self._fail(folder, Failure(key, start, rank, _host(), code, "", time.time()))
        # The others end well: an error would have srun kill rank 0 while it asks SLURM to queue the job again.
        if rank == 0:
            self._requeue(folder, environment, start, warnings, time.monotonic() - begun)
        sys.exit(0)

    def _look_after(self, folder: JobFolder, warnings: Warnings, owner: dict[str, Any] | None) -> int:
        """Run training in a process of its own and return its exit code, as a shell would give it."""
        command = [sys.executable, "-m", "stvit_video.run", "--cfg", str(folder.config)]
        child = subprocess.Popen(command, env={**os.environ, "PYTHONUNBUFFERED": "1"}, start_new_session=True)
        checked = time.monotonic()
        try:
            while child.poll() is None:
                time.sleep(POLL_S)
                now = time.monotonic()
                if warnings.received is not None and not warnings.passed_on:
                    print(f"{_host()}: {warnings.received.name} received", file=sys.stderr, flush=True)
                    child.send_signal(warnings.received)
                    warnings.passed_on = True
                if warnings.received is signal.SIGUSR2 and now - warnings.at > max(5, self.warning_s - REQUEUE_S):
                    print("error: no checkpoint in time: the last one has to do", file=sys.stderr, flush=True)
                    os.killpg(child.pid, signal.SIGKILL)
                if owner is not None and now - checked > OWNER_EVERY_S:
                    checked = now
                    if _read(folder.owner) not in (owner, None):
                        # SLURM gave up this node, which works on, and started the job elsewhere.
                        print("error: this job runs elsewhere by now: ending here", file=sys.stderr, flush=True)
                        os.killpg(child.pid, signal.SIGKILL)
        except KeyboardInterrupt:  # cluster debug, in a terminal
            child.send_signal(signal.SIGINT)
            child.wait()
        return child.returncode if child.returncode >= 0 else 128 - child.returncode

    def _requeue(
        self,
        folder: JobFolder,
        environment: submitit.JobEnvironment,
        start: int,
        warnings: Warnings,
        elapsed: float,
    ) -> None:
        """Have the job queued again, unless it is to end or has timed out too often."""
        key, step = self.submission, folder.newest_step()
        reason = self._reason(environment, warnings, elapsed)
        folder.note(key, start, "stopped", reason=reason, step=step)
        print(f"stopped at step {step}: {reason}", flush=True)
        if reason == TOLD_TO_END:
            return
        stops = [row["reason"] for row in folder.events(key) if row["event"] == "stopped"]
        timeouts = stops.count("time limit")
        again = f"python slurm/submit.py resume {self.run}"
        if timeouts > self.max_timeouts and reason == "time limit":
            problem = f"timed out {timeouts} times, and max_timeouts is {self.max_timeouts}; go on with: {again}"
            self._fail(folder, Failure(key, start, 0, _host(), 1, problem, time.time()))
        folder.note(key, start, "requeued", reason=reason, step=step)
        try:
            environment._requeue(self.max_timeouts - timeouts)
        except (OSError, subprocess.SubprocessError) as error:
            if getattr(error, "returncode", 1) in (-signal.SIGTERM, -signal.SIGKILL):
                return  # SLURM does as it was asked, and ends all processes of the job, also the one that asked
            problem = f"stopped at step {step}, but SLURM did not queue the job again ({error}); go on with: {again}"
            self._fail(folder, Failure(key, start, 0, _host(), 1, problem, time.time()))

    def _reason(self, environment: submitit.JobEnvironment, warnings: Warnings, elapsed: float) -> str:
        """Return why the job was stopped.

        SIGTERM comes with preemption at some sites. Otherwise it is scancel, scontrol requeue, which needs no help, or
        srun ending the step because another task has failed: none of these is to be queued again from here.
        """
        facts = job_facts(environment.job_id) if environment.cluster == "slurm" else {}
        if facts.get("JobState", "RUNNING") != "RUNNING":
            return TOLD_TO_END
        if facts.get("PreemptTime", "None") not in ("None", "N/A", "Unknown"):
            return "preempted"
        if warnings.received is signal.SIGTERM:
            return TOLD_TO_END
        if warnings.received is not None and elapsed >= 60 * self.minutes - self.warning_s - EARLY_WARNING_S:
            return "time limit"
        return f"signal {warnings.received.name}" if warnings.received else "signal to a process"

    def _fail(self, folder: JobFolder, failure: Failure) -> NoReturn:
        """End this task, and with it (srun --kill-on-bad-exit) the job."""
        folder.add_failure(failure)
        if failure.rank == 0:
            folder.note(failure.submission, failure.start, "failed", code=failure.code, problem=failure.problem)
        if failure.problem:
            print(f"error: {failure.problem}", file=sys.stderr, flush=True)
        sys.exit(failure.code)


def check_paths(run: str | Path) -> str:
    """Return what this node cannot read or write of what the run needs, empty where all is there.

    Once a node, before training: a file system that one node of many has not mounted is common.
    """
    cfg = yaml.safe_load(JobFolder(run).config.read_text())
    data, problems = cfg["DATA"], []
    needed = {} if data["GENERATE"] else {"DATA.ROOT": Path(data["ROOT"])}
    if needed:
        splits = {"train": ("TRAIN", "VAL", "TEST"), "test": ("TEST",)}.get(cfg["MODE"], ("TRAIN", "TEST"))
        names = [f"{split}_LIST" for split in splits] + ["CLASSES"]
        needed |= {f"DATA.{name}": Path(data["ROOT"]) / data[name] for name in names if data[name]}
    if cfg["MODEL"]["INIT"] and not JobFolder(run).newest_step():
        needed["MODEL.INIT"] = Path(cfg["MODEL"]["INIT"])
    for name, path in needed.items():
        try:
            if path.is_dir():
                next(path.iterdir(), None)
            else:
                with path.open("rb") as file:
                    file.read(1)
        except OSError as error:
            problems.append(f"{name} {path} ({error.strerror})")
    if not os.access(run, os.W_OK):
        problems.append(f"OUTPUT_DIR {run} (cannot be written)")
    if not problems:
        return ""
    return f"node {_host()} cannot use {', '.join(problems)}; mount or copy what is missing there, or exclude the node"


def job_facts(job: str) -> dict[str, str]:
    """Return what ``scontrol show job`` says, empty where it does not answer."""
    try:
        command = ["scontrol", "--oneliner", "show", "job", job]
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(word.split("=", 1) for word in said.split() if "=" in word)


def _host() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
