"""Processes and devices. The only module that reads rank, world and host variables."""

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from stvit_video.errors import UsageError

T = TypeVar("T")

# What torchrun sets for each of its processes.
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process's place among all processes of the run."""

    rank: int
    size: int
    device: torch.device
    cpu_group: Any = None  # for small messages; None is the default group

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def join_world(device: str = "auto", timeout_s: int = 1800) -> Iterator[World]:
    """Join the process group that the environment describes, or run alone; leave the group at the end.

    A complete set of torchrun's variables makes a group (NCCL on GPUs, gloo on CPUs); none makes a single process; a
    partial set is an error. A group that cannot be formed is an error too, never a silent single process.
    """
    present = [name for name in TORCHRUN_VARIABLES[:3] if name in os.environ]
    if not present:
        yield World(0, 1, _pick_device(device, 0, 1))
        return
    missing = [name for name in TORCHRUN_VARIABLES if name not in os.environ]
    if missing:
        raise UsageError(
            f"{', '.join(present)} set but {', '.join(missing)} not; set all of {', '.join(TORCHRUN_VARIABLES)} "
            f"(torchrun does), or none for a single process."
        )
    rank, size, local_rank = (int(os.environ[name]) for name in TORCHRUN_VARIABLES[:3])
    target = _pick_device(device, local_rank, int(os.environ["LOCAL_WORLD_SIZE"]))
    if target.type == "cuda":
        torch.cuda.set_device(target)
    elif "OMP_NUM_THREADS" not in os.environ or os.environ["OMP_NUM_THREADS"] == "1":
        # torchrun gives each process one thread; share the machine's cores instead.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    timeout = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group("nccl" if target.type == "cuda" else "gloo", timeout=timeout)
    try:
        yield World(rank, size, target, dist.new_group(backend="gloo") if target.type == "cuda" else None)
    finally:
        dist.destroy_process_group()


def _pick_device(name: str, local_rank: int, processes: int) -> torch.device:
    """Return this process's device; all processes of a machine come to the same kind."""
    count = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else 0
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
