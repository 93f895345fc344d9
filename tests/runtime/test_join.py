"""Launchers and rendezvous: a complete set of variables, none, or an error that names what is missing."""

import os
import random
import signal
import socket
import subprocess
import sys
from unittest import mock

import pytest

from stvit_video.common.errors import UsageError
from stvit_video.runtime.launchers import OTHER_LAUNCHERS, SLURM_VARIABLES, TORCHRUN_VARIABLES, Place, find_place
from stvit_video.runtime.world import PORTS_TRIED, _find_problem, join_world, on_main, report_failure

TORCHRUN = dict(zip(TORCHRUN_VARIABLES, ("3", "4", "1", "2", "10.0.0.1", "29500"), strict=True))
# What srun sets for the last of five tasks on three nodes, as printed by one.
STEP = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "4", "SLURM_NTASKS": "5", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2", "SLURM_JOB_NODELIST": "gpu[01-02,07]", "SLURM_STEP_NODELIST": "gpu[01-02,07]",
    "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURMD_NODENAME": "gpu07",
    "SLURM_CPUS_PER_TASK": "6", "ENVIRONMENT": "BATCH",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_rank_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name in (*TORCHRUN_VARIABLES, *OTHER_LAUNCHERS) or name.startswith(("SLURM", "SUBMITIT")):
            monkeypatch.delenv(name)


def place_in(env: dict[str, str]) -> Place | None:
    """Return the place of a process with these variables."""
    with mock.patch.dict(os.environ, env):
        return find_place()


def test_single_process_without_variables() -> None:
    with join_world("cpu") as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert on_main(world, lambda: 3) == 3


@pytest.mark.parametrize("present", [("RANK",), ("WORLD_SIZE", "RANK"), ("MASTER_PORT",), TORCHRUN_VARIABLES[:-1]])
def test_incomplete_torchrun_variables_are_named(monkeypatch: pytest.MonkeyPatch, present: tuple[str, ...]) -> None:
    for name in present:
        monkeypatch.setenv(name, "1")
    with pytest.raises(UsageError) as error, join_world("cpu"):
        pass
    for name in TORCHRUN_VARIABLES:
        assert name in str(error.value)


def test_incomplete_group_is_an_error() -> None:
    code = "from stvit_video.runtime.world import join_world\nwith join_world('cpu', timeout_s=3) as w: print('ran', w)"
    env = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29871"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "ran" not in result.stdout


def test_missing_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="0 GPUs are visible"), join_world("cuda"):
        pass


def test_place_of_a_slurm_task() -> None:
    place = place_in(STEP)
    assert place is not None
    assert (place.launcher, place.rank, place.size, place.local_rank, place.local_size) == ("SLURM", 4, 5, 0, 1)
    assert (place.host, place.hosts, place.tasks) == ("gpu07", ("gpu01", "gpu02", "gpu07"), (2, 2, 1))
    assert (place.address, place.port, place.cpus) == ("gpu01", None, 6)
    again = place_in(STEP | {"SLURM_RESTART_COUNT": "1"})
    assert again is not None
    assert again.job != place.job  # an earlier start that still runs is not joined


def test_torchrun_comes_before_slurm() -> None:
    """All workers of torchrun inside a SLURM task see the same SLURM variables."""
    place = place_in(STEP | TORCHRUN)
    assert place is not None
    assert (place.launcher, place.rank, place.size, place.local_rank) == ("torchrun", 3, 4, 1)


def test_incomplete_torchrun_variables_are_an_error_inside_slurm() -> None:
    with pytest.raises(UsageError, match="RANK set but WORLD_SIZE"):
        place_in(STEP | {"RANK": "0"})


@pytest.mark.parametrize("missing", SLURM_VARIABLES)
def test_incomplete_slurm_variables_are_named(missing: str) -> None:
    env = {name: value for name, value in STEP.items() if name in SLURM_VARIABLES and name != missing}
    with pytest.raises(UsageError, match=missing):
        place_in(env)


