"""The trainer: the state of a training run, and its steps."""

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from stvit_video.data.dataset import Batch, TrainDataset
from stvit_video.data.ledger import Failure
from stvit_video.data.loader import build_train_loader
from stvit_video.data.mixing import Mix, build_mix
from stvit_video.distributed import World, sum_over_world
from stvit_video.engine.evaluate import check_failures
from stvit_video.engine.logging import MetricsLog
from stvit_video.engine.optim import build_optimizer, build_scheduler
from stvit_video.engine.start import autocast
from stvit_video.errors import UsageError
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
        self.epoch = self.step = 0  # epochs that are over, steps taken
        self.best = 0.0  # validation top-1 in percent
        self.failures: list[Failure] = []
        self.failed: set[str] = set()  # training videos of this epoch and process
        self.model: nn.Module = model
        if world.size > 1:
            devices = [world.device] if world.device.type == "cuda" else None
            self.model = DistributedDataParallel(model, device_ids=devices)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.loader) // self.accumulate

    @property
    def steps_left(self) -> int:
        """Steps of the present epoch that are not yet taken."""
        return (self.epoch + 1) * self.steps_per_epoch - self.step

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds.

        There is no random state in it: every step seeds its own. The order of the videos follows from seed and epoch,
        and the place in it from the step.
        """
        return {
            "model": self.bare_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "processes": self.world.size,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        self.bare_model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]

    def train_epoch(self, progress: Progress, log: MetricsLog | None, after_step: Callable[[], None]) -> None:
        """Take the steps of the present epoch that are left, and call ``after_step`` after each.

        Augmentation, mixing and dropout depend on seed, epoch or step, and rank alone: an epoch that was interrupted
        goes on as if it had not been.
        """
        done = self.steps_per_epoch - self.steps_left
        if self.steps_left == 0:
            return  # the run was stopped between the last step and validation
        self.loader.batch_sampler.load_state_dict(  # type: ignore[union-attr]
            {"epoch": self.epoch, "start": done * self.accumulate}
        )
        self.model.train()
        self.failed = set()
        batches, sums, text = TimedBatches(self.loader), self._zeros(), ""
        for i in range(done + 1, self.steps_per_epoch + 1):
            seed_all(self._seed(self.step))
            sums += self.take_step(batches)
            if i % LOG_EVERY == 0 or i == self.steps_per_epoch:
                values = self._averages(sums, batches)
                if log is not None:
                    log.write(self.step, self.step / self.steps_per_epoch, "train", values)
                text = describe_step(self.epoch + 1, values)
                sums = self._zeros()
            progress.advance(text)
            after_step()

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


def seed_all(seed: int) -> None:
    """Seed every generator that a network may draw from: torch's, also those of the GPUs, NumPy's and Python's."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


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
