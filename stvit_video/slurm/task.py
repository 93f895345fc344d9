"""What runs on the nodes: a small process beside each training process.

It catches SLURM's warning from its first moment on, passes it on to training, and has the job queued again when all
processes have saved. Training itself is ``python -m stvit_video.run`` in a process of its own.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import submitit
import yaml

from stvit_video.common.cli import EXIT_STOPPED
from stvit_video.common.files import write_json
from stvit_video.runtime.launchers import host_name
from stvit_video.slurm.records import JobFolder, TaskFailure, read_json

POLL_S = 0.2
OWNER_EVERY_S = 5.0
EARLY_WARNING_S = 65  # SLURM may send its warning a minute early
REQUEUE_S = 20  # between warning and time limit, reserved for requeueing

NO_SCONTROL = (
    "warning: no scontrol on this node's PATH, so the job cannot have itself queued again: after a time limit, go on "
    "with slurm/submit.py resume. In a container, bring SLURM's commands in (slurm/profiles/container.yaml)."
)
TOLD_TO_END = "told to end"

# Starts Python in a task. A warning that comes before Python has its handlers would kill the task: it is blocked until
# then or, with an `env` older than 2019 (coreutils 8.31), ignored.
GUARD = (
    "env --block-signal=USR1,USR2 true 2>/dev/null && "
    'exec env --block-signal=USR1,USR2 "$@"; trap "" USR1 USR2; exec "$@"'
)
BLOCKED = (signal.SIGUSR1, signal.SIGUSR2)


class WarningSignals:
    """Handlers of the signals that announce the end of the job. The first one is kept in ``received``."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.passed_on = False
        self.at = 0.0
        for number in (*BLOCKED, signal.SIGTERM):  # replaces submitit's handlers, which requeue at once
            signal.signal(number, self._handle)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self.at = signal.Signals(number), time.monotonic()


@dataclass(frozen=True)
class Task:
    """The callable that submitit pickles and starts once per task: queued jobs need its name and fields as they are."""

    run: str  # the run folder; its paths are absolute
    submission: str  # key of the submission in the run folder
    minutes: int
    warning_s: int
    max_timeouts: int

    def __call__(self) -> None:
        """Train, and exit with a code that tells SLURM what to do."""
        begun, signals, environment = time.monotonic(), WarningSignals(), submitit.JobEnvironment()
        if environment.cluster == "slurm":
            start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        else:
            start = sum(row["event"] == "started" for row in JobFolder(self.run).events(self.submission))
        TaskStart(self, signals, environment, start, begun).run()


