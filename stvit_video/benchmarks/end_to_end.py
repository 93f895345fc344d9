"""From video files to logits, and to trained weights: clips a second, and the share of time that waits for data."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stvit_video.common.errors import UsageError
from stvit_video.config.schema import value_of
from stvit_video.data.loader import build_test_loader, build_train_loader, shorten
from stvit_video.runs.preflight import OpenRun, open_run
from stvit_video.runtime.join import pick_device
from stvit_video.runtime.parallel import compile_model
from stvit_video.runtime.precision import autocast, set_precision
from stvit_video.runtime.world import World

WORKERS = (1, 2, 4)
LEAST = 8  # batches a round


@dataclass(frozen=True)
class Flow:
    """A number of workers: clips a second and the share of the time spent waiting for data, round by round."""

    what: str
    workers: int
    clips_per_second: list[float]
    waiting: list[float]


def run_through(batches: Iterable[Any], work: Callable[[Any], int]) -> tuple[float, float]:
    """Work on all batches; return clips a second and the share of time spent waiting.

    From the second batch on: before the first one the workers have nothing to work beside.
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


def build_work(cfg: CfgNode, model: nn.Module, device: torch.device, training: bool) -> Callable[[Any], int]:
    """Return what is done with a batch, a training step or the logits of all views; it returns the clips it saw."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5) if training else None

    def train(batch: Any) -> int:
        batch = batch.to(device)
        clips = batch.make_clips()
        with autocast(device, cfg.PRECISION):
            logits = model(clips)
        loss = F.cross_entropy(logits.float(), batch.clip_labels)
        loss.backward()
        assert optimizer is not None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # the step is waited for: what a GPU has still to do is no waiting for data
        return len(clips)

    def infer(batch: Any) -> int:
        clips: Tensor = batch.to(device).make_clips()
        with torch.inference_mode(), autocast(device, cfg.PRECISION):
            model(clips).float().cpu()  # the logits are waited for
        return len(clips)

    model.train(training)
    return train if training else infer


def measure_flow(cfg: CfgNode, clips: int, rounds: int) -> list[Flow]:
    """Time inference on the test list and training on the training list with each number of workers, in turn.

    The network is compiled as COMPILE says; that, and the workers' start, is in a first round that is not counted.
    """
    device = pick_device(cfg.DEVICE, 0, 1)
    set_precision(device, cfg.PRECISION)
    world = World(0, 1, device)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.TRAIN.ACCUMULATE, cfg.TRAIN.MIXUP, cfg.TRAIN.CUTMIX = 1, 0.0, 0.0
    run = open_run(cfg, world, "measure")
    assert run is not None, "nothing is finished where nothing is written"
    model = run.model.to(device)
    compile_model(model, cfg.COMPILE)
    flows = []
    for training in (False, True):
        work = build_work(cfg, model, device, training)
        loaders = {workers: _build_loader(run, training, workers, clips) for workers in WORKERS}
        found: dict[int, list[tuple[float, float]]] = {workers: [] for workers in WORKERS}
        for number in range(rounds + 1):
            for workers, loader in loaders.items():
                model.train(training)
                result = run_through(loader, work)
                if number:  # the first one starts the workers
                    found[workers].append(result)
        what = "training" if training else "inference"
        for workers, results in found.items():
            flows.append(Flow(what, workers, [rate for rate, _ in results], [share for _, share in results]))
    return flows


def _build_loader(run: OpenRun, training: bool, workers: int, clips: int) -> DataLoader:
    """Return a loader of so many clips or LEAST batches, whichever is more, and one batch before them."""
    cfg, world = run.cfg.clone(), run.world
    cfg.DATA.WORKERS = workers
    views = cfg.TEST.CLIPS * cfg.TEST.CROPS
    if training:
        loader = build_train_loader(cfg, world, run.videos["train"])
        size, key = cfg.TRAIN.BATCH_SIZE, "TRAIN.BATCH_SIZE"
    else:
        loader = build_test_loader(cfg, world, run.videos["test"], clips=cfg.TEST.CLIPS, crops=cfg.TEST.CROPS)
        size, key = cfg.TEST.BATCH_SIZE * views, "TEST.BATCH_SIZE"
    shorten(loader, 1 + max(LEAST, -(-clips // size)))
    if len(loader) < 1 + LEAST:
        raise UsageError(
            f"The list gives {len(loader)} batches, and {1 + LEAST} are needed; lower {key} {value_of(cfg, key)}."
        )
    return loader


def describe_flows(flows: Sequence[Flow]) -> Iterator[str]:
    """Yield the lines of a table."""
    yield f"{'':10} {'workers':>7}  {'clips/s':>8}  {'least to most':>18}  {'waits for data':>14}"
    for flow in flows:
        spread = f"{min(flow.clips_per_second):.1f} to {max(flow.clips_per_second):.1f}"
        rate, waits = median(flow.clips_per_second), 100 * median(flow.waiting)
        yield f"{flow.what:10} {flow.workers:7}  {rate:8.1f}  {spread:>18}  {waits:12.0f} %"


def figures_of_flows(flows: Sequence[Flow]) -> list[dict[str, Any]]:
    """Return what was measured as plain data."""
    return [asdict(flow) for flow in flows]
