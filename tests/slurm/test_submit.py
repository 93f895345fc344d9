"""Submission without SLURM: profiles, scripts, grids, following jobs, requeueing, and submitit's local executor."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from stvit_video.common.errors import UsageError
from stvit_video.slurm import jobs as following
from stvit_video.slurm import scaling
from stvit_video.slurm.cli import expand_grid, main
from stvit_video.slurm.jobs import ClusterJob, find_jobs
from stvit_video.slurm.request import read_profile
from stvit_video.slurm.task import GUARD, Task, check_paths
from tests.conftest import REPOSITORY
from tests.slurm.cluster import CONFIG, processes, settings, wait_until

PROFILES = sorted((REPOSITORY / "slurm" / "profiles").glob("*.yaml"))


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Set a PATH without SLURM's clients; return its first folder, for mock clients."""
    front = tmp_path / "bin"
    front.mkdir()
    for name in ("python3", "bash", "env", "git", "sh"):
        (front / name).symlink_to(f"/usr/bin/{name}")
    monkeypatch.setenv("PATH", str(front))
    return front


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_profile_gives_a_script(
    path: Path, tmp_path: Path, no_slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*CONFIG, "--nodes", "2", "--gpus-per-node", "4", "--profile", str(path), "--dry-run"]
    assert main([*words, "OUTPUT_DIR", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    for line in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {line}" in said
    assert not (tmp_path / "run").exists()
    profile = yaml.safe_load(path.read_text())
    for line in profile.get("setup", []):
        assert line in said
    assert subprocess.run(["/usr/bin/bash", "-n"], input=said.partition("\nruns:")[0], text=True).returncode == 0


def test_dry_run_prints_what_an_array_takes(tmp_path: Path, no_slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*CONFIG, "--nodes", "2", "--gpus-per-node", "8", "--cpus-per-task", "12", "--time", "2:30:00", "--dry-run"]
    assert main([*words, "--array", "SEED=0,1 OPTIM.LR=1e-3,1e-4", "OUTPUT_DIR", str(tmp_path / "grid")]) == 0
    said = capsys.readouterr().out
    assert "#SBATCH --array=0-3%4" in said
    assert "#SBATCH --time=150" in said
    assert "4 job(s) of 2 node(s) x 8 task(s) x 12 CPU(s), 16 GPU(s), 2.5 h" in said
    assert "1920 CPU hours and 160 GPU hours" in said  # 4 x 16 x 12 x 2.5 and 4 x 16 x 2.5
    assert f"  {tmp_path}/grid/SEED=1,OPTIM.LR=1e-4\n" in said
    # srun of 22.05 and later does not take the CPUs of a task from sbatch.
    assert "--kill-on-bad-exit=1 --cpus-per-task=12" in said
    assert list(tmp_path.iterdir()) == [no_slurm]


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("24:00:00", 1440), ("30:00", 30), ("2-12", 3600), ("1-00:30:00", 1470), ("4320", 4320)],
)
def test_time_is_parsed_as_slurm_does(tmp_path: Path, text: str, minutes: int) -> None:
    profile = tmp_path / "site.yaml"
    profile.write_text(f"time: {text}\n")
    assert read_profile(profile).minutes == minutes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("partiton: gpu", "partiton is unknown. Did you mean partition?"),
        ("time: soon", "'soon' is no time limit"),
        ("time: 0", "'0' is no time limit"),
        ("cpus_per_task: many", "cpus_per_task is 'many'; it has to be a int"),
        ("cpus_per_task: -1", "cpus_per_task is -1"),
        ("setup: module load cuda", "setup is 'module load cuda'; it has to be a list"),
        ("- gpu", "is not a list of lines `key: value`"),
        ("time: 1", "warning_s is 120 but the job has 1 minutes"),
        ("a: [", "cannot be read"),
    ],
)
def test_wrong_profile_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    profile = tmp_path / "site.yaml"
    profile.write_text(content)
    with pytest.raises(UsageError) as error:
        read_profile(profile)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--gpus-per-node is missing"),
        (["--gpus-per-node", "0"], "sbatch is not on the PATH"),
        (["--gpus-per-node", "-1"], "--gpus-per-node -1 is out of range; give a number from 0 on"),
        (["--nodes", "0", "--gpus-per-node", "1"], "--nodes 0 is out of range; give a number from 1 on"),
        (["--gpus-per-node", "2", "--tasks-per-node", "3"], "each GPU has one process"),
        (["--gpus-per-node", "0", "--profile", "nowhere.yaml"], "Profile nowhere.yaml cannot be read"),
        (["--gpus-per-node", "0", "--array", "SEED"], "'SEED' is not KEY=VALUE,VALUE"),
        (["--gpus-per-node", "0", "--array", "SEDE=1,2"], "Did you mean SEED?"),
        (["--gpus-per-node", "0", "--cluster", "local", "--nodes", "2"], "--cluster local runs one configuration"),
        (["--gpus-per-node", "0", "--wiat"], "unrecognized arguments: --wiat"),
        (["--cfg", "configs/sample_stvit.yaml", "--gpus-per-node"], "or status, logs, cancel, resume RUN"),
        (["--cfg", "configs/nothing.yaml", "--gpus-per-node", "0"], "is not there"),
    ],
)
def test_wrong_use_is_one_line(
    no_slurm: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*CONFIG, *words, "OUTPUT_DIR", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_unknown_verb_and_wrong_number_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["statsu", str(tmp_path)]) == 2
    assert "--cfg FILE is missing, or did you mean status?" in capsys.readouterr().err
    assert main(["logs", str(tmp_path), "--lines", "0"]) == 2
    assert "--lines 0 is out of range; give a number from 1 on" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["status", "logs", "cancel", "resume"])
