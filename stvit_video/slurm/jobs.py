"""Submitting runs as jobs, and asking for their state."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import submitit
from fvcore.common.config import CfgNode
from submitit.core.utils import FailedJobError, FailedSubmissionError

from stvit_video.common.errors import UsageError
from stvit_video.common.files import write_json
from stvit_video.config.load import load_config, override
from stvit_video.slurm.records import JobFolder
from stvit_video.slurm.request import JobRequest, Profile
from stvit_video.slurm.task import Task

# SLURM's final states of a job, although it may still queue the job again. All others (RUNNING, PENDING ...) go on.
GONE = "GONE"  # not SLURM's: it no longer knows the job
ENDED = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE",
    "REVOKED", "SPECIAL_EXIT", GONE,
}  # fmt: skip
NO_ANSWER = "NO ANSWER"


@dataclass(frozen=True)
class ClusterJob:
    """A run that was submitted as a job."""

    run: Path
    cluster: str
    id: str
    logs: Path
    submission: str  # key of the submission in the run folder

    @property
    def folder(self) -> JobFolder:
        return JobFolder(self.run)

    def log(self, rank: int = 0) -> Path:
        """Return the path of a task's output."""
        return self.logs / f"{self.id}_{rank}_log.out"

    def is_done(self) -> bool:
        """Say whether rank 0 recorded that the run is complete. SLURM's state alone does not tell."""
        return any(row["event"] == "done" for row in self.folder.events(self.submission))

    def state(self) -> tuple[str, str]:
        """Return the job's state and, where SLURM gives them, its nodes or a reason. Takes at most a minute."""
        if self.cluster != "slurm":
            with suppress(OSError):
                command = Path(f"/proc/{self.id}/cmdline").read_bytes()
                # Empty for a moment after the start, and of a zombie: it has ended, but submit.py has not noticed yet.
                is_starting = not command and "State:\tZ" not in Path(f"/proc/{self.id}/status").read_text()
                if is_starting or b"submitit.local" in command:
                    return "RUNNING", ""
            return "COMPLETED" if self.is_done() else "FAILED", ""
        ok, said = run_client(
            "squeue", "--noheader", "--array", "--states=all", "--format=%T|%r|%N", f"--jobs={self.id}"
        )
        if ok and said:
            state, reason, nodes = said.splitlines()[0].split("|")
            return state, nodes or ("" if reason == "None" else reason)
        if not ok and "Invalid job id" not in said:
            return NO_ANSWER, said
        # The controller forgets old jobs; accounting, where there is any, does not.
        ok, said = run_client(
            "sacct", "--noheader", "--allocations", "--parsable2", "--format=State", f"--jobs={self.id}"
        )
        return (said.split()[0], "") if ok and said else (GONE, "")


def run_client(*command: str, given: str | None = None) -> tuple[bool, str]:
    """Run one of SLURM's clients, with ``given`` as its input; return whether it succeeded, and its output or error."""
    try:
        found = subprocess.run(command, input=given, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    return found.returncode == 0, (found.stderr if found.returncode else found.stdout).strip()


def check_cluster(cluster: str, jobs: int, request: JobRequest) -> None:
    """Raise UsageError where ``cluster`` cannot be used from here."""
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise UsageError(
            "sbatch is not on the PATH, so this is no login node of a SLURM cluster; go to one, use --cluster local to "
            "run on this machine, or try slurm/local_cluster.sh."
        )
    if cluster != "slurm" and (jobs > 1 or request.nodes > 1 or (cluster == "debug" and request.tasks > 1)):
        most = "one process" if cluster == "debug" else "one configuration on one node"
        raise UsageError(f"--cluster {cluster} runs {most}; use --cluster slurm for {jobs} of {request.nodes} node(s).")


def open_job_folders(configs: Sequence[CfgNode], request: JobRequest, cluster: str, logs: Path) -> list[JobFolder]:
    """Claim a run folder for each job, and write into it the configuration, with absolute paths, that the job will run.

    Folders are cleared where the configuration says OVERWRITE. Raises UsageError, before any folder is changed, where
    the cluster cannot be used.
    """
    from stvit_video.runs.folder import build_run_folder

    check_cluster(cluster, len(configs), request)
    if cluster == "slurm" and any(cfg.OVERWRITE for cfg in configs):  # delete nothing for a job that SLURM would refuse
        with _outside_jobs():
            ok, said = run_client("sbatch", "--test-only", given=request.sbatch_text(logs, len(configs)))
        if not ok:
            raise UsageError(_explain_refusal(said))
    folders = [JobFolder(cfg.OUTPUT_DIR) for cfg in configs]
    for cfg, folder in zip(configs, folders, strict=True):
        earlier = read_job(folder.run)
        if earlier is not None and earlier.state()[0] not in ENDED:
            raise UsageError(
                f"OUTPUT_DIR {folder.run} belongs to job {earlier.id}, which has not ended; give another one, or end "
                f"that job: python slurm/submit.py cancel {folder.run}"
            )
        run = build_run_folder(cfg)
        run.check()
        if run.is_finished() and cfg.MODE == "train" and not cfg.OVERWRITE:
            raise UsageError(f"OUTPUT_DIR {run.path} is finished; give another one, or OVERWRITE True to run it again.")
        run.claim()
        cfg = override(cfg, [("OVERWRITE", False)], "a job")  # the folder is cleared; each start of the job continues
        folder.path.mkdir(exist_ok=True)
        folder.config.write_text(cfg.dump())
    logs.mkdir(parents=True, exist_ok=True)
    return folders


def submit(
    folders: Sequence[JobFolder], request: JobRequest, cluster: str, logs: Path, about: dict[str, Any]
) -> list[ClusterJob]:
    """Submit a job for each run folder, as one array where there are several, and record it there with ``about``.

    Raises UsageError where the cluster refuses.
    """
    executor, profile = request.executor(cluster, logs), request.profile
    limits = (profile.minutes, profile.warning_s, profile.max_timeouts)
    tasks = [Task(str(folder.run), uuid.uuid4().hex[:12], *limits) for folder in folders]
    with _outside_jobs(), ExitStack() as restore:
        restore.callback(os.chdir, os.getcwd())
        os.chdir(request.source)  # tasks start there, and import the package from there
        if cluster == "local":  # Ctrl-C in the terminal only stops following the job: its processes inherit this
            restore.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.SIG_IGN))
        try:
            with redirect_stderr(StringIO()), executor.batch():  # submitit repeats sbatch's message there
                submitted = [executor.submit(task) for task in tasks]
        except (FailedJobError, FailedSubmissionError) as error:
            raise UsageError(_explain_refusal(str(error))) from error
        jobs = [
            ClusterJob(folder.run, cluster, job.job_id, logs, task.submission)
            for folder, task, job in zip(folders, tasks, submitted, strict=True)
        ]
        for job in jobs:
            record = {"id": job.id, "submission": job.submission, "cluster": cluster, "logs": str(logs)}
            write_json(job.folder.job, {**record, "request": asdict(request), **about})
        if cluster == "debug":
            submitted[0].results()
    return jobs


