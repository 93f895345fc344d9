"""Which process of how many this is, from the variables of torchrun, SLURM or submitit."""

import itertools
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from stvit_video.common.errors import UsageError


@dataclass(frozen=True)
class Place:
    """Where a launcher put this process."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int  # processes on this machine
    host: str
    hosts: tuple[str, ...] = ()  # of all processes, rank 0's first; empty where torchrun knows better
    tasks: tuple[int, ...] = ()  # processes of each host
    job: str = ""  # tells this start of this job from any other
    cpus: int | None = None  # this process's share of the machine
    address: str = ""  # of rank 0
    port: int | None = None  # of rank 0, where it is fixed


# What torchrun sets for each of its processes, and SLURM for each task of a step.
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM_VARIABLES = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_NODELIST")


def find_place(env: Mapping[str, str]) -> Place | None:
    """Return this process's place by the variables of its launcher, None for a single process.

    Raises UsageError where a set of variables is not complete, naming what is missing.
    """
    present = [name for name in TORCHRUN_VARIABLES if name in env]
    # Rank 0's address alone may also be set for tasks that another launcher started.
    others = any(name.startswith(("SLURM_", "SUBMITIT_")) for name in env)
    if present and not (others and set(present) <= set(TORCHRUN_VARIABLES[4:])):
        missing = [name for name in TORCHRUN_VARIABLES if name not in env]
        if missing:
            raise UsageError(
                f"{', '.join(present)} set but {', '.join(missing)} not; set all of {', '.join(TORCHRUN_VARIABLES)} "
                f"(torchrun does), or none for a single process."
            )
        rank, size, local_rank, local_size, port = (
            _integer(env, name) for name in (*TORCHRUN_VARIABLES[:4], "MASTER_PORT")
        )
        address = env["MASTER_ADDR"]
        return Place("torchrun", rank, size, local_rank, local_size, socket.gethostname(), address=address, port=port)
    if env.get("SUBMITIT_EXECUTOR") == "local" and "SUBMITIT_LOCAL_GLOBALID" in env:
        rank, size, local_rank = (_integer(env, f"SUBMITIT_LOCAL_{name}") for name in ("GLOBALID", "NTASKS", "LOCALID"))
        job = f"local.{env['SUBMITIT_LOCAL_JOB_ID']}"
        host = "localhost"
        return Place("submitit", rank, size, local_rank, size, host, (host,), (size,), job, address=host)
    return _find_slurm_task(env)


def _find_slurm_task(env: Mapping[str, str]) -> Place | None:
    """Return the place of a task that srun started; a shell of sbatch or salloc is none, unless it stands for one."""
    is_step = "SLURM_STEP_ID" in env
    if not is_step and (env.get("ENVIRONMENT") == "BATCH" or not {"SLURM_PROCID", "SLURM_LOCALID"} & env.keys()):
        if _integer(env, "SLURM_NTASKS", 1) == 1:
            return None
        raise UsageError(
            f"SLURM_NTASKS is {env['SLURM_NTASKS']}, but SLURM_STEP_ID and so the rank are missing: this is the job's "
            f"shell and none of its tasks. Start them with `srun python -m stvit_video.run ...`, or ask for one task."
        )
    missing = [name for name in SLURM_VARIABLES if name not in env]
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if nodes and "SLURM_JOB_NODELIST" in missing:
        missing.remove("SLURM_JOB_NODELIST")
    if missing or nodes is None:
        present = [name for name in SLURM_VARIABLES if name in env]
        raise UsageError(
            f"{', '.join(present)} set but {', '.join(missing)} not; start with srun, which sets all of "
            f"{', '.join(SLURM_VARIABLES)}, or unset them for a single process."
        )
    size = _integer(env, "SLURM_STEP_NUM_TASKS", _integer(env, "SLURM_NTASKS"))
    if size == 1:
        return None
    hosts = expand_hosts(nodes)
    tasks = _expand_counts(env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or "")
    node = _integer(env, "SLURM_NODEID", 0)
    local_size = tasks[node] if node < len(tasks) else -(-size // len(hosts))
    job = ".".join(env.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    host = env.get("SLURMD_NODENAME") or socket.gethostname()
    cpus = _integer(env, "SLURM_CPUS_PER_TASK", 0) or None
    rank, local_rank = _integer(env, "SLURM_PROCID"), _integer(env, "SLURM_LOCALID")
    address, port = env.get("MASTER_ADDR") or hosts[0], _integer(env, "MASTER_PORT", 0) or None
    return Place("SLURM", rank, size, local_rank, local_size, host, hosts, tasks, job, cpus, address, port)


def _integer(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    if name not in env and default is not None:
        return default
    try:
        return int(env[name])
    except (KeyError, ValueError):
        raise UsageError(f"{name} is {env.get(name)!r}; it has to be a number, as its launcher sets it.") from None


def expand_hosts(text: str) -> tuple[str, ...]:
    """Return the names in a SLURM node list such as ``gpu[01-03,7],login``.

    As ``scontrol show hostnames`` does, which need not be there in a container.
    """
    names: list[str] = []
    for entry in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):  # commas within brackets do not separate
        parts = [_expand_range(part) for part in re.split(r"(\[[^\]]*\])", entry)]
        names += ["".join(choice) for choice in itertools.product(*parts)]
    return tuple(names)


def _expand_range(part: str) -> list[str]:
    if not part.startswith("["):
        return [part]
    numbers: list[str] = []
    for piece in part[1:-1].split(","):
        low, _, high = piece.partition("-")
        numbers += [f"{n:0{len(low)}d}" for n in range(int(low), int(high or low) + 1)]
    return numbers


def _expand_counts(text: str) -> tuple[int, ...]:
    """Return the numbers in SLURM's ``4(x2),1``: 4, 4, 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return tuple(itertools.chain.from_iterable([int(number)] * int(times or 1) for number, times in found))
