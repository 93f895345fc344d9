"""Jobs on a real SLURM of two virtual nodes: an interrupted job gives the result of an uninterrupted one."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stvit_video import extract
from stvit_video.runtime.launchers import find_place
from stvit_video.slurm.cli import main
from stvit_video.slurm.jobs import ClusterJob, find_jobs
from tests.conftest import REPOSITORY
from tests.slurm.cluster import (
    CONFIG,
    Cluster,
    finish,
    hold,
    let_go,
    processes,
    settings,
    wait_until,
    why_not,
)

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(why_not()), reason=why_not())]
TWO_NODES = ["--nodes", "2", "--gpus-per-node", "0", "--cpus-per-task", "1"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="stvit-slurm-", dir="/tmp"))  # short: SLURM's sockets lie in it
    found = Cluster(folder)
    up = found.script("up", GPUS="2")
    try:
        if up.returncode == 2:
            pytest.skip(up.stderr.strip())
        assert up.returncode == 0, up.stderr
        yield found
    finally:
        down = found.script("down")
        shutil.rmtree(folder, ignore_errors=True)
    assert down.returncode == 0, down.stderr
    assert not processes(str(folder)), "processes left running"


@pytest.fixture(autouse=True)
def _free(cluster: Cluster) -> Iterator[None]:
    """Restore the nodes before a test, and end its jobs after it."""
    cluster.script("up")
    yield
    left = cluster("squeue", "--noheader", "--format=%A").split()
    if left:
        cluster("scancel", *left)
        wait_until(lambda: not cluster("squeue", "--noheader"), f"end of {left}", 30)


@pytest.fixture(scope="module")
def undisturbed(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two processes under torchrun."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "stvit_video.run"]
    command = [sys.executable, *launch, *CONFIG, *settings(small_set, output)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, timeout=180, env=env, cwd=REPOSITORY)
    return output


def assert_same(output: Path, expected: Path) -> None:
    """Weights bit for bit, and all figures but the speed."""
    found, wanted = (load_file(path / "model.safetensors") for path in (output, expected))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    figures, known = (json.loads((path / "results.json").read_text()) for path in (output, expected))
    assert figures.pop("clips_per_second") > 0
    del known["clips_per_second"]
    assert figures == known


def test_features_of_two_nodes_are_those_of_one_process(
    cluster: Cluster, small_set: Path, trained: Path, tmp_path: Path
) -> None:
    words = [str(small_set / "videos"), "--checkpoint", str(trained), "--set", "TEST.CLIPS=1", "--output"]
    code, said = cluster.submit("extract", *TWO_NODES, "--", *words, str(tmp_path / "shared"))
    assert code == 0, said
    assert extract.main([*words, str(tmp_path / "alone")]) == 0
    wait_until(lambda: not cluster("squeue", "--noheader"), "the end of the job", 120)
    found, expected = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.suffix in (".npy", ".csv")}
        for name in ("shared", "alone")
    )
    assert found == expected
    assert len(found) > 10


def job_of(output: Path) -> ClusterJob:
    return find_jobs(output)[0]


def stops(output: Path) -> list[tuple[str, int]]:
    """Return reason and step of each stop that the job recorded."""
    return [(row["reason"], row["step"]) for row in job_of(output).events("stopped")]


def test_two_nodes_equal_two_processes(cluster: Cluster, small_set: Path, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    code, said = cluster.submit(*CONFIG, *TWO_NODES, "--copy-source", "--wait", *settings(small_set, output))
    assert code == 0, said
    assert "RUNNING node[1-2]" in said
    assert f"is done: {output}, top-1" in said
    assert_same(output, undisturbed)
    job = job_of(output)
    source = job.logs / "source1"
    record = json.loads((job.path / "job.json").read_text())
    assert record["request"]["source"] == str(source)
    assert (source / "stvit_video" / "run.py").is_file()
    assert "submit.py" in " ".join(record["command"])
    assert [row["hosts"] for row in job.events("started")] == [["node1", "node2"]]
    code, said = cluster.submit("status", str(output))
    assert (code, "done" in said, "checkpoint of step 12" in said) == (0, True, True), said
    code, said = cluster.submit(*CONFIG, *TWO_NODES, *settings(small_set, output))
    assert (code, said.count("\n")) == (2, 1), said
    assert "is finished" in said
    words = ["--partition", "gold", *settings(small_set, output, "OVERWRITE", "True")]
    code, said = cluster.submit(*CONFIG, *TWO_NODES, *words)
    assert (code, "sbatch refused the job" in said) == (2, True), said
    assert_same(output, undisturbed)


def preempt(cluster: Cluster, job: ClusterJob) -> None:
    cluster("sbatch", "-p", "urgent", "-N", "2", "--exclusive", "-o", "/dev/null", "--wrap", "srun sleep 2")
    wait_until(lambda: cluster.state(job.id) != "RUNNING", "the job makes way", 30)


def requeue(cluster: Cluster, job: ClusterJob) -> None:
    cluster("scontrol", "requeue", job.id)


def signal_by_hand(cluster: Cluster, job: ClusterJob) -> None:
    cluster("scancel", "--signal=USR1", job.id)


def lose_a_node(cluster: Cluster, job: ClusterJob) -> None:
    """Kill a slurmd. Its tasks go on, as where only the daemon or the network failed."""
    os.kill(cluster.slurmd("node2"), signal.SIGKILL)
    wait_until(lambda: cluster.state(job.id) == "PENDING", "the job is queued again", 60)
    cluster.script("up")


def disturb(cluster: Cluster, job: ClusterJob, how: Callable[[Cluster, ClusterJob], None]) -> None:
    """Interrupt a job after a step or two of its current start, and wait for its next start."""
    held = hold(job.run, job.newest_step() + 1)
    starts = len(job.events("started"))
    if how is not lose_a_node:  # then they must not end the run before SLURM has missed the node
        threading.Timer(1.0, let_go, [held]).start()
    how(cluster, job)
    wait_until(lambda: len(job.events("started")) > starts, "the job's next start", 90)


def assert_steps_once(output: Path) -> None:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["split"] == "train"]
    assert steps == sorted(set(steps))


def test_interrupted_job_equals_uninterrupted(
    cluster: Cluster, small_set: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Preemption, requeue, a signal and the loss of a node, each in the middle of an epoch."""
    output = tmp_path / "run"
    process = cluster.start(*CONFIG, *TWO_NODES, "--time", "60", "--wait", *settings(small_set, output))
    try:
        wait_until((output / "slurm" / "job.json").is_file, "the submission")
        job = job_of(output)
        disturb(cluster, job, preempt)
        # submitit would take this result of an earlier start for an error of the next one.
        stale = job.logs / f"{job.id}_1_result.pkl"
        stale.write_bytes(pickle.dumps(("error", "Connection closed by peer")))
        disturb(cluster, job, requeue)
        disturb(cluster, job, signal_by_hand)
        disturb(cluster, job, lose_a_node)
        code, said = finish(process)
    finally:
        process.kill()
    assert code == 0, said
    assert f"is done: {output}" in said
    assert_same(output, undisturbed)
    assert_steps_once(output)
    assert pickle.loads(stale.read_bytes())[0] == "success"  # noqa: S301 (written by this test's own job)
    resumed = [row["step"] for row in job.events("started")]
    assert len(resumed) == 5
    assert resumed == sorted(set(resumed)), "each start continues where the one before was stopped"
    ours = [(reason, step) for reason, step in stops(output) if reason != "told to end"]  # may be recorded too late
    assert ours == [("preempted", resumed[1]), ("signal SIGUSR1", resumed[3])], said


