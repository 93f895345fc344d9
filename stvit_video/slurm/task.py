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
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import submitit

from stvit_video.common.cli import EXIT_STOPPED
from stvit_video.common.files import write_json
from stvit_video.config.yaml_text import parse_yaml, read_text
from stvit_video.runtime.launchers import host_name
from stvit_video.slurm.jobs import ClusterJob, read_json, run_client

POLL_S = 0.2
OWNER_EVERY_S = 5.0
EARLY_WARNING_S = 65  # SLURM may send its warning a minute early
REQUEUE_S = 20  # between warning and time limit, reserved for requeueing

NO_SCONTROL = (
    "warning: no scontrol on this node's PATH, so the job cannot have itself queued again: after a time limit, go on "
    "with slurm/submit.py resume. In a container, bring SLURM's commands in (slurm/profiles/container.yaml)."
)
TOLD_TO_END = "told to end"
OWNER = "owner.json"

# Starts Python in a task. A warning that comes before Python has its handlers would kill the task: it is blocked until
# then or, with an `env` older than 2019 (coreutils 8.31), ignored.
GUARD = (
    "env --block-signal=USR1,USR2 true 2>/dev/null && "
    'exec env --block-signal=USR1,USR2 "$@"; trap "" USR1 USR2; exec "$@"'
)
BLOCKED = (signal.SIGUSR1, signal.SIGUSR2)

Signals = list[tuple[signal.Signals, float]]


def catch_signals() -> Signals:
    """Return a list to which each signal that announces the end of the job is added, with its time.monotonic()."""
    received: Signals = []
    for number in (*BLOCKED, signal.SIGTERM):  # replaces submitit's handlers, which requeue at once
        signal.signal(number, lambda number, frame: received.append((signal.Signals(number), time.monotonic())))
    signal.signal(signal.SIGCONT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED)
    return received


