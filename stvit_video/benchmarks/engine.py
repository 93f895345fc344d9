"""What the engine adds to a bare training loop: the same batches, model and optimiser, with and without it."""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from itertools import islice
from types import SimpleNamespace
from typing import Any

from fvcore.common.config import CfgNode

from stvit_video.benchmarks.rounds import PLAIN_TRAINING, Figures, measure_steps, open_benchmark, timed, train_step
from stvit_video.common.errors import Stopped, UsageError
from stvit_video.data.dataset import Batch
from stvit_video.runs.folder import RunFolder
from stvit_video.runtime.stopping import StopSignals
from stvit_video.training.loop import build_training, open_records

# One epoch, and only what the bare loop does too.
CHANGES = {
    **PLAIN_TRAINING,
    "TRAIN.EPOCHS": 1,
    "TRAIN.EMA": 0.0,
    "LOG.WANDB": "",
    "CHECKPOINT.EVERY_STEPS": 0,
    "CHECKPOINT.EVERY_MINUTES": 0.0,
}


class HeldBatches(list[Batch]):
    """A loader whose batches are in memory: decoding, whose time varies, is not measured."""

    batch_sampler = SimpleNamespace(load_state_dict=lambda state: None)
    dataset: Any


def build_engine_figures(cfg: CfgNode, steps: int, rounds: int) -> Figures:
    """Time steps of a bare loop, which comes first, and of the engine; print the table and return the figures."""
    run = open_benchmark(cfg, {**CHANGES, "TRAIN.MAX_STEPS": steps}, cfg.DEVICE)
    run.videos.pop("val", None)  # no validation after the epoch
    training = build_training(run)
    trainer, settings = training.trainer, training.trainer.settings
    if settings.clip_grad <= 0 or trainer.scaler.is_enabled():
        raise UsageError("The engine is timed with OPTIM.CLIP_GRAD above 0 and PRECISION fp32, tf32 or bf16; set them.")
    batches = HeldBatches(islice(trainer.loader, steps))
    batches.dataset = trainer.loader.dataset
    trainer.loader = batches  # type: ignore[assignment]

    def bare_loop() -> Iterator[int]:
        options = {"label_smoothing": settings.label_smoothing, "clip_grad": settings.clip_grad}
        model = trainer.wrapped.train()
        for batch in batches:
            batch = batch.to(trainer.world.device)
            clips, labels = batch.make_clips(), batch.clip_labels
            loss = train_step(model, trainer.optimizer, clips, labels, settings.precision, **options)
            trainer.scheduler.step()
            loss.item()
            yield 1

    def engine_loop() -> Iterator[int]:
        """Train an epoch as a run does: logs, guards, stop signals and the checkpoint at its end included."""
        trainer.epoch = trainer.step = 0
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            run.folder = training.folder = RunFolder(folder)
            run.folder.checkpoints.mkdir()
            try:
                with StopSignals(launched=False) as signals, open_records(run, 0) as (log, writer):
                    training.run_epochs(log, writer, signals)
            except Stopped as stopped:  # there is nothing to continue
                raise KeyboardInterrupt from stopped
        yield trainer.step

    timers = {"bare loop": timed(bare_loop, int), "engine": timed(engine_loop, int)}
    measured = measure_steps(f"training steps of {cfg.TRAIN.BATCH_SIZE} clips held in memory", "step", timers, rounds)
    speed = 1 / measured[1]["ratio"]
    print(f"the engine takes {speed:.3f} of the bare loop's steps per second, checkpoint and logs included", flush=True)
    return {"engine": measured, "speed": speed}
