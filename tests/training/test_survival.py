"""Runs that are killed, stopped or damaged, and started again end with the weights of an undisturbed run."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stvit_video import run
from stvit_video.common.cli import EXIT_STOPPED
from stvit_video.runs.checkpoint import list_checkpoints
from stvit_video.runs.log import read_metrics
from stvit_video.training.trainer import Trainer
from tests.conftest import REPOSITORY, small_arguments

# Dropout, augmentation, mixing and workers: all that is random, and all that could be out of step.
EVERYTHING = [
    *("MODEL.DROPOUT", "0.2", "MODEL.DROP_PATH", "0.2", "DATA.WORKERS", "1", "DATA.RAND_AUGMENT_LAYERS", "1"),
    *("DATA.ERASE", "0.3", "TRAIN.MIXUP", "0.8", "TRAIN.CUTMIX", "1.0", "TRAIN.EPOCHS", "3"),
    *("CHECKPOINT.EVERY_STEPS", "1"),
]


def launch(small_set: Path, output: Path, processes: int = 1, *extra: str) -> list[str]:
    """Return the command of a run of 12 steps, under torchrun where ``processes`` > 1."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    words = f"--cfg {REPOSITORY}/configs/sample_stvit.yaml DATA.ROOT {small_set} TRAIN.BATCH_SIZE 8 OUTPUT_DIR {output}"
    words += " DEVICE cpu DATA.GENERATE_CLIPS [32,16,16]"
    return [sys.executable, *start, "-m", "stvit_video.run", *words.split(), "DATA.GENERATE", "", *EVERYTHING, *extra]


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.long)])
def undisturbed(request: pytest.FixtureRequest, small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """The number of processes, and the weights of a run without interruption."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    command = launch(small_set, output, request.param)
    if request.param == 1:
        assert run.main([*command[3:], "DATA.WORKERS", "0"]) == 0
    else:
        subprocess.run(command, check=True, capture_output=True, timeout=300)
    return request.param, load_file(output / "model.safetensors")


def equal(output: Path, expected: dict[str, torch.Tensor]) -> bool:
    found = load_file(output / "model.safetensors")
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def newest_step(output: Path) -> int:
    found = list_checkpoints(output / "checkpoints")
    return int(found[0].stem.split("_")[1]) if found else 0


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Wait until ``condition`` holds or the process has ended."""
    for _ in range(30_000):
        if condition() or process.poll() is not None:
            return
        time.sleep(0.01)
    pytest.fail("nothing happened for five minutes")


@pytest.fixture(scope="module")
def two_epochs(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of eight steps without interruption, in this process."""
    output = tmp_path_factory.mktemp("two_epochs") / "run"
    assert run.main(small_arguments(small_set, output, *EVERYTHING, "TRAIN.EPOCHS", "2", "DATA.WORKERS", "0")) == 0
    return output


@pytest.mark.parametrize(("steps", "workers"), [(1, "0"), (3, "1"), (4, "0"), (6, "0")])  # four steps an epoch
def test_a_run_killed_within_an_epoch_ends_with_the_same_weights(
    two_epochs: Path,
    small_run: Callable[..., list[str]],
    run_killed: Callable[[list[str], int], None],
    tmp_path: Path,
    steps: int,
    workers: str,
) -> None:
    """Also with another number of loader workers than the uninterrupted run had."""
    arguments = small_run(*EVERYTHING, "TRAIN.EPOCHS", "2", "DATA.WORKERS", workers)
    run_killed(arguments, steps)
    assert newest_step(tmp_path / "run") == steps
    assert run.main(arguments) == 0
    assert equal(tmp_path / "run", load_file(two_epochs / "model.safetensors"))
    rows = [[(row["split"], row["step"]) for row in read_metrics(folder / "metrics.jsonl")]
            for folder in (two_epochs, tmp_path / "run")]  # fmt: skip
    assert rows[0] == rows[1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, 1), (signal.SIGSTOP, EXIT_STOPPED)])
def test_a_run_whose_workers_die_or_hang_is_kept_and_continues(
    two_epochs: Path,
    small_run: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
) -> None:
    """A killed worker ends the run; one that is stopped would be waited for, but a SIGTERM ends that."""
    arguments = small_run(*EVERYTHING, "TRAIN.EPOCHS", "2", "CHECKPOINT.EVERY_STEPS", "100")
    take_step = Trainer.take_step

    def disturb(self: Trainer, batches: Iterator) -> torch.Tensor:
        if self.step == 1:  # of four: two more are read by now, or being read
            for worker in self.loader._started:
                os.kill(worker.process.pid or 0, number)
            if number == signal.SIGSTOP:
                threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return take_step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", disturb)
        assert run.main(arguments) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    ends = "loader worker 1 of 1 (process" if code == 1 else "stopped by SIGTERM after step "
    assert ends in said.splitlines()[-1]
    assert said.splitlines()[-1].endswith("the same command, without OVERWRITE, continues")
    assert 1 <= newest_step(tmp_path / "run") <= 3
    assert run.main(arguments) == 0
    assert equal(tmp_path / "run", load_file(two_epochs / "model.safetensors"))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR2, marks=pytest.mark.long)])
def test_a_signal_stops_at_a_step_and_the_same_command_continues(
    undisturbed: tuple[int, dict], small_set: Path, tmp_path: Path, number: signal.Signals
) -> None:
    processes, expected = undisturbed
    if processes > 1 and number != signal.SIGTERM:
        pytest.skip("torchrun passes on SIGTERM")
    output = tmp_path / "run"
    command = launch(small_set, output, processes, "CHECKPOINT.EVERY_STEPS", "3")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: newest_step(output) >= 3, process)
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    stopped = newest_step(output)
    assert 3 <= stopped < 12, said
    assert f"stopped by {number.name} after step {stopped}; all of it is kept" in said
    if processes == 1:
        assert process.returncode == EXIT_STOPPED
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert f"continuing at step {stopped} in epoch {(stopped + 3) // 4}" in again.stdout
    assert equal(output, expected)


def test_a_signal_to_the_process_group_stops_too(small_set: Path, tmp_path: Path) -> None:
    """As Ctrl-C in a terminal sends it: loader workers and decoders get it too."""
    output = tmp_path / "run"
    process = subprocess.Popen(
        launch(small_set, output), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    wait_for(lambda: newest_step(output) >= 2, process)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED, said
    assert "Traceback" not in said
    assert "stopped by SIGINT after step" in said


FAIL = """
import sys
from stvit_video import run
from stvit_video.training.trainer import Trainer
def fail(self, batches):
    next(batches)
    raise ArithmeticError("a mistake of ours")
Trainer.take_step = fail
sys.exit(run.main(sys.argv[1:]))
"""


@pytest.mark.long
def test_a_run_that_fails_ends_although_it_has_workers(small_set: Path, tmp_path: Path) -> None:
    """The traceback keeps the loader alive, and its workers ignore the signal that would end them."""
    words = launch(small_set, tmp_path / "run", 1, "DATA.WORKERS", "2")[3:]
    ended = subprocess.run(
        [sys.executable, "-c", FAIL, *words], capture_output=True, text=True, timeout=120, cwd=REPOSITORY
    )
    assert ended.returncode == 1
    # A worker that is killed while it waits for the main process may have begun a traceback of its own.
    assert "\nArithmeticError: a mistake of ours\n" in ended.stderr


LOSE_A_WORKER = """
import os, signal, sys
from stvit_video import run
from stvit_video.training.trainer import Trainer
take_step = Trainer.take_step
def disturb(self, batches):
    if self.step == 1 and self.world.rank == 1:
        os.kill(self.loader._started[0].process.pid, signal.SIGKILL)
    return take_step(self, batches)
if os.environ.get("DISTURB"):
    Trainer.take_step = disturb
sys.exit(run.main(sys.argv[1:]))
"""


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_several_processes_save_where_one_loses_a_worker(small_set: Path, tmp_path: Path, strategy: str) -> None:
    """The others would wait for that one in the middle of a step."""
    (tmp_path / "start.py").write_text(LOSE_A_WORKER)
    words = ("TRAIN.EPOCHS", "1", "CHECKPOINT.EVERY_STEPS", "100", "PARALLEL.STRATEGY", strategy)
    weights = []
    for name, disturbed in (("run", "1"), ("run", ""), ("whole", "")):
        command = launch(small_set, tmp_path / name, 2, *words)
        place = command.index("-m", 2)
        command[place : place + 2] = [str(tmp_path / "start.py")]
        env = {**os.environ, "DISTURB": disturbed, "PYTHONPATH": str(REPOSITORY)}
        ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
        if disturbed:
            assert ended.returncode != 0
            assert re.search(r"error: loader worker 1 of 1 \(process \d+\) was killed.*continues\n", ended.stderr)
            assert 1 <= newest_step(tmp_path / "run") <= 3
        else:
            assert ended.returncode == 0, ended.stderr
            weights.append(load_file(tmp_path / name / "model.safetensors"))
    assert equal(tmp_path / "run", weights[1])


def send(launched: bool, *signals: signal.Signals, pause: float = 0.0) -> tuple[int, str]:
    """Send signals to a process that uses StopSignals; return its exit code and its output."""
    code = f"""
import os, time
from stvit_video.runtime.stopping import StopSignals
with StopSignals({launched}) as signals:
    for number in {[int(number) for number in signals]}:
        time.sleep({pause})
        os.kill(os.getpid(), number)
    print(signals.received, flush=True)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    return found.returncode, found.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_second_signal_exits_at_once(number: signal.Signals) -> None:
    assert send(False, number) == (0, f"{number.name}\n")
    assert send(False, number, number) == (128 + number, "")
    assert send(True, number, number, pause=1.1) == (128 + number, "")


def test_repeated_signals_of_launchers_count_once() -> None:
    """torchrun and srun both pass a signal on; a scheduler sends SIGTERM after SIGUSR2."""
    both = (signal.SIGUSR2, signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM)
    assert send(True, *both) == (0, "SIGUSR2\n")
    assert send(True, signal.SIGUSR2, signal.SIGTERM, pause=1.1) == (0, "SIGUSR2\n")
    assert send(True, signal.SIGUSR2, signal.SIGINT, pause=1.1) == (128 + signal.SIGINT, "")


def kill_until_done(small_set: Path, output: Path, processes: int, rng: np.random.Generator) -> int:
    """Start a run and kill it at random moments until it finishes; return the number of kills."""
    command, kills = launch(small_set, output, processes), 0
    while not (output / "results.json").is_file():
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        target = newest_step(output) + int(rng.integers(1, 6))
        wait_for(lambda: newest_step(output) >= target, process)  # noqa: B023 (called at once)
        time.sleep(rng.uniform(0, 0.05))  # in a step, in a write, between them
        if process.poll() is None:
            kill_all(output)
            kills += 1
        process.wait()
    return kills


def kill_all(output: Path) -> None:
    """Kill every process of a run at once: torchrun and its ranks, which are in other sessions."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended since
            if f"{output}\0".encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                os.kill(int(path.parent.name), signal.SIGKILL)


@pytest.mark.long
def test_a_run_killed_at_random_moments_ends_with_the_same_weights(
    undisturbed: tuple[int, dict], small_set: Path, tmp_path: Path
) -> None:
    processes, expected = undisturbed
    assert kill_until_done(small_set, tmp_path / "run", processes, np.random.default_rng(processes)) >= 1
    assert equal(tmp_path / "run", expected)


@pytest.mark.long
def test_a_restart_waits_for_the_processes_of_the_last_start(
    undisturbed: tuple[int, dict], small_set: Path, tmp_path: Path
) -> None:
    """Two ranks whose torchrun is killed stop at their step; one process that hangs has to be killed first."""
    processes, expected = undisturbed
    output = tmp_path / "run"
    command = launch(small_set, output, processes)
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: newest_step(output) >= 2, first)
    if processes == 1:
        first.send_signal(signal.SIGSTOP)
    else:
        first.kill()
    second = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if processes == 1:
        assert second.stdout is not None
        line = next(line for line in second.stdout if "waiting" in line)
        assert (
            line == f"waiting for process {first.pid} on {socket.gethostname()} to end, which still writes {output}\n"
        )
        first.kill()
    said = second.communicate(timeout=300)[0]
    assert second.returncode == 0, said
    assert "continuing at step" in said
    if processes > 1:
        assert "stopped by SIGTERM after step" in first.communicate(timeout=60)[0]
    assert equal(output, expected)


@pytest.mark.long
def test_a_damaged_newest_checkpoint_costs_only_steps(
    undisturbed: tuple[int, dict], small_set: Path, tmp_path: Path
) -> None:
    processes, expected = undisturbed
    if processes > 1:
        pytest.skip("whether one process or all read it makes no difference")
    command = launch(small_set, tmp_path / "run")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: newest_step(tmp_path / "run") >= 3, process)
    process.kill()
    process.wait()
    newest, before = list_checkpoints(tmp_path / "run" / "checkpoints")[:2]
    newest.write_bytes(newest.read_bytes()[:1000])
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert f"{newest.name} is damaged (wrong checksum); trying the one before" in again.stderr
    assert f"continuing at step {int(before.stem.split('_')[1])} " in again.stdout
    assert equal(tmp_path / "run", expected)


@pytest.mark.slow
def test_fifteen_such_runs_for_each_number_of_processes(
    undisturbed: tuple[int, dict], small_set: Path, tmp_path: Path
) -> None:
    processes, expected = undisturbed
    kills = 0
    for seed in range(15):
        output = tmp_path / f"run{seed}"
        kills += kill_until_done(small_set, output, processes, np.random.default_rng(100 * processes + seed))
        assert equal(output, expected), f"seed {seed}"
    assert kills >= 15


def test_a_full_disk_stops_the_run_which_continues_later(
    two_epochs: Path, small_run: Callable[..., list[str]], refused: Callable[[list[str]], str], tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk can be mounted by root only")
    try:
        extra = ["TRAIN.EPOCHS", "2", "DATA.WORKERS", "0", "CHECKPOINT.EVERY_STEPS", "2", "CHECKPOINT.KEEP", "2"]
        arguments = small_run(*EVERYTHING, *extra, "OUTPUT_DIR", str(small / "run"))
        said = refused(arguments)
        assert "No space left on device" in said
        reached = newest_step(small / "run")
        assert reached >= 2
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        assert run.main(arguments) == 0
        assert equal(small / "run", load_file(two_epochs / "model.safetensors"))
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)  # TensorBoard may hold its file a little longer
