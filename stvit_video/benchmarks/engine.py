"""What the engine adds to a bare training loop: the same batches, model and optimiser, with and without it."""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import nn

from stvit_video.benchmarks.loader import timed
from stvit_video.benchmarks.rounds import Timer, describe, interleave
from stvit_video.common.errors import Stopped, UsageError
from stvit_video.data.dataset import Batch
from stvit_video.runs.checkpoint import CheckpointWriter
from stvit_video.runs.folder import RunFolder
from stvit_video.runs.log import MetricsLog
from stvit_video.runs.preflight import open_run
from stvit_video.runtime.join import pick_device
from stvit_video.runtime.precision import autocast
from stvit_video.runtime.stopping import StopSignals
from stvit_video.runtime.world import World
from stvit_video.training.loop import Training, build_training
from stvit_video.training.trainer import Trainer


class HeldBatches:
    """A loader whose batches are in memory, so that decoding, which varies, is not timed."""

    def __init__(self, batches: list[Batch], dataset: Any) -> None:
        self.batches, self.dataset = batches, dataset
        self.batch_sampler = SimpleNamespace(load_state_dict=lambda state: None)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def bare_loop(trainer: Trainer, batches: list[Batch]) -> Iterator[float]:
    """Train on batches with nothing but what the steps need; yield each loss."""
    trainer.wrapped.train()
    for batch in batches:
        batch = batch.to(trainer.world.device)
        with autocast(trainer.world.device, trainer.settings.precision):
            logits = trainer.wrapped(batch.make_clips())
        loss = F.cross_entropy(logits.float(), batch.clip_labels, label_smoothing=trainer.settings.label_smoothing)
        loss.backward()
        nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.settings.clip_grad)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.scheduler.step()
        yield loss.item()


def engine_loop(training: Training, keep: int) -> Iterator[int]:
    """Train an epoch as a run does: logs, guards, stop signals and the checkpoint at its end included."""
    trainer = training.trainer
    trainer.epoch = trainer.step = 0
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = RunFolder(Path(folder))
        run.checkpoints.mkdir()
        try:
            with (
                StopSignals(launched=False) as signals,
                closing(MetricsLog(run.path, 0)) as log,
                CheckpointWriter(run.checkpoints, keep, 0, 0) as writer,
            ):
                replace(training, folder=run).run_epochs(log, writer, signals)
        except Stopped as stopped:  # there is nothing to continue
            raise KeyboardInterrupt from stopped
    yield trainer.step


def build_engine_timers(cfg: CfgNode, steps: int) -> dict[str, Timer]:
    """Return timers of a step of the bare loop, which comes first, and of the engine."""
    world = World(0, 1, pick_device(cfg.DEVICE, 0, 1))
    cfg = cfg.clone()
    cfg.defrost()
    cfg.TRAIN.EPOCHS, cfg.TRAIN.MAX_STEPS, cfg.TRAIN.ACCUMULATE, cfg.LOG.WANDB = 1, steps, 1, ""
    cfg.TRAIN.MIXUP = cfg.TRAIN.CUTMIX = cfg.TRAIN.EMA = 0.0
    cfg.freeze()
    run = open_run(cfg, world, "measure")
    assert run is not None, "nothing is finished where nothing is written"
    run.videos.pop("val", None)
    training = build_training(run)
    trainer = training.trainer
    if trainer.settings.clip_grad <= 0 or trainer.scaler.is_enabled():
        raise UsageError("The engine is timed with OPTIM.CLIP_GRAD above 0 and PRECISION fp32, tf32 or bf16; set them.")
    batches = list(islice(trainer.loader, steps))
    trainer.loader = HeldBatches(batches, trainer.loader.dataset)  # type: ignore[assignment]
    return {
        "bare loop": timed(lambda: bare_loop(trainer, batches), len(batches)),
        "engine": timed(lambda: engine_loop(training, cfg.CHECKPOINT.KEEP), len(batches)),
    }


def benchmark_engine(cfg: CfgNode, steps: int, rounds: int) -> dict[str, Any]:
    """Time training steps with and without the engine, print the table and return the figures."""

    rows = interleave(build_engine_timers(cfg, steps), rounds)
    print(describe(f"training steps of {cfg.TRAIN.BATCH_SIZE} clips held in memory", "step", rows))
    speed = 1 / rows[1].ratio
    print(f"the engine takes {speed:.3f} of the bare loop's steps a second, checkpoint and logs included", flush=True)
    return {"engine": [asdict(row) for row in rows], "speed": speed}
