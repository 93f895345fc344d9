"""Which of how many processes this is, according to the variables of torchrun, submitit or SLURM.

submitit's ``TorchDistributedEnvironment`` covers its tasks on this machine. For SLURM it does not: it refuses jobs of
others, and assumes equally many tasks on all nodes and one step per job.
"""

import os
import re
import socket
from collections.abc import Collection
from dataclasses import dataclass

from submitit.helpers import TorchDistributedEnvironment
from submitit.slurm.slurm import _parse_node_list

from stvit_video.common.errors import UsageError


@dataclass(frozen=True)
class Place:
    """The rank of this process and where the others are, as its launcher says."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int  # processes on this machine
    host: str
    hosts: tuple[str, ...] = ()  # of all processes, rank 0's first; unknown to torchrun's workers
    tasks: tuple[int, ...] = ()  # processes on each host
    job: str = ""  # unique to this start of this job
    address: str = ""  # of rank 0
    port: int | None = None  # of rank 0; None: chosen by rank 0
    cpus: int | None = None  # for this process


TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# How others number their processes, of which we do not know where rank 0 is: Open MPI, MPICH and Intel MPI, MVAPICH2,
# jsrun of LSF, Flux, Horovod; PMIx, PALS and ALPS do not say how many there are.
OTHER_LAUNCHERS = {
    "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE",
    "PMI_RANK": "PMI_SIZE",
    "MV2_COMM_WORLD_RANK": "MV2_COMM_WORLD_SIZE",
    "JSM_NAMESPACE_RANK": "JSM_NAMESPACE_SIZE",
    "FLUX_TASK_RANK": "FLUX_JOB_SIZE",
    "HOROVOD_RANK": "HOROVOD_SIZE",
    "PMIX_RANK": "",
    "PALS_RANKID": "",
    "ALPS_APP_PE": "",
}
SLURM_VARIABLES = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_NODELIST")


def find_place() -> Place | None:
    """Return this process's place, or None for a single process. Raises UsageError, naming the missing variables."""
    env = os.environ
    # The address and port of rank 0 may also be set for tasks that SLURM or submitit started.
    others = any(name.startswith(("SLURM_", "SUBMITIT_")) for name in env)
    if any(name in env for name in TORCHRUN_VARIABLES[: 4 if others else 6]):
        _check_complete(TORCHRUN_VARIABLES, "set all (torchrun does), or none for a single process.")
        rank, size, local_rank, local_size = (_integer(name) for name in TORCHRUN_VARIABLES[:4])
        address = env["MASTER_ADDR"]
        port = _integer("MASTER_PORT")
        return Place("torchrun", rank, size, local_rank, local_size, host_name(), address=address, port=port)
    if env.get("SUBMITIT_EXECUTOR") == "local" and "SUBMITIT_LOCAL_GLOBALID" in env:
        task = TorchDistributedEnvironment()
        job = f"local.{env['SUBMITIT_LOCAL_JOB_ID']}"
        host = "localhost"
        size = task.world_size
        return Place("submitit", task.rank, size, task.local_rank, size, host, (host,), (size,), job, host)
    place = _find_slurm_task()
    _check_other_launchers(place)
    return place


def _check_other_launchers(place: Place | None) -> None:
    """Raise UsageError in one of several processes of another launcher than SLURM, which would all do the same.

    srun sets variables of some of them too (--mpi=pmi2, --mpi=pmix), to its own numbers.
    """
    for name, size_name in OTHER_LAUNCHERS.items():
        if not os.environ.get(name):
            continue
        rank = _integer(name)
        size = _integer(size_name, rank + 1)
        if size > 1 and (place is None or (rank, size if size_name else place.size) != (place.rank, place.size)):
            of = f" and {size_name} {size}" if size_name else ""
            raise UsageError(
                f"{name} is {rank}{of}: a launcher that is not supported started several processes; start them with "
                f"torchrun (on each machine, torchrun --nproc_per_node N -m stvit_video.run ...) or srun, or one alone."
            )


def _find_slurm_task() -> Place | None:
    """Return the place of a task of srun; None in a step of one task, and in the shell of a job of one task."""
    env = os.environ
    has_rank = "SLURM_PROCID" in env or "SLURM_LOCALID" in env
    if "SLURM_STEP_ID" not in env and (env.get("ENVIRONMENT") == "BATCH" or not has_rank):
        if _integer("SLURM_NTASKS", 1) == 1:
            return None
        raise UsageError(
            f"SLURM_NTASKS is {env['SLURM_NTASKS']}, but SLURM_STEP_ID and so the rank are missing: this is the job's "
            f"shell and none of its tasks. Start them with `srun python -m stvit_video.run ...`, or ask for one task."
        )
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    remedy = "start with srun, which sets all, or unset them for a single process."
    _check_complete(SLURM_VARIABLES, remedy, {"SLURM_JOB_NODELIST"} if nodes else set())
    size = _integer("SLURM_STEP_NUM_TASKS", _integer("SLURM_NTASKS"))
    if size == 1:
        return None
    hosts = tuple(_parse_node_list(nodes))  # not by `scontrol show hostnames`, which a container may lack
    counts = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or ""
    repeated = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)  # 4(x2),1 is 4, 4, 1
    tasks = tuple(int(number) for number, times in repeated for _ in range(int(times or 1)))
    node = _integer("SLURM_NODEID", 0)
    rank = _integer("SLURM_PROCID")
    local_rank = _integer("SLURM_LOCALID")
    local_size = tasks[node] if node < len(tasks) else -(-size // len(hosts))
    job = ".".join(env.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    cpus = _integer("SLURM_CPUS_PER_TASK", 0) or None
    address = env.get("MASTER_ADDR") or hosts[0]
    port = _integer("MASTER_PORT", 0) or None
    return Place("SLURM", rank, size, local_rank, local_size, host_name(), hosts, tasks, job, address, port, cpus)


def host_name() -> str:
    """Return the name of this machine, in a SLURM job its node's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _check_complete(names: tuple[str, ...], remedy: str, known: Collection[str] = ()) -> None:
    given = [name for name in names if os.environ.get(name) or name in known]
    missing = [name for name in names if name not in given]
    if missing:
        raise UsageError(f"{', '.join(given) or 'empty variables are'} set but {', '.join(missing)} not; {remedy}")


def _integer(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{name} is {text!r}; it has to be a number, as its launcher sets it.") from None