def test_shell_of_a_job_is_a_single_process_or_an_error() -> None:
    batch = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "n1"}
    batch |= {"ENVIRONMENT": "BATCH"}
    salloc = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2"}
    for shell in (batch, salloc):
        assert place_in(shell) is None
        assert place_in(shell | {"SLURM_NTASKS": "1"}) is None
        with pytest.raises(UsageError, match="srun python"):
            place_in(shell | {"SLURM_NTASKS": "2"})
    interactive = STEP | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}  # as `srun --pty bash` in a larger job
    assert place_in(interactive) is None


@pytest.mark.parametrize(("rank", "size"), OTHER_LAUNCHERS.items())
def test_launchers_that_are_not_supported_are_named(rank: str, size: str) -> None:
    """Alone, as the only process, beside srun, which numbers its tasks so too, and around torchrun."""
    second = {rank: "1"} | ({size: "2"} if size else {})
    with pytest.raises(UsageError, match=rf"{rank} is 1.*start them with torchrun .* or srun"):
        place_in(second)
    assert place_in({rank: "0"} | ({size: "1"} if size else {})) is None
    if size:
        with pytest.raises(UsageError, match=rf"{rank} is 0 and {size} 2"):
            place_in(second | {rank: "0"})
    task = place_in(STEP | {rank: "4"} | ({size: "5"} if size else {}))
    assert task is not None
    assert (task.launcher, task.rank) == ("SLURM", 4)
    with pytest.raises(UsageError, match=rank):  # mpirun in a job starts one process a node with srun
        place_in(STEP | {rank: "9"} | ({size: "10"} if size else {}))
    around = place_in(TORCHRUN | second)
    assert around is not None
    assert around.launcher == "torchrun"


def test_rank_has_to_be_a_number() -> None:
    with pytest.raises(UsageError, match="RANK is 'first'"):
        place_in(TORCHRUN | {"RANK": "first"})


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        ("n1", "n1"),
        ("n[1-3]", "n1 n2 n3"),
        ("gpu[08-11,20],login", "gpu08 gpu09 gpu10 gpu11 gpu20 login"),
        ("a-[1,3]-b[1-2],c", "a-1-b1 a-1-b2 a-3-b1 a-3-b2 c"),
        ("n[098-101]", "n098 n099 n100 n101"),
    ],
)
def test_node_lists_are_expanded(nodes: str, hosts: str) -> None:
    place = place_in(STEP | {"SLURM_STEP_NODELIST": nodes})
    assert place is not None
    assert place.hosts == tuple(hosts.split())


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, ""),
        ({"gpu": "GPU-1"}, "ranks 0 and 1 on n1 have the same GPU"),
        ({"gpu": "GPU-1", "host": "n2"}, ""),  # UUIDs repeat on cloned machines
        ({"kind": "cpu", "gpu": ""}, "rank 1 on n1: no GPU, while others have one"),
        ({"problem": "2 GPUs are needed"}, "rank 1 on n1: 2 GPUs are needed"),
    ],
)
def test_incompatible_processes_are_named(change: dict[str, str], verdict: str) -> None:
    entries = [{"host": "n1", "kind": "cuda", "gpu": f"GPU-{rank + 1}", "problem": ""} for rank in range(2)]
    found = _find_problem({0: entries[0], 1: entries[1] | change}, Place("SLURM", 0, 2, 0, 2, "n1"), 5)
    assert found.startswith(verdict)
    assert bool(found) == bool(verdict)


