"""Submitting runs, and asking what became of them."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import submitit
import yaml
from fvcore.common.config import CfgNode
from submitit.core.utils import FailedJobError, FailedSubmissionError

import stvit_video
from stvit_video.common.errors import UsageError
from stvit_video.slurm.records import JobFolder
from stvit_video.slurm.request import Profile, Request
from stvit_video.slurm.task import Task

# SLURM's names of states that a job does not leave by itself. All others (RUNNING, PENDING, COMPLETING ...) go on.
ENDED = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE",
    "REVOKED", "SPECIAL_EXIT", "GONE",
}  # fmt: skip
GONE = "GONE"  # no longer known to SLURM
NO_ANSWER = "NO ANSWER"


@dataclass(frozen=True)
class Job:
    """A submitted run."""

    run: Path
    cluster: str
    id: str
    logs: Path
    submission: str  # its key in the run folder

    @property
    def folder(self) -> JobFolder:
        return JobFolder(self.run)

    def log(self, rank: int = 0) -> Path:
        """Return where a task's output is."""
        return self.logs / f"{self.id}_{rank}_log.out"

    def is_done(self) -> bool:
        """Say whether rank 0 saw the run to its end: SLURM's word for it says less."""
        return any(row["event"] == "done" for row in self.folder.events(self.submission))

    def state(self) -> tuple[str, str]:
        """Return the job's state and, where SLURM gives any, reason or nodes. Asks once, and waits for a minute."""
        if self.cluster != "slurm":
            return self._local_state(), ""
        known, said = _ask("squeue", "--noheader", "--array", "--states=all", "--format=%T|%r|%N", f"--jobs={self.id}")
        if known and said:
            state, reason, nodes = said.splitlines()[0].split("|")
            return state, nodes or ("" if reason == "None" else reason)
        if not known and "Invalid job id" not in said:
            return NO_ANSWER, said
        # Forgotten by the controller; where there is accounting, that still knows it.
        known, said = _ask("sacct", "--noheader", "--allocations", "--parsable2", "--format=State", f"--jobs={self.id}")
        return (said.split()[0], "") if known and said else (GONE, "")

    def _local_state(self) -> str:
        try:
            command = Path(f"/proc/{self.id}/cmdline").read_bytes()
        except OSError:
            command = b""
        if b"submitit.local" in command:
            return "RUNNING"
        return "COMPLETED" if self.is_done() else "FAILED"


