"""The trainer: the state of a training run, and its steps."""

import copy
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from stvit_video.common.errors import UsageError
from stvit_video.common.progress import Progress
from stvit_video.config.schema import flatten
from stvit_video.data.dataset import MAX_TRIES, Batch
from stvit_video.data.failures import Failure, check_failures
from stvit_video.data.loader import build_test_loader, build_train_loader
from stvit_video.data.workers import Loader, LoaderFailure
from stvit_video.models.weights.files import header
from stvit_video.runs.folder import RunFolder
from stvit_video.runs.log import MetricsLog
from stvit_video.runs.preflight import OpenRun
from stvit_video.runtime import parallel
from stvit_video.runtime.clock import PARTS, StepClock, peak_memory
from stvit_video.runtime.precision import autocast, set_precision
from stvit_video.runtime.stopping import Diverged
from stvit_video.runtime.world import World, any_of, gather_objects, sum_over_world
from stvit_video.training.losses import classification_loss
from stvit_video.training.optim import average_weights, build_optimizer, build_scheduler, freeze
from stvit_video.training.settings import TrainSettings, build_train_settings

LOG_EVERY = 8  # steps between rows of metrics.jsonl
COUNTERS = ("epoch", "step", "bad_steps", "best", "stale")  # of a trainer, in its checkpoints
ROUNDING = ("processes", "strategy", "accumulation", "compile", "device")  # of a setup: may change, with a note


class WaitEnded(Exception):
    """There is no batch for a step, because the run is to stop."""