@contextmanager
def _outside_jobs() -> Iterator[None]:
    """Hide the variables of an enclosing job from the submission, except which cluster is meant."""
    conf = os.environ.get("SLURM_CONF")
    with submitit.helpers.clean_env():
        if conf is not None:
            os.environ["SLURM_CONF"] = conf
        yield


def _explain_refusal(said: str) -> str:
    """Return sbatch's reason and what the cluster offers, on one line."""
    lines = [line.partition(":")[2].removeprefix(" error:").strip() for line in said.splitlines() if "sbatch:" in line]
    reason = lines[-1] if lines else (said.strip().splitlines() or ["no reason given"])[-1]
    ok, listed = run_client("sinfo", "--noheader", "--format=%R: %D node(s) of %c CPUs, %G, at most %l")
    offers = f" Partitions here: {'; '.join(dict.fromkeys(listed.splitlines()))}." if ok and listed else ""
    return f"sbatch refused the job: {reason.rstrip('.')}.{offers} Correct the profile, --nodes or --gpus-per-node."


def read_job(run: Path) -> ClusterJob | None:
    """Return the job that was last submitted for a run folder, None where none was."""
    path = JobFolder(run).job
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    return ClusterJob(run, record["cluster"], record["id"], Path(record["logs"]), record["submission"])


def find_jobs(folder: Path) -> list[ClusterJob]:
    """Return the jobs of a run folder, or of all run folders of an array. Raises UsageError where there is none."""
    array = folder / "slurm" / "array.json"
    runs = json.loads(array.read_text()) if array.is_file() and not JobFolder(folder).job.is_file() else [folder]
    jobs = [job for run in runs if (job := read_job(Path(run))) is not None]
    if not jobs:
        raise UsageError(f"{folder} holds no submitted job; give the OUTPUT_DIR that submit.py printed.")
    return jobs


def resume(job: ClusterJob) -> ClusterJob:
    """Submit the run of a job again with the same request; it continues at its newest checkpoint."""
    state, _ = job.state()
    if state not in ENDED:
        raise UsageError(f"{job.run} belongs to job {job.id}, which is {state}; there is nothing to resume.")
    record = json.loads(job.folder.job.read_text())
    given = record.pop("request")
    request = JobRequest(**given | {"profile": Profile(**given["profile"])})
    about = {name: value for name, value in record.items() if name not in ("id", "cluster", "logs", "submission")}
    config = load_config(job.folder.config)
    folders = open_job_folders([config], request, job.cluster, job.logs)
    return submit(folders, request, job.cluster, job.logs, about)[0]


def cancel(job: ClusterJob) -> None:
    """End a job; its checkpoints stay."""
    if job.cluster == "slurm":
        ok, said = run_client("scancel", job.id)
        if not ok:
            raise UsageError(f"scancel {job.id}: {said.splitlines()[-1] if said else 'no answer'}; try again.")
    elif job.state()[0] == "RUNNING":
        # submitit's controller ends when its tasks do, and so does the shell around it that runs the profile's setup,
        # in which a signal would not reach the controller.
        children_file = Path(f"/proc/{job.id}/task/{job.id}/children")
        children = children_file.read_text().split() if children_file.is_file() else []
        for process in children or [job.id]:
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGTERM)


def expand_grid(text: str) -> list[list[str]]:
    """Return the overrides of each point of a grid such as ``OPTIM.LR=1e-3,3e-4 SEED=0,1``: here four.

    Commas within brackets do not separate. Raises UsageError where there is no ``=``.
    """
    axes = []
    for word in text.split() or [text]:
        key, equals, values = word.partition("=")
        if not (key and equals and values):
            raise UsageError(f"--array {text!r}: {word!r} is not KEY=VALUE,VALUE; write 'OPTIM.LR=1e-3,3e-4 SEED=0,1'.")
        axes.append([f"{key}={value}" for value in re.split(r",(?![^\[]*\])", values)])
    return [list(point) for point in itertools.product(*axes)]