def _ask(*command: str) -> tuple[bool, str]:
    """Return whether SLURM answered, and what it said."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    return found.returncode == 0, (found.stdout if found.returncode == 0 else found.stderr).strip()


def submit(
    configs: Sequence[CfgNode], request: Request, cluster: str, logs: Path, about: dict[str, Any], copy: bool = False
) -> list[Job]:
    """Submit a job a configuration, as one array where there are several; all paths in them are absolute.

    The run folders are marked, and emptied where the configuration says OVERWRITE, before anything is submitted. The
    jobs run from the package as it will be then, or from a ``copy``. Raises UsageError where the cluster refuses.
    """
    check_cluster(cluster, len(configs), request)
    if cluster == "slurm" and any(cfg.OVERWRITE for cfg in configs):
        _rehearse(request, logs, len(configs))  # nothing is deleted for a job that SLURM would not take
    for cfg in configs:
        _prepare(cfg)
    logs.mkdir(parents=True, exist_ok=True)
    if copy:
        request = replace(request, source=str(copy_source(logs)))
    executor = build_executor(request, cluster, logs)
    profile = request.profile
    keys = [uuid.uuid4().hex[:12] for _ in configs]
    limits = (profile.minutes, profile.warning_s, profile.max_timeouts)
    tasks = [Task(cfg.OUTPUT_DIR, key, *limits) for cfg, key in zip(configs, keys, strict=True)]
    with _outside_jobs(), _in_folder(request.source), _deaf_to_ctrl_c(cluster):
        try:
            with redirect_stderr(StringIO()), executor.batch():  # submitit repeats there what sbatch says
                submitted = [executor.submit(task) for task in tasks]
        except (FailedJobError, FailedSubmissionError) as error:
            raise UsageError(_explain_refusal(str(error))) from error
        jobs = [
            Job(Path(task.run), cluster, job.job_id, logs, task.submission)
            for task, job in zip(tasks, submitted, strict=True)
        ]
        for job in jobs:
            record = {
                "id": job.id,
                "submission": job.submission,
                "cluster": cluster,
                "logs": str(logs),
                "request": asdict(request),
                **about,
            }
            job.folder.write(job.folder.job, record)
        if cluster == "debug":
            submitted[0].results()
    return jobs


@contextmanager
def _outside_jobs() -> Iterator[None]:
    """Hide the variables of a job that we are in from the one we submit; which cluster is meant stays."""
    conf = os.environ.get("SLURM_CONF")
    with submitit.helpers.clean_env():
        if conf is not None:
            os.environ["SLURM_CONF"] = conf
        yield


@contextmanager
def _in_folder(path: str) -> Iterator[None]:
    """Stay in a folder: where tasks start, and so where the package is imported from."""
    before = os.getcwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


def check_cluster(cluster: str, jobs: int, request: Request) -> None:
    """Raise UsageError where ``cluster`` cannot be used from here."""
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise UsageError(
            "sbatch is not on the PATH, so this is no login node of a SLURM cluster; go to one, use --cluster local to "
            "run on this machine, or try slurm/local_cluster.sh."
        )
    if cluster != "slurm" and (jobs > 1 or request.nodes > 1 or (cluster == "debug" and request.tasks > 1)):
        most = "one process" if cluster == "debug" else "one configuration on one node"
        raise UsageError(f"--cluster {cluster} runs {most}; use --cluster slurm for {jobs} of {request.nodes} node(s).")


def build_executor(request: Request, cluster: str, logs: Path) -> submitit.AutoExecutor:
    """Return submitit's executor for the job."""
    python = {"slurm_python": request.launcher()} if cluster == "slurm" else {}
    executor = submitit.AutoExecutor(logs, cluster=cluster, **python)
    executor.update_parameters(**request.parameters())
    if cluster == "local":
        executor.update_parameters(local_setup=[*request.profile.setup])
        executor._executor.parameters["signal_delay_s"] = request.profile.warning_s
    return executor


@contextmanager
def _deaf_to_ctrl_c(cluster: str) -> Iterator[None]:
    """Start a local job's processes deaf to the terminal's Ctrl-C, which is for the command that follows them."""
    if cluster != "local" or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is ignored stays so in new processes
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _prepare(cfg: CfgNode) -> None:
    """Make a folder the run's and put into it what the job will run."""
    from stvit_video.runs.folder import build_run_folder

    folder = JobFolder(cfg.OUTPUT_DIR)
    earlier = read_job(folder.run)
    if earlier is not None and earlier.state()[0] not in ENDED:
        raise UsageError(
            f"OUTPUT_DIR {folder.run} belongs to job {earlier.id}, which has not ended; give another one, or end that "
            f"job: python slurm/submit.py cancel {folder.run}"
        )
    run = build_run_folder(cfg)
    run.check()
    if run.is_finished() and cfg.MODE == "train" and not cfg.OVERWRITE:
        raise UsageError(f"OUTPUT_DIR {run.path} is finished; give another one, or OVERWRITE True to run it again.")
    run.claim()
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OVERWRITE = False  # done; the job continues each time it starts
    folder.path.mkdir(exist_ok=True)
    folder.config.write_text(cfg.dump())


