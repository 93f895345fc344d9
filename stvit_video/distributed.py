"""Processes and devices. The only module that reads rank, world and host variables.

Who started this process is found in this order: a complete set of torchrun's variables; submitit on this machine; a
task of a SLURM step; nobody, which is a single process. A set that is not complete is an error that says what lacks.
"""

import datetime
import itertools
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from stvit_video.errors import Stopped, UsageError
from stvit_video.rendezvous import Place, call_roll, connect, report
from stvit_video.signals import end_with_parent

T = TypeVar("T")

# What torchrun sets for each of its processes, and SLURM for each task of a step.
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM_VARIABLES = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_NODELIST")


@dataclass(frozen=True)
class World:
    """This process's place among all processes of the run."""

    rank: int
    size: int
    device: torch.device
    cpu_group: Any = None  # for small messages; None is the default group
    launched: bool = False  # by torchrun or a scheduler
    store: Any = None  # what all processes share; None of a single one

    @property
    def is_main(self) -> bool:
        return self.rank == 0


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


@contextmanager
def join_world(device: str = "auto", timeout_s: int = 1800) -> Iterator[World]:
    """Join the process group that the environment describes, or run alone; leave the group at the end.

    NCCL between GPUs, gloo between CPUs. A group that cannot be formed is an error that names who is missing, never a
    silent single process; an error inside is reported with the rank it happened on. Raises UsageError for an
    incomplete environment or too few GPUs, RunFailure where other processes do not come.
    """
    place = find_place(os.environ)
    if place is None:
        yield World(0, 1, pick_device(device, 0, 1))
        return
    if place.launcher == "torchrun":  # killed, it would leave this process running beside those of a new start
        end_with_parent(signal.SIGTERM)
    store = connect(place, timeout_s)
    target = _agree_on_device(store, place, device, timeout_s)
    if target.type == "cuda":
        torch.cuda.set_device(target)
    elif "OMP_NUM_THREADS" not in os.environ or (place.launcher, os.environ["OMP_NUM_THREADS"]) == ("torchrun", "1"):
        # torchrun gives each process one thread; share the machine's cores instead.
        torch.set_num_threads(place.cpus or max(1, len(os.sched_getaffinity(0)) // place.local_size))
    backend, timeout = "nccl" if target.type == "cuda" else "gloo", datetime.timedelta(seconds=timeout_s)
    failed = True
    try:
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=timeout)
        messages = dist.new_group(backend="gloo") if backend == "nccl" else None
        yield World(place.rank, place.size, target, messages, launched=True, store=store)
        failed = False
    except Stopped:
        failed = False
        raise
    except Exception as error:
        report(store, place, error)
        raise
    finally:
        # After a failure NCCL would wait for the others, who may wait for this process: its end frees them.
        if dist.is_initialized() and not (failed and backend == "nccl"):
            dist.destroy_process_group()


def _agree_on_device(store: Any, place: Place, name: str, timeout_s: int) -> torch.device:
    """Return this process's device, once all processes have theirs."""
    target, gpu, problem = torch.device("cpu"), "", None
    try:
        target = pick_device(name, place.local_rank, place.local_size, bound=place.launcher == "SLURM")
        gpu = str(torch.cuda.get_device_properties(target).uuid) if target.type == "cuda" else ""
    except UsageError as error:
        problem = error
    try:
        call_roll(store, place, target.type, gpu, str(problem or ""), timeout_s)
    except RuntimeError:
        if problem is not None:  # the others are told by the roll; here it is one line
            raise problem from None
        raise
    return target


def pick_device(name: str, local_rank: int, processes: int, bound: bool = False) -> torch.device:
    """Return this process's device; all processes of a machine come to the same kind.

    Where SLURM has ``bound`` a GPU to each task, a task sees that one alone.
    """
    count = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else 0
    if bound and count == 1:
        return torch.device("cuda", 0)
    if count < processes and (name == "cuda" or count > 0):
        raise UsageError(
            f"{processes} process(es) on this machine with DEVICE {name}, but {count} GPUs are visible; "
            f"start at most one process a GPU, or use DEVICE cpu."
        )
    return torch.device("cuda", local_rank) if count else torch.device("cpu")


def gather_objects(world: World, value: Any) -> list[Any]:
    """Return every process's ``value``, by rank, on every process."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def sum_over_world(world: World, values: torch.Tensor) -> torch.Tensor:
    """Return the sum of ``values`` over all processes."""
    if world.size > 1:
        dist.all_reduce(values)
    return values


def any_of(world: World, flag: bool) -> bool:
    """Return whether ``flag`` is set on any process. Between CPUs: no GPU has to wait for its queue."""
    if world.size == 1:
        return flag
    flags = torch.tensor([int(flag)])
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=world.cpu_group)
    return bool(flags.item())


def tell_all(world: World, note: str) -> None:
    """Leave a note that every process can find, at once and without waiting for them."""
    if world.store is not None:
        world.store.set(note, "")


def is_told(world: World, note: str) -> bool:
    """Return whether any process of this start has left the note."""
    return world.store is not None and bool(world.store.check([note]))


def on_main(world: World, action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 and return its result everywhere; an error a user can mend is raised everywhere."""
    outcome: tuple[Any, Exception | None] = (None, None)
    if world.is_main:
        try:
            outcome = (action(), None)
        except (UsageError, OSError) as error:
            outcome = (None, error)
    value, failure = gather_objects(world, outcome)[0]
    if failure is not None:
        raise failure
    return value
