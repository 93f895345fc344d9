"""What a job asks of a cluster: a site's profile, and the numbers of one job."""

import re
import shlex
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

from stvit_video.common.errors import UsageError, nearest
from stvit_video.slurm.task import GUARD

TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+)(?::(?P<minutes>\d+))?(?::(?P<seconds>\d+))?")


@dataclass(frozen=True)
class Profile:
    """What a site needs; see slurm/profiles/example.yaml for the meaning of each."""

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
        """The time limit. Raises UsageError where ``time`` is not one."""
        if self.time.isdigit() and int(self.time) > 0:
            return int(self.time)
        match = TIME.fullmatch(self.time)
        parts = {name: int(text or 0) for name, text in match.groupdict().items()} if match else {}
        if match and not parts["days"] and match["seconds"] is None:  # as in SLURM: 30:00 is half an hour
            parts = {"days": 0, "hours": 0, "minutes": parts["hours"], "seconds": parts["minutes"]}
        total = parts["days"] * 1440 + parts["hours"] * 60 + parts["minutes"] if parts else 0
        if total < 1:
            raise UsageError(
                f"time {self.time!r} is no time limit; write minutes (90), hours:minutes:seconds (24:00:00) or "
                f"days-hours (2-12), at least a minute."
            )
        return total


def read_profile(path: str | Path | None, **changes: Any) -> Profile:
    """Return the profile in a YAML file, with ``changes`` that are not None. Raises UsageError, naming the key."""
    content: Any = {}
    if path is not None:
        try:
            text = Path(path).read_text()
            content = yaml.safe_load(text) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = getattr(error, "strerror", None) or str(error).replace("\n", " ")
            raise UsageError(f"Profile {path} cannot be read ({reason}); see slurm/profiles/.") from error
    if not isinstance(content, dict):
        raise UsageError(f"Profile {path} is not a list of lines `key: value`; see slurm/profiles/example.yaml.")
    types = {item.name: get_type_hints(Profile)[item.name] for item in fields(Profile)}
    for name, value in content.items():
        if name not in types:
            raise UsageError(
                f"Profile {path}: {name} is unknown.{nearest(str(name), list(types))} Known are: {', '.join(types)}."
            )
        kind = getattr(types[name], "__origin__", types[name])
        if kind is str and isinstance(value, int) and not isinstance(value, bool):
            value = content[name] = _as_typed(text, name)  # 24:00:00 is a number to YAML
        if not isinstance(value, kind) or isinstance(value, bool) or (kind is int and value < 0):
            raise UsageError(f"Profile {path}: {name} is {value!r}; it has to be a {kind.__name__}.")
    profile = Profile(**content | {name: value for name, value in changes.items() if value is not None})
    if profile.warning_s >= 60 * profile.minutes:
        raise UsageError(f"warning_s is {profile.warning_s} but the job has {profile.minutes} minutes; lower it.")
    return profile


def _as_typed(text: str, name: str) -> str:
    """Return the characters of a value in a YAML mapping."""
    root = yaml.compose(text, yaml.SafeLoader)
    assert root is not None, "an empty file has no values"
    return next(value.value for key, value in root.value if key.value == name)


@dataclass(frozen=True)
class Request:
    """One job's size, and how it starts. ``source`` is the folder that the package is imported from."""

    profile: Profile
    nodes: int
    gpus_per_node: int
    tasks_per_node: int
    cpus_per_task: int
    source: str
    name: str = "stvit"

    @property
    def tasks(self) -> int:
        return self.nodes * self.tasks_per_node

    def describe(self, jobs: int = 1) -> str:
        """Return what the job or array takes at most."""
        gpus, cpus, hours = self.nodes * self.gpus_per_node, self.tasks * self.cpus_per_task, self.profile.minutes / 60
        each = (
            f"{self.nodes} node(s) x {self.tasks_per_node} task(s) x {self.cpus_per_task} CPU(s), {gpus} GPU(s), "
            f"{hours:g} h at most before it is queued again"
        )
        total = f"{jobs * cpus * hours:g} CPU hours and {jobs * gpus * hours:g} GPU hours a start"
        return f"{jobs} job(s) of {each}: {total}"

    def parameters(self) -> dict[str, Any]:
        """Return submitit's parameters of this job."""
        profile = self.profile
        srun = ["--kill-on-bad-exit=1", f"--cpus-per-task={self.cpus_per_task}", *profile.srun]
        extra = {"requeue": True, "chdir": self.source, **profile.sbatch}
        setup = [f"module load {shlex.quote(name)}" for name in profile.modules] + profile.setup
        named = {name: getattr(profile, name) for name in ("partition", "account", "qos", "constraint")}
        return {
            "name": self.name,
            "timeout_min": profile.minutes,
            "nodes": self.nodes,
            "tasks_per_node": self.tasks_per_node,
            "cpus_per_task": self.cpus_per_task,
            "stderr_to_stdout": True,
            **({"gpus_per_node": self.gpus_per_node} if self.gpus_per_node else {}),
            **({"mem_gb": profile.memory_gb} if profile.memory_gb else {}),
            **{f"slurm_{name}": value for name, value in named.items() if value},
            "slurm_signal_delay_s": profile.warning_s,
            "slurm_setup": setup,
            "slurm_srun_args": srun,
            "slurm_additional_parameters": extra,
        }

    def launcher(self) -> str:
        """Return the shell words that start Python in a task, inside the container where there is one."""
        words = f"bash -c {shlex.quote(GUARD)} task {shlex.quote(self.profile.python)}"
        return f"{self.profile.container} {words}".strip()

    def sbatch_text(self, folder: Path, jobs: int = 1) -> str:
        """Return the script that submitit hands to sbatch; no SLURM is needed for it."""
        given = self.parameters()
        generic = {name: value for name, value in given.items() if not name.startswith("slurm_")}
        specific = {name.removeprefix("slurm_"): value for name, value in given.items() if name.startswith("slurm_")}
        executor = _Unsubmitted(folder, python=self.launcher())
        executor.update_parameters(**executor._convert_parameters(generic), **specific)
        parameters = {**executor.parameters, **({"map_count": jobs} if jobs > 1 else {})}
        return _make_sbatch_string(command=executor._submitit_command_str, folder=folder, **parameters)


class _Unsubmitted(SlurmExecutor):
    """submitit's own executor, which writes its script also where SLURM is not."""

    @classmethod
    def affinity(cls) -> int:
        return 1
