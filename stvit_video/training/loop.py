"""Training: the loop, its checkpoints, the test at the end, and the rehearsal of all of it."""

import hashlib
import itertools
import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stvit_video.common.accuracy import ACCURACIES, accuracy_key
from stvit_video.common.charts import plot_curves
from stvit_video.common.errors import Stopped, UsageError
from stvit_video.common.progress import Progress
from stvit_video.data.failures import check_failures, merge, read_ledger
from stvit_video.data.workers import Loader, LoaderFailure
from stvit_video.evaluation.evaluate import build_tested_model, build_tester, class_probabilities, describe_videos
from stvit_video.models.weights.files import read_checkpoint, read_metadata
from stvit_video.runs.checkpoint import CheckpointWriter, list_checkpoints
from stvit_video.runs.fingerprint import check_start
from stvit_video.runs.folder import RunFolder
from stvit_video.runs.log import MetricsLog, describe_weights, read_metrics
from stvit_video.runs.preflight import OpenRun, build_memory_line
from stvit_video.runtime.clock import PARTS, peak_memory
from stvit_video.runtime.precision import autocast
from stvit_video.runtime.stopping import StopSignals
from stvit_video.runtime.world import any_of, gather_objects, on_main
from stvit_video.training.trainer import ROUNDING, Trainer, build_trainer


def run_epochs(
    run: OpenRun, trainer: Trainer, log: MetricsLog | None, writer: CheckpointWriter, signals: StopSignals
) -> None:
    """Take the steps that are left, validate after epochs, and write checkpoints when they are due.

    ``log`` is rank 0's. Raises Stopped, with a checkpoint of the very step, after a signal to stop.
    """
    world = run.world

    def save() -> None:
        write_failures(run, trainer)
        state = trainer.state()
        on_main(world, partial(writer.save, state))

    epochs = math.ceil(trainer.total_steps / trainer.steps_per_epoch)  # the last may be cut short
    with Progress("train", trainer.total_steps, trainer.step, enabled=world.is_main) as progress:
        while trainer.epoch < epochs and not trainer.is_stale:
            try:
                for _ in trainer.train_epoch(progress, log, lambda: signals.received is not None):
                    stop = any_of(world, signals.received is not None)
                    due = any_of(world, world.is_main and writer.is_due(trainer.step))
                    if stop or due or trainer.steps_left == 0:
                        save()
                    if stop:
                        on_main(world, writer.wait)  # launchers end all processes when one leaves: first the disk
                        raise Stopped(signals.received, f"step {trainer.step}")
            except UsageError:  # too many videos failed: failures.csv lists those that this process knows of
                if world.is_main:
                    run.folder.write_failures(trainer.failures)
                raise
            except LoaderFailure:
                if trainer.step > 0:  # all processes are here
                    save()
                    on_main(world, writer.wait)
                raise
            on_main(world, writer.wait)  # before validation forks its workers
            epoch = trainer.epoch + 1
            if trainer.val_loader is not None and (epoch == epochs or epoch % trainer.settings.val_every == 0):
                values = validate(run, trainer, trainer.val_loader, signals)
                if log is not None:
                    log.write(trainer.step, trainer.step / trainer.steps_per_epoch, "val", values)
                key = accuracy_key(values)
                accuracy = f"{ACCURACIES[key]} {values[key]:.1f} %"
                progress.note(f"epoch {epoch}: validation loss {values['loss']:.3f}, {accuracy}")
                if trainer.is_stale and epoch < epochs:
                    progress.note(
                        f"training ends early (TRAIN.PATIENCE): validation has been no better than {trainer.best:.1f} "
                        f"% {trainer.stale} times; TEST.WEIGHTS best tests the weights of that, last the present ones"
                    )
            trainer.epoch = epoch
            write_failures(run, trainer)
            for stage, loader in (("train", trainer.loader), ("val", trainer.val_loader)):
                failed = len({failure.path for failure in trainer.failures if failure.stage == stage})
                total = len(loader.dataset) if loader else 0
                check_failures(failed, total, trainer.settings.max_failures, stage)


