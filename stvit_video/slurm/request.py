"""Submitting runs as jobs: the profile of a site, the size of a job, and submission through submitit."""

import os
import re
import shlex
import shutil
import signal
import socket
import sys
import time
import uuid
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, field, fields
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints

import submitit
import yaml
from fvcore.common.config import CfgNode
from submitit.core.utils import FailedJobError, FailedSubmissionError

import stvit_video
from stvit_video.common.cli import Parser, number
from stvit_video.common.errors import UsageError, nearest
from stvit_video.common.files import write_atomically, write_json
from stvit_video.common.text import printable
from stvit_video.config.load import load_config, override
from stvit_video.config.yaml_text import parse_yaml, read_text
from stvit_video.slurm.jobs import ENDED, ClusterJob, check_owner, read_job, read_record, run_client
from stvit_video.slurm.task import GUARD, Task

if TYPE_CHECKING:
    from stvit_video.runs.folder import RunFolder


@dataclass(frozen=True)
class Profile:
    """What a site needs; slurm/profiles/example.yaml explains each key."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    time: str = "24:00:00"
    cpus_per_task: int = 0
    memory_gb: int = 0
    warning_s: int = 120
    max_timeouts: int = 10
    python: str = sys.executable
    container: str = ""
    modules: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    srun: list[str] = field(default_factory=list)
    sbatch: dict[str, Any] = field(default_factory=dict)

    @property
    def minutes(self) -> int:
        """The time limit. Raises UsageError where ``time`` is not in one of SLURM's formats."""
        match = re.fullmatch("(?:([0-9]{1,6})-)?([0-9]{1,6})(?::([0-9]{1,6}))?(:[0-9]{1,6})?", self.time)
        days, first, second, seconds = match.groups(default="") if match else ("", "0", "", "")
        # As in SLURM, 30:00 is half an hour, but after days the first number is hours.
        total = 60 * int(first) + int(second or 0) if days or seconds else int(first)
        total += 1440 * int(days or 0)
        if total < 1:
            raise UsageError(
                f"time {self.time!r:.80} is no time limit; write minutes, H:MM:SS or D-HH, at least a minute."
            )
        return total


def read_profile(path: str | Path | None, **changes: Any) -> Profile:
    """Return the profile in a YAML file, with ``changes`` that are not None. Raises UsageError, naming the key."""
    try:
        content = ({} if path is None else parse_yaml(read_text(Path(path)))) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UsageError(f"Profile {path} cannot be read ({reason:.120}); see slurm/profiles/.") from error
    if not isinstance(content, dict):
        raise UsageError(f"Profile {path} is not a list of lines `key: value`; see slurm/profiles/example.yaml.")
    return _check_profile(content | {name: value for name, value in changes.items() if value is not None}, path)


def _check_profile(content: dict[str, Any], path: str | Path | None) -> Profile:
    """Return a profile whose keys and values are of the right kind. Raises UsageError, naming the key."""
    types = get_type_hints(Profile)
    for name, value in content.items():
        if name not in types:
            near = nearest(str(name), list(types))
            raise UsageError(f"Profile {path}: {name!s:.80} is unknown.{near} Known are: {', '.join(types)}.")
        kind = get_origin(types[name]) or types[name]
        if kind is str and type(value) is int:
            value = content[name] = str(value)
        wrong = kind is list and isinstance(value, list) and not all(isinstance(one, str) for one in value)
        if wrong or not isinstance(value, kind) or isinstance(value, bool) or (kind is int and value < 0):
            takes = "list of texts" if kind is list else kind.__name__
            raise UsageError(f"Profile {path}: {name} is {value!r:.80}; it has to be a {takes}.")
        words = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
        for word in words:  # the lines of setup are commands; all else is a word in a line of the script
            if not isinstance(word, str | int | float) or printable(word, "\n\t" if name == "setup" else "") != str(
                word
            ):
                raise UsageError(f"Profile {path}: {name} holds {word!r:.80}; write text of one line, or a number.")
        if unfit := [key for key in value if not re.fullmatch(r"[A-Za-z][\w-]*", str(key))] if kind is dict else []:
            raise UsageError(f"Profile {path}: {unfit[0]!r:.80} is no option of sbatch; write its name without dashes.")
    profile = Profile(**content)
    if profile.warning_s >= 60 * profile.minutes:
        raise UsageError(f"warning_s is {profile.warning_s} but the job has {profile.minutes} minutes; lower it.")
    return profile