def _rehearse(request: Request, logs: Path, jobs: int) -> None:
    """Raise UsageError where sbatch would refuse the job."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as script, _outside_jobs():
        script.write(request.sbatch_text(logs, jobs))
        script.flush()
        known, said = _ask("sbatch", "--test-only", script.name)
    if not known:
        raise UsageError(_explain_refusal(said))


def _explain_refusal(said: str) -> str:
    """Return sbatch's reason on one line, with a remedy."""
    lines = [line.partition(":")[2].removeprefix(" error:").strip() for line in said.splitlines() if "sbatch:" in line]
    reason = lines[-1] if lines else (said.strip().splitlines() or ["no reason given"])[-1]
    known, listed = _ask("sinfo", "--noheader", "--format=%R: %D node(s) of %c CPUs, %G, at most %l")
    offers = f" Partitions here: {'; '.join(dict.fromkeys(listed.splitlines()))}." if known and listed else ""
    return f"sbatch refused the job: {reason.rstrip('.')}.{offers} Correct the profile, --nodes or --gpus-per-node."


def read_job(run: Path) -> Job | None:
    """Return the job that was submitted last for a run folder, None where none was."""
    try:
        record = json.loads(JobFolder(run).job.read_text())
    except FileNotFoundError:
        return None
    return Job(run, record["cluster"], record["id"], Path(record["logs"]), record["submission"])


def find_jobs(folder: Path) -> list[Job]:
    """Return the jobs of a run folder, or of all run folders of an array. Raises UsageError where there is none."""
    single = read_job(folder)
    if single is not None:
        return [single]
    try:
        runs = json.loads((folder / "slurm" / "array.json").read_text())
    except FileNotFoundError:
        raise UsageError(f"{folder} holds no submitted job; give the OUTPUT_DIR that submit.py printed.") from None
    jobs = [read_job(Path(run)) for run in runs]
    return [job for job in jobs if job is not None]


def resume(job: Job) -> Job:
    """Submit the run of a job again, as it was; it continues at its newest checkpoint."""
    state, _ = job.state()
    if state not in ENDED:
        raise UsageError(f"{job.run} belongs to job {job.id}, which is {state}; there is nothing to resume.")
    record = json.loads(job.folder.job.read_text())
    given = record.pop("request")
    request = Request(**given | {"profile": Profile(**given["profile"])})
    cfg = CfgNode(yaml.safe_load(job.folder.config.read_text()))
    about = {name: value for name, value in record.items() if name not in ("id", "cluster", "logs", "submission")}
    return submit([cfg], request, job.cluster, job.logs, about)[0]


def cancel(job: Job) -> None:
    """End a job; what it has trained stays."""
    if job.cluster == "slurm":
        known, said = _ask("scancel", job.id)
        if not known:
            raise UsageError(f"scancel {job.id}: {said.splitlines()[-1] if said else 'no answer'}; try again.")
    elif job.state()[0] == "RUNNING":
        os.kill(int(job.id), 15)


def expand_grid(text: str) -> Iterator[list[str]]:
    """Yield the overrides of each point of a grid such as ``OPTIM.LR=1e-3,3e-4 SEED=0,1``: here four.

    Commas within brackets do not separate. Raises UsageError where there is no ``=``.
    """
    axes = []
    for word in text.split():
        key, equals, values = word.partition("=")
        if not (key and equals and values):
            raise UsageError(f"--array {text!r}: {word!r} is not KEY=VALUE,VALUE; write 'OPTIM.LR=1e-3,3e-4 SEED=0,1'.")
        axes.append([f"{key}={value}" for value in _split(values)])
    if not axes:
        raise UsageError("--array is empty; write 'OPTIM.LR=1e-3,3e-4 SEED=0,1'.")
    for point in itertools.product(*axes):
        yield list(point)


def _split(values: str) -> list[str]:
    parts, depth = [""], 0
    for letter in values:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def copy_source(to: Path) -> Path:
    """Copy the package to a new folder under ``to``, so that jobs that wait do not see later changes."""
    package = Path(stvit_video.__file__).parent
    for number in itertools.count(1):
        target = to / f"source{number}"
        if not target.exists():
            shutil.copytree(package, target / package.name, ignore=shutil.ignore_patterns("__pycache__"))
            return target
    raise AssertionError