def validate(run: OpenRun, trainer: Trainer, loader: Loader, signals: StopSignals) -> dict[str, float]:
    """Score the validation list with one view a video; keep the best weights. Raises Stopped after a signal to stop."""
    model = trainer.model_to_test()
    precision = trainer.settings.precision
    try:
        describe = class_probabilities(model, run.multi_label)
        predictions = describe_videos(describe, loader, run.world, precision, signals=signals)
    except Stopped:  # the scores so far are not kept: one view a video is quickly scored again
        raise Stopped(signals.received, f"step {trainer.step}") from None
    trainer.failures += predictions.failures
    values = {"loss": predictions.loss, **predictions.figures()}
    accuracy = values[accuracy_key(values)]
    trainer.stale += 1
    if accuracy > trainer.best:
        trainer.best, trainer.stale = accuracy, 0
        about = {"weights": "best", "weights_step": trainer.step, "weights_validation": accuracy}
        on_main(run.world, lambda: run.save_weights(run.folder.best_weights, model, about))
    return values


def choose_weights(trainer: Trainer, folder: RunFolder) -> tuple[nn.Module, dict[str, Any], str]:
    """Return the network to test after training, which weights it has, and a note on best ones that are not tested.

    Collective. Raises UsageError where the best are asked for and are not there.
    """
    model = trainer.model_to_test()
    best = read_metadata(folder.best_weights) if folder.best_weights.is_file() else None
    about = {"weights": "average" if trainer.ema_model else "last", "weights_step": trainer.step}
    if trainer.settings.tested == "best":
        if best is None:
            raise UsageError(
                f"TEST.WEIGHTS best: {folder.best_weights} is missing; put it back, or test the last weights: MODE "
                f"test MODEL.INIT {list_checkpoints(folder.checkpoints)[0]} with another OUTPUT_DIR."
            )
        model.load_state_dict(read_checkpoint(folder.best_weights).tensors)
        about = best.get("weights") or {"weights": "best"}
    known = best.get("weights") if best else None
    if known is None or known["weights_step"] == about.get("weights_step"):
        return model, about, ""
    return model, about, f"note: not tested (TEST.WEIGHTS): {describe_weights(known)}, in {folder.best_weights}"


def write_failures(run: OpenRun, trainer: Trainer) -> None:
    """Write the list of the videos that failed on any process."""
    trainer.failures = merge(itertools.chain.from_iterable(gather_objects(run.world, trainer.failures)))
    on_main(run.world, lambda: run.folder.write_failures(trainer.failures))


def resume(run: OpenRun, trainer: Trainer, state: dict[str, Any]) -> None:
    """Continue from a checkpoint, and say where."""
    trainer.restore(state)
    trainer.failures = on_main(run.world, lambda: read_ledger(run.folder.path / "failures.csv"))
    if run.world.is_main:
        print(f"continuing at step {trainer.step} in epoch {trainer.epoch + 1}", flush=True)
        setups = state["setup"], trainer.setup
        both = [(name, *(setup[name] for setup in setups)) for name in ROUNDING if name in state["setup"]]
        if changed := [f"{name} {old} (now {new})" for name, old, new in both if old != new]:
            print(
                f"note: the run was with {', '.join(changed)}: its steps see the same videos, but sums are rounded "
                f"differently, mixed pairs and dropout drawn anew, so weights will not be equal bit for bit",
                flush=True,
            )


def train(run: OpenRun) -> None:
    """Run MODE train: from the start or the newest checkpoint, then test."""
    world, folder = run.world, run.folder
    # What is wrong is found before the folder is touched.
    trainer = build_trainer(run)
    tester = build_tester(run)
    run.claim()
    if run.state is not None:
        resume(run, trainer, run.state)
        run.state = None  # frees as much memory as the weights and the optimiser take
    with StopSignals(world.launched) as signals:
        with open_records(run, trainer.step) as (log, writer):
            run_epochs(run, trainer, log, writer, signals)
        model, about, note = choose_weights(trainer, folder)

        def finish() -> None:
            print("\n".join(filter(None, [f"testing the {describe_weights(about)}", note])), flush=True)
            run.save_weights(folder.weights, model, about)
            plot_curves(read_metrics(folder.path / "metrics.jsonl"), folder.path / "curves.png")

        on_main(world, finish)
        for loader in filter(None, (trainer.loader, trainer.val_loader)):  # the test needs the memory
            loader.close()
        tester.test(model, trainer.failures, signals, about)


