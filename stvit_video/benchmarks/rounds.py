"""What all benchmarks share: how they open a configuration, the training step that they time, interleaved rounds."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from stvit_video.common.tables import format_table
from stvit_video.config.load import override
from stvit_video.data.loader import build_test_loader, build_train_loader
from stvit_video.runs.preflight import OpenRun, open_run
from stvit_video.runtime.precision import autocast
from stvit_video.runtime.world import World, pick_device

PLAIN_TRAINING = {"TRAIN.ACCUMULATE": 1, "TRAIN.MIXUP": 0.0, "TRAIN.CUTMIX": 0.0}  # as ``train_step``
Timer = Callable[[], float]  # runs one round and returns seconds per item


@dataclass(frozen=True)
class TimedStep:
    """One measured step: the milliseconds per item in each round, and their median as a share of the first step's."""

    name: str
    milliseconds: list[float]
    ratio: float

    @property
    def median(self) -> float:
        return median(self.milliseconds)


def open_benchmark(cfg: CfgNode, changes: Mapping[str, Any], device: str) -> OpenRun:
    """Open a training run with ``changes`` to its configuration, of this process alone on ``device``.

    The data are generated where the configuration says so. Raises UsageError for files that are missing.
    """
    cfg = override(cfg, {"MODE": "train", **changes}.items(), "a benchmark")
    run = open_run(cfg, World(0, 1, pick_device(device, 0, 1)), "measure")
    assert run is not None, "nothing is finished where OUTPUT_DIR is not read"
    return run


def build_loader(run: OpenRun, workers: int, training: bool) -> DataLoader:
    """Return the loader of training clips, or of test videos, with that many workers."""
    cfg = override(run.cfg, [("DATA.WORKERS", workers)], "a benchmark")
    if training:
        return build_train_loader(cfg, run.world, run.videos["train"])
    return build_test_loader(cfg, run.world, run.videos["test"], clips=cfg.TEST.CLIPS, crops=cfg.TEST.CROPS)


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    clips: Tensor,
    labels: Tensor,
    precision: str,
    *,
    label_smoothing: float = 0.0,
    clip_grad: float = 0.0,
) -> Tensor:
    """Take a training step on clips (B, 3, T, H, W) with nothing else around it, and return its loss."""
    with autocast(clips.device, precision):
        logits = model(clips)
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
    loss.backward()
    if clip_grad:
        nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def timed(work: Callable[[], Iterable[object]], items: int) -> Timer:
    """Return a timer of ``work``, which yields its results for that many items; they are discarded."""

    def run() -> float:
        started = time.perf_counter()
        deque(work(), maxlen=0)
        return (time.perf_counter() - started) / items

    return run


def interleave(timers: Mapping[str, Timer], rounds: int) -> list[TimedStep]:
    """Run each timer once per round, after a round that is not counted; ratios are to the first one's median."""
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for number in range(rounds + 1):
        for name, timer in timers.items():
            taken = timer()
            if number:
                seconds[name].append(1000 * taken)
    reference = median(next(iter(seconds.values())))
    return [TimedStep(name, taken, median(taken) / reference) for name, taken in seconds.items()]


def describe(title: str, item: str, steps: Iterable[TimedStep]) -> str:
    """Return a table of medians and ranges below its title."""
    rows = []
    for step in steps:
        figures = f"{step.median:.1f}", min_to_max(step.milliseconds), f"{1000 / step.median:.1f}", f"{step.ratio:.2f}"
        rows.append((step.name, *figures))
    return f"{title}\n" + format_table(("", f"ms per {item}", "min to max", f"{item}s/s", "ratio"), rows)


def min_to_max(values: Iterable[float], digits: int = 1) -> str:
    values = list(values)
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"
