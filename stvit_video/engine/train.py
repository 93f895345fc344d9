"""Training: the loop, its checkpoints, and the test at the end."""

import itertools
import json
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from stvit_video.data.dataset import Batch, TrainDataset
from stvit_video.data.ledger import Failure, merge
from stvit_video.data.loader import build_test_loader, build_train_loader
from stvit_video.data.mixing import Mix, build_mix
from stvit_video.data.videos import build_classes
from stvit_video.distributed import World, gather_objects, on_main, sum_over_world
from stvit_video.engine.checkpoint import load_newest, save_checkpoint, save_weights
from stvit_video.engine.evaluate import check_failures, predict, test_model
from stvit_video.engine.logging import MetricsLog, describe_results, read_metrics
from stvit_video.engine.optim import build_optimizer, build_scheduler
from stvit_video.engine.plots import plot_curves
from stvit_video.engine.run_folder import RunFolder
from stvit_video.engine.start import autocast, build_data, check_inputs, report_lists, report_model
from stvit_video.errors import UsageError
from stvit_video.models import LoadReport, load_pretrained
from stvit_video.models.checkpoints import read_metadata
from stvit_video.models.zoo import build_model
from stvit_video.progress import Progress

LOG_EVERY = 8  # steps between rows of metrics.jsonl


class Trainer:
    """The state of a training run, and one epoch of it at a time."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LambdaLR,
        loader: DataLoader,
        world: World,
        *,
        precision: str,
        accumulate: int,
        clip_grad: float,
        label_smoothing: float,
        mix: Mix | None,
        max_failures: float,
        seed: int,
    ) -> None:
        self.bare_model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.loader, self.world = loader, world
        self.precision, self.accumulate, self.seed = precision, accumulate, seed
        self.clip_grad, self.label_smoothing, self.mix = clip_grad, label_smoothing, mix
        self.max_failures = max_failures
        self.epoch = self.step = 0
        self.failures: list[Failure] = []
        self.failed: set[str] = set()  # training videos of this epoch and process
        self.model: nn.Module = model
        if world.size > 1:
            devices = [world.device] if world.device.type == "cuda" else None
            self.model = DistributedDataParallel(model, device_ids=devices)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.loader) // self.accumulate

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {
            "model": self.bare_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        self.bare_model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.step = state["epoch"], state["step"]

    def train_epoch(self, progress: Progress, log: MetricsLog | None) -> None:
        """Take every step of the next epoch."""
        self.loader.batch_sampler.epoch = self.epoch  # type: ignore[union-attr]
        self.model.train()
        self.failed = set()
        batches, sums, text = TimedBatches(self.loader), self._zeros(), ""
        # Dropout then depends on seed, epoch and rank alone, whether or not the run was interrupted before. After the
        # loader's start: that draws a number, but only when its workers start too.
        torch.manual_seed(self._seed(self.epoch))
        for i in range(1, self.steps_per_epoch + 1):
            sums += self.take_step(batches)
            if i % LOG_EVERY == 0 or i == self.steps_per_epoch:
                values = self._averages(sums, batches)
                if log is not None:
                    log.write(self.step, self.step / self.steps_per_epoch, "train", values)
                text = describe_step(self.epoch + 1, values)
                sums = self._zeros()
            progress.advance(text)
        self.epoch += 1

    def take_step(self, batches: Iterator[Batch]) -> Tensor:
        """Take one optimiser step on ``accumulate`` batches; return the sums of loss and hits, and the clip count."""
        sums = self._zeros()
        for i in range(self.accumulate):
            batch = next(batches)
            self.failures += batch.failures
            self.failed.update(failure.path for failure in batch.failures)
            if batch.missing:
                first = batch.failures[0]
                raise UsageError(
                    f"{TrainDataset.MAX_TRIES} training videos in a row could not be read, the first {first.path}: "
                    f"{first.message}. Check DATA.ROOT and DATA.TRAIN_LIST."
                )
            batch = batch.to(self.world.device)
            clips, labels = batch.clips, batch.clip_labels
            targets = labels
            if self.mix is not None:
                clips, targets = self.mix(clips, labels, self._seed(self.step, i))
                labels = targets.argmax(dim=1)  # for the hits: the label with the larger share
            # Gradients are exchanged once a step, with its last batch.
            unsynchronised = isinstance(self.model, DistributedDataParallel) and i + 1 < self.accumulate
            with self.model.no_sync() if unsynchronised else nullcontext():  # type: ignore[operator]
                with autocast(self.world.device, self.precision):
                    logits = self.model(clips)
                loss = F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing)
                (loss / self.accumulate).backward()
            with torch.no_grad():
                hits = (logits.argmax(dim=1) == labels).sum()
                sums += torch.stack([loss * len(labels), hits, torch.tensor(len(labels), device=loss.device)])
        if self.clip_grad > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        self.step += 1
        return sums

    def _seed(self, *of: int) -> int:
        """Return a seed that depends on the run's seed, the process and ``of`` alone."""
        return int(np.random.SeedSequence([self.seed, *of, self.world.rank]).generate_state(1)[0])

    def _zeros(self) -> Tensor:
        return torch.zeros(3, device=self.world.device)

    def _averages(self, sums: Tensor, batches: "TimedBatches") -> dict[str, float]:
        """Return the figures of the steps since the last call, over all processes."""
        failed = torch.tensor([len(self.failed)], dtype=sums.dtype, device=sums.device)
        loss, hits, clips, failed_videos = sum_over_world(self.world, torch.cat([sums, failed])).tolist()
        check_failures(int(failed_videos), len(self.loader.dataset), self.max_failures, "train")  # type: ignore[arg-type]
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss / clips} within {LOG_EVERY} steps before step {self.step}; lower OPTIM.LR, raise "
                f"OPTIM.WARMUP_EPOCHS, or use PRECISION fp32."
            )
        elapsed, waited = batches.lap()
        return {
            "loss": loss / clips,
            "top1": 100 * hits / clips,
            "lr": max(self.scheduler.get_last_lr()),
            "clips_per_second": clips / elapsed,
            "data_share": waited / elapsed,
        }


