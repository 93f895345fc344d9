"""Training: the loop, its checkpoints, and the test at the end."""

import itertools
import json
from contextlib import closing, nullcontext
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn
from torch.utils.data import DataLoader

from stvit_video.common.charts import plot_curves
from stvit_video.common.errors import RunFailure, Stopped, UsageError
from stvit_video.common.progress import Progress
from stvit_video.config.clip_settings import view_settings
from stvit_video.data.failures import check_failures, merge
from stvit_video.data.lists.videos import build_classes
from stvit_video.data.loader import build_test_loader
from stvit_video.evaluation.evaluate import class_probabilities, describe_videos, test_model
from stvit_video.models.weights.files import save_weights
from stvit_video.models.zoo import build_model
from stvit_video.runs.checkpoint import build_writer, load_newest
from stvit_video.runs.folder import RunFolder
from stvit_video.runs.log import build_log, check_log, describe_results, read_metrics
from stvit_video.runs.preflight import build_cost, build_data, check_inputs, check_model, report_lists, report_model
from stvit_video.runs.weights import build_weights
from stvit_video.runtime.stopping import StopSignals
from stvit_video.runtime.world import World, any_of, gather_objects, on_main
from stvit_video.training.trainer import Trainer, build_trainer


def train(cfg: CfgNode, world: World) -> None:
    """Run MODE train: from the start or the newest checkpoint, then test. A finished run is reported, not redone."""
    check_model(cfg)
    build_data(cfg, world)
    folder = RunFolder(cfg.OUTPUT_DIR)
    on_main(world, lambda: folder.check(cfg))
    check_log(cfg)
    if on_main(world, folder.is_finished) and not cfg.OVERWRITE:
        if world.is_main:
            print(f"{cfg.OUTPUT_DIR} is finished (OVERWRITE True runs it again):")
            print(describe_results(json.loads(folder.results.read_text())), flush=True)
        return
    on_main(world, folder.lock)
    state = None if cfg.OVERWRITE else load_agreed(world, folder)
    check_inputs(cfg, resumed=state is not None)
    classes = build_classes(cfg)
    torch.manual_seed(cfg.SEED)
    model = build_model(cfg, len(classes))
    report = None
    if cfg.MODEL.INIT and state is None:
        report = build_weights(cfg, model, classes)
        if world.is_main:
            print(report, flush=True)
    cost = build_cost(cfg, model)
    # All that can be wrong is found before the folder is touched, and before hours of training.
    trainer = build_trainer(cfg, world, model, len(classes), cost.gflops)
    val_loader = build_test_loader(cfg, world, "val", len(classes)) if cfg.DATA.VAL_LIST else None
    test_loader = build_test_loader(cfg, world, "test", len(classes), clips=cfg.TEST.CLIPS, crops=cfg.TEST.CROPS)
    on_main(world, lambda: folder.claim(cfg))
    on_main(world, folder.lock)  # of a new one
    if report is not None:
        text = report.to_json()
        on_main(world, lambda: folder.write_load_report(text))
    if world.is_main:
        report_model(cfg, cost, world, len(classes))
        report_lists({"train": trainer.loader, "val": val_loader, "test": test_loader})
    if state is not None:
        resume(trainer, state, folder)
    with StopSignals(world.launched) as signals:
        train_epochs(cfg, trainer, folder, val_loader, classes, signals)
        tested = trainer.model_to_test()
        on_main(world, lambda: finish_training(cfg, folder, tested, classes))
        test_model(cfg, world, folder, tested, cost, test_loader, classes, trainer.failures, signals)


def load_agreed(world: World, folder: RunFolder) -> dict[str, Any] | None:
    """Return the newest training state that is whole. Raises RunFailure where processes find different ones."""
    state = load_newest(folder.checkpoints)
    steps = gather_objects(world, None if state is None else int(state["step"]))
    if len(set(steps)) > 1:
        seen = [f"rank {rank} {'none' if step is None else f'step {step}'}" for rank, step in enumerate(steps)]
        raise RunFailure(
            f"the processes find different newest checkpoints in {folder.checkpoints}: {', '.join(seen[:8])}; "
            f"OUTPUT_DIR has to be one folder that all machines share. If it is, start again: one of them saw it late."
        )
    return state


def finish_training(cfg: CfgNode, folder: RunFolder, model: nn.Module, classes: list[str]) -> None:
    """Write the weights to be tested and the learning curves."""
    save_weights(folder.weights, model, classes, view_settings(cfg))
    plot_curves(read_metrics(folder.path / "metrics.jsonl"), folder.path / "curves.png")