@dataclass(frozen=True)
class JobRequest:
    """The size of one job, and how it starts."""

    profile: Profile
    nodes: int
    gpus_per_node: int
    tasks_per_node: int
    cpus_per_task: int
    name: str
    source: str = str(Path(stvit_video.__file__).parent.parent)  # folder from which the package is imported

    def describe(self, jobs: int) -> str:
        """Return what ``jobs`` of this size take at most."""
        gpus, cpus = self.nodes * self.gpus_per_node, self.nodes * self.tasks_per_node * self.cpus_per_task
        hours = self.profile.minutes / 60
        return (
            f"{jobs} job(s) of {self.nodes} node(s) x {self.tasks_per_node} task(s) x {self.cpus_per_task} CPU(s), "
            f"{gpus} GPU(s), {hours:g} h at most before it is queued again: "
            f"{jobs * cpus * hours:g} CPU hours and {jobs * gpus * hours:g} GPU hours a start"
        )

    def executor(self, cluster: str, logs: Path) -> Any:
        """Return submitit's executor of this job, which writes to ``logs``."""
        profile, common = self.profile, {"signal_delay_s": self.profile.warning_s, "stderr_to_stdout": True}
        # SLURM replaces %j and the like in the names of logs, and a backslash changes how.
        if printable(logs) != str(logs) or re.search(r"[%\\]", str(logs)):
            given = f"OUTPUT_DIR {printable(logs.parent)}"
            raise UsageError(f"{given}: a job's folder cannot have control characters, % or \\ in its name; rename it.")
        if printable(self.source) != self.source:
            raise UsageError(
                f"the package lies in {printable(self.source)}; move it to a folder without control characters."
            )
        if cluster == "debug":
            return submitit.DebugExecutor(logs)
        if cluster == "local":
            executor = submitit.LocalExecutor(logs)
            sizes = {"tasks_per_node": self.tasks_per_node, "gpus_per_node": self.gpus_per_node}
            executor.update_parameters(timeout_min=profile.minutes, setup=profile.setup, **sizes, **common)
            if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
                executor.parameters["visible_gpus"] = visible.split(",")  # else submitit takes the machine's first GPUs
            return executor
        words = f"bash -c {shlex.quote(GUARD)} task {shlex.quote(profile.python)}"
        slurm = _SlurmExecutor(logs, python=f"{profile.container} {words}".strip())
        # What is 0 or empty in the profile is left to the site.
        slurm.update_parameters(
            job_name=re.sub(r"[^\w.+-]+", "-", self.name, flags=re.ASCII)[:64],
            time=profile.minutes,
            nodes=self.nodes,
            ntasks_per_node=self.tasks_per_node,
            cpus_per_task=self.cpus_per_task,
            gpus_per_node=self.gpus_per_node or None,
            mem=f"{profile.memory_gb}GB" if profile.memory_gb else None,
            **{name: getattr(profile, name) or None for name in ("partition", "account", "qos", "constraint")},
            **common,
            setup=[f"module load {shlex.quote(name)}" for name in profile.modules] + profile.setup,
            # From version 22.05 on, srun does not take the CPUs per task from sbatch.
            srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={self.cpus_per_task}", *profile.srun],
            additional_parameters={"requeue": True, "chdir": self.source, **profile.sbatch},
        )
        return slurm

    def sbatch_text(self, logs: Path, jobs: int) -> str:
        """Return the script that submitit passes to sbatch; needs no SLURM."""
        executor = self.executor("slurm", logs)
        if jobs > 1:
            executor.parameters["map_count"] = jobs
        return executor._make_submission_file_text(executor._submitit_command_str, "")


def add_sizes(parser: Parser) -> None:
    """Add the options of a submission that ``build_request`` reads, and how it is sent."""
    add = parser.add_argument
    count, some = number(int, 1), number(int, 0)
    add("--nodes", type=count, default=1, help="machines (default: %(default)s)")
    add("--gpus-per-node", type=some, metavar="G", help="GPUs of each, one process per GPU; 0: none")
    add("--tasks-per-node", type=some, metavar="T", help="processes per machine where there are no GPUs")
    add("--cpus-per-task", type=count, metavar="C", help="default: the profile's, else one more than its workers")
    add("--profile", metavar="FILE", help="what the site needs: slurm/profiles/NAME.yaml")
    add("--partition", metavar="NAME", help="instead of the profile's")
    add("--time", metavar="TIME", help="instead of the profile's: minutes, H:MM:SS or D-HH")
    add("--cluster", default="slurm", choices=("slurm", "local", "debug"), help="local, debug: here")
    add("--wait", action="store_true", help="follow the jobs; Ctrl-C leaves them running")
    add("--dry-run", action="store_true", help="print the script and what it takes; submit nothing")