@dataclass
class Task:
    """The callable that submitit pickles and starts once per task: queued jobs need its name and fields as they are."""

    run: str  # the run folder; its paths are absolute
    submission: str  # key of the submission in the run folder
    minutes: int
    warning_s: int
    max_timeouts: int

    def __call__(self) -> None:
        """Train, and exit with a code that tells SLURM what to do: an error only where the job has to end."""
        begun = time.monotonic()
        signals = catch_signals()
        self.begin(submitit.JobEnvironment(), signals, begun)
        if self.environment.cluster != "debug":
            # submitit would take a result that an earlier start left for the result of this one.
            self.environment.paths.result_pickle.unlink(missing_ok=True)
        if self.rank == 0:
            write_json(self.job.path / OWNER, self.owner)
            hosts = list(self.environment.hostnames)
            step = self.job.newest_step()
            self.job.add_event(self.start, "started", job=self.job.id, hosts=hosts, step=step)
            if self.job.cluster == "slurm" and shutil.which("scontrol") is None:
                print(NO_SCONTROL, file=sys.stderr, flush=True)
        if self.environment.local_rank == 0 and (problem := check_paths(self.job)):
            self._fail(2, problem)
        code = self._train()
        if code == 0:
            if self.rank == 0:
                self.job.add_event(self.start, "done")
            return
        # After a warning the run continues from its newest checkpoint, whatever ended this process.
        if code != EXIT_STOPPED and not self.signals:
            self._fail(code)
        # The other ranks exit with 0: on an error srun would kill rank 0 while it requeues the job.
        if self.rank == 0:
            self.requeue()
        sys.exit(0)

    def begin(self, environment: submitit.JobEnvironment, signals: Signals, begun: float) -> None:
        """Note where this start runs, the signals that it receives, and the time.monotonic() at which it began."""
        self.environment, self.signals, self.begun = environment, signals, begun
        run = Path(self.run)
        self.job = ClusterJob(run, environment.cluster, environment.job_id, run / "slurm", self.submission)
        self.rank = environment.global_rank
        self.start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        if environment.cluster != "slurm":
            self.start = len(self.job.events("started"))
        self.owner = {"submission": self.submission, "start": self.start}

    def _train(self) -> int:
        """Run training in a process of its own, and return its exit code as a shell would."""
        command = [sys.executable, "-m", "stvit_video.run", "--cfg", str(self.job.path / "config.yaml")]
        child = subprocess.Popen(command, env={**os.environ, "PYTHONUNBUFFERED": "1"}, start_new_session=True)
        passed_on = False
        checked = time.monotonic()
        save_s = max(5, self.warning_s - REQUEUE_S)
        try:
            while child.poll() is None:
                time.sleep(POLL_S)
                received, at = self.signals[0] if self.signals else (None, 0.0)
                now = time.monotonic()
                if received is not None and not passed_on:
                    print(f"{host_name()}: {received.name} received", file=sys.stderr, flush=True)
                    child.send_signal(received)
                    passed_on = True
                if received is signal.SIGUSR2 and now - at > save_s:
                    print("error: no checkpoint in time: the last one has to do", file=sys.stderr, flush=True)
                    os.killpg(child.pid, signal.SIGKILL)
                if self.rank == 0 and now - checked > OWNER_EVERY_S:
                    checked = now
                    if read_json(self.job.path / OWNER) not in (self.owner, None):
                        # SLURM gave up this node, which still works, and started the job elsewhere.
                        print("error: this job runs elsewhere by now: ending here", file=sys.stderr, flush=True)
                        os.killpg(child.pid, signal.SIGKILL)
        except KeyboardInterrupt:  # cluster debug, in a terminal
            child.send_signal(signal.SIGINT)
            child.wait()
        return child.returncode if child.returncode >= 0 else 128 - child.returncode

    def requeue(self) -> None:
        """Have the job queued again, unless it is to end or has timed out too often."""
        step = self.job.newest_step()
        reason = self.stop_reason()
        self.job.add_event(self.start, "stopped", reason=reason, step=step)
        print(f"stopped at step {step}: {reason}", flush=True)
        if reason == TOLD_TO_END:
            return
        timeouts = sum(row["reason"] == "time limit" for row in self.job.events("stopped"))
        go_on = f"go on with: python slurm/submit.py resume {self.run}"
        if timeouts > self.max_timeouts and reason == "time limit":
            self._fail(1, f"timed out {timeouts} times, and max_timeouts is {self.max_timeouts}; {go_on}")
        self.job.add_event(self.start, "requeued", reason=reason, step=step)
        try:
            self.environment._requeue(self.max_timeouts - timeouts)
        except (OSError, subprocess.SubprocessError) as error:
            if getattr(error, "returncode", 1) in (-signal.SIGTERM, -signal.SIGKILL):
                return  # SLURM already ends all processes of the job, and with them scontrol
            self._fail(1, f"stopped at step {step}, but SLURM did not queue the job again ({error}); {go_on}")

    def stop_reason(self) -> str:
        """Return why the job was stopped."""
        ok, said = False, ""
        if self.job.cluster == "slurm":
            ok, said = run_client("scontrol", "--oneliner", "show", "job", self.job.id)
        facts = dict(word.split("=", 1) for word in said.split() if ok and "=" in word)  # else judge by the signal
        if facts.get("JobState", "RUNNING") != "RUNNING":
            return TOLD_TO_END
        if facts.get("PreemptTime", "None") not in ("None", "N/A", "Unknown"):  # at some sites with SIGTERM
            return "preempted"
        if not self.signals:
            return "signal to a process"
        received, _ = self.signals[0]
        if received is signal.SIGTERM:  # from scancel, from scontrol requeue, or from srun after another task failed
            return TOLD_TO_END
        if time.monotonic() - self.begun >= 60 * self.minutes - self.warning_s - EARLY_WARNING_S:
            return "time limit"
        return f"signal {received.name}"

    def _fail(self, code: int, problem: str = "") -> NoReturn:
        """Record a failure and end this task, and with it (srun --kill-on-bad-exit) the job."""
        self.job.add_failure(self.start, self.rank, host_name(), code, problem)
        if self.rank == 0:
            self.job.add_event(self.start, "failed", code=code, problem=problem)
        if problem:
            print(f"error: {problem}", file=sys.stderr, flush=True)
        sys.exit(code)


def check_paths(job: ClusterJob) -> str:
    """Return which files of the run this node cannot use, or "": one of many nodes may lack a mounted file system."""
    config = parse_yaml(read_text(job.path / "config.yaml"))
    data, problems, needed = config["DATA"], [], {}
    if not data["GENERATE"]:
        splits = {"train": ("TRAIN", "VAL", "TEST"), "test": ("TEST",)}.get(config["MODE"], ("TRAIN", "TEST"))
        names = [*(f"{split}_LIST" for split in splits), "CLASSES"]
        needed = {"DATA.ROOT": Path(data["ROOT"])}
        needed |= {f"DATA.{name}": Path(data["ROOT"], data[name]) for name in names if data[name]}
    if config["MODEL"]["INIT"] and not job.newest_step():
        needed["MODEL.INIT"] = Path(config["MODEL"]["INIT"])
    for name, path in needed.items():
        try:
            os.close(os.open(path, os.O_RDONLY))  # of a folder too
        except OSError as error:
            problems.append(f"{name} {path} ({error.strerror})")
    if not os.access(job.run, os.W_OK):
        problems.append(f"OUTPUT_DIR {job.run} (cannot be written)")
    remedy = "mount or copy what is missing there, or exclude the node"
    return f"node {host_name()} cannot use {', '.join(problems)}; {remedy}" if problems else ""