def test_folder_without_a_job_is_one_line(tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, str(tmp_path)]) == 2
    assert "holds no submitted job" in capsys.readouterr().err


def test_grid_is_a_product_and_keeps_lists() -> None:
    points = expand_grid("SEED=0,1 MODEL.REGIONS=[8,4,4],[4,4,4]")
    assert points == [[f"SEED={s}", f"MODEL.REGIONS={r}"] for s in (0, 1) for r in ("[8,4,4]", "[4,4,4]")]


# --- jobs as mock clients of SLURM report them


def mock_client(folder: Path, name: str, answers: list[str]) -> None:
    """Write a client that prints one answer per call, and then the last one; ``!`` marks an error."""
    counter = folder / f"{name}.count"
    counter.write_text("0")
    program = f"""#!{sys.executable}
import pathlib, sys
answers, counter = {answers!r}, pathlib.Path({str(counter)!r})
number = int(counter.read_text())
counter.write_text(str(number + 1))
answer = answers[min(number, len(answers) - 1)]
if answer.startswith("!"):
    sys.exit(answer[1:])
print(answer)
"""
    (folder / name).write_text(program)
    (folder / name).chmod(0o755)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterJob:
    monkeypatch.setattr(following, "SETTLE_S", {"COMPLETED": 0.2, "FAILED": 0.2})
    monkeypatch.setattr(following, "SETTLE_OTHERS_S", 0.5)
    monkeypatch.setattr(following.time, "sleep", lambda seconds: None)
    run = tmp_path / "run"
    (run / "slurm").mkdir(parents=True)
    return ClusterJob(run, "slurm", "7", run / "slurm", "abc")