def test_time_limit_is_survived(cluster: Cluster, small_set: Path, undisturbed: Path, tmp_path: Path) -> None:
    output, profile = tmp_path / "run", tmp_path / "site.yaml"
    profile.write_text("time: 1\nwarning_s: 10\n")
    words = [*CONFIG, *TWO_NODES, "--profile", str(profile), "--wait", *settings(small_set, output)]
    process = cluster.start(*words)
    try:
        hold(output, 5)  # until SLURM's warning, SIGCONT and SIGUSR2
        code, said = finish(process)
    finally:
        process.kill()
    assert code == 0, said
    assert_same(output, undisturbed)
    assert_steps_once(output)
    assert {reason for reason, _ in stops(output)} == {"time limit"}
    assert 5 <= stops(output)[0][1] < 12


CRASH = """
import sys
if "stvit_video.run" in sys.orig_argv:
    import os
    from stvit_video.training.trainer import Trainer
    take_step = Trainer.take_step
    def crash(self, batches):
        if self.step == 2 and os.environ["SLURM_PROCID"] == "1":
            raise ArithmeticError("nothing adds up")
        return take_step(self, batches)
    Trainer.take_step = crash
"""


def test_crash_ends_all_nodes_and_is_shown(cluster: Cluster, small_set: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(CRASH)
    output = tmp_path / "run"
    words = [*CONFIG, *TWO_NODES, "--wait", *settings(small_set, output)]
    code, said = cluster.submit(*words, env={"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"})
    assert code == 1, said
    assert "ArithmeticError: nothing adds up" in said
    assert "rank 1 on node2 failed first, with exit code 1" in said
    job = job_of(output)
    assert cluster.state(job.id) == "FAILED"
    assert "Restarts=0" in cluster("scontrol", "show", "job", job.id)
    assert not processes("stvit_video.run", str(output))
    rows = [json.loads(line) for line in (output / "slurm" / "history.jsonl").read_text().splitlines()]
    ended = json.loads(next((output / "slurm" / "failures").glob("*.1.json")).read_text())["time"]
    found = cluster("scontrol", "show", "job", job.id)
    end = time.mktime(time.strptime(re.search(r"EndTime=(\S+)", found)[1], "%Y-%m-%dT%H:%M:%S"))  # type: ignore[index]
    assert end - ended < 15, rows


def test_node_without_data_ends_the_job_before_training(cluster: Cluster, small_set: Path, tmp_path: Path) -> None:
    output, empty = tmp_path / "run", tmp_path / "empty"
    empty.mkdir()
    root = small_set
    cluster.inside("node2", "mount", "--bind", str(empty), str(root))
    try:
        code, said = cluster.submit(*CONFIG, *TWO_NODES, "--wait", *settings(small_set, output))
    finally:
        cluster.inside("node2", "umount", str(root))
    assert code == 1, said
    assert "rank 1 on node2 failed first, with exit code 2" in said
    assert f"node node2 cannot use DATA.TRAIN_LIST {root}/motion/train.csv (No such file or directory)" in said
    assert "Traceback" not in said
    assert not list(output.glob("checkpoints/*"))
    job = job_of(output)
    assert len(job.events("started")) <= 1, "a missing file is not retried"  # 0: rank 1 failed first
    assert "Restarts=0" in cluster("scontrol", "show", "job", job.id)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--partition", "gold"], "sbatch refused the job: Batch job submission failed: Invalid partition name"),
        (["--nodes", "3"], "sbatch refused the job: Batch job submission failed: "),
        (["--cpus-per-task", "99"], "sbatch refused the job: Batch job submission failed: "),
        (["--gpus-per-node", "8"], "sbatch refused the job: Batch job submission failed: "),
    ],
)
def test_refusal_of_sbatch_is_one_line(
    cluster: Cluster,
    small_set: Path,
    tmp_path: Path,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    assert main([*CONFIG, *TWO_NODES, *words, "--wait", *settings(small_set, tmp_path / "run")]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1, said
    assert message in said
    assert "Partitions here: main: 2 node(s) of 4 CPUs" in said


def test_ctrl_c_cancel_and_resume(cluster: Cluster, small_set: Path, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = cluster.start(*CONFIG, *TWO_NODES, "--wait", *settings(small_set, output))
    try:
        held = hold(output, 5)
        process.send_signal(signal.SIGINT)
        code, said = finish(process, 90)
    finally:
        process.kill()
    assert (code, "the job goes on" in said) == (130, True), said
    first = job_of(output)
    assert cluster.state(first.id) == "RUNNING"
    code, said = cluster.submit(*CONFIG, *TWO_NODES, *settings(small_set, output))
    assert (code, f"belongs to job {first.id}, which has not ended" in said) == (2, True), said
    assert cluster.submit("cancel", str(output))[0] == 0
    let_go(held)
    wait_until(lambda: cluster.state(first.id) == "CANCELLED", "the job's end", 30)
    [(reason, step)] = stops(output)
    assert reason == "told to end"
    code, said = cluster.submit("resume", "--wait", str(output))
    assert code == 0, said
    assert job_of(output).id != first.id
    assert f"continuing at step {step} " in job_of(output).log().read_text()
    assert_same(output, undisturbed)


def test_array_of_four_runs_and_its_table(cluster: Cluster, small_set: Path, tmp_path: Path) -> None:
    words = [
        *CONFIG,
        "--gpus-per-node",
        "0",
        "--cpus-per-task",
        "1",
        "--array",
        "SEED=0,1 OPTIM.LR=1e-3,1e-4",
        "--wait",
    ]
    quick = ["TRAIN.EPOCHS", "1", "TRAIN.VAL_EVERY", "1"]
    code, said = cluster.submit(*words, *settings(small_set, tmp_path / "grid", *quick))
    assert code == 0, said
    runs = sorted(path.parent.name for path in tmp_path.glob("grid/*/results.json"))
    assert runs == [f"SEED={seed},OPTIM.LR={rate}" for seed in (0, 1) for rate in ("1e-3", "1e-4")]
    table = (tmp_path / "grid" / "summary.csv").read_text().splitlines()
    assert len(table) == 5
    assert table[0].startswith("run,job,state,OPTIM.LR,SEED,top1")
    assert all(",done," in line for line in table[1:])
    assert "SEED=0,OPTIM.LR=1e-4" in said
    assert len({job.id.split("_")[0] for job in find_jobs(tmp_path / "grid")}) == 1


PLACE = """
import json, os, sys
sys.path.insert(0, {repository!r})
from stvit_video.runtime.launchers import find_place
from stvit_video.runtime.world import gather_objects, join_world
place = find_place()
with join_world("cpu", 30) as world:
    seen = gather_objects(world, os.environ.get("SLURMD_NODENAME"))
    mine = [world.rank, world.size, place and place.launcher, place and place.local_rank, seen]
    with open(f"{folder}/place-{{world.rank}}.json", "w") as file:  # a file per process: lines may interleave
        json.dump(mine + [os.environ.get("CUDA_VISIBLE_DEVICES")], file)
"""


@pytest.mark.parametrize(
    ("launcher", "expected"),
    [
        ("srun PYTHON", [[r, 4, "SLURM", r % 2, ["node1", "node1", "node2", "node2"]] for r in range(4)]),
        ("srun -n 1 -N 1 PYTHON", [[0, 1, None, None, ["node1"]]]),
        ("srun -n 1 -N 1 torchrun --standalone --nproc_per_node 2", [[r, 2, "torchrun", r] for r in range(2)]),
        ("torchrun --standalone --nproc_per_node 2", [[r, 2, "torchrun", r] for r in range(2)]),
    ],
)
def test_launchers_give_the_right_ranks(
    cluster: Cluster, tmp_path: Path, launcher: str, expected: list[list[object]]
) -> None:
    program = tmp_path / "place.py"
    program.write_text(PLACE.format(repository=str(REPOSITORY), folder=tmp_path))
    launcher = launcher.replace("PYTHON", sys.executable)
    launcher = launcher.replace("torchrun", f"{sys.executable} -m torch.distributed.run")
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\n{launcher} {program}\n")
    sizes = ["-N", "2", "--ntasks-per-node=2", "--gpus-per-node=2"]
    job = cluster("sbatch", "--parsable", *sizes, "-o", str(tmp_path / "out"), str(script))
    wait_until(lambda: cluster.state(job) in ("COMPLETED", "FAILED"), "the job's end")
    said = (tmp_path / "out").read_text()
    assert cluster.state(job) == "COMPLETED", said
    places = sorted(json.loads(file.read_text()) for file in tmp_path.glob("place-*.json"))
    for found, wanted in zip(places, expected, strict=True):
        assert found.pop() == "0,1"  # CUDA_VISIBLE_DEVICES, as SLURM set it
        assert found[: len(wanted)] == wanted


def test_missing_rank_is_named(cluster: Cluster, tmp_path: Path) -> None:
    program = tmp_path / "place.py"
    program.write_text(PLACE.format(repository=str(REPOSITORY), folder=tmp_path).replace('"cpu", 30', '"cpu", 8'))
    script = tmp_path / "job.sh"
    # Rank 1 exits without an error; the others must not wait forever.
    script.write_text(
        f"#!/bin/bash\nsrun --kill-on-bad-exit=0 bash -c '[ $SLURM_PROCID = 1 ] || {sys.executable} {program}'\n"
    )
    job = cluster("sbatch", "--parsable", "-N", "2", "-n", "2", "-o", str(tmp_path / "out"), str(script))
    wait_until(lambda: cluster.state(job) in ("COMPLETED", "FAILED"), "the job's end")
    said = (tmp_path / "out").read_text()
    assert cluster.state(job) == "FAILED", said
    assert "rank 1 from node2 (0 of 1 connected) did not connect within 8 s" in said
    assert not list(tmp_path.glob("place-*.json"))


@pytest.mark.parametrize("text", ["node[1-2]", "gpu[01-03,7],login", "a1,b[9-11],c", "r[1-2]n[08-10]"])
def test_node_lists_are_parsed_as_scontrol_does(cluster: Cluster, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"STEP_ID": "0", "PROCID": "0", "LOCALID": "0", "NTASKS": "2", "STEP_NODELIST": text}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    place = find_place()
    assert place is not None
    assert list(place.hosts) == cluster("scontrol", "show", "hostnames", text).split()