def build_request(options: Namespace, workers: int, name: str) -> JobRequest:
    """Return the request that the options of ``add_sizes`` describe, of processes with so many ``workers``."""
    profile = read_profile(options.profile, partition=options.partition, time=options.time)
    gpus, tasks = options.gpus_per_node, options.tasks_per_node
    if gpus is None:
        raise UsageError("--gpus-per-node is missing; give the GPUs of a machine, or 0 to run on its CPUs.")
    if gpus and tasks not in (None, gpus):
        problem = f"--tasks-per-node {tasks} with --gpus-per-node {gpus}"
        raise UsageError(f"{problem}: each GPU has one process; omit --tasks-per-node.")
    cpus = options.cpus_per_task or profile.cpus_per_task or workers + 1
    return JobRequest(profile, options.nodes, gpus, gpus or tasks or 1, cpus, name)


class _SlurmExecutor(submitit.SlurmExecutor):
    """submitit's executor, which writes its script also where SLURM is absent."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def check_cluster(cluster: str, jobs: int, request: JobRequest) -> None:
    """Raise UsageError where ``cluster`` cannot be used from here."""
    if cluster == "slurm" and shutil.which("sbatch") is None:
        remedy = "go to one, use --cluster local to run on this machine, or try slurm/local_cluster.sh"
        raise UsageError(f"sbatch is not on the PATH, so this is no login node of a SLURM cluster; {remedy}.")
    if cluster != "slurm" and (jobs > 1 or request.nodes > 1 or (cluster == "debug" and request.tasks_per_node > 1)):
        most = "one process" if cluster == "debug" else "one configuration on one node"
        raise UsageError(f"--cluster {cluster} runs {most}; use --cluster slurm for {jobs} of {request.nodes} node(s).")


def open_job_folders(configs: Sequence[CfgNode], request: JobRequest, cluster: str, logs: Path) -> list["RunFolder"]:
    """Claim a run folder for each job, and write into it the configuration, with absolute paths, that the job will run.

    Each is locked until ``submit`` has recorded the job. Raises UsageError where a folder belongs to another job and,
    before any is changed, where the cluster refuses.
    """
    from stvit_video.runs.folder import build_run_folder

    check_cluster(cluster, len(configs), request)
    if cluster == "slurm" and any(cfg.OVERWRITE for cfg in configs):  # delete nothing for a job that SLURM would refuse
        with _outside_jobs():
            ok, said = run_client("sbatch", "--test-only", given=request.sbatch_text(logs, len(configs)))
        if not ok:
            raise UsageError(_explain_refusal(said))
    folders = []
    for cfg in configs:
        paths = [("OUTPUT_DIR", cfg.OUTPUT_DIR), ("DATA.ROOT", cfg.DATA.ROOT), ("MODEL.INIT", cfg.MODEL.INIT)]
        cfg = override(cfg, [(key, os.path.abspath(path)) for key, path in paths if path], "a submission")
        run = build_run_folder(cfg)
        _check_no_job(run.path)  # rather than wait for its lock
        run.lock()
        _check_no_job(run.path)
        run.check()
        if run.is_finished() and cfg.MODE == "train" and not cfg.OVERWRITE:
            raise UsageError(f"OUTPUT_DIR {run.path} is finished; give another one, or OVERWRITE True to run it again.")
        run.claim()
        folder = run.path / "slurm"
        folder.mkdir(exist_ok=True)
        # The folder is cleared: from now on each start of the job continues.
        write_atomically(folder / "config.yaml", override(cfg, [("OVERWRITE", False)], "a submission").dump().encode())
        folders.append(run)
    logs.mkdir(parents=True, exist_ok=True)
    return folders


def _check_no_job(run: Path) -> None:
    """Raise UsageError where a run folder belongs to a job that has not ended."""
    earlier = read_job(run)
    if earlier is not None and earlier.state()[0] not in ENDED:
        remedy = f"give another one, or end that job: python slurm/submit.py cancel {run}"
        raise UsageError(f"OUTPUT_DIR {run} belongs to job {earlier.id}, which has not ended; {remedy}")


def submit(
    folders: Sequence["RunFolder"], request: JobRequest, cluster: str, logs: Path, about: dict[str, Any] | None = None
) -> list[ClusterJob]:
    """Submit a job for each run folder, several as one array, and record it there. Raises UsageError on a refusal.

    The record tells ``about`` the submission: by default the command, its time, its host and the commit.
    """
    from stvit_video.runs.folder import environment

    if about is None:
        about = {"command": sys.orig_argv, "submitted": time.time(), "host": socket.gethostname()}
        about["git"] = environment()["git"]
    profile = request.profile
    limits = (profile.minutes, profile.warning_s, profile.max_timeouts)
    tasks = [Task(str(folder.path), uuid.uuid4().hex[:12], *limits) for folder in folders]
    with _ready_to_send(request, cluster):
        submitted = send(tasks, request, cluster, logs)
        jobs = []
        for folder, task, accepted in zip(folders, tasks, submitted, strict=True):
            jobs.append(ClusterJob(folder.path, cluster, accepted.job_id, logs, task.submission))
            about |= {"id": accepted.job_id, "submission": task.submission, "cluster": cluster, "logs": str(logs)}
            write_json(folder.path / "slurm" / "job.json", {**about, "request": asdict(request)})
            folder.unlock()  # the job itself waits for it
        if cluster == "debug":
            submitted[0].results()
    return jobs


def send(tasks: Sequence[Callable[[], None]], request: JobRequest, cluster: str, logs: Path) -> list[Any]:
    """Return submitit's jobs of tasks, several as one array. Raises UsageError on a refusal."""
    executor = request.executor(cluster, logs)
    with _ready_to_send(request, cluster):
        try:
            with redirect_stderr(StringIO()), executor.batch():  # submitit repeats sbatch's message there
                return [executor.submit(task) for task in tasks]
        except (FailedJobError, FailedSubmissionError) as error:
            raise UsageError(_explain_refusal(str(error))) from error


