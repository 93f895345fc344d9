"""From video files to logits, and to trained weights: clips per second, and the share of time that waits for data."""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch.utils.data import DataLoader

from stvit_video.benchmarks.models import build_conditions
from stvit_video.benchmarks.rounds import PLAIN_TRAINING, build_loader, min_to_max, open_benchmark, train_step
from stvit_video.common.errors import UsageError
from stvit_video.common.tables import format_table
from stvit_video.data.dataset import Batch
from stvit_video.data.loader import shorten
from stvit_video.runs.preflight import OpenRun
from stvit_video.runtime.parallel import compile_model
from stvit_video.runtime.precision import autocast, set_precision

WORKERS = (1, 2, 4)
MIN_BATCHES = 8  # per round


@dataclass(frozen=True)
class Flow:
    """The figures of a number of workers, round by round."""

    what: str  # training or inference
    workers: int
    clips_per_second: list[float] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)  # share of the time spent waiting for data


def run_through(batches: Iterable[Any], work: Callable[[Any], int]) -> tuple[float, float]:
    """Work on all batches; return clips per second and the share of time spent waiting.

    From the second batch on: the workers load the first one while nothing is computed.
    """
    iterator = iter(batches)
    work(next(iterator))
    done, waited, started = 0, 0.0, time.perf_counter()
    while True:
        before = time.perf_counter()
        batch = next(iterator, None)
        waited += time.perf_counter() - before
        if batch is None:
            break
        done += work(batch)
    seconds = time.perf_counter() - started
    return done / seconds, waited / seconds


def build_flows(cfg: CfgNode, clips: int, rounds: int) -> list[Flow]:
    """Time inference on the test list and training on the training list with each number of workers, in turn.

    The model is compiled as COMPILE says. Compiling and starting the workers fall in a first round that is not counted.
    """
    run = open_benchmark(cfg, PLAIN_TRAINING, cfg.DEVICE)
    device = run.world.device
    set_precision(device, cfg.PRECISION)
    model = run.model.to(device)
    compile_model(model, cfg.COMPILE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    # Both wait for their result, so that a GPU's remaining work is not counted as waiting for data.
    def train(batch: Batch) -> int:
        batch = batch.to(device)
        clips = batch.make_clips()
        train_step(model, optimizer, clips, batch.clip_labels, cfg.PRECISION).item()
        return len(clips)

    def infer(batch: Batch) -> int:
        clips = batch.to(device).make_clips()
        with torch.inference_mode(), autocast(device, cfg.PRECISION):
            model(clips).float().cpu()
        return len(clips)

    flows = []
    for what, work in (("inference", infer), ("training", train)):
        loaders = [_build_loader(run, what == "training", workers, clips) for workers in WORKERS]
        found = [Flow(what, workers) for workers in WORKERS]
        model.train(what == "training")
        for number in range(rounds + 1):
            for flow, loader in zip(found, loaders, strict=True):
                rate, waiting = run_through(loader, work)
                if number:
                    flow.clips_per_second.append(rate)
                    flow.waiting.append(waiting)
        flows += found
    return flows


def _build_loader(run: OpenRun, training: bool, workers: int, clips: int) -> DataLoader:
    """Return a loader of that many clips, or of MIN_BATCHES where that is more, and one batch before them."""
    loader, cfg = build_loader(run, workers, training), run.cfg
    key, size = ("TRAIN.BATCH_SIZE", cfg.TRAIN.BATCH_SIZE) if training else ("TEST.BATCH_SIZE", cfg.TEST.BATCH_SIZE)
    clips_each = size if training else size * cfg.TEST.CLIPS * cfg.TEST.CROPS
    shorten(loader, 1 + max(MIN_BATCHES, -(-clips // clips_each)))
    if len(loader) < 1 + MIN_BATCHES:
        raise UsageError(f"The list gives {len(loader)} batches, and {1 + MIN_BATCHES} are needed; lower {key} {size}.")
    return loader


def build_end_to_end_figures(cfg: CfgNode, clips: int, rounds: int) -> dict[str, Any]:
    """Time files to logits and training with 1, 2 and 4 workers, print the table and return the figures."""
    conditions = build_conditions(cfg, False, cfg.TEST.BATCH_SIZE)
    flows = build_flows(cfg, clips, rounds)
    shape = f"{cfg.DATA.FRAMES} frames of {cfg.DATA.SIZE}x{cfg.DATA.SIZE}"
    print(f"{cfg.MODEL.NAME}, {conditions.device.type}, {conditions}: from video files, clips of {shape}")
    rows = []
    for flow in flows:
        rates, waiting = flow.clips_per_second, f"{100 * median(flow.waiting):.0f} %"
        rows.append((flow.what, flow.workers, f"{median(rates):.1f}", min_to_max(rates), waiting))
    print(format_table(("", "workers", "clips/s", "min to max", "waits for data"), rows), flush=True)
    return {"model": cfg.MODEL.NAME, **conditions.figures, "flows": [asdict(flow) for flow in flows]}
