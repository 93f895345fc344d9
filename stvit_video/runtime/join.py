"""Joining the process group: how the processes find each other, and the device of each one."""

import datetime
import json
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from stvit_video.common.errors import RunFailure, Stopped, UsageError, first_line
from stvit_video.runtime.launchers import Place, find_place
from stvit_video.runtime.stopping import end_with_parent
from stvit_video.runtime.world import World

WAITING_NOTE_S = 30  # between two notes about missing ranks
PORTS_TRIED = 8
ANSWER_S = 10
RANKS_SHOWN = 8


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
        report_failure(store, place, error)
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
    listed = ", ".join(map(str, ports))
    if place.rank == 0:
        for port in ports:
            with socket.socket() as probe, suppress(OSError, dist.DistError):
                probe.bind(("", port))  # torch would share a port on which another process listens
                probe.close()
                store = TCPStore(place.address, port, place.size, True, timeout, wait_for_workers=False)
                store.set(f"job {place.job}", "")
                return store
        raise RunFailure(f"rank 0 on {place.host}: ports {listed} are all taken; set MASTER_PORT to a free one")
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for port in ports:
            store = _find_store(place, port, timeout)
            if store is not None:
                return store
        time.sleep(0.2)
    raise RunFailure(
        f"rank {place.rank} on {place.host}: no answer from rank 0 on {place.address} within {timeout_s} s: it did not "
        f"start, or its ports {listed} cannot be reached from here"
    )


def _find_store(place: Place, port: int, timeout: datetime.timedelta) -> Any:
    """Return this job's store if rank 0 serves it on ``port``, else None."""
    found: list[Any] = []

    def ask() -> None:
        with suppress(dist.DistError):
            limit = datetime.timedelta(seconds=5)
            store = TCPStore(place.address, port, place.size, False, limit, wait_for_workers=False)
            if store.check([f"job {place.job}"]):
                found.append(store)

    try:
        socket.create_connection((place.address, port), timeout=2).close()  # fails at once where nobody listens
    except OSError:
        return None
    # Another program on that port may never answer, and torch has no time limit there: the thread is then abandoned.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER_S)
    if found:
        found[0].set_timeout(timeout)
    return found[0] if found else None


def wait_for_all_ranks(store: Any, place: Place, name: str, timeout_s: int) -> torch.device:
    """Return this process's device when all processes are there and have suitable ones.

    Each process reports its type of device, the GPU's UUID and its problem; rank 0 decides for all. Raises RunFailure
    on every rank otherwise, UsageError where this process has no device.
    """
    target, gpu, problem = torch.device("cpu"), "", None
    try:
        target = pick_device(name, place.local_rank, place.local_size, bound=place.launcher == "SLURM")
        gpu = str(torch.cuda.get_device_properties(target).uuid) if target.type == "cuda" else ""
    except UsageError as error:
        problem = error
    entry = {"host": place.host, "kind": target.type, "gpu": gpu, "problem": str(problem or "")}
    store.set(f"here/{place.rank}", json.dumps(entry))
    if place.rank == 0:
        verdict = _find_problem(_collect(store, place, timeout_s), place, timeout_s)
        store.set("verdict", verdict)
    else:
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
    deadline, reports = time.monotonic() + timeout_s, dict[int, dict[str, str]]()
    while True:
        missing = [rank for rank in range(place.size) if rank not in reports]
        patience = min(WAITING_NOTE_S, deadline - time.monotonic())
        if not missing or patience <= 0:
            return reports
        with suppress(dist.DistError):
            store.wait([f"here/{rank}" for rank in missing], datetime.timedelta(seconds=patience))
        for rank in missing:
            if store.check([f"here/{rank}"]):
                reports[rank] = json.loads(store.get(f"here/{rank}"))
        if len(reports) < place.size:
            print(f"waiting for {_describe_missing(reports, place)}", file=sys.stderr, flush=True)


def _find_problem(reports: dict[int, dict[str, str]], place: Place, timeout_s: int) -> str:
    """Return why the processes cannot form a group, empty where they can."""
    if len(reports) < place.size:
        return f"{_describe_missing(reports, place)} did not connect within {timeout_s} s"
    problems = [f"rank {rank} on {e['host']}: {e['problem']}" for rank, e in reports.items() if e["problem"]]
    if problems:
        return "; ".join(problems[:3])
    on_cpu = [f"rank {rank} on {entry['host']}" for rank, entry in reports.items() if entry["kind"] == "cpu"]
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
    text = _list_ranks(rank for rank in range(place.size) if rank not in reports)
    arrived = [sum(entry["host"] == host for entry in reports.values()) for host in place.hosts]
    incomplete = [
        f"{host} ({n} of {of} connected)"
        for host, n, of in zip(place.hosts, arrived, place.tasks, strict=False)
        if n < of
    ]
    return f"{text} from {', '.join(incomplete[:8])}" if incomplete else text


def _list_ranks(ranks: Iterable[int]) -> str:
    names = [str(rank) for rank in ranks]
    return f"rank {', '.join(names[:RANKS_SHOWN])}{' ...' if len(names) > RANKS_SHOWN else ''}"


def report_failure(store: Any, place: Place, error: Exception) -> None:
    """Print on which rank a run failed. The first rank that fails leaves its error in the store for the others."""
    who = f"rank {place.rank} of {place.size} on {place.host}"
    lost_a_peer = isinstance(error, dist.DistError) or "gloo" in str(error)
    text = f"{type(error).__name__}: {first_line(error)}"
    if not lost_a_peer:
        if not isinstance(error, UsageError):  # which the command prints as one line
            print(f"{who} failed: {text}", file=sys.stderr, flush=True)
        with suppress(dist.DistError):  # rank 0, which serves the store, may have ended
            if store.add("failures", 1) == 1:
                store.set("failure", f"{who} failed: {text}")
        return
    try:
        store.set(f"left/{place.rank}", "")
        store.wait(["failure"], datetime.timedelta(seconds=2))
        reason = store.get("failure").decode()
    except dist.DistError:
        try:  # ranks that have not noticed the end of the run
            silent = [rank for rank in range(place.size) if not store.check([f"left/{rank}"])]
            lost = f"{_list_ranks(silent)}, which hangs or was killed"
        except dist.DistError:
            lost = "rank 0, or the machine it ran on, is gone"
        reason = f"it lost another process: {lost} ({text})"
    print(f"{who} ends: {reason}", file=sys.stderr, flush=True)
