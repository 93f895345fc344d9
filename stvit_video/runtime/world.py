"""The processes of a run: how they find each other, the device of each one, and their communication."""

import datetime
import json
import os
import random
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from stvit_video.common.errors import RunFailure, Stopped, UsageError, first_line
from stvit_video.runtime.launchers import Place, find_place
from stvit_video.runtime.stopping import end_with_parent

WAITING_NOTE_S = 30  # between two notes about missing ranks
PORTS_TRIED = 8
SHOWN = 8

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


def any_so_far(world: World, note: str, flag: bool) -> bool:
    """Return whether ``flag`` was set on any process that has asked for this ``note``, without waiting for others."""
    if flag and world.store is not None:
        world.store.set(note, "")
    return flag or (world.store is not None and bool(world.store.check([note])))


def on_main(world: World, action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 and return its result on all ranks, or raise its UsageError, RunFailure or OSError."""
    outcome: list[Any] = [None, None]  # value, failure
    if world.is_main:
        try:
            outcome[0] = action()
        except (UsageError, RunFailure, OSError) as error:
            outcome[1] = error
    if world.size > 1:  # sent from the CPU, once: a list of all videos may be large
        dist.broadcast_object_list(outcome, src=0, group=world.cpu_group)
    if outcome[1] is None:
        return outcome[0]
    try:
        raise outcome[1]
    finally:  # an error knows this frame, which else would keep all that callers hold, such as a folder's lock
        outcome.clear()


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
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Python would act on it only after a wait for other processes
    store = connect(place, timeout_s)
    target = wait_for_all_ranks(store, place, device, timeout_s)
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
        if lost := report_failure(store, place, error):
            raise RunFailure(lost) from error
        raise
    finally:
        # After a failure NCCL would wait for the other ranks, which may wait for this one: exit without it.
        if dist.is_initialized() and not (failed and backend == "nccl"):
            dist.destroy_process_group()


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


def connect(place: Place, timeout_s: int) -> Any:
    """Return the key-value store of all processes of this start of the job."""
    timeout = datetime.timedelta(seconds=timeout_s)
    if place.launcher == "torchrun":
        try:
            return next(iter(rendezvous("env://", place.rank, place.size, timeout=timeout)))[0]
        except dist.DistError as error:
            where = f"{place.address}:{place.port}"
            raise RunFailure(f"rank {place.rank}: no answer from {where} within {timeout_s} s") from error
    # Several jobs may share a machine: each tries ports of its own, and a key in the store tells the jobs apart.
    ports = [place.port] if place.port else random.Random(place.job).sample(range(20000, 32768), PORTS_TRIED)
    who = f"rank {place.rank} on {place.host}"
    listed = ", ".join(map(str, ports))
    if place.rank == 0:
        for port in ports:
            with suppress(OSError, dist.DistError):
                with socket.socket() as probe:
                    probe.bind(("", port))  # torch would share a port on which another process listens
                store = TCPStore(place.address, port, place.size, True, timeout, wait_for_workers=False)
                store.set(f"job {place.job}", "")
                return store
        raise RunFailure(f"{who}: ports {listed} are all taken; set MASTER_PORT to a free one")
    found = list[Any]()
    arrived = threading.Event()

    def look(port: int) -> None:
        while not arrived.is_set():
            with suppress(OSError, dist.DistError):
                socket.create_connection((place.address, port), timeout=2).close()  # fails at once where nobody listens
                limit = datetime.timedelta(seconds=5)
                store = TCPStore(place.address, port, place.size, False, limit, wait_for_workers=False)
                if store.check([f"job {place.job}"]):
                    found.append(store)
                    arrived.set()
            time.sleep(0.2)

    for port in ports:  # another program on a port may never answer, and torch has no time limit there
        threading.Thread(target=look, args=(port,), daemon=True).start()
    if not arrived.wait(timeout_s):
        arrived.set()
        raise RunFailure(
            f"{who}: no answer from rank 0 on {place.address} within {timeout_s} s: it did not start, or its ports "
            f"{listed} cannot be reached from here"
        )
    found[0].set_timeout(timeout)
    return found[0]


def wait_for_all_ranks(store: Any, place: Place, name: str, timeout_s: int) -> torch.device:
    """Return this process's device; raise RunFailure on all ranks where one is missing or has none that suits."""
    target, gpu, problem = torch.device("cpu"), "", None
    try:
        target = pick_device(name, place.local_rank, place.local_size, bound=place.launcher == "SLURM")
        gpu = str(torch.cuda.get_device_properties(target).uuid) if target.type == "cuda" else ""
    except UsageError as error:
        problem = error
    entry = {"host": place.host, "kind": target.type, "gpu": gpu, "problem": str(problem or "")}
    store.set(f"here/{place.rank}", json.dumps(entry))
    if place.rank == 0:
        store.set("verdict", _find_problem(_collect(store, place, timeout_s), place, timeout_s))
    try:
        store.wait(["verdict"], datetime.timedelta(seconds=timeout_s + 10))
        verdict = store.get("verdict").decode()
    except dist.DistError as error:
        where = f" on {place.hosts[0]}" if place.hosts else ""
        verdict = f"rank 0{where} was lost before all processes had connected ({first_line(error)})"
    if problem is not None:  # the other ranks report it with its rank; here it is one line
        raise problem
    if verdict:
        raise RunFailure(f"rank {place.rank} on {place.host}: the processes cannot form a group: {verdict}")
    return target


def _collect(store: Any, place: Place, timeout_s: int) -> dict[int, dict[str, str]]:
    """Return the reports that arrive in time, by rank; print now and then which are missing."""
    deadline = time.monotonic() + timeout_s
    reports = dict[int, dict[str, str]]()
    while len(reports) < place.size and (left := deadline - time.monotonic()) > 0:
        missing = [rank for rank in range(place.size) if rank not in reports]
        with suppress(dist.DistError):
            patience = datetime.timedelta(seconds=min(WAITING_NOTE_S, left))
            store.wait([f"here/{rank}" for rank in missing], patience)
        for rank in missing:
            if store.check([f"here/{rank}"]):
                reports[rank] = json.loads(store.get(f"here/{rank}"))
        if len(reports) < place.size:
            print(f"waiting for {_describe_missing(reports, place)}", file=sys.stderr, flush=True)
    return reports


def _find_problem(reports: dict[int, dict[str, str]], place: Place, timeout_s: int) -> str:
    """Return why the processes cannot form a group, empty where they can."""
    if len(reports) < place.size:
        return f"{_describe_missing(reports, place)} did not connect within {timeout_s} s"
    names = {rank: f"rank {rank} on {entry['host']}" for rank, entry in reports.items()}
    if problems := [f"{names[rank]}: {entry['problem']}" for rank, entry in reports.items() if entry["problem"]]:
        return "; ".join(problems[:3])
    on_cpu = [names[rank] for rank, entry in reports.items() if entry["kind"] == "cpu"]
    if 0 < len(on_cpu) < place.size:
        return f"{', '.join(on_cpu[:3])}: no GPU, while others have one; ask for GPUs on every node, or set DEVICE cpu"
    owners: dict[tuple[str, str], int] = {}
    for rank, entry in reports.items():
        other = owners.setdefault((entry["host"], entry["gpu"]), rank)
        if entry["gpu"] and other != rank:
            return f"ranks {other} and {rank} on {entry['host']} have the same GPU; start one process a GPU"
    return ""


def _describe_missing(reports: dict[int, dict[str, str]], place: Place) -> str:
    """Return which ranks have not reported, and from which hosts."""
    text = _list_ranks([rank for rank in range(place.size) if rank not in reports])
    arrived = Counter(entry["host"] for entry in reports.values())
    hosts = [(host, arrived[host], expected) for host, expected in zip(place.hosts, place.tasks, strict=False)]
    incomplete = [f"{host} ({n} of {expected} connected)" for host, n, expected in hosts if n < expected]
    return f"{text} from {', '.join(incomplete[:SHOWN])}" if incomplete else text


def _list_ranks(ranks: list[int]) -> str:
    return f"rank {', '.join(map(str, ranks[:SHOWN]))}{' ...' if len(ranks) > SHOWN else ''}"


def report_failure(store: Any, place: Place, error: Exception) -> str:
    """Print on which rank a run failed, or return why this one cannot go on without another.

    The first rank that fails leaves its error in the store for the others.
    """
    who = f"rank {place.rank} of {place.size} on {place.host}"
    text = f"{type(error).__name__}: {first_line(error)}"
    if room := next((line.strip() for line in str(error).splitlines() if "/dev/shm/nccl" in line), ""):
        return f"{who} ends: {room}; NCCL needs more room there (docker run --shm-size=1g), or NCCL_SHM_DISABLE=1"
    if not isinstance(error, dist.DistError) and "gloo" not in str(error):
        if not isinstance(error, UsageError):  # which the command prints as one line
            print(f"{who} failed: {text}", file=sys.stderr, flush=True)
        with suppress(dist.DistError):  # rank 0, which serves the store, may have ended
            if store.add("failures", 1) == 1:
                store.set("failure", f"{who} failed: {text}")
        return ""
    lost = "rank 0, or the machine it ran on, is gone"
    with suppress(dist.DistError):
        store.set(f"left/{place.rank}", "")
        with suppress(dist.DistError):
            store.wait(["failure"], datetime.timedelta(seconds=2))
            return f"{who} ends: {store.get('failure').decode()}"
        # No rank has failed: those that have not noticed the end of the run are the reason.
        silent = [rank for rank in range(place.size) if not store.check([f"left/{rank}"])]
        lost = f"{_list_ranks(silent)}, which hangs or was killed"
    return f"{who} ends: it lost another process: {lost} ({text})"
