"""What a job asks of a cluster: the profile of a site, and the size of one job."""

import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import submitit
import yaml

from stvit_video.common.errors import UsageError, nearest
from stvit_video.slurm.task import GUARD


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
        days, dash, clock = self.time.rpartition("-")
        numbers = clock.split(":")
        # As in SLURM, 30:00 is half an hour, but after days the first number is hours.
        units = (60, 1, 0) if dash or len(numbers) == 3 else (1, 0)
        total = 0
        if all(word.isdecimal() for word in [*numbers, *([days] if dash else [])]) and len(numbers) <= len(units):
            total = int(days or 0) * 1440 + sum(int(n) * unit for n, unit in zip(numbers, units, strict=False))
        if total < 1:
            raise UsageError(
                f"time {self.time!r} is no time limit; write minutes (90), hours:minutes:seconds (24:00:00) or "
                f"days-hours (2-12), at least a minute."
            )
        return total


def read_profile(path: str | Path | None, **changes: Any) -> Profile:
    """Return the profile in a YAML file, with ``changes`` that are not None. Raises UsageError, naming the key."""
    content = {} if path is None else _read_keys(path)
    profile = Profile(**content | {name: value for name, value in changes.items() if value is not None})
    if profile.warning_s >= 60 * profile.minutes:
        raise UsageError(f"warning_s is {profile.warning_s} but the job has {profile.minutes} minutes; lower it.")
    return profile


def _read_keys(path: str | Path) -> dict[str, Any]:
    try:
        text = Path(path).read_text()
        content = yaml.safe_load(text) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or str(error).replace("\n", " ")
        raise UsageError(f"Profile {path} cannot be read ({reason}); see slurm/profiles/.") from error
    if not isinstance(content, dict):
        raise UsageError(f"Profile {path} is not a list of lines `key: value`; see slurm/profiles/example.yaml.")
    types = get_type_hints(Profile)
    for name, value in content.items():
        if name not in types:
            raise UsageError(
                f"Profile {path}: {name} is unknown.{nearest(str(name), list(types))} Known are: {', '.join(types)}."
            )
        kind = get_origin(types[name]) or types[name]
        if kind is str and isinstance(value, int) and not isinstance(value, bool):
            root: Any = yaml.compose(text, yaml.SafeLoader)
            # YAML reads 24:00:00 as a number: take the text.
            value = content[name] = next(node.value for key, node in root.value if key.value == name)
        if not isinstance(value, kind) or isinstance(value, bool) or (kind is int and value < 0):
            raise UsageError(f"Profile {path}: {name} is {value!r}; it has to be a {kind.__name__}.")
    return content


@dataclass(frozen=True)
class JobRequest:
    """The size of one job, and how it starts."""

    profile: Profile
    nodes: int
    gpus_per_node: int
    tasks_per_node: int
    cpus_per_task: int
    source: str  # folder from which the package is imported
    name: str = "stvit"

    @property
    def tasks(self) -> int:
        return self.nodes * self.tasks_per_node

    def describe(self, jobs: int = 1) -> str:
        """Return what the job, or an array of ``jobs``, takes at most."""
        gpus, cpus, hours = self.nodes * self.gpus_per_node, self.tasks * self.cpus_per_task, self.profile.minutes / 60
        return (
            f"{jobs} job(s) of {self.nodes} node(s) x {self.tasks_per_node} task(s) x {self.cpus_per_task} CPU(s), "
            f"{gpus} GPU(s), {hours:g} h at most before it is queued again: "
            f"{jobs * cpus * hours:g} CPU hours and {jobs * gpus * hours:g} GPU hours a start"
        )

    def executor(self, cluster: str, logs: Path) -> submitit.Executor:
        """Return submitit's executor of this job, which writes to ``logs``."""
        if cluster == "debug":
            return submitit.DebugExecutor(logs)
        if cluster == "slurm":
            return self.slurm_executor(logs)
        executor = submitit.LocalExecutor(logs)
        executor.update_parameters(
            timeout_min=self.profile.minutes,
            tasks_per_node=self.tasks_per_node,
            gpus_per_node=self.gpus_per_node,
            signal_delay_s=self.profile.warning_s,
            setup=self.profile.setup,
            stderr_to_stdout=True,
        )
        if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
            executor.parameters["visible_gpus"] = visible.split(",")  # else submitit takes the machine's first GPUs
        return executor

    def slurm_executor(self, logs: Path) -> submitit.SlurmExecutor:
        """Return submitit's executor for SLURM; what is 0 or empty in the profile is left to the site."""
        profile = self.profile
        words = f"bash -c {shlex.quote(GUARD)} task {shlex.quote(profile.python)}"
        executor = _SlurmExecutor(logs, python=f"{profile.container} {words}".strip())
        executor.update_parameters(
            job_name=self.name,
            time=profile.minutes,
            nodes=self.nodes,
            ntasks_per_node=self.tasks_per_node,
            cpus_per_task=self.cpus_per_task,
            gpus_per_node=self.gpus_per_node or None,
            mem=f"{profile.memory_gb}GB" if profile.memory_gb else None,
            **{name: getattr(profile, name) or None for name in ("partition", "account", "qos", "constraint")},
            stderr_to_stdout=True,
            signal_delay_s=profile.warning_s,
            setup=[f"module load {shlex.quote(name)}" for name in profile.modules] + profile.setup,
            # From version 22.05 on, srun does not take the CPUs per task from sbatch.
            srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={self.cpus_per_task}", *profile.srun],
            additional_parameters={"requeue": True, "chdir": self.source, **profile.sbatch},
        )
        return executor

    def sbatch_text(self, logs: Path, jobs: int = 1) -> str:
        """Return the script that submitit passes to sbatch; needs no SLURM."""
        executor = self.slurm_executor(logs)
        if jobs > 1:
            executor.parameters["map_count"] = jobs
        return executor._make_submission_file_text(executor._submitit_command_str, "")


class _SlurmExecutor(submitit.SlurmExecutor):
    """submitit's executor, which writes its script also where SLURM is absent."""

    @classmethod
    def affinity(cls) -> int:
        return 1