def resume(trainer: Trainer, state: dict[str, Any], folder: RunFolder) -> None:
    """Continue from a checkpoint, and say where."""
    world = trainer.world
    trainer.restore(state)
    trainer.failures = on_main(world, folder.read_failures)
    if not world.is_main:
        return
    print(f"continuing at step {trainer.step} in epoch {trainer.epoch + 1}", flush=True)
    changed = [f"{name} {old} (now {trainer.setup[name]})" for name, old in state["setup"].items()
               if old != trainer.setup[name]]  # fmt: skip
    if changed:
        print(
            f"note: the run was with {', '.join(changed)}: its steps see the same videos, but sums are rounded "
            f"differently, so weights will not be equal bit for bit",
            flush=True,
        )


def train_epochs(
    cfg: CfgNode,
    trainer: Trainer,
    folder: RunFolder,
    val_loader: DataLoader | None,
    classes: list[str],
    signals: StopSignals,
) -> None:
    """Take the steps that are left, validate after epochs, and write checkpoints as the configuration asks.

    Raises Stopped, with a checkpoint at the very step, after a signal to stop.
    """
    world = trainer.world
    log = build_log(cfg, folder.path, trainer.step) if world.is_main else None
    with (
        closing(log) if log is not None else nullcontext(),
        build_writer(cfg, folder.checkpoints) as writer,
        Progress("train", trainer.total_steps, trainer.step, enabled=world.is_main) as progress,
    ):

        def after_step() -> None:
            stop = any_of(world, signals.received is not None)
            if stop or trainer.steps_left == 0 or any_of(world, world.is_main and writer.is_due(trainer.step)):
                keep_failures(trainer, folder)
                state = trainer.state()
                on_main(world, lambda: writer.save(state))
            if stop:
                on_main(world, writer.wait)  # nobody leaves, and so nobody is made to leave, before it is on the disk
                raise Stopped(signals.received, f"step {trainer.step}")

        while trainer.epoch < trainer.epochs:
            try:
                trainer.train_epoch(progress, log, after_step)
            except UsageError:  # too many videos failed: the ledger says which, as far as this process knows
                if world.is_main:
                    folder.write_failures(trainer.failures)
                raise
            on_main(world, writer.wait)  # before validation forks its workers
            last = trainer.epoch + 1 == trainer.epochs
            if val_loader is not None and (last or (trainer.epoch + 1) % cfg.TRAIN.VAL_EVERY == 0):
                values = validate(cfg, trainer, folder, val_loader, classes, signals)
                if log is not None:
                    log.write(trainer.step, trainer.step / trainer.steps_per_epoch, "val", values)
                progress.note(describe_validation(trainer.epoch + 1, values))
            trainer.epoch += 1
            keep_failures(trainer, folder)
            check_all_failures(cfg, trainer, val_loader)


def keep_failures(trainer: Trainer, folder: RunFolder) -> None:
    """Write the ledger of the videos that failed on any process."""
    trainer.failures = merge(itertools.chain.from_iterable(gather_objects(trainer.world, trainer.failures)))
    on_main(trainer.world, lambda: folder.write_failures(trainer.failures))


def check_all_failures(cfg: CfgNode, trainer: Trainer, val_loader: DataLoader | None) -> None:
    """Raise UsageError where a list has lost more videos than DATA.MAX_FAILURES allows."""
    for stage, loader in (("train", trainer.loader), ("val", val_loader)):
        failed = len({failure.path for failure in trainer.failures if failure.stage == stage})
        check_failures(failed, len(loader.dataset) if loader else 0, cfg.DATA.MAX_FAILURES, stage)  # type: ignore[arg-type]


def validate(
    cfg: CfgNode, trainer: Trainer, folder: RunFolder, loader: DataLoader, classes: list[str], signals: StopSignals
) -> dict[str, float]:
    """Score the validation list with one view a video; keep the weights where they are the best so far.

    Raises Stopped after a signal to stop; the checkpoint of the last step is there by then.
    """
    model = trainer.model_to_test()
    try:
        predictions = describe_videos(class_probabilities(model), loader, trainer.world, cfg.PRECISION, signals=signals)
    except Stopped:  # the scores so far are not kept: one view a video is soon made again
        raise Stopped(signals.received, f"step {trainer.step}") from None
    trainer.failures += predictions.failures
    values = {"loss": predictions.loss, "top1": predictions.top(1), "top5": predictions.top(5)}
    if values["top1"] > trainer.best:
        trainer.best = values["top1"]
        on_main(trainer.world, lambda: save_weights(folder.best_weights, model, classes, view_settings(cfg)))
    return values


def describe_validation(epoch: int, values: dict[str, float]) -> str:
    """Return the line that is printed after a validation."""
    return f"epoch {epoch}: validation loss {values['loss']:.3f}, top-1 {values['top1']:.1f} %"