def test_follow_continues_after_node_fail(no_slurm: Path, job: ClusterJob, capsys: pytest.CaptureFixture[str]) -> None:
    """SLURM reports NODE_FAIL before it requeues the job."""
    states = ["RUNNING|None|node[1-2]", "NODE_FAIL|None|node[1-2]", "PENDING|BeginTime|", "RUNNING|None|node[1-2]"]
    mock_client(no_slurm, "squeue", [*states, "COMPLETED|None|node[1-2]"])
    following.follow([job])
    said = re.findall(r"job 7  (\w+)", capsys.readouterr().out)
    assert said == ["RUNNING", "NODE_FAIL", "PENDING", "RUNNING", "COMPLETED"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("!slurm_load_jobs error: Invalid job id specified", "is unknown to SLURM, and left no result"),
        ("FAILED|NonZeroExitCode|node1", "ended without a result (FAILED node1)"),
        ("NODE_FAIL|None|", "ended without a result (NODE_FAIL)"),
        ("COMPLETED|None|node1", "ended without a result (COMPLETED node1)"),
    ],
)
def test_follow_ends_without_a_result(
    no_slurm: Path, job: ClusterJob, answer: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without accounting, or with a job that was killed before it wrote a result, too."""
    mock_client(no_slurm, "squeue", [answer])
    begun = time.monotonic()
    assert not following.follow([job])
    assert time.monotonic() - begun < 10
    assert message in capsys.readouterr().out


def test_follow_gives_up_without_an_answer(
    no_slurm: Path, job: ClusterJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mock_client(no_slurm, "squeue", ["RUNNING|None|node1", "!slurm_load_jobs error: Unable to contact controller"])
    monkeypatch.setattr(following, "SILENCE_S", 0.5)
    assert not following.follow([job])
    assert "no answer from SLURM" in capsys.readouterr().out


def test_first_failure_is_shown(no_slurm: Path, job: ClusterJob, capsys: pytest.CaptureFixture[str]) -> None:
    mock_client(no_slurm, "squeue", ["FAILED|NonZeroExitCode|node[1-2]"])
    replace(job, submission="earlier").add_failure(0, 3, "node4", 1, "")  # another submission
    job.add_failure(0, 1, "node2", 1, "")
    job.add_failure(0, 0, "node1", 1, "")
    job.log(1).write_text("epoch 1\nZeroDivisionError: division by zero\n")
    job.log(0).write_text("RuntimeError: Connection closed by peer\n")
    assert not following.follow([job])
    said = capsys.readouterr().out
    assert "rank 1 on node2 failed first" in said
    assert "ZeroDivisionError" in said
    assert "Connection closed" not in said


def test_events_of_another_submission_are_ignored(job: ClusterJob) -> None:
    replace(job, submission="earlier").add_event(0, "done")
    assert not job.is_done()
    job.add_event(0, "done")
    assert job.is_done()


# --- on the node


class Environment:
    """A job environment of submitit, as far as a task needs it."""

    global_rank = 0

    def __init__(self, cluster: str, outcome: Exception | None = None) -> None:
        self.job_id, self.cluster, self.outcome, self.timeouts_left = "7", cluster, outcome, [None]

    def _requeue(self, countdown: int) -> None:
        self.timeouts_left.append(countdown)
        if self.outcome is not None:
            raise self.outcome


def warned_task(
    run: Path | str, environment: Environment, elapsed: float, number: signal.Signals = signal.SIGUSR2, start: int = 0
) -> Task:
    """Return a task of a job of ten minutes that has received a signal after ``elapsed`` seconds."""
    task = Task(str(run), "abc", minutes=10, warning_s=30, max_timeouts=2)
    task.begin(environment, [(number, 0.0)], time.monotonic() - elapsed)  # type: ignore[arg-type]
    task.start = start
    return task


@pytest.mark.parametrize(
    ("facts", "elapsed", "reason"),
    [
        ("JobState=RUNNING PreemptTime=None", 30, "signal SIGUSR2"),
        ("JobState=RUNNING PreemptTime=2026-11-23T01:00:00", 30, "preempted"),
        ("JobState=RUNNING PreemptTime=2026-11-23T01:00:00", 599, "preempted"),
        ("JobState=RUNNING PreemptTime=None", 600 - 30, "time limit"),
        ("JobState=RUNNING PreemptTime=None", 600 - 30 - 60, "time limit"),  # SLURM may be a minute early
        ("JobState=CANCELLED PreemptTime=None", 30, "told to end"),
        ("JobState=COMPLETING PreemptTime=None", 30, "told to end"),
        ("!scontrol: error", 30, "signal SIGUSR2"),
        ("JobState=RUNNING PreemptTime=None SIGTERM", 30, "told to end"),  # from srun, because another task has failed
        ("JobState=RUNNING PreemptTime=2026-11-23T01:00:00 SIGTERM", 30, "preempted"),
    ],
)
def test_stop_reason_tells_time_limit_from_preemption(no_slurm: Path, facts: str, elapsed: float, reason: str) -> None:
    """submitit counts every warning in a job of up to ten minutes as a time-out."""
    mock_client(no_slurm, "scontrol", [facts if facts.startswith("!") else f"JobId=7 JobName=a {facts} Restarts=0"])
    number = signal.SIGTERM if facts.endswith("SIGTERM") else signal.SIGUSR2
    assert warned_task("run", Environment("slurm"), elapsed, number).stop_reason() == reason


def test_time_outs_are_counted_up_to_max_timeouts(job: ClusterJob) -> None:
    environment = Environment("local")
    for start in range(2):
        warned_task(job.run, environment, elapsed=590, start=start).requeue()
    warned_task(job.run, environment, elapsed=30, start=2).requeue()  # a signal by hand is not counted
    assert environment.timeouts_left[1:] == [1, 0, 0]
    with pytest.raises(SystemExit) as ended:
        warned_task(job.run, environment, elapsed=590, start=3).requeue()
    assert ended.value.code == 1
    assert len(environment.timeouts_left) == 4
    failure = job.first_failure()
    assert failure is not None
    assert failure["problem"].startswith(
        "timed out 3 times, and max_timeouts is 2; go on with: python slurm/submit.py resume"
    )


def test_refused_requeue_is_a_failure_with_a_remedy(job: ClusterJob) -> None:
    refusal = subprocess.CalledProcessError(1, ["scontrol", "requeue", "7"])
    with pytest.raises(SystemExit):
        warned_task(job.run, Environment("local", refusal), elapsed=30).requeue()
    failure = job.first_failure()
    assert failure is not None
    assert re.search("SLURM did not queue the job again .* resume", failure["problem"])


def test_scontrol_killed_by_its_own_requeue_is_no_failure(job: ClusterJob) -> None:
    ended = subprocess.CalledProcessError(-signal.SIGTERM, ["scontrol", "requeue", "7"])
    warned_task(job.run, Environment("local", ended), elapsed=30).requeue()
    assert [row["event"] for row in job.events()] == ["stopped", "requeued"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
@pytest.mark.parametrize("old_env", [False, True])
def test_warning_before_python_starts_does_not_kill(tmp_path: Path, old_env: bool, number: signal.Signals) -> None:
    """It is blocked until then; with an `env` older than 2019 it is ignored."""
    program = """
import time
print("up", flush=True)
time.sleep(1)
from stvit_video.slurm.task import catch_signals
received = catch_signals()
time.sleep(0.1)
print("caught", received[0][0].name if received else None)
"""
    path = os.environ["PATH"]
    if old_env:
        refuse = '[ "$1" = --block-signal=USR1,USR2 ] && exit 125'
        (tmp_path / "env").write_text(f'#!/bin/sh\n{refuse}\nexec /usr/bin/env "$@"\n')
        (tmp_path / "env").chmod(0o755)
        path = f"{tmp_path}:{path}"
    command = ["bash", "-c", GUARD, "task", sys.executable, "-c", program]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PATH": path})
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    assert process.communicate(timeout=60)[0] == f"caught {None if old_env else number.name}\n"
    assert process.returncode == 0


def test_missing_paths_are_named(job: ClusterJob, small_set: Path, tmp_path: Path) -> None:
    content = {"MODE": "train", "MODEL": {"INIT": ""}, "DATA": {"GENERATE": "", "ROOT": str(small_set), "CLASSES": ""}}
    content["DATA"] |= {f"{split}_LIST": f"motion/{split.lower()}.csv" for split in ("TRAIN", "VAL", "TEST")}
    (job.path / "config.yaml").write_text(yaml.safe_dump(content))
    assert check_paths(job) == ""
    content["MODEL"]["INIT"] = str(tmp_path / "weights.pth")
    content["DATA"]["TEST_LIST"] = "elsewhere.csv"
    (job.path / "config.yaml").write_text(yaml.safe_dump(content))
    assert f"MODEL.INIT {tmp_path}/weights.pth (No such file or directory)" in check_paths(job)
    assert f"DATA.TEST_LIST {small_set}/elsewhere.csv (No such file or directory)" in check_paths(job)


# --- submitit on this machine


def submit_here(*words: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    command = [sys.executable, str(REPOSITORY / "slurm" / "submit.py"), *CONFIG, "--gpus-per-node", "0", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    # A local job inherits the output: a pipe would be read until the job has ended.
    with tempfile.TemporaryFile("w+") as said:
        found = subprocess.run(command, stdout=said, stderr=subprocess.STDOUT, timeout=300, env=environment)
        said.seek(0)
        return found.returncode, said.read()


def test_cluster_local_runs_two_processes(small_set: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    quick = settings(small_set, output, "TRAIN.EPOCHS", "1", "TRAIN.VAL_EVERY", "1")
    code, said = submit_here("--cluster", "local", "--tasks-per-node", "2", "--wait", *quick)
    assert code == 0, said
    assert json.loads((output / "results.json").read_text())["processes"] == 2
    assert "is done" in said


@pytest.mark.long
@pytest.mark.parametrize("setup", ["[]", "[export A=1]"])
def test_cancel_ends_a_local_job(small_set: Path, tmp_path: Path, setup: str) -> None:
    """With ``setup`` a shell runs the job's controller."""
    output, profile = tmp_path / "run", tmp_path / "site.yaml"
    profile.write_text(f"setup: {setup}\n")
    words = ["--cluster", "local", "--profile", str(profile), *settings(small_set, output, "TRAIN.EPOCHS", "99")]
    assert submit_here(*words)[0] == 0
    job = find_jobs(output)[0]
    assert job.state()[0] == "RUNNING"
    wait_until((output / "metrics.jsonl").is_file, "the first steps", 120)
    assert main(["cancel", str(output)]) == 0
    wait_until(lambda: not processes("stvit_video.run", str(output)), "the end of training", 60)
    wait_until(lambda: job.state()[0] == "FAILED", "the end of the job", 30)
    assert [row["reason"] for row in job.events("stopped")] == ["told to end"]


def test_local_job_runs_from_its_start_until_it_is_a_zombie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All have an empty command line; the last is a kernel thread, with the number of a job that is gone."""
    job = ClusterJob(tmp_path, "local", "7", tmp_path, "abc")
    memory = "VmPeak:\t  9 kB\nVmSize:\t  9 kB\n"
    for letter, held, state in (("R", memory, "RUNNING"), ("Z", "", "FAILED"), ("I", "", "FAILED")):
        (tmp_path / "status").write_text(f"Name:\tpython\nState:\t{letter} (text)\n{held}")
        (tmp_path / "cmdline").write_text("")
        monkeypatch.setattr("stvit_video.slurm.jobs.Path", lambda path: tmp_path / path.rpartition("/")[2])
        monkeypatch.setattr(ClusterJob, "is_done", lambda self: False)
        assert job.state()[0] == state


@pytest.mark.long
def test_ctrl_c_leaves_a_local_job_running(small_set: Path, tmp_path: Path) -> None:
    """A terminal sends SIGINT to the whole process group."""
    output = tmp_path / "run"
    command = [sys.executable, str(REPOSITORY / "slurm" / "submit.py"), *CONFIG, "--gpus-per-node", "0", "--wait"]
    command += ["--cluster", "local", *settings(small_set, output, "TRAIN.EPOCHS", "2", "TRAIN.VAL_EVERY", "2")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, start_new_session=True, env=environment, stderr=subprocess.PIPE, text=True)
    wait_until((output / "metrics.jsonl").is_file, "the first steps", 120)
    os.killpg(process.pid, signal.SIGINT)
    assert "the job goes on" in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    wait_until((output / "results.json").is_file, "the end of the job", 120)


@pytest.mark.long
def test_cluster_debug_runs_here(small_set: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    code, said = submit_here("--cluster", "debug", *settings(small_set, output, "TRAIN.EPOCHS", "1"))
    assert code == 0, said
    assert json.loads((output / "results.json").read_text())["processes"] == 1


# --- slurm/README.md


def test_readme_commands_run_and_its_table_is_current(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    text = (REPOSITORY / "slurm" / "README.md").read_text()
    [dry_run] = [line.split() for line in text.splitlines() if "submit.py --cfg" in line and "--dry-run" in line]
    assert main(dry_run[2:]) == 0
    [calculation] = [line.split() for line in text.splitlines() if "slurm.scaling --cfg" in line]
    capsys.readouterr()
    assert scaling.main(calculation[3:]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(printed) == 2 + len(scaling.GPUS)
    assert "\n".join(printed) in text


def test_scaling_by_hand() -> None:
    """100 M parameters are 0.4 GB; 10 GFLOPs forward are 60 in training, so 60 TFLOP/s are 1,000 clips/s."""
    costs = {"parameters": 100_000_000, "gpu_clips": scaling.gpu_speed(10, 60), "core_clips": 20, "network_gb": 10}
    run = {"clips_a_gpu": 10, "lr": 1e-3, "base_batch": 40, "videos": 8_050, "epochs": 2}
    row = scaling.scale(8, **costs, **run)
    assert (row["batch"], row["learning rate"], row["steps"], row["decode cores"]) == (80, 2e-3, 200, 8 * 50)
    assert row["GB a step, DDP"] == pytest.approx(2 * 7 / 8 * 0.4)
    assert row["FSDP"] == pytest.approx(3 * 7 / 8 * 0.4)
    # A step computes for 10 ms and sends for 70 ms, of which 6.67 ms are hidden.
    assert row["efficiency (%)"] == pytest.approx(100 * 0.01 / (0.01 + 0.07 - 0.02 / 3))
    assert scaling.scale(1, **costs, **run)["efficiency (%)"] == 100
