"""The trainer: accumulation, resuming, precision, and what a run leaves behind."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stvit_video import run
from stvit_video.config import load_config
from stvit_video.distributed import World
from stvit_video.engine.logging import MetricsLog, read_metrics
from stvit_video.engine.start import autocast
from stvit_video.engine.train import build_trainer
from stvit_video.models.zoo import build_model
from stvit_video.progress import Progress

WORLD = World(0, 1, torch.device("cpu"))


def weights_after_an_epoch(arguments: list[str]) -> dict[str, torch.Tensor]:
    cfg = load_config(arguments[1], arguments[2:])
    torch.manual_seed(0)
    trainer = build_trainer(cfg, WORLD, build_model(cfg, 8), 8)
    trainer.train_epoch(Progress("", trainer.steps_per_epoch, enabled=False), None)
    return trainer.bare_model.state_dict()


def test_accumulated_batches_equal_one_large_batch(small_run: Callable[..., list[str]]) -> None:
    sgd = ["OPTIM.CLIP_GRAD", "0.01"]
    whole = weights_after_an_epoch(small_run(*sgd))
    for accumulate in ("2", "4"):
        parts = weights_after_an_epoch(small_run(*sgd, "TRAIN.ACCUMULATE", accumulate))
        difference = max((parts[name] - whole[name]).abs().max() for name in whole)
        moved = max((parts[name] - value).abs().max() for name, value in initial_weights(small_run()).items())
        assert difference < 1e-5 < moved


def initial_weights(arguments: list[str]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_model(load_config(arguments[1], arguments[2:]), 8).state_dict()


@pytest.mark.parametrize(
    "extra", [[], ["MODEL.DROPOUT", "0.2", "MODEL.DROP_PATH", "0.2", "DATA.WORKERS", "1"]], ids=["plain", "dropout"]
)
def test_interrupted_after_an_epoch_equals_uninterrupted(
    small_run: Callable[..., list[str]],
    run_killed: Callable[[list[str], int], None],
    tmp_path: Path,
    extra: list[str],
) -> None:
    extra = [*extra, "TRAIN.EPOCHS", "2", "DATA.VAL_LIST", ""]
    assert run.main(small_run(*extra)) == 0
    whole = load_file(tmp_path / "run" / "model.safetensors")

    output = ["OUTPUT_DIR", str(tmp_path / "killed")]
    run_killed(small_run(*extra, *output), 5)
    assert not (tmp_path / "killed" / "results.json").exists()
    assert run.main(small_run(*extra, *output)) == 0
    resumed = load_file(tmp_path / "killed" / "model.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    for folder in ("run", "killed"):
        steps = [row["step"] for row in read_metrics(tmp_path / folder / "metrics.jsonl")]
        assert steps == [4, 8]


def test_precision_names_what_runs() -> None:
    layer, seen = torch.nn.Linear(4, 4), []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    for precision in ("fp32", "bf16"):
        with autocast(torch.device("cpu"), precision):
            layer(torch.randn(2, 4))
    assert seen == [torch.float32, torch.bfloat16]


def test_bf16_trains(small_run: Callable[..., list[str]]) -> None:
    whole, half = weights_after_an_epoch(small_run()), weights_after_an_epoch(small_run("PRECISION", "bf16"))
    assert half["head.proj.weight"].dtype == torch.float32
    assert 0 < (half["head.proj.weight"] - whole["head.proj.weight"]).abs().max() < 0.01


def test_a_loss_that_is_not_finite_stops_the_run(small_run: Callable[..., list[str]]) -> None:
    with pytest.raises(FloatingPointError, match="The loss is nan"):
        weights_after_an_epoch(small_run("OPTIM.LR", "1e30", "OPTIM.CLIP_GRAD", "0", "OPTIM.WARMUP_EPOCHS", "0"))


def test_metrics_of_lost_work_are_dropped_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    rows = [{"step": step, "epoch": 1, "split": "train", "loss": 1.0} for step in (4, 8, 12)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 16, "ep')
    log = MetricsLog(tmp_path, step=8)
    log.write(9, 1.1, "train", {"loss": 0.5})
    log.close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [4, 8, 9]