@contextmanager
def _ready_to_send(request: JobRequest, cluster: str) -> Iterator[None]:
    with _outside_jobs(), ExitStack() as restore:
        restore.callback(os.chdir, os.getcwd())
        os.chdir(request.source)  # tasks start there, and import the package from there
        if cluster == "local":  # Ctrl-C in the terminal only stops following the job: its processes inherit this
            restore.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.SIG_IGN))
        yield


@contextmanager
def _outside_jobs() -> Iterator[None]:
    """Hide the variables of an enclosing job from the submission, except which cluster is meant."""
    kept = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with submitit.helpers.clean_env(), submitit.helpers.environment_variables(**kept):
        yield


def _explain_refusal(said: str) -> str:
    """Return sbatch's reason and what the cluster offers, on one line."""
    lines = [line.partition(":")[2].removeprefix(" error:").strip() for line in said.splitlines() if "sbatch:" in line]
    reason = lines[-1] if lines else (said.strip().splitlines() or ["no reason given"])[-1]
    ok, listed = run_client("sinfo", "--noheader", "--format=%R: %D node(s) of %c CPUs, %G, at most %l")
    offers = f" Partitions here: {'; '.join(dict.fromkeys(listed.splitlines()))}." if ok and listed else ""
    return f"sbatch refused the job: {reason.rstrip('.')}.{offers} Correct the profile, --nodes or --gpus-per-node."


def resume(job: ClusterJob) -> ClusterJob:
    """Submit the run of a job again with the same request; it continues at its newest checkpoint."""
    check_owner(job.run, job.path, job.path / "job.json", job.path / "config.yaml", job.logs)
    state, _ = job.state()
    if state not in ENDED:
        raise UsageError(f"{job.run} belongs to job {job.id}, which is {state}; there is nothing to resume.")
    record = read_record(job.run)
    request = _read_request(record, job.path / "job.json")
    print(f"resuming as {job.path} says: config.yaml, and job.json with the package in {request.source}", flush=True)
    for name in ("python", "container", "modules", "setup", "srun", "sbatch"):
        if value := getattr(request.profile, name):
            print(f"  {name}: {printable(value)}", flush=True)
    folders = open_job_folders([load_config(job.path / "config.yaml")], request, job.cluster, job.logs)
    return submit(folders, request, job.cluster, job.logs, record)[0]


def _read_request(record: dict[str, Any], path: Path) -> JobRequest:
    """Return the request of a job's record. Raises UsageError where it is not as we write it."""
    request = record.get("request")
    kinds = {"profile": dict, "name": str, "source": str}
    names = [field.name for field in fields(JobRequest)]
    if not isinstance(request, dict) or sorted(request) != sorted(names):
        raise UsageError(f"{path}: request is not what a submission writes ({', '.join(names)}); submit the run again.")
    for name, value in request.items():
        if type(value) is not kinds.get(name, int) or (type(value) is int and value < 0):
            raise UsageError(f"{path}: {name} is {value!r}, which no submission writes; submit the run again.")
    return JobRequest(**request | {"profile": _check_profile(request["profile"], path)})
