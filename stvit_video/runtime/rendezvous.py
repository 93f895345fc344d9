"""How the processes of a run find each other, and who is to blame where they do not."""

import datetime
import json
import random
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from stvit_video.common.errors import RunFailure, UsageError, first_line
from stvit_video.runtime.launchers import Place

WAITING_NOTE_S = 30  # seconds between notes on who has not come yet
PORTS_TRIED = 8
ANSWER_S = 10


def connect(place: Place, timeout_s: int) -> Any:
    """Return the store that all processes of this start of the job share."""
    timeout = datetime.timedelta(seconds=timeout_s)
    if place.launcher == "torchrun":
        try:
            return next(iter(rendezvous("env://", place.rank, place.size, timeout=timeout)))[0]
        except dist.DistError as error:
            where = f"{place.address}:{place.port}"
            raise RunFailure(f"rank {place.rank}: nobody answers on {where} within {timeout_s} s") from error
    host = place.address
    # Several jobs may share a machine: each has ports of its own to try, and says by a key which job it is.
    ports = [place.port] if place.port else random.Random(place.job).sample(range(20000, 32768), PORTS_TRIED)
    if place.rank == 0:
        return _serve(place, host, ports, timeout)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for port in ports:
            store = _find_store(place, host, port, timeout)
            if store is not None:
                return store
        time.sleep(0.2)
    raise RunFailure(
        f"rank {place.rank} on {place.host}: rank 0 on {host} did not come within {timeout_s} s, or its ports "
        f"{', '.join(map(str, ports))} cannot be reached from here"
    )


def _serve(place: Place, host: str, ports: list[int], timeout: datetime.timedelta) -> Any:
    for port in ports:
        with socket.socket() as probe:  # torch would share a port that is being listened on
            try:
                probe.bind(("", port))
            except OSError:
                continue
        try:
            store = TCPStore(host, port, place.size, True, timeout, wait_for_workers=False)
        except dist.DistError:
            continue
        store.set(f"job {place.job}", "")
        return store
    raise RunFailure(
        f"rank 0 on {place.host}: ports {', '.join(map(str, ports))} are all taken; set MASTER_PORT to a free one"
    )


def _find_store(place: Place, host: str, port: int, timeout: datetime.timedelta) -> Any:
    """Return this job's store if it is behind ``port``, else None."""
    found: list[Any] = []

    def ask() -> None:
        with suppress(dist.DistError):
            store = TCPStore(host, port, place.size, False, datetime.timedelta(seconds=5), wait_for_workers=False)
            if store.check([f"job {place.job}"]):
                found.append(store)

    try:
        socket.create_connection((host, port), timeout=2).close()  # refused at once where nobody listens
    except OSError:
        return None
    # Whatever listens there may never answer, and torch would wait for ever: in a thread that can be left behind.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER_S)
    if found:
        found[0].set_timeout(timeout)
    return found[0] if found else None


def call_roll(store: Any, place: Place, kind: str, gpu: str, problem: str, timeout_s: int) -> None:
    """Return once all processes have come, and their devices go together; raise RunFailure where that fails.

    Every process says where it is and what it has (``kind`` of device, the GPU's identity, its ``problem``); rank 0
    judges, and its verdict reaches all.
    """
    entry = {"host": place.host, "kind": kind, "gpu": gpu, "problem": problem}
    store.set(f"here/{place.rank}", json.dumps(entry))
    if place.rank == 0:
        verdict = _judge(_collect(store, place, timeout_s), place, timeout_s)
        store.set("verdict", verdict)
    else:
        try:
            store.wait(["verdict"], datetime.timedelta(seconds=timeout_s + 10))
            verdict = store.get("verdict").decode()
        except dist.DistError as error:
            where = f" on {place.hosts[0]}" if place.hosts else ""
            verdict = f"rank 0{where} was lost before all processes had come ({first_line(error)})"
    if verdict:
        raise RunFailure(f"rank {place.rank} on {place.host}: the processes cannot work together: {verdict}")


