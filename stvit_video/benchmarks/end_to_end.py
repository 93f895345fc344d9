"""From video files to logits, and to trained weights: clips per second, and the share of time that waits for data."""

import time
from collections.abc import Callable, Iterable
from functools import partial
from statistics import median
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch.utils.data import DataLoader

from stvit_video.benchmarks.rounds import (
    COMPILED,
    PLAIN_TRAINING,
    Figures,
    build_loader,
    min_to_max,
    open_benchmark,
    run_rounds,
    train_step,
)
from stvit_video.common.errors import UsageError
from stvit_video.common.tables import format_table
from stvit_video.data.dataset import Batch
from stvit_video.data.loader import shorten
from stvit_video.runs.preflight import OpenRun
from stvit_video.runtime.parallel import compile_model
from stvit_video.runtime.precision import autocast, set_precision

WORKERS = (1, 2, 4)
MIN_BATCHES = 8  # per round


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


def build_end_to_end_figures(cfg: CfgNode, clips: int, rounds: int) -> Figures:
    """Time inference on the test list and training on the training list with each number of workers, in turn.

    Compiling, as COMPILE says, and starting the workers fall in a first round that is not counted.
    """
    run = open_benchmark(cfg, PLAIN_TRAINING, cfg.DEVICE)
    device, model = run.world.device, run.model.to(run.world.device)
    set_precision(device, cfg.PRECISION)
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

    flows, rows = [], []
    for what, work in (("inference", infer), ("training", train)):
        model.train(what == "training")
        loaders = [_build_loader(run, what == "training", workers, clips) for workers in WORKERS]
        measured = run_rounds([partial(run_through, loader, work) for loader in loaders], rounds)
        for workers, found in zip(WORKERS, measured, strict=True):
            rates, waiting = map(list, zip(*found, strict=True))
            flows.append({"what": what, "workers": workers, "clips_per_second": rates, "waiting": waiting})
            rows.append((what, workers, f"{median(rates):.1f}", min_to_max(rates), f"{100 * median(waiting):.0f} %"))
    shape = f"{cfg.DATA.FRAMES} frames of {cfg.DATA.SIZE}x{cfg.DATA.SIZE}"
    how = f"{device.type}, {cfg.PRECISION}, {COMPILED[cfg.COMPILE]}"
    print(f"{cfg.MODEL.NAME}, {how}: from video files, clips of {shape}")
    print(format_table(("", "workers", "clips/s", "min to max", "waits for data"), rows), flush=True)
    conditions = {"device": device.type, "precision": cfg.PRECISION, "compiled": cfg.COMPILE}
    return {"model": cfg.MODEL.NAME, **conditions, "flows": flows}


def _build_loader(run: OpenRun, training: bool, workers: int, clips: int) -> DataLoader:
    """Return a loader of that many clips, or of MIN_BATCHES where that is more, and one batch before them."""
    loader, cfg = build_loader(run, workers, training), run.cfg
    key, size = ("TRAIN.BATCH_SIZE", cfg.TRAIN.BATCH_SIZE) if training else ("TEST.BATCH_SIZE", cfg.TEST.BATCH_SIZE)
    clips_each = size if training else size * cfg.TEST.CLIPS * cfg.TEST.CROPS
    shorten(loader, 1 + max(MIN_BATCHES, -(-clips // clips_each)))
    if len(loader) < 1 + MIN_BATCHES:
        raise UsageError(f"The list gives {len(loader)} batches, and {1 + MIN_BATCHES} are needed; lower {key} {size}.")
    return loader
