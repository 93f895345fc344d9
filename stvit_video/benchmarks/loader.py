"""What the loader's benchmark times: each step from files to batches alone, the whole, and peers of it."""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from fractions import Fraction
from itertools import cycle, islice
from typing import Any

import decord
import numpy as np
import torch
import torchvision.transforms._functional_tensor as functional_tensor
from fvcore.common.config import CfgNode
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torchvision.transforms import v2

from stvit_video.benchmarks.rounds import Row, Timer, describe, interleave
from stvit_video.common.errors import UsageError
from stvit_video.data.dataset import Collate, Sample, SampleKey, TestDataset, TrainDataset
from stvit_video.data.decode.frames import FrameRequest, open_video, read_file
from stvit_video.data.decode.process import Decoding
from stvit_video.data.decode.readers import to_numpy
from stvit_video.data.decode.types import DecodeError, Frames, Indices
from stvit_video.data.loader import build_test_loader, build_train_loader, shorten
from stvit_video.runs.preflight import OpenRun, open_run
from stvit_video.runtime.world import World

BATCH = 8  # videos a batch: enough that its first one, which nothing is done beside, counts little


def timed(work: Callable[[], Iterable[object]], items: int) -> Timer:
    """Return a timer of ``work``, which yields what it makes of so many items; nothing of it is kept."""

    def run() -> float:
        started = time.perf_counter()
        deque(work(), maxlen=0)
        return (time.perf_counter() - started) / items

    return run


def bare_decord(path: str, indices: Indices) -> Frames:
    """Open, decode and convert as shortly as decord can: the reference."""
    return to_numpy(decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1).get_batch(indices))


def choose_readable(requests: Iterable[FrameRequest]) -> list[tuple[FrameRequest, Indices]]:
    """Return the requests that decord can answer, with the frames that each asks for."""
    chosen = []
    for request in requests:
        try:
            reader = open_video(request.path, decoder="decord")
            indices = request.choice(reader)
            reader.close()
            bare_decord(request.path, np.unique(indices))
        except (DecodeError, RuntimeError, decord.DECORDError):
            continue
        chosen.append((request, indices))
    if not chosen:
        raise UsageError("decord, which is the reference, can read none of the videos; give DATA.ROOT others.")
    return chosen


def step_timers(
    dataset: TrainDataset | TestDataset, chosen: list[tuple[FrameRequest, Indices]], items_each: int
) -> dict[str, Timer]:
    """Return timers of the steps before the loader; a request stands for ``items_each`` items."""
    decoding, views = Decoding(("pyav", "decord"), 600.0), dataset.views
    requests = [request for request, _ in chosen]
    items = len(requests) * items_each
    frames = read_file(requests[0])
    collate = Collate(views)
    sample = Sample(views.prepare(frames, (0, 0, 0)), 0, 0, (0, 0, 0), [])
    some = min(len(requests), 8)
    return {
        "decord, bare": timed(lambda: (bare_decord(r.path, np.unique(indices)) for r, indices in chosen), items),
        "decode": timed(lambda: map(read_file, requests), items),
        "decode in its process": timed(lambda: decoding.read_all(requests), items),
        "crop and augment": timed(lambda: (views.prepare(frames, (0, 0, i)) for i in range(some)), some * items_each),
        "bytes to floats": timed(lambda: (collate([sample]).make_clips() for _ in range(some)), some * items_each),
    }


def loader_timer(loader: DataLoader, batches: int) -> Timer:
    """Return a timer of the first batches of an epoch, floats included; its workers are started beforehand."""
    shorten(loader, batches)

    def run() -> float:
        started, done = time.perf_counter(), 0
        for batch in loader:
            done += len(batch.make_clips()) if isinstance(loader.dataset, TrainDataset) else len(batch.labels)
        return (time.perf_counter() - started) / max(1, done)

    return run