@contextmanager
def open_records(run: OpenRun, step: int) -> Iterator[tuple[MetricsLog | None, CheckpointWriter]]:
    """Yield the log of a run that is at ``step`` (rank 0 only) and the writer of its checkpoints."""
    cfg, folder, log = run.cfg, run.folder, None
    if run.world.is_main:
        board = None
        if cfg.LOG.WANDB:
            import wandb

            # A folder is always the same run there, also after an interruption.
            identity = hashlib.sha256(str(folder.path.resolve()).encode()).hexdigest()[:16]
            options = {"id": identity, "resume": "allow", "dir": folder.path, "config": folder.settings}
            board = wandb.init(project=cfg.LOG.WANDB, name=folder.path.name, **options)
        log = MetricsLog(folder.path, step, board)
    keys = cfg.CHECKPOINT
    writer = CheckpointWriter(folder.checkpoints, keys.KEEP, keys.EVERY_STEPS, keys.EVERY_MINUTES)
    with closing(log) if log is not None else nullcontext(), writer:
        yield log, writer


def build_dry_run(run: OpenRun) -> None:
    """Print in about 20 lines what a run would read, load, cost, do and write; begin none, and change no folder."""
    world = run.world
    report = run.report.summary() if run.report else "weights: random, as MODEL.INIT is empty"
    lines = [run.summary, report, build_memory_line(run.cfg, run.model, run.cost)]
    if run.cfg.MODE == "train":
        trainer = build_trainer(run)
        chance = math.log(2 if run.multi_label else len(run.classes))
        lines.append(rehearse_step(trainer, chance))
        trainer.loader.close()
        model = trainer.model_to_test()
    else:
        model = build_tested_model(run)
    tester = build_tester(run)
    started = time.monotonic()
    batch = next(iter(tester.loader), None)
    waited = time.monotonic() - started
    text = "none for this process" if batch is None else "no video of the first could be read"
    if batch is not None and len(batch.labels):
        clips = batch.to(world.device).make_clips()
        started = time.monotonic()
        with torch.no_grad(), autocast(world.device, tester.precision):
            text = describe_shapes(clips, model.eval()(clips))
        text += f"; {time.monotonic() - started:.2f} s to score"
    tester.loader.close()
    lines.append(f"test batch: {text}, {waited:.2f} s to load; peak memory {peak_memory(world.device):.2f} GB")
    if world.is_main:
        try:
            check_start(run.folder, run.lists, run.classes, run.multi_label)
            lines.append(run.folder.describe_start())
        except UsageError as error:
            lines.append(f"a run is refused: {error}")
        print("\n".join([*lines, "dry run: nothing was written"]), flush=True)


def rehearse_step(trainer: Trainer, chance: float) -> str:
    """Take one training step, the first and therefore a slow one, and return a line on it.

    ``chance`` is the loss of a model that gives every class the same probability.
    """
    seen: list[str] = []
    hook = trainer.wrapped.register_forward_hook(
        lambda module, clips, logits: seen.append(describe_shapes(clips[0], logits))
    )
    trainer.wrapped.train()
    trainer.clock.lap()
    loss, _, count = trainer.take_step(iter(trainer.loader)).tolist()
    hook.remove()
    lap = trainer.clock.lap()
    parts = ", ".join(f"{part} {lap[part]:.2f} s" for part in PARTS)
    batches = f"{trainer.settings.accumulate} x " if trainer.settings.accumulate > 1 else ""
    outcome = (
        f"loss {loss / count:.3f} (chance {chance:.3f})" if count else "skipped: its loss or gradients are not finite"
    )
    return f"first training step: {batches}{seen[0]}, {outcome}; {parts}"


def describe_shapes(clips: Tensor, logits: Tensor) -> str:
    return f"clips {tuple(clips.shape)} -> logits {tuple(logits.shape)}"