@dataclass(eq=False)
class Trainer:
    """The state of a training run, and one epoch of it at a time."""

    model: nn.Module  # perhaps sharded in place (FSDP)
    wrapped: nn.Module  # what gradients are computed with: ``model``, or ``model`` inside DDP
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    loader: Loader
    world: World
    settings: TrainSettings
    total_steps: int
    setup: dict[str, Any]  # what a continuation compares, see ``check_continued`` and ROUNDING
    ema_model: AveragedModel | None = None  # follows the weights of ``model``
    eval_model: nn.Module | None = None  # an unsharded copy, to test a sharded model with
    val_loader: Loader | None = None
    epoch: int = 0  # finished epochs
    step: int = 0  # steps taken
    bad_steps: int = 0  # those of them that were skipped
    best: float = -1.0  # validation top-1 or mAP in percent; any first one is better
    stale: int = 0  # validations since then
    failures: list[Failure] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=self.settings.precision == "fp16")
        self.clock = StepClock(self.world.device)
        self.failed: set[str] = set()  # training videos of this epoch and process

    @property
    def steps_per_epoch(self) -> int:
        return len(self.loader) // self.settings.accumulate

    @property
    def is_stale(self) -> bool:
        """Say whether the accuracy of validation has not grown for as long as ``patience`` allows."""
        return 0 < self.settings.patience <= self.stale

    @property
    def steps_left(self) -> int:
        """Steps of the present epoch that are not yet taken."""
        return min((self.epoch + 1) * self.steps_per_epoch, self.total_steps) - self.step

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds; rank 0 gets the whole state. Collective: all processes have to call it."""
        # No random state: each step seeds the generators, and the order of the videos follows from seed and epoch.
        return {
            **parallel.full_state_dict(self.model, self.optimizer),
            "average": None if self.ema_model is None else parallel.model_state_dict(self.ema_model.module),
            "averaged": 0 if self.ema_model is None else int(self.ema_model.n_averaged),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            **{name: getattr(self, name) for name in COUNTERS},
            "setup": self.setup,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        parallel.load_full_state_dict(self.model, self.optimizer, state)
        if self.ema_model is not None:
            parallel.load_model_state_dict(self.ema_model.module, state["average"])
            self.ema_model.n_averaged.fill_(state["averaged"])
        self.scheduler.load_state_dict(state["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        for name in COUNTERS:
            setattr(self, name, state.get(name, 0))  # older checkpoints lack the newest

    def model_to_test(self) -> nn.Module:
        """Return the network to test: the moving average where there is one. A collective call of all processes."""
        model = self.model if self.ema_model is None else self.ema_model.module
        if self.eval_model is None:
            return model
        self.eval_model.load_state_dict(parallel.model_state_dict(model))
        return self.eval_model.to(self.world.device)

    def train_epoch(
        self, progress: Progress, log: MetricsLog | None, stop: Callable[[], bool] = lambda: False
    ) -> Iterator[None]:
        """Take the steps of the present epoch that are left; yield after each, and where ``stop`` ends a wait."""
        if self.steps_left == 0:
            return  # the run was stopped between the last step and validation
        done = self.step - self.epoch * self.steps_per_epoch
        position = {"epoch": self.epoch, "start": done * self.settings.accumulate}
        self.loader.batch_sampler.load_state_dict(position)
        self.wrapped.train()
        if self.eval_model is not None:
            self.eval_model.cpu()  # training needs the room
        self.failed = set()
        batches = self.loader.batches(stop)
        text = ""
        logged = self.step
        sums = torch.zeros(3, device=self.world.device)
        self.clock.lap()
        for i in range(done + 1, done + self.steps_left + 1):
            # Of every generator that a network may draw from, so that an interrupted epoch continues bit for bit.
            seed = self._seed(self.step)
            torch.manual_seed(seed)  # also those of the GPUs
            np.random.seed(seed)
            random.seed(seed)
            skipped = self.bad_steps
            try:
                sums = sums + self.take_step(batches)
            except WaitEnded:
                yield
                raise
            if self.bad_steps > skipped:
                progress.note(f"step {self.step} skipped: its loss or gradients are not finite")
            if i % LOG_EVERY == 0 or self.steps_left == 0:
                values = self._averages(sums, self.step - logged)
                if log is not None:
                    log.write(self.step, self.step / self.steps_per_epoch, "train", values)
                sums = torch.zeros_like(sums)
                logged = self.step
                text = f"epoch {self.epoch + 1}  all steps skipped"
                if "loss" in values:
                    accuracy = f"  top1 {values['top1']:.1f} %" if "top1" in values else ""
                    text = (
                        f"epoch {self.epoch + 1}  loss {values['loss']:.3f}{accuracy}  "
                        f"{values['clips_per_second']:.0f} clips/s  data {100 * values['data_share']:.0f} %  "
                        f"mfu {100 * values['mfu']:.0f} %"
                    )
            progress.advance(text)
            yield

    def take_step(self, batches: Iterator[Batch]) -> Tensor:
        """Take one optimiser step on ``accumulate`` batches; return the sums of loss and hits, and the clip count."""
        sums = torch.zeros(3, device=self.world.device)
        seen = []
        for i in range(self.settings.accumulate):
            with self.clock.part("data"):
                batch = self._next_batch(batches)
                self.failures += batch.failures
                self.failed.update(failure.path for failure in batch.failures)
                if batch.missing:
                    first = batch.failures[0]
                    raise UsageError(
                        f"{MAX_TRIES} training videos in a row could not be read, the first {first.path}: "
                        f"{first.message}. Check DATA.ROOT and DATA.TRAIN_LIST."
                    )
                batch = batch.to(self.world.device)
                clips = batch.make_clips()
                labels = batch.clip_labels
            # Processes exchange gradients once a step, with its last batch.
            with parallel.gradient_sync(self.wrapped, i + 1 == self.settings.accumulate):
                with self.clock.part("forward"):
                    targets, settings = labels, self.settings
                    if settings.mix is not None:
                        clips, targets = settings.mix(clips, labels, self._seed(self.step, i))
                    if targets.ndim == 2:
                        labels = targets.argmax(dim=1)  # for the hits: the label with the larger share
                    with autocast(self.world.device, self.settings.precision):
                        logits = self.wrapped(clips)
                    how = (settings.label_smoothing, settings.multi_label, settings.class_weights)
                    loss = classification_loss(logits.float(), targets, *how)
                    # A learned reducer's: added for the gradients, not in the logged loss.
                    auxiliary = getattr(self.model, "auxiliary_loss", lambda: None)()
                    total = loss if auxiliary is None else loss + auxiliary
                with self.clock.part("backward"):
                    # A loss that is not finite makes all gradients NaN: every process sees it in their sum, and all
                    # skip the step together, without another exchange.
                    guard = torch.where(total.detach().isfinite(), 1.0, torch.nan)
                    self.scaler.scale(total * guard / self.settings.accumulate).backward()
            with torch.no_grad():
                hits = (logits.argmax(dim=1) == labels).sum()
                sums += torch.stack([loss * len(labels), hits, torch.tensor(len(labels), device=loss.device)])
            seen.append((batch, logits.detach(), loss.detach()))
        with self.clock.part("optimizer"):
            finite = self._update_weights()
        self.scheduler.step()
        self.step += 1
        if finite:
            return sums
        self._skip(seen)
        return torch.zeros_like(sums)

    def _next_batch(self, batches: Iterator[Batch]) -> Batch:
        """Return the next batch, where all processes have theirs.

        Where one has none, all know before they begin to wait for each other in a step, and can still save: raises
        that one's LoaderFailure on all of them, or WaitEnded.
        """
        batch, failure = None, None
        try:
            batch = next(batches, None)
        except LoaderFailure as error:
            failure = error
        if any_of(self.world, batch is None):
            found = filter(None, gather_objects(self.world, failure))
            raise next(found, WaitEnded())
        assert batch is not None
        return batch

    def _update_weights(self) -> bool:
        """Clip the gradients and step; where they are not finite, on every process, leave the weights as they are."""
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        finite = bool((norm.full_tensor() if isinstance(norm, DTensor) else norm).isfinite())
        if finite and self.settings.clip_grad > 0:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.settings.clip_grad, norm)
        if finite or self.scaler.is_enabled():  # the scaler skips steps that are not finite, and lowers its scale
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if finite and self.ema_model is not None:
            self.ema_model.update_parameters(self.model)
        return finite

    def _skip(self, seen: list[tuple[Batch, Tensor, Tensor]]) -> None:
        """Count a skipped step; fp16 overflows that the loss scaler handles are not counted."""
        videos = self.loader.dataset.videos
        paths = []  # of the videos whose logits are not finite; of a whole batch if only its loss is not
        for batch, logits, loss in seen:
            bad = (~logits.isfinite()).any(dim=1).view(len(batch.indices), -1).any(dim=1).cpu()
            if not loss.isfinite():
                paths += [videos[i].name for i in (batch.indices[bad] if bad.any() else batch.indices).tolist()]
        if self.scaler.is_enabled() and not any_of(self.world, bool(paths)) and self.scaler.get_scale() >= 1:
            return
        self.bad_steps += 1
        most = self.settings.max_bad_steps
        if self.bad_steps > most:
            paths = [path for share in gather_objects(self.world, paths) for path in share]
            paths = paths or [videos[index].name for batch, *_ in seen for index in batch.indices.tolist()]
            raise Diverged(
                f"{self.bad_steps} steps had a loss or gradients that are not finite, the last step {self.step} with "
                f"the video(s) {', '.join(paths[:8])}{' ...' if len(paths) > 8 else ''}; TRAIN.MAX_BAD_STEPS {most} "
                f"are allowed. Look at these videos, lower OPTIM.LR, raise OPTIM.WARMUP_EPOCHS, or use PRECISION fp32."
            )

    def _seed(self, *of: int) -> int:
        """Return a seed that depends on the run's seed, the rank and ``of`` alone."""
        return int(np.random.SeedSequence([self.settings.seed, *of, self.world.rank]).generate_state(1)[0])

    def _averages(self, sums: Tensor, steps: int) -> dict[str, float]:
        """Return the figures of the last ``steps`` steps, over all processes; times are of this one."""
        failed = torch.tensor([len(self.failed)], dtype=sums.dtype, device=sums.device)
        loss, hits, clips, failed_videos = sum_over_world(self.world, torch.cat([sums, failed])).tolist()
        check_failures(int(failed_videos), len(self.loader.dataset), self.settings.max_failures, "train")
        lap = self.clock.lap()
        speed = clips / lap["elapsed"]
        figures = {"loss": loss / clips, "top1": 100 * hits / clips} if clips else {}  # none if all were skipped
        if self.settings.multi_label:  # whose accuracy is that of a whole list: see validation
            figures.pop("top1", None)
        return {
            **figures,
            "lr": max(self.scheduler.get_last_lr()),
            "clips_per_second": speed,
            "data_share": lap["data"] / lap["elapsed"],
            "step_s": lap["elapsed"] / steps,
            **{f"{part}_s": lap[part] / steps for part in PARTS},
            "mfu": speed / self.settings.peak_clips_per_second,
            "memory_gb": peak_memory(self.world.device),
            "bad_steps": self.bad_steps,
        }


