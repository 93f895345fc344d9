"""The trainer: accumulation, resuming, precision, and what a run leaves behind."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from stvit_video import run
from stvit_video.common.progress import Progress
from stvit_video.config import load_config
from stvit_video.data.clips.transforms import Augment, Mix, Normalise, TrainViews
from stvit_video.data.dataset import Batch, Sample, collate
from stvit_video.models.zoo import build_model
from stvit_video.runs.log import MetricsLog, read_metrics
from stvit_video.runs.preflight import open_run
from stvit_video.runtime.world import World
from stvit_video.training.settings import TrainSettings
from stvit_video.training.trainer import Trainer, build_trainer

WORLD = World(0, 1, torch.device("cpu"))


def weights_after_an_epoch(arguments: list[str]) -> dict[str, torch.Tensor]:
    cfg = load_config(arguments[1], arguments[2:])
    trainer = build_trainer(open_run(cfg, WORLD, "measure"))
    for _ in trainer.train_epoch(Progress("", trainer.steps_per_epoch, enabled=False), None):
        pass
    return trainer.model.state_dict()


def test_accumulated_batches_equal_one_large_batch(small_run: Callable[..., list[str]]) -> None:
    sgd = ["OPTIM.CLIP_GRAD", "0.01"]
    whole = weights_after_an_epoch(small_run(*sgd))
    for accumulate in ("2", "4"):
        parts = weights_after_an_epoch(small_run(*sgd, "TRAIN.ACCUMULATE", accumulate))
        difference = max((parts[name] - whole[name]).abs().max() for name in whole)
        moved = max((parts[name] - value).abs().max() for name, value in initial_weights(small_run()).items())
        assert difference < 1e-5 < moved


def plain_trainer(model: nn.Module, optimizer: Any, scheduler: Any, loader: Any = None, **settings: Any) -> Trainer:
    """Return a trainer of any module with every optional part switched off."""
    off = {"precision": "fp32", "accumulate": 1, "clip_grad": 0.0, "label_smoothing": 0.0, "max_failures": 0.1}
    steps = TrainSettings(**{**off, "max_bad_steps": 0, "peak_clips_per_second": 1.0, "seed": 0, **settings})
    return Trainer(model, model, optimizer, scheduler, loader, WORLD, steps, total_steps=12, setup={})


def plain_batch(*samples: Sample) -> Batch:
    """Return a batch of samples whose pixels (2, 8, 8, 3) are already clips."""
    views = TrainViews(clips=1, frames=2, size=8, normalise=Normalise((0, 0, 0), (1, 1, 1)), short_side=(8, 8))
    return collate(list(samples), views)


def initial_weights(arguments: list[str]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_model(load_config(arguments[1], arguments[2:]), 8).state_dict()


AUGMENTED = [
    *("DATA.RAND_AUGMENT_LAYERS", "2", "DATA.COLOR_JITTER", "0.4", "DATA.ERASE", "0.5"),
    *("TRAIN.MIXUP", "0.8", "TRAIN.CUTMIX", "1.0", "TRAIN.MIX_PROBABILITY", "0.8", "OPTIM.LABEL_SMOOTHING", "0.1"),
]
DROPOUT = ["MODEL.DROPOUT", "0.2", "MODEL.DROP_PATH", "0.2"]


@pytest.mark.parametrize(
    "extra",
    [
        [*AUGMENTED, *DROPOUT, "TRAIN.ACCUMULATE", "2"],
        ["MODEL.REDUCER", "dynamicvit"],  # its decisions are sampled at random
    ],
    ids=["augmented", "reducer"],
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


def test_training_ends_early_also_after_an_interruption(
    small_run: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    refused: Callable[[list[str]], str],
) -> None:
    """Weights that do not change are never better than in the first epoch."""
    one_step = ["TRAIN.BATCH_SIZE", "32", "OPTIM.LR", "0.0", "TRAIN.BALANCED", "True"]
    words = ["TRAIN.EPOCHS", "9", "TRAIN.PATIENCE", "2", *one_step]
    assert "give a validation list, or TRAIN.PATIENCE 0" in refused(small_run(*words, "DATA.VAL_LIST", ""))
    for start in ("new", "continued"):  # from the last checkpoint, as where it was killed in its test
        assert run.main(small_run(*words)) == 0
        out, err = capsys.readouterr()
        assert ("continuing at step 3" in out) == (start == "continued")
        assert "(TRAIN.PATIENCE): validation has been no better than" in out + err
        assert "TEST.WEIGHTS best" in out + err
        rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
        assert [row["step"] for row in rows if row["split"] == "val"] == [1, 2, 3]
        (tmp_path / "run" / "results.json").unlink()
        (tmp_path / "run" / "model.safetensors").unlink()


def test_augmentation_is_as_configured_and_off_by_default(small_run: Callable[..., list[str]]) -> None:
    def build(*overrides: str) -> Trainer:
        arguments = small_run(*overrides)
        cfg = load_config(arguments[1], arguments[2:])
        return build_trainer(open_run(cfg, WORLD, "measure"))

    plain, trainer = build(), build(*AUGMENTED, "DATA.RAND_AUGMENT_MAGNITUDE", "7", "TRAIN.MIX_SWITCH", "0.3")
    assert (plain.loader.dataset.views.augment, plain.settings.mix) == (Augment(), None)
    assert trainer.loader.dataset.views.augment == Augment(layers=2, magnitude=7, jitter=0.4, erase=0.5)
    mix = trainer.settings.mix
    assert [transform.alpha for transform in mix.transforms] == [0.8, 1.0]
    assert (mix.probability, mix.switch, mix.num_classes) == (0.8, 0.3, 8)


def test_a_mixed_batch_has_a_weighted_loss_and_counts_the_larger_label() -> None:
    """Clip 0 is all 0, clip 1 all 1: the mean of a mixed clip is its share of label 1, which the model takes as is."""

    class Share(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.seen: list[torch.Tensor] = []

        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            share = clips.mean(dim=(1, 2, 3, 4))
            self.seen.append(share)
            return self.scale * torch.stack([1 - share, share], dim=1)

    model = Share()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    mix = Mix(mixup=1.0, cutmix=1.0, probability=1.0, switch=0.5, num_classes=2)
    trainer = plain_trainer(model, optimizer, scheduler, mix=mix)
    pixels = [torch.full((2, 8, 8, 3), 255 * label, dtype=torch.uint8) for label in range(2)]
    batches = itertools.repeat(plain_batch(*(Sample(pixels[label], label, label, (0,), []) for label in range(2))))
    for _ in range(12):
        loss, hits, count = trainer.take_step(batches).tolist()
        share = model.seen[-1]
        scores = torch.stack([1 - share, share], dim=1)
        assert (hits, count) == (2, 2)
        assert loss == pytest.approx(-(scores * scores.log_softmax(dim=1)).sum().item(), rel=1e-5)
    assert torch.stack(model.seen)[:, 0].unique().numel() == 12  # each step draws anew


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_auxiliary_loss_is_trained_and_not_logged(precision: str) -> None:
    class Own(nn.Module):
        """Logits that depend on one parameter, and a loss of its own on another."""

        def __init__(self) -> None:
            super().__init__()
            self.scale, self.other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.tensor(3.0))

        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            return self.scale * clips.mean(dim=(1, 2, 3, 4)).unsqueeze(1)

        def auxiliary_loss(self) -> torch.Tensor:
            return self.other.square()

    model = Own()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = plain_trainer(model, optimizer, scheduler, accumulate=2, precision=precision)
    pixels = torch.full((2, 8, 8, 3), 255, dtype=torch.uint8)
    batches = itertools.repeat(plain_batch(*(Sample(pixels, label, label, (0,), []) for label in range(2))))
    loss, _, count = trainer.take_step(batches).tolist()
    assert loss / count == pytest.approx(math.log(2), rel=1e-3)
    assert model.other.item() == pytest.approx(3 - 0.125 * 2 * 3)  # of two accumulated batches: their mean


@pytest.mark.parametrize("reducer", ["tome", "spot"])
def test_a_reducer_of_the_configuration_is_trained(reducer: str, small_run: Callable[..., list[str]]) -> None:
    few = small_run("MODEL.REDUCER", reducer, "TRAIN.ACCUMULATE", "2", "TRAIN.MAX_STEPS", "1")
    before, after = initial_weights(few), weights_after_an_epoch(few)
    assert any(name.startswith("reducer.") for name in after) == (reducer == "spot")
    for name, weight in before.items():
        assert not torch.equal(after[name], weight), name
        assert after[name].isfinite().all()


def test_transforms_give_the_same_clips_on_the_device_and_in_workers(small_run: Callable[..., list[str]]) -> None:
    words = ["DATA.REPEATS", "2", "DATA.RAND_AUGMENT_LAYERS", "2", "DATA.ERASE", "0.5", "DATA.WORKERS", "1"]
    early, late = (weights_after_an_epoch(small_run(*words, "DATA.TRANSFORM_ON", on)) for on in ("workers", "device"))
    assert all(torch.equal(early[name], value) for name, value in late.items())


def test_metrics_after_the_resumed_step_and_cut_lines_are_dropped(tmp_path: Path) -> None:
    rows = [{"step": step, "epoch": 1, "split": "train", "loss": 1.0} for step in (4, 8, 12)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 16, "ep')
    log = MetricsLog(tmp_path, step=8)
    log.write(9, 1.1, "train", {"loss": 0.5})
    log.close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [4, 8, 9]
