"""Joining the process group, and the device of each process."""

import datetime
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from stvit_video.common.errors import Stopped, UsageError
from stvit_video.runtime.launchers import Place, find_place
from stvit_video.runtime.rendezvous import connect, report_failure, wait_for_all_ranks
from stvit_video.runtime.signals import end_with_parent
from stvit_video.runtime.world import World


@contextmanager
def join_world(device: str = "auto", timeout_s: int = 1800) -> Iterator[World]:
    """Join the process group that the environment describes, or run alone; leave the group at the end.

    The backend is NCCL between GPUs and gloo between CPUs. An error inside is reported with its rank. Raises UsageError
    for incomplete variables or too few GPUs, RunFailure, which names the missing ranks, where the group is incomplete.
    """
    place = find_place()
    if place is None:
        yield World(0, 1, pick_device(device, 0, 1))
        return
    if place.launcher == "torchrun":  # torchrun that is killed must not leave this process beside those of a new start
        end_with_parent(signal.SIGTERM)
    store = connect(place, timeout_s)
    target = _agree_on_device(store, place, device, timeout_s)
    if target.type == "cuda":
        torch.cuda.set_device(target)
    elif "OMP_NUM_THREADS" not in os.environ or (place.launcher, os.environ["OMP_NUM_THREADS"]) == ("torchrun", "1"):
        # torchrun sets one thread per process by default; divide the machine's cores instead.
        torch.set_num_threads(place.cpus or max(1, len(os.sched_getaffinity(0)) // place.local_size))
    backend, timeout = "nccl" if target.type == "cuda" else "gloo", datetime.timedelta(seconds=timeout_s)
    failed = True
    try:
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=timeout)
        cpu_group = dist.new_group(backend="gloo") if backend == "nccl" else None
        yield World(place.rank, place.size, target, cpu_group, launched=True, store=store)
        failed = False
    except Stopped:
        failed = False
        raise
    except Exception as error:
        report_failure(store, place, error)
        raise
    finally:
        # After a failure NCCL would wait for the other ranks, which may wait for this one: exit without it.
        if dist.is_initialized() and not (failed and backend == "nccl"):
            dist.destroy_process_group()


def _agree_on_device(store: Any, place: Place, name: str, timeout_s: int) -> torch.device:
    """Return this process's device as soon as all processes have one."""
    target, gpu, problem = torch.device("cpu"), "", None
    try:
        target = pick_device(name, place.local_rank, place.local_size, bound=place.launcher == "SLURM")
        gpu = str(torch.cuda.get_device_properties(target).uuid) if target.type == "cuda" else ""
    except UsageError as error:
        problem = error
    try:
        wait_for_all_ranks(store, place, target.type, gpu, str(problem or ""), timeout_s)
    except RuntimeError:
        if problem is not None:  # the other ranks report it with its rank; here it is one line
            raise problem from None
        raise
    return target


def pick_device(name: str, local_rank: int, processes: int, bound: bool = False) -> torch.device:
    """Return the device of one of the ``processes`` on this machine; all of them get the same type of device.

    With ``bound``, SLURM may have bound one GPU to each task, which then sees only that one.
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
