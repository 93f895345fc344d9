"""What all benchmarks share: how they open a configuration, the training step that they time, interleaved rounds."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
COMPILED = {"none": "eager", "blocks": "blocks compiled", "model": "compiled"}  # COMPILE in words
Figures = dict[str, Any]  # what was measured, as a benchmark's --output holds it


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


def timed(work: Callable[[], Iterable[Any]], count: Callable[[Any], int]) -> Callable[[], float]:
    """Return a timer of ``work``: the seconds per item, of which each of its results holds ``count`` items."""

    def run() -> float:
        started = time.perf_counter()
        done = sum(map(count, work()))
        return (time.perf_counter() - started) / max(1, done)

    return run


def run_rounds(timers: Sequence[Callable[[], Any]], rounds: int, uncounted: int = 1) -> list[list[Any]]:
    """Run all timers in turn, round after round; return what each measured, without the first ``uncounted`` rounds."""
    measured = [[timer() for timer in timers] for _ in range(uncounted + rounds)]
    return [list(found) for found in zip(*measured[uncounted:], strict=True)]


def measure_steps(title: str, item: str, timers: Mapping[str, Callable[[], float]], rounds: int) -> list[Figures]:
    """Run timers of seconds per item in rounds, and print a table of medians and ranges below its title.

    Return the name of each step, its milliseconds in each round, and the ratio of its median to that of the first step.
    """
    steps, rows = [], []
    measured = run_rounds(list(timers.values()), rounds)
    for name, seconds in zip(timers, measured, strict=True):
        middle, milliseconds = median(seconds), [1000 * taken for taken in seconds]
        ratio = middle / median(measured[0])
        steps.append({"name": name, "milliseconds": milliseconds, "ratio": ratio})
        figures = f"{1000 * middle:.1f}", min_to_max(milliseconds), f"{1 / middle:.1f}", f"{ratio:.2f}"
        rows.append((name, *figures))
    headers = ("", f"ms per {item}", "min to max", f"{item}s/s", "ratio")
    print(f"{title}\n{format_table(headers, rows)}", flush=True)
    return steps


def min_to_max(values: Sequence[float], digits: int = 1) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"
