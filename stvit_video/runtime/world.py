"""The processes of a run as each of them sees it, and their communication."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from stvit_video.common.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's rank and device, and the number of processes."""

    rank: int
    size: int
    device: torch.device
    cpu_group: Any = None  # process group for CPU tensors; None: the default group
    launched: bool = False  # by torchrun or a scheduler
    store: Any = None  # key-value store of all processes; None of a single process

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def gather_objects(world: World, value: Any) -> list[Any]:
    """Return every process's ``value``, by rank, on every process."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def sum_over_world(world: World, values: torch.Tensor) -> torch.Tensor:
    """Return the sum of ``values`` over all processes, in place."""
    if world.size > 1:
        dist.all_reduce(values)
    return values


def any_of(world: World, flag: bool) -> bool:
    """Return whether ``flag`` is set on any process. Reduced on CPUs, so no GPU has to be synchronised."""
    if world.size == 1:
        return flag
    flags = torch.tensor([int(flag)])
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=world.cpu_group)
    return bool(flags.item())


def tell_all(world: World, note: str) -> None:
    """Set the key ``note`` in the store of all processes, without waiting for them."""
    if world.store is not None:
        world.store.set(note, "")


def is_told(world: World, note: str) -> bool:
    """Return whether any process has set the key ``note``."""
    return world.store is not None and bool(world.store.check([note]))


def on_main(world: World, action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 and return its result on all ranks, or raise its UsageError or OSError on all ranks."""
    outcome: list[Any] = [None, None]  # value, failure
    if world.is_main:
        try:
            outcome[0] = action()
        except (UsageError, OSError) as error:
            outcome[1] = error
    if world.size > 1:  # sent from the CPU, once: a list of all videos may be large
        dist.broadcast_object_list(outcome, src=0, group=world.cpu_group)
    value, failure = outcome
    if failure is not None:
        raise failure
    return value