@dataclass
class TaskStart:
    """One start of a task: a job that is queued again starts its tasks again."""

    task: Task
    signals: WarningSignals
    environment: submitit.JobEnvironment
    start: int  # its number
    begun: float  # time.monotonic()

    def __post_init__(self) -> None:
        self.folder, self.rank = JobFolder(self.task.run), self.environment.global_rank
        self.owner = {"submission": self.task.submission, "start": self.start}

    def run(self) -> None:
        """Train; exit with an error only where the job has to end."""
        if self.environment.cluster != "debug":
            # submitit would take a result that an earlier start left for the result of this one.
            self.environment.paths.result_pickle.unlink(missing_ok=True)
        if self.rank == 0:
            write_json(self.folder.owner, self.owner)
            hosts, step = list(self.environment.hostnames), self.folder.newest_step()
            self._add_event("started", job=self.environment.job_id, hosts=hosts, step=step)
            if self.environment.cluster == "slurm" and shutil.which("scontrol") is None:
                print(NO_SCONTROL, file=sys.stderr, flush=True)
        problem = check_paths(self.task.run) if self.environment.local_rank == 0 else ""
        if problem:
            self._fail(2, problem)
        code = self._train()
        if code == 0:
            if self.rank == 0:
                self._add_event("done")
            return
        # After a warning the run continues from its newest checkpoint, whatever ended this process.
        if code != EXIT_STOPPED and self.signals.received is None:
            self._fail(code)
        # The other ranks exit with 0: on an error srun would kill rank 0 while it requeues the job.
        if self.rank == 0:
            self._requeue()
        sys.exit(0)

    def _train(self) -> int:
        """Run training in a process of its own, and return its exit code as a shell would."""
        command = [sys.executable, "-m", "stvit_video.run", "--cfg", str(self.folder.config)]
        child = subprocess.Popen(command, env={**os.environ, "PYTHONUNBUFFERED": "1"}, start_new_session=True)
        signals, checked = self.signals, time.monotonic()
        save_s = max(5, self.task.warning_s - REQUEUE_S)
        try:
            while child.poll() is None:
                time.sleep(POLL_S)
                now = time.monotonic()
                if signals.received is not None and not signals.passed_on:
                    print(f"{host_name()}: {signals.received.name} received", file=sys.stderr, flush=True)
                    child.send_signal(signals.received)
                    signals.passed_on = True
                if signals.received is signal.SIGUSR2 and now - signals.at > save_s:
                    print("error: no checkpoint in time: the last one has to do", file=sys.stderr, flush=True)
                    os.killpg(child.pid, signal.SIGKILL)
                if self.rank == 0 and now - checked > OWNER_EVERY_S:
                    checked = now
                    if read_json(self.folder.owner) not in (self.owner, None):
                        # SLURM gave up this node, which still works, and started the job elsewhere.
                        print("error: this job runs elsewhere by now: ending here", file=sys.stderr, flush=True)
                        os.killpg(child.pid, signal.SIGKILL)
        except KeyboardInterrupt:  # cluster debug, in a terminal
            child.send_signal(signal.SIGINT)
            child.wait()
        return child.returncode if child.returncode >= 0 else 128 - child.returncode

    def _requeue(self) -> None:
        """Have the job queued again, unless it is to end or has timed out too often."""
        step, reason = self.folder.newest_step(), self._stop_reason()
        self._add_event("stopped", reason=reason, step=step)
        print(f"stopped at step {step}: {reason}", flush=True)
        if reason == TOLD_TO_END:
            return
        events = self.folder.events(self.task.submission)
        timeouts = sum(row["event"] == "stopped" and row["reason"] == "time limit" for row in events)
        most = self.task.max_timeouts
        go_on = f"go on with: python slurm/submit.py resume {self.task.run}"
        if timeouts > most and reason == "time limit":
            self._fail(1, f"timed out {timeouts} times, and max_timeouts is {most}; {go_on}")
        self._add_event("requeued", reason=reason, step=step)
        try:
            self.environment._requeue(most - timeouts)
        except (OSError, subprocess.SubprocessError) as error:
            if getattr(error, "returncode", 1) in (-signal.SIGTERM, -signal.SIGKILL):
                return  # SLURM already ends all processes of the job, and with them scontrol
            self._fail(1, f"stopped at step {step}, but SLURM did not queue the job again ({error}); {go_on}")

    def _stop_reason(self) -> str:
        """Return why the job was stopped.

        Some sites preempt with SIGTERM. Otherwise it comes from scancel, from scontrol requeue, or from srun after
        another task has failed: none of these is to be queued again from here.
        """
        received, said = self.signals.received, ""
        if self.environment.cluster == "slurm":
            command = ["scontrol", "--oneliner", "show", "job", self.environment.job_id]
            with suppress(OSError, subprocess.SubprocessError):  # no answer: judge by the signal
                said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        facts = dict(word.split("=", 1) for word in said.split() if "=" in word)
        if facts.get("JobState", "RUNNING") != "RUNNING":
            return TOLD_TO_END
        if facts.get("PreemptTime", "None") not in ("None", "N/A", "Unknown"):
            return "preempted"
        if received is signal.SIGTERM:
            return TOLD_TO_END
        elapsed = time.monotonic() - self.begun
        if received is not None and elapsed >= 60 * self.task.minutes - self.task.warning_s - EARLY_WARNING_S:
            return "time limit"
        return f"signal {received.name}" if received else "signal to a process"

    def _fail(self, code: int, problem: str = "") -> NoReturn:
        """Record a failure and end this task, and with it (srun --kill-on-bad-exit) the job."""
        failure = TaskFailure(self.task.submission, self.start, self.rank, host_name(), code, problem, time.time())
        self.folder.add_failure(failure)
        if self.rank == 0:
            self._add_event("failed", code=code, problem=problem)
        if problem:
            print(f"error: {problem}", file=sys.stderr, flush=True)
        sys.exit(code)

    def _add_event(self, event: str, **more: object) -> None:
        self.folder.add_event(self.task.submission, self.start, event, **more)


def check_paths(run: str | Path) -> str:
    """Return which files of the run this node cannot read or write, empty where it can use all.

    Called once per node before training: often one node of many has not mounted a file system.
    """
    config = yaml.safe_load(JobFolder(run).config.read_text())
    data, problems, needed = config["DATA"], [], {}
    if not data["GENERATE"]:
        splits = {"train": ("TRAIN", "VAL", "TEST"), "test": ("TEST",)}.get(config["MODE"], ("TRAIN", "TEST"))
        names = [*(f"{split}_LIST" for split in splits), "CLASSES"]
        needed = {"DATA.ROOT": Path(data["ROOT"])}
        needed |= {f"DATA.{name}": Path(data["ROOT"], data[name]) for name in names if data[name]}
    if config["MODEL"]["INIT"] and not JobFolder(run).newest_step():
        needed["MODEL.INIT"] = Path(config["MODEL"]["INIT"])
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
    return (
        f"node {host_name()} cannot use {', '.join(problems)}; mount or copy what is missing there, or exclude the node"
    )