PROGRAM = """
import os, signal, sys, threading, time
from stvit_video.common.errors import RunFailure
from stvit_video.runtime.world import any_of, gather_objects, join_world, on_main
def fail():
    raise RunFailure("no decoder starts")
signal.signal(signal.SIGTERM, lambda number, frame: None)  # as commands do, which end when Python runs again
with join_world("cpu", timeout_s=int(sys.argv[1])) as world:
    print(gather_objects(world, os.environ["SLURMD_NODENAME"]), flush=True)
    if sys.argv[2] == os.environ["SLURMD_NODENAME"]:
        raise ArithmeticError("nothing adds up")
    if sys.argv[2] == os.environ["SLURMD_NODENAME"] + " hangs":
        time.sleep(int(sys.argv[1]) + 8)
    if sys.argv[2] == "main":
        on_main(world, fail)
    if sys.argv[2] == "ends while it waits":
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start() if world.is_main else time.sleep(3)
    any_of(world, False)
"""


def run_tasks(*words: str, ranks: tuple[int, ...] = (0, 1), job: str = "901") -> list[tuple[int, str]]:
    """Run tasks as srun would start them on two nodes; return exit codes and outputs."""
    started = []
    for rank in ranks:
        task = STEP | {"SLURM_JOB_ID": job, "SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)}
        task |= {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
        task |= {"SLURM_STEP_NODELIST": "left,right", "SLURMD_NODENAME": ("left", "right")[rank]}
        env = {**os.environ, **task, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", PROGRAM, *words]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [process.communicate(timeout=180)[0] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def test_tasks_meet_when_ports_are_taken() -> None:
    """Other programs listen on the first two ports of this job."""
    ports = random.Random("902.0.0").sample(range(20000, 32768), PORTS_TRIED)[:2]
    with socket.create_server(("", ports[0])), socket.create_server(("", ports[1])):
        for code, said in run_tasks("90", "nobody", job="902"):
            assert (code, "['left', 'right']" in said) == (0, True), said


def test_failure_is_reported_with_its_rank_on_all_ranks() -> None:
    (left, left_said), (right, right_said) = run_tasks("90", "right")
    assert left != 0
    assert right != 0
    assert "rank 1 of 2 on right failed: ArithmeticError: nothing adds up" in right_said
    assert "rank 0 of 2 on left ends: rank 1 of 2 on right failed: ArithmeticError" in left_said


def test_a_process_that_waits_for_others_is_ended_at_once() -> None:
    (left, _), _ = run_tasks("90", "ends while it waits", job="907")
    assert left == -signal.SIGTERM


@pytest.mark.long
def test_a_failure_of_rank_0_is_that_of_all() -> None:
    for rank, (code, said) in enumerate(run_tasks("90", "main", job="906")):
        assert code == 1
        assert f"rank {rank} of 2 on {('left', 'right')[rank]} failed: RunFailure: no decoder starts" in said


def test_only_the_room_that_nccl_lacks_is_called_so() -> None:
    place, store = Place("torchrun", 1, 2, 1, 2, "n1"), mock.Mock(add=lambda key, count: count)
    lacking = "NCCL error\nError while creating shared memory segment /dev/shm/nccl-TLJr (size 9637888)"
    assert "/dev/shm/nccl-TLJr (size 9637888); NCCL needs more room" in report_failure(store, place, OSError(lacking))
    assert report_failure(store, place, UsageError("DATA.ROOT /dev/shm/set is missing")) == ""


def test_hanging_process_is_named_within_the_timeout() -> None:
    (left, left_said), (right, _) = run_tasks("4", "right hangs")
    assert left != 0
    assert right != 0
    assert "rank 0 of 2 on left ends: it lost another process: rank 1, which hangs" in left_said


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "rank 1 from right (0 of 1 connected) did not connect within 3 s"),
        (1, "rank 1 on right: no answer from rank 0 on 127.0.0.1 within 3 s"),
    ],
)
def test_missing_rank_is_named(rank: int, message: str) -> None:
    [(code, said)] = run_tasks("3", "nobody", ranks=(rank,), job=f"90{rank + 3}")
    assert code != 0
    assert message in said
    assert "['left'" not in said
