"""Several processes: FSDP trains like DDP, and a run may resume with other processes and another strategy."""

import json
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from stvit_video.runtime.parallel import gradient_sync
from tests.conftest import REPOSITORY
from tests.training.test_survival import launch, newest_step

Arguments = Callable[..., list[str]]
# Small updates, and no gradient so close to zero that its sign could differ: only rounding remains.
CALM = ["OPTIM.LR", "1e-4", "DATA.WORKERS", "0", "TRAIN.EMA", "0.9", "TRAIN.MIXUP", "0.0", "TRAIN.CUTMIX", "0.0"]
CALM += ["TRAIN.MAX_STEPS", "5", "PARALLEL.TIMEOUT_S", "120", "MODEL.DROPOUT", "0.0", "MODEL.DROP_PATH", "0.0"]


def finish(command: list[str]) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def difference(a: Path, b: Path) -> float:
    found, expected = (load_file(path / "model.safetensors") for path in (a, b))
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


@pytest.fixture(scope="module")
def replicated(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("parallel") / "ddp"
    finish(launch(small_set, output, 2, *CALM))
    return output


@pytest.fixture(scope="module")
def sharded(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("parallel") / "fsdp"
    assert "weights sharded (fsdp)" in finish(launch(small_set, output, 2, *CALM, "PARALLEL.STRATEGY", "fsdp"))
    return output


def test_fsdp_equals_ddp(replicated: Path, sharded: Path) -> None:
    assert difference(sharded, replicated) < 1e-5
    results = [json.loads((path / "results.json").read_text()) for path in (sharded, replicated)]
    assert results[0]["top1"] == results[1]["top1"]


@pytest.mark.long
def test_fsdp_accumulation_equals_whole_batches(replicated: Path, small_set: Path, tmp_path: Path) -> None:
    finish(launch(small_set, tmp_path / "run", 2, *CALM, "PARALLEL.STRATEGY", "fsdp", "TRAIN.ACCUMULATE", "2"))
    assert difference(tmp_path / "run", replicated) < 1e-5


def die_at(step: int, command: list[str], folder: Path) -> None:
    """Run a command whose processes all exit when training reaches ``step``, and check that it did."""
    script = folder / "die.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from stvit_video import run\nfrom stvit_video.training.trainer import Trainer\ntake = Trainer.take_step\n"
        f"def die(self, batches):\n    if self.step == {step}:\n        sys.exit(9)\n    return take(self, batches)\n"
        "from stvit_video.runs.checkpoint import CheckpointWriter\nsave = CheckpointWriter.save\n"
        "CheckpointWriter.save = lambda self, content: (save(self, content), self.wait())\n"
        "Trainer.take_step = die\nsys.exit(run.main(sys.argv[1:]))\n"
    )
    place = command.index("stvit_video.run")
    command = [*command[: place - 1], str(script), *command[place + 1 :]]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode != 0
    output = Path(command[command.index("OUTPUT_DIR") + 1])
    assert newest_step(output) == step, ended.stderr


@pytest.mark.long
def test_resume_with_other_processes_and_strategy(replicated: Path, small_set: Path, tmp_path: Path) -> None:
    """From two sharded processes to one, and from there to two replicated ones."""
    output = tmp_path / "run"
    die_at(2, launch(small_set, output, 2, *CALM, "PARALLEL.STRATEGY", "fsdp"), tmp_path)
    die_at(3, launch(small_set, output, 1, *CALM, "TRAIN.ACCUMULATE", "2"), tmp_path)
    said = finish(launch(small_set, output, 2, *CALM))
    assert "continuing at step 3 in epoch 1" in said
    assert "note: the run was with processes 1 (now 2), accumulation 2 (now 1): its steps see the same videos" in said
    assert difference(output, replicated) < 1e-5


def test_accumulated_gradients_are_reduced_once() -> None:
    reduced = []

    def count(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        reduced.append(bucket.index())
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(torch.nn.Linear(4, 4))
        model.register_comm_hook(None, count)
        for i in range(8):
            with gradient_sync(model, i % 4 == 3):
                model(torch.ones(2, 4)).sum().backward()
    finally:
        dist.destroy_process_group()
    assert reduced == [0, 0]  # one bucket, in every fourth backward pass


@pytest.mark.long
def test_different_checkpoints_on_ranks_are_an_error(small_set: Path, tmp_path: Path) -> None:
    """As with an OUTPUT_DIR on a local disk of each machine."""
    die_at(2, launch(small_set, tmp_path / "0", 1, *CALM), tmp_path)
    with socket.create_server(("", 0)) as free:
        place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        place["MASTER_PORT"] = str(free.getsockname()[1])
    started = []
    for rank in ("0", "1"):
        command = launch(small_set, tmp_path / rank, 1, *CALM)
        environment = {**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank}
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in started:
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 1
        assert "rank 0 step 2, rank 1 none; OUTPUT_DIR has to be one folder" in said


@pytest.mark.long
def test_fsdp_resumes_bit_for_bit(sharded: Path, small_set: Path, tmp_path: Path) -> None:
    command = launch(small_set, tmp_path / "run", 2, *CALM, "PARALLEL.STRATEGY", "fsdp")
    die_at(3, command, tmp_path)
    assert "continuing at step 3" in finish(command)
    assert difference(tmp_path / "run", sharded) == 0