def _build_run(cfg: CfgNode) -> OpenRun:
    """Return a run of one process in small batches."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.TRAIN.BATCH_SIZE, cfg.TRAIN.ACCUMULATE = BATCH * cfg.DATA.REPEATS, 1
    cfg.TEST.BATCH_SIZE = BATCH
    run = open_run(cfg, World(0, 1, torch.device("cpu")), "measure")
    assert run is not None, "nothing is finished where nothing is written"
    return run


def _worker_counts(cfg: CfgNode) -> list[int]:
    return sorted({1, cfg.DATA.WORKERS})


def build_train_timers(cfg: CfgNode, clips: int, peers: Sequence[str]) -> dict[str, Timer]:
    """Return timers per training clip, the reference first. Raises UsageError as training would."""
    run = _build_run(cfg)
    cfg, world, found = run.cfg, run.world, run.videos["train"]
    dataset: Any = build_train_loader(cfg, world, found).dataset
    keys = [SampleKey(0, index) for index in range(min(len(dataset), -(-clips // cfg.DATA.REPEATS)))]
    chosen = choose_readable(dataset.request(key) for key in keys)
    timers = step_timers(dataset, chosen, cfg.DATA.REPEATS)
    for workers in _worker_counts(cfg):
        cfg.DATA.WORKERS = workers
        loader = build_train_loader(cfg, world, found)
        timers[f"loader, {workers} worker(s)"] = loader_timer(loader, -(-clips // cfg.TRAIN.BATCH_SIZE))
    if "pytorchvideo" in peers:
        paths = [request.path for request, _ in chosen]
        timers["pytorchvideo, 1 worker"] = _pytorchvideo_timer(cfg, paths, clips)
    return timers


def build_test_timers(cfg: CfgNode, videos: int) -> dict[str, Timer]:
    """Return timers per test video, the reference first."""
    run = _build_run(cfg)
    cfg, world, found = run.cfg, run.world, run.videos["test"]
    views = {"clips": cfg.TEST.CLIPS, "crops": cfg.TEST.CROPS}
    dataset: Any = build_test_loader(cfg, world, found, **views).dataset
    chosen = choose_readable(dataset.request(index) for index in range(min(len(dataset), videos)))
    timers = step_timers(dataset, chosen, 1)
    for workers in _worker_counts(cfg):
        cfg.DATA.WORKERS = workers
        loader = build_test_loader(cfg, world, found, **views)
        timers[f"loader, {workers} worker(s)"] = loader_timer(loader, -(-videos // BATCH))
    return timers


def _pytorchvideo_timer(cfg: CfgNode, paths: list[str], clips: int) -> Timer:
    """Return a timer of PyTorchVideo's own data set with the same clips, crops and normalisation, in one worker."""
    # PyTorchVideo 0.1.5 imports a module that torchvision has since renamed.
    sys.modules.setdefault("torchvision.transforms.functional_tensor", functional_tensor)
    from pytorchvideo.data import LabeledVideoDataset, make_clip_sampler
    from pytorchvideo.transforms import ApplyTransformToKey, RandomShortSideScale, UniformTemporalSubsample

    reader = open_video(paths[0])
    rate = (reader.length - 1) / max(reader.times()[-1], 1e-6)
    normalise = v2.Normalize(list(cfg.DATA.MEAN), list(cfg.DATA.STD))
    steps = v2.Compose([
        UniformTemporalSubsample(cfg.DATA.FRAMES),
        v2.Lambda(lambda clip: clip / 255.0),
        v2.Lambda(lambda clip: normalise(clip.transpose(0, 1)).transpose(0, 1)),
        RandomShortSideScale(*cfg.DATA.SHORT_SIDE),
        v2.RandomCrop(cfg.DATA.SIZE),
        *([v2.RandomHorizontalFlip()] if cfg.DATA.FLIP else []),
    ])  # fmt: skip
    seconds = Fraction(cfg.DATA.FRAMES * cfg.DATA.STRIDE) / Fraction(rate).limit_denominator(1001)
    labelled = [(path, {"label": 0}) for path in islice(cycle(paths), clips + BATCH)]
    dataset = LabeledVideoDataset(
        labelled, make_clip_sampler("random", seconds), RandomSampler, ApplyTransformToKey("video", steps),
        decode_audio=False, decoder="decord",
    )  # fmt: skip
    loader = DataLoader(dataset, batch_size=BATCH, num_workers=1, persistent_workers=True)

    def run() -> float:
        started, done = time.perf_counter(), 0
        for batch in loader:
            videos: Tensor = batch["video"]
            done += len(videos)
            if done >= clips:
                break
        return (time.perf_counter() - started) / done

    return run


def advise(cfg: CfgNode, train: list[Row], cores: int) -> str:
    """Return what bounds the training loader here, and what to change."""
    times = {row.name: row.median for row in train}
    decode, transform, floats = times["decode"], times["crop and augment"], times["bytes to floats"]
    handing_over = max(0.0, times["decode in its process"] - decode)
    workers = cfg.DATA.WORKERS
    full = times[f"loader, {workers} worker(s)"]
    parts = (decode, handing_over, transform, floats)
    work = sum(parts)
    lines = [
        "a clip costs {:.0f} ms of one core: {:.0f} % decoding, {:.0f} % handing frames over, {:.0f} % crop and "
        "augmentation, {:.0f} % floats, which are made where the model is".format(
            work, *(100 * p / work for p in parts)
        )
    ]
    busy = work / full
    if busy > 0.75 * cores:
        lines.append(
            f"bound by the {cores} cores ({busy:.1f} busy): more cores, or smaller files (short side near "
            f"{cfg.DATA.SHORT_SIDE[0]}, key frames every second or so) and DATA.REPEATS 2"
        )
    elif transform > decode:
        lines.append("bound by the transforms: DATA.TRANSFORM_ON device, or fewer DATA.RAND_AUGMENT_LAYERS")
    else:
        lines.append(f"bound by {workers} worker(s) ({busy:.1f} of {cores} cores busy): raise DATA.WORKERS")
    return "\n".join(lines)


def benchmark_loader(cfg: CfgNode, clips: int, rounds: int, peers: Sequence[str]) -> dict[str, Any]:
    """Time each step of loading training clips and test videos, print the tables and return the figures."""
    import torch

    torch.set_num_threads(1)  # as in a worker, and so that no step takes the core of another
    train = interleave(build_train_timers(cfg, clips, peers), rounds)
    shape = f"{cfg.DATA.FRAMES} frames of {cfg.DATA.SIZE}x{cfg.DATA.SIZE}"
    print(describe(f"training: clips of {shape}", "clip", train), flush=True)
    test = interleave(build_test_timers(cfg, max(1, clips // cfg.TEST.CLIPS)), rounds)
    print(describe(f"test: {cfg.TEST.CLIPS} x {cfg.TEST.CROPS} views of {shape}", "video", test))
    advice = advise(cfg, train, len(os.sched_getaffinity(0)))
    print(advice, flush=True)
    return {"train": [asdict(row) for row in train], "test": [asdict(row) for row in test], "advice": advice}
