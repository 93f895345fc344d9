"""What a trainer takes from the configuration."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stvit_video.data.clips.transforms import Mix
from stvit_video.data.loader import build_mix
from stvit_video.runs.preflight import OpenRun
from stvit_video.runtime.precision import matrix_rate
from stvit_video.runtime.world import sum_over_world
from stvit_video.training.losses import build_class_weights


@dataclass(frozen=True)
class TrainSettings:
    """How steps are taken."""

    precision: str
    accumulate: int  # batches a step and process
    clip_grad: float  # largest norm of the gradients; 0: no clipping
    label_smoothing: float
    max_failures: float  # share of the training videos that may be unreadable
    max_bad_steps: int  # steps that may be skipped because loss or gradients are not finite
    peak_clips_per_second: float  # if a training step were nothing but one matrix product, over all processes
    seed: int
    val_every: int = 1  # epochs between validations
    patience: int = 0  # validations without a better accuracy that end the training; 0: none do
    mix: Mix | None = None
    multi_label: bool = False  # labels are those of each class by itself (clips, classes)
    tested: str = "last"  # which weights are tested at the end
    class_weights: Tensor | None = None  # (classes,)


def build_train_settings(run: OpenRun) -> TrainSettings:
    """Return what a trainer takes from the configuration. A collective call of all processes."""
    cfg, world = run.cfg, run.world
    rate = sum_over_world(world, torch.tensor([matrix_rate(world.device, cfg.PRECISION)], device=world.device))
    return TrainSettings(
        precision=cfg.PRECISION,
        accumulate=cfg.TRAIN.ACCUMULATE,
        clip_grad=cfg.OPTIM.CLIP_GRAD,
        label_smoothing=cfg.OPTIM.LABEL_SMOOTHING,
        max_failures=cfg.DATA.MAX_FAILURES,
        max_bad_steps=cfg.TRAIN.MAX_BAD_STEPS,
        peak_clips_per_second=float(rate) / (3 * run.cost.gflops),  # the backward pass costs twice the forward pass
        seed=cfg.SEED,
        val_every=cfg.TRAIN.VAL_EVERY,
        patience=cfg.TRAIN.PATIENCE,
        mix=build_mix(cfg, world, len(run.classes)),
        multi_label=run.multi_label,
        tested=cfg.TEST.WEIGHTS,
        class_weights=build_class_weights(run),
    )
