"""Losses and gradients that are not finite: the step is skipped on every rank and counted; too many end the run."""

import itertools
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from stvit_video import run
from stvit_video.data.dataset import Batch, Sample
from stvit_video.data.lists.annotations import Video
from stvit_video.runs.log import read_metrics
from stvit_video.runtime.stopping import Diverged
from stvit_video.training.trainer import Trainer
from tests.training.test_train import plain_batch, plain_trainer

Arguments = Callable[..., list[str]]


class Fragile(nn.Module):
    """A classifier whose logits or gradients are not finite for white clips."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(1, 2), how

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        brightness = clips.mean(dim=(1, 2, 3, 4), keepdim=True).flatten(1)
        logits = self.layer(brightness)
        white = brightness == 1
        if self.how == "logits":
            return torch.where(white, torch.nan, logits)
        return logits + torch.where(white, (0 * self.layer.weight.sum()).sqrt(), 0)


def batches(*values: int) -> list[Batch]:
    """Batches of one black clip and one of each given brightness; video i of the list has brightness i."""

    def sample(value: int) -> Sample:
        return Sample(torch.full((2, 8, 8, 3), value, dtype=torch.uint8), 0, value, (0,), [])

    return [plain_batch(sample(0), sample(value)) for value in values]


def trainer_of(model: nn.Module, most: int, **settings: object) -> Trainer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    videos = types.SimpleNamespace(videos=[Video(f"{i}.mp4", 0) for i in range(256)])
    loader = types.SimpleNamespace(dataset=videos)
    return plain_trainer(model, optimizer, scheduler, loader, max_bad_steps=most, **settings)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_bad_step_changes_nothing_but_the_count(precision: str) -> None:
    model = Fragile("logits")
    trainer = trainer_of(model, 2, precision=precision)
    before = [parameter.clone() for parameter in model.parameters()]
    assert trainer.take_step(iter(batches(255))).tolist() == [0, 0, 0]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert (trainer.bad_steps, trainer.step) == (1, 1)
    assert trainer.take_step(iter(batches(100)))[2] == 2
    assert not torch.equal(before[0], model.layer.weight)
    assert (trainer.bad_steps, trainer.step) == (1, 2)


def test_one_bad_micro_batch_skips_the_step() -> None:
    model = Fragile("logits")
    trainer = trainer_of(model, 1, accumulate=2)
    before = model.layer.weight.clone()
    trainer.take_step(iter(batches(255, 100)))
    assert torch.equal(before, model.layer.weight)
    assert trainer.bad_steps == 1


def test_gradients_that_are_not_finite_count_too() -> None:
    """The square root of 0 has an infinite slope."""
    trainer = trainer_of(Fragile("gradients"), 0)
    with pytest.raises(Diverged, match=r"the last step 1 with the video\(s\) 0\.mp4, 255\.mp4;"):
        trainer.take_step(iter(batches(255)))


def test_the_message_names_the_videos_of_the_last_bad_step() -> None:
    trainer = trainer_of(Fragile("logits"), 1)
    endless = itertools.cycle(batches(255))
    trainer.take_step(endless)
    with pytest.raises(Diverged, match=r"2 steps had .* step 2 with the video\(s\) 255\.mp4; .*MAX_BAD_STEPS 1 are"):
        trainer.take_step(endless)


def test_fp16_overflows_handled_by_the_loss_scaler_are_not_counted() -> None:
    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 2)

        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            return self.layer(clips.mean(dim=(1, 2, 3, 4), keepdim=True).flatten(1)) * 50

    trainer = trainer_of(Steep(), 0, precision="fp16")
    scale = trainer.scaler.get_scale()
    endless = itertools.cycle(batches(200))
    for _ in range(8):
        trainer.take_step(endless)
    assert trainer.scaler.get_scale() < scale
    assert trainer.bad_steps == 0


def test_a_run_that_diverges_ends_with_one_line(
    small_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = ["OPTIM.LR", "1e30", "OPTIM.CLIP_GRAD", "0", "OPTIM.WARMUP_EPOCHS", "0", "DATA.VAL_LIST", ""]
    assert run.main(small_run(*wild, "TRAIN.MAX_BAD_STEPS", "1")) == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: 2 steps had a loss or gradients that are not finite, the last step ")
    assert said.err.count("\n") == 1
    assert ".mp4" in said.err
    assert "skipped: its loss or gradients are not finite" in said.out


def test_a_checkpoint_after_a_bad_first_step_changes_nothing(
    small_run: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimiser has no state yet, and must not step to create one."""
    update = Trainer._update_weights

    def spoil(self: Trainer) -> bool:
        if self.step == 0:
            next(iter(self.model.parameters())).grad.fill_(torch.nan)  # type: ignore[union-attr]
        return update(self)

    monkeypatch.setattr(Trainer, "_update_weights", spoil)
    for name, every in (("seldom", "0"), ("often", "1")):
        words = ["DATA.VAL_LIST", "", "CHECKPOINT.EVERY_STEPS", every, "OUTPUT_DIR", str(tmp_path / name)]
        assert run.main(small_run(*words)) == 0
    seldom, often = (load_file(tmp_path / name / "model.safetensors") for name in ("seldom", "often"))
    assert all(torch.equal(often[name], value) for name, value in seldom.items())


def test_scores_that_are_not_finite_are_refused(
    small_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(small_run("DATA.VAL_LIST", "", "TRAIN.MAX_STEPS", "1")) == 0
    path = tmp_path / "run" / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weights["head.proj.weight"].fill_(3e38)  # finite, unlike its products
    save_file(weights, path, metadata)
    capsys.readouterr()
    words = ["MODE", "test", "MODEL.INIT", str(path), "OUTPUT_DIR", str(tmp_path / "test")]
    assert run.main(small_run(*words)) == 1
    assert capsys.readouterr().err.startswith("error: The scores of 16 of 16 videos are not finite")
    assert not (tmp_path / "test" / "results.json").exists()


def test_the_count_survives_an_interruption(
    small_run: Arguments, run_killed: Callable[[list[str], int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["DATA.VAL_LIST", "", "CHECKPOINT.EVERY_STEPS", "1"]
    update = Trainer._update_weights
    monkeypatch.setattr(Trainer, "_update_weights", lambda self: update(self) and self.step != 0)
    run_killed(small_run(*words), 2)
    assert run.main(small_run(*words)) == 0
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["bad_steps"] == 1