def _collect(store: Any, place: Place, timeout_s: int) -> dict[int, dict[str, str]]:
    """Return what the processes said that came in time, and note now and then who has not."""
    deadline, came = time.monotonic() + timeout_s, dict[int, dict[str, str]]()
    while True:
        missing = [rank for rank in range(place.size) if rank not in came]
        patience = min(WAITING_NOTE_S, deadline - time.monotonic())
        if not missing or patience <= 0:
            return came
        with suppress(dist.DistError):
            store.wait([f"here/{rank}" for rank in missing], datetime.timedelta(seconds=patience))
        for rank in missing:
            if store.check([f"here/{rank}"]):
                came[rank] = json.loads(store.get(f"here/{rank}"))
        if len(came) < place.size:
            print(f"waiting for {_describe_missing(came, place)}", file=sys.stderr, flush=True)


def _judge(came: dict[int, dict[str, str]], place: Place, timeout_s: int) -> str:
    """Return why the processes cannot form a group, empty where they can."""
    if len(came) < place.size:
        return f"{_describe_missing(came, place)} did not come within {timeout_s} s"
    troubled = [
        f"rank {rank} on {entry['host']}: {entry['problem']}" for rank, entry in came.items() if entry["problem"]
    ]
    if troubled:
        return "; ".join(troubled[:3])
    on_cpu = [f"rank {rank} on {entry['host']}" for rank, entry in came.items() if entry["kind"] == "cpu"]
    if 0 < len(on_cpu) < place.size:
        return f"{', '.join(on_cpu[:3])}: no GPU, while others have one; ask for GPUs on every node, or set DEVICE cpu"
    owners: dict[tuple[str, str], int] = {}
    for rank, entry in came.items():
        other = owners.setdefault((entry["host"], entry["gpu"]), rank)
        if entry["gpu"] and other != rank:
            return f"ranks {other} and {rank} on {entry['host']} have the same GPU; start one process a GPU"
    return ""


def _describe_missing(came: dict[int, dict[str, str]], place: Place) -> str:
    """Return which ranks have not come, and from which hosts."""
    ranks = [str(rank) for rank in range(place.size) if rank not in came]
    text = f"rank {', '.join(ranks[:8])}{' ...' if len(ranks) > 8 else ''}"
    arrived = [sum(entry["host"] == host for entry in came.values()) for host in place.hosts]
    short = [
        f"{host} ({n} of {of} came)" for host, n, of in zip(place.hosts, arrived, place.tasks, strict=False) if n < of
    ]
    return f"{text} from {', '.join(short[:8])}" if short else text


def report(store: Any, place: Place, error: Exception) -> None:
    """Say on which rank a run failed: the first that fails leaves a note to those that lose it."""
    who = f"rank {place.rank} of {place.size} on {place.host}"
    lost = isinstance(error, dist.DistError) or "gloo" in str(error)  # a peer's end, seen from here
    text = f"{type(error).__name__}: {first_line(error)}"
    if not lost:
        if not isinstance(error, UsageError):  # which is one line already
            print(f"{who} failed: {text}", file=sys.stderr, flush=True)
        with suppress(dist.DistError):  # rank 0, which keeps the store, may have failed and gone before
            if store.add("failures", 1) == 1:
                store.set("failure", f"{who} failed: {text}")
        return
    try:
        store.set(f"left/{place.rank}", "")
        store.wait(["failure"], datetime.timedelta(seconds=2))
        reason = store.get("failure").decode()
    except dist.DistError:
        reason = f"it lost another process: {_describe_silent(store, place)} ({text})"
    print(f"{who} ends: {reason}", file=sys.stderr, flush=True)


def _describe_silent(store: Any, place: Place) -> str:
    """Return which ranks have not noticed that the run ends: one of them hangs, or was killed."""
    try:
        silent = [str(rank) for rank in range(place.size) if not store.check([f"left/{rank}"])]
    except dist.DistError:
        return "rank 0, or the machine it ran on, is gone"
    return f"no word from rank {', '.join(silent[:8])}{' ...' if len(silent) > 8 else ''}, which hangs or was killed"