class TimedBatches:
    """The loader's batches, and how much of the time went into waiting for them."""

    def __init__(self, loader: DataLoader) -> None:
        self.batches = iter(loader)
        self.started, self.waited = time.monotonic(), 0.0

    def __iter__(self) -> "TimedBatches":
        return self

    def __next__(self) -> Batch:
        asked = time.monotonic()
        batch = next(self.batches)
        self.waited += time.monotonic() - asked
        return batch

    def lap(self) -> tuple[float, float]:
        """Return seconds elapsed and seconds waited since the last lap, and start a new one."""
        now = time.monotonic()
        elapsed, waited = now - self.started, self.waited
        self.started, self.waited = now, 0.0
        return elapsed, waited


def describe_step(epoch: int, values: dict[str, float]) -> str:
    """Return the figures of a progress line."""
    return (
        f"epoch {epoch}  loss {values['loss']:.3f}  top1 {values['top1']:.1f} %  "
        f"{values['clips_per_second']:.0f} clips/s  data wait {100 * values['data_share']:.0f} %"
    )


def build_trainer(cfg: CfgNode, world: World, model: nn.Module, num_classes: int) -> Trainer:
    """Return a trainer at step 0 for ``model``, which is moved to the process's device."""
    loader = build_train_loader(cfg, world, num_classes)
    model = model.to(world.device)
    optimizer = build_optimizer(cfg, model)
    return Trainer(
        model,
        optimizer,
        build_scheduler(cfg, optimizer, len(loader) // cfg.TRAIN.ACCUMULATE),
        loader,
        world,
        precision=cfg.PRECISION,
        accumulate=cfg.TRAIN.ACCUMULATE,
        clip_grad=cfg.OPTIM.CLIP_GRAD,
        label_smoothing=cfg.OPTIM.LABEL_SMOOTHING,
        mix=build_mix(cfg, world, num_classes),
        max_failures=cfg.DATA.MAX_FAILURES,
        seed=cfg.SEED,
    )


def build_weights(cfg: CfgNode, model: nn.Module, classes: list[str]) -> LoadReport:
    """Load MODEL.INIT into the model as the configuration asks; a classifier of other classes is no silent start."""
    known = read_metadata(cfg.MODEL.INIT).get("classes") if Path(cfg.MODEL.INIT).is_file() else None
    if known not in (None, classes) and not cfg.MODEL.NEW_HEAD and cfg.MODEL.INIT_DEPTH is None:
        raise UsageError(
            f"{cfg.MODEL.INIT}: its classifier is for other classes ({', '.join(map(str, known[:4]))} ...) than the "
            f"data's ({', '.join(classes[:4])} ...). Set MODEL.NEW_HEAD True to train a new one."
        )
    return load_pretrained(
        model,
        cfg.MODEL.INIT,
        min_coverage=cfg.MODEL.INIT_MIN_COVERAGE,
        new_head=cfg.MODEL.NEW_HEAD,
        motion=cfg.MODEL.INIT_MOTION,
        depth=cfg.MODEL.INIT_DEPTH,
    )


def train(cfg: CfgNode, world: World) -> None:
    """Run MODE train: from the start or the newest checkpoint, then test. A finished run is reported, not redone."""
    build_data(cfg, world)
    folder = RunFolder(cfg.OUTPUT_DIR)
    on_main(world, lambda: folder.check(cfg))
    if folder.is_finished() and not cfg.OVERWRITE:
        if world.is_main:
            print(f"{cfg.OUTPUT_DIR} is finished (OVERWRITE True runs it again):")
            print(describe_results(json.loads(folder.results.read_text())), flush=True)
        return
    state = None if cfg.OVERWRITE else load_newest(folder.checkpoints)
    check_inputs(cfg, resumed=state is not None)
    classes = build_classes(cfg)
    torch.manual_seed(cfg.SEED)
    model = build_model(cfg, len(classes))
    report = None
    if cfg.MODEL.INIT and state is None:
        report = build_weights(cfg, model, classes)
        if world.is_main:
            print(report, flush=True)
    # All that can be wrong is found before the folder is touched, and before hours of training.
    trainer = build_trainer(cfg, world, model, len(classes))
    val_loader = build_test_loader(cfg, world, "val", len(classes)) if cfg.DATA.VAL_LIST else None
    test_loader = build_test_loader(cfg, world, "test", len(classes), clips=cfg.TEST.CLIPS, crops=cfg.TEST.CROPS)
    on_main(world, lambda: folder.claim(cfg))
    if report is not None:
        text = report.to_json()
        on_main(world, lambda: folder.write_load_report(text))
    if world.is_main:
        report_model(cfg, model, world, len(classes))
        report_lists({"train": trainer.loader, "val": val_loader, "test": test_loader})
    if state is not None:
        trainer.restore(state)
        trainer.failures = on_main(world, folder.read_failures)
        if world.is_main:
            print(f"continuing after epoch {trainer.epoch}, step {trainer.step}", flush=True)
    train_epochs(cfg, trainer, folder, val_loader)
    on_main(world, lambda: finish_training(folder, trainer, classes))
    test_model(cfg, world, folder, trainer.bare_model, test_loader, classes, trainer.failures)


def train_epochs(cfg: CfgNode, trainer: Trainer, folder: RunFolder, val_loader: DataLoader | None) -> None:
    """Take the epochs that are left; validate, and write a checkpoint after each."""
    world = trainer.world
    log = MetricsLog(folder.path, trainer.step) if world.is_main else None
    total = cfg.TRAIN.EPOCHS * trainer.steps_per_epoch
    with Progress("train", total, trainer.step, enabled=world.is_main) as progress:
        while trainer.epoch < cfg.TRAIN.EPOCHS:
            try:
                trainer.train_epoch(progress, log)
            except UsageError:  # too many videos failed: the ledger says which, as far as this process knows
                if world.is_main:
                    folder.write_failures(trainer.failures)
                raise
            if val_loader is not None and trainer.epoch % cfg.TRAIN.VAL_EVERY == 0:
                validate(cfg, trainer, val_loader, progress, log)
            trainer.failures = gather_failures(world, trainer.failures)
            on_main(world, lambda: folder.write_failures(trainer.failures))
            on_main(world, lambda: save_checkpoint(folder.checkpoints, trainer.state(), cfg.CHECKPOINT.KEEP))
            for stage, loader in (("train", trainer.loader), ("val", val_loader)):
                failed = len({failure.path for failure in trainer.failures if failure.stage == stage})
                check_failures(failed, len(loader.dataset) if loader else 0, cfg.DATA.MAX_FAILURES, stage)  # type: ignore[arg-type]
    if log is not None:
        log.close()


def validate(cfg: CfgNode, trainer: Trainer, loader: DataLoader, progress: Progress, log: MetricsLog | None) -> None:
    """Score the validation list with one view a video."""
    predictions = predict(trainer.bare_model, loader, trainer.world, cfg.PRECISION)
    trainer.failures += predictions.failures
    values = {"loss": predictions.loss, "top1": predictions.top(1), "top5": predictions.top(5)}
    if log is not None:
        log.write(trainer.step, trainer.epoch, "val", values)
    progress.note(f"epoch {trainer.epoch}: validation loss {values['loss']:.3f}, top-1 {values['top1']:.1f} %")


def gather_failures(world: World, failures: list[Failure]) -> list[Failure]:
    """Return the failures of all processes, each once."""
    return merge(itertools.chain.from_iterable(gather_objects(world, failures)))


def finish_training(folder: RunFolder, trainer: Trainer, classes: list[str]) -> None:
    """Write the weights to be tested and the learning curves."""
    save_weights(folder.weights, trainer.bare_model, classes)
    plot_curves(read_metrics(folder.path / "metrics.jsonl"), folder.path / "curves.png")
