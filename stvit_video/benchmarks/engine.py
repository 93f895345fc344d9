"""What the engine adds to a bare training loop: the same batches, model and optimiser, with and without it."""

import contextlib
import io
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fvcore.common.config import CfgNode

from stvit_video.benchmarks.rounds import PLAIN_TRAINING, Timer, describe, interleave, open_benchmark, timed, train_step
from stvit_video.common.errors import Stopped, UsageError
from stvit_video.data.dataset import Batch
from stvit_video.runs.checkpoint import CheckpointWriter
from stvit_video.runs.folder import RunFolder
from stvit_video.runs.log import MetricsLog
from stvit_video.runs.preflight import OpenRun
from stvit_video.runtime.stopping import StopSignals
from stvit_video.training.loop import run_epochs
from stvit_video.training.trainer import Trainer, build_trainer

# One epoch, and only what the bare loop does too.
CHANGES = {**PLAIN_TRAINING, "TRAIN.EPOCHS": 1, "TRAIN.EMA": 0.0, "LOG.WANDB": ""}


class HeldBatches(list[Batch]):
    """A loader whose batches are in memory: decoding, whose time varies, is not measured."""

    batch_sampler = SimpleNamespace(load_state_dict=lambda state: None)

    def __init__(self, batches: Iterable[Batch], dataset: Any) -> None:
        super().__init__(batches)
        self.dataset = dataset


def engine_loop(opened: OpenRun, trainer: Trainer, keep: int) -> Iterator[int]:
    """Train an epoch as a run does: logs, guards, stop signals and the checkpoint at its end included."""
    trainer.epoch = trainer.step = 0
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = RunFolder(Path(folder))
        run.checkpoints.mkdir()
        try:
            with (
                StopSignals(launched=False) as signals,
                contextlib.closing(MetricsLog(run.path, 0)) as log,
                CheckpointWriter(run.checkpoints, keep, 0, 0) as writer,
            ):
                run_epochs(replace(opened, folder=run), trainer, log, writer, signals)
        except Stopped as stopped:  # there is nothing to continue
            raise KeyboardInterrupt from stopped
    yield trainer.step


def build_engine_timers(cfg: CfgNode, steps: int) -> dict[str, Timer]:
    """Return timers of a step of the bare loop, which comes first, and of the engine."""
    run = open_benchmark(cfg, {**CHANGES, "TRAIN.MAX_STEPS": steps}, cfg.DEVICE)
    run.videos.pop("val", None)  # no validation after the epoch
    trainer = build_trainer(run)
    settings = trainer.settings
    if settings.clip_grad <= 0 or trainer.scaler.is_enabled():
        raise UsageError("The engine is timed with OPTIM.CLIP_GRAD above 0 and PRECISION fp32, tf32 or bf16; set them.")
    batches = HeldBatches(islice(trainer.loader, steps), trainer.loader.dataset)
    trainer.loader = batches  # type: ignore[assignment]

    def bare_loop() -> Iterator[float]:
        options = {"label_smoothing": settings.label_smoothing, "clip_grad": settings.clip_grad}
        model = trainer.wrapped.train()
        for batch in batches:
            batch = batch.to(trainer.world.device)
            clips, labels = batch.make_clips(), batch.clip_labels
            loss = train_step(model, trainer.optimizer, clips, labels, settings.precision, **options)
            trainer.scheduler.step()
            yield loss.item()

    return {
        "bare loop": timed(bare_loop, len(batches)),
        "engine": timed(lambda: engine_loop(run, trainer, cfg.CHECKPOINT.KEEP), len(batches)),
    }


def build_engine_figures(cfg: CfgNode, steps: int, rounds: int) -> dict[str, Any]:
    """Time training steps with and without the engine, print the table and return the figures."""
    measured = interleave(build_engine_timers(cfg, steps), rounds)
    print(describe(f"training steps of {cfg.TRAIN.BATCH_SIZE} clips held in memory", "step", measured))
    speed = 1 / measured[1].ratio
    print(f"the engine takes {speed:.3f} of the bare loop's steps per second, checkpoint and logs included", flush=True)
    return {"engine": [asdict(step) for step in measured], "speed": speed}