def check_schedule(scheduler: LambdaLR, state: dict[str, Any], folder: RunFolder) -> None:
    """Raise UsageError where a checkpoint has other learning rates than its step now has.

    The schedule depends on the length of the training list, which checkpoints of older versions do not record.
    """
    factors = [factor(state["step"]) for factor in scheduler.lr_lambdas]
    bases = np.array(scheduler.base_lrs, dtype=float)
    then, now = np.array(state["scheduler"]["_last_lr"]), bases * factors
    if not np.allclose(then, now, rtol=1e-6, atol=1e-9 * bases.max()):
        raise UsageError(
            f"{folder.checkpoints}: step {state['step']} was at a learning rate of {then.max():.4g}, which is now "
            f"{now.max():.4g}: the training list had another length. Put it back, or {folder.way_on()}"
        )


def build_trainer(run: OpenRun) -> Trainer:
    """Return a trainer at step 0 of the run's model: on the device, frozen, compiled, sharded or replicated."""
    cfg, world = run.cfg, run.world
    set_precision(world.device, cfg.PRECISION)
    columns = run.label_columns
    loader = build_train_loader(cfg, world, run.videos["train"], columns)
    val_loader = None
    if "val" in run.videos:
        val_loader = build_test_loader(cfg, world, run.videos["val"], "val", label_columns=columns)
    model, sharded = run.model, world.size > 1 and cfg.PARALLEL.STRATEGY == "fsdp"
    eval_model = copy.deepcopy(model) if sharded else None
    model.to(world.device)
    freeze(model, cfg.TRAIN.FREEZE)
    ema_model = average_weights(model, cfg.TRAIN.EMA) if cfg.TRAIN.EMA > 0 else None
    parallel.compile_model(model, cfg.COMPILE)
    if sharded:
        parallel.shard(model)
        if ema_model is not None:
            parallel.shard(ema_model.module)
    wrapped = parallel.replicate(model, world) if world.size > 1 and not sharded else model
    steps_per_epoch = len(loader) // cfg.TRAIN.ACCUMULATE
    total = min(cfg.TRAIN.EPOCHS * steps_per_epoch, cfg.TRAIN.MAX_STEPS or sys.maxsize)
    optimizer = build_optimizer(cfg, model)
    settings = build_train_settings(run)
    setup = {
        "processes": world.size,
        "strategy": cfg.PARALLEL.STRATEGY,
        "accumulation": cfg.TRAIN.ACCUMULATE,
        "compile": cfg.COMPILE,
        "device": world.device.type,
        # A run that continues keeps these: see open_run.
        "batch": cfg.TRAIN.BATCH_SIZE,
        "sampling": cfg.DATA.SAMPLING,
        "multi_label": run.multi_label,
        "classes": run.classes,
        "lists": run.lists,
        "settings": flatten(run.folder.settings),
        "header": header(model, run.classes, run.views, run.multi_label),  # as in files of weights
    }
    scheduler = build_scheduler(cfg, optimizer, steps_per_epoch, total)
    if run.state is not None:
        check_schedule(scheduler, run.state, run.folder)
    return Trainer(
        model, wrapped, optimizer, scheduler, loader, world, settings, total, setup, ema_model, eval_model, val_loader
    )
