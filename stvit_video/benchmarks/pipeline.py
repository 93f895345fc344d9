"""How fast the parts of a run are: the loader, the way from files to logits and to weights, and the training loop."""

import contextlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from statistics import median
from types import SimpleNamespace
from typing import Any

import decord
import numpy as np
import torch
import torchvision.transforms._functional_tensor as functional_tensor
from fvcore.common.config import CfgNode
from torch.utils.data import DataLoader, RandomSampler
from torchvision.transforms import v2

from stvit_video.benchmarks.rounds import (
    Figures,
    describe_conditions,
    measure_steps,
    min_to_max,
    run_rounds,
    timed,
    train_step,
)
from stvit_video.common.errors import Stopped, UsageError
from stvit_video.common.tables import format_table, three_digits
from stvit_video.config.load import override
from stvit_video.data.dataset import Batch, Sample, SampleKey, collate
from stvit_video.data.decode.frames import Decoding, FrameRequest, open_video, read_file
from stvit_video.data.decode.readers import to_numpy
from stvit_video.data.decode.types import DecodeError, Frames, Indices
from stvit_video.data.loader import build_test_loader, build_train_loader, shorten
from stvit_video.data.workers import Loader
from stvit_video.runs.folder import RunFolder
from stvit_video.runs.preflight import OpenRun, open_run
from stvit_video.runtime.parallel import compile_model
from stvit_video.runtime.precision import autocast, set_precision
from stvit_video.runtime.stopping import StopSignals
from stvit_video.runtime.world import World, pick_device
from stvit_video.training.loop import open_records, run_epochs
from stvit_video.training.trainer import build_trainer

BATCH = 8  # training clips of a batch of the loader; a test video, of many views, is one alone
WORKERS = (1, 2, 4)  # from files to logits
MIN_BATCHES = 8  # per round, from files to logits
PLAIN_TRAINING = {"TRAIN.ACCUMULATE": 1, "TRAIN.MIXUP": 0.0, "TRAIN.CUTMIX": 0.0}  # as ``train_step``
# Of the engine: only what the bare loop does too.
ONE_EPOCH = {"TRAIN.EPOCHS": 1, "TRAIN.EMA": 0.0, "LOG.WANDB": ""}
NO_CHECKPOINTS = {"CHECKPOINT.EVERY_STEPS": 0, "CHECKPOINT.EVERY_MINUTES": 0.0}


def open_benchmark(cfg: CfgNode, changes: Mapping[str, Any], device: str) -> OpenRun:
    """Open a training run of this process alone, with ``changes``. Raises UsageError for files that are missing."""
    cfg = override(cfg, {"MODE": "train", **changes}.items(), "a benchmark")
    run = open_run(cfg, World(0, 1, pick_device(device, 0, 1)), "measure")
    assert run is not None, "nothing is finished where OUTPUT_DIR is not read"
    return run


def build_loader(run: OpenRun, workers: int, training: bool, batches: int) -> Loader:
    """Return a loader of ``batches`` of training clips, or of test videos, with that many workers."""
    cfg = override(run.cfg, [("DATA.WORKERS", workers)], "a benchmark")
    if training:
        loader = build_train_loader(cfg, run.world, run.videos["train"], run.label_columns)
    else:
        views = {"clips": cfg.TEST.CLIPS, "crops": cfg.TEST.CROPS}
        loader = build_test_loader(cfg, run.world, run.videos["test"], **views, label_columns=run.label_columns)
    shorten(loader, batches)
    return loader


def bare_decord(path: str, indices: Indices) -> Frames:
    """Open, decode and convert with decord alone: the reference."""
    return to_numpy(decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1).get_batch(indices))


def build_timers(cfg: CfgNode, count: int, peers: Sequence[str], training: bool) -> dict[str, Callable[[], float]]:
    """Return timers per training clip, or per test video, the reference first; a round reads ``count`` of them."""
    repeats = cfg.DATA.REPEATS if training else 1
    sizes = {"TRAIN.BATCH_SIZE": BATCH * repeats, "TRAIN.ACCUMULATE": 1, "TEST.BATCH_SIZE": 1}
    run = open_benchmark(cfg, sizes, "cpu")
    batches = -(-count // (BATCH * repeats)) if training else count
    dataset: Any = build_loader(run, 0, training, batches).dataset
    requests: dict[FrameRequest, Indices] = {}  # those that decord can answer, with the frames that each asks for
    for i in range(min(len(dataset), -(-count // repeats))):
        request = dataset.request(SampleKey(0, i) if training else i)
        try:
            with contextlib.closing(open_video(request.path, decoder="decord")) as reader:
                requests[request] = np.unique(request.choice(reader))
            bare_decord(request.path, requests[request])
        except (DecodeError, RuntimeError, decord.DECORDError):
            requests.pop(request, None)
    if not requests:
        raise UsageError("decord, which is the reference, can read none of the videos; give DATA.ROOT others.")
    decoding, views = Decoding("pyav", 600.0), dataset.views
    frames = read_file(next(iter(requests)))
    sample = Sample(views.prepare(frames, (0, 0, 0)), 0, 0, (0, 0, 0), [])
    some = range(min(len(requests), 8))

    def make_floats(batch: Batch) -> int:
        clips = batch.make_clips()
        return len(clips) if training else len(batch.labels)

    works: dict[str, Callable[[], Iterable[Any]]] = {
        "decord, bare": lambda: (bare_decord(request.path, indices) for request, indices in requests.items()),
        "decode": lambda: map(read_file, requests),
        "decode in its process": lambda: decoding.read_all(requests),
        "crop and augment": lambda: (views.prepare(frames, (0, 0, i)) for i in some),
        "bytes to floats": lambda: (collate([sample], views).make_clips() for _ in some),
    }
    timers = {name: timed(work, lambda _: repeats) for name, work in works.items()}
    for workers in sorted({1, cfg.DATA.WORKERS}):
        loader = build_loader(run, workers, training, batches)
        timers[f"loader, {workers} worker(s)"] = timed(partial(iter, loader), make_floats)
    if "pytorchvideo" in peers:
        peer = _build_peer_loader(cfg, [request.path for request in requests], -(-count // BATCH) * BATCH)
        timers["pytorchvideo, 1 worker"] = timed(partial(iter, peer), lambda batch: len(batch["video"]))
    return timers


def _build_peer_loader(cfg: CfgNode, paths: list[str], clips: int) -> DataLoader:
    """Return a loader of PyTorchVideo's own dataset with the same clips, crops and normalisation, in one worker."""
    # PyTorchVideo 0.1.5 imports a module that torchvision has since renamed.
    sys.modules.setdefault("torchvision.transforms.functional_tensor", functional_tensor)
    from pytorchvideo.data import LabeledVideoDataset, make_clip_sampler
    from pytorchvideo.transforms import ApplyTransformToKey, RandomShortSideScale, UniformTemporalSubsample

    times = open_video(paths[0]).times()
    seconds = cfg.DATA.FRAMES * cfg.DATA.STRIDE * times[-1] / max(1, len(times) - 1)
    normalise = v2.Normalize(list(cfg.DATA.MEAN), list(cfg.DATA.STD))
    steps = v2.Compose([
        UniformTemporalSubsample(cfg.DATA.FRAMES),
        v2.Lambda(lambda clip: clip / 255.0),
        v2.Lambda(lambda clip: normalise(clip.transpose(0, 1)).transpose(0, 1)),
        RandomShortSideScale(*cfg.DATA.SHORT_SIDE),
        v2.RandomCrop(cfg.DATA.SIZE),
        *([v2.RandomHorizontalFlip()] if cfg.DATA.FLIP else []),
    ])  # fmt: skip
    labelled = [(path, {"label": 0}) for path in islice(cycle(paths), clips)]
    chosen = make_clip_sampler("random", seconds)
    transform = ApplyTransformToKey("video", steps)
    dataset = LabeledVideoDataset(labelled, chosen, RandomSampler, transform, decode_audio=False, decoder="decord")
    return DataLoader(dataset, batch_size=BATCH, num_workers=1, persistent_workers=True)


def advise(steps: Sequence[Figures], workers: int, cores: int, short_side: int) -> str:
    """Return what bounds the training loader here, and what to change."""
    times = {step["name"]: median(step["milliseconds"]) for step in steps}
    decode, transform, floats = times["decode"], times["crop and augment"], times["bytes to floats"]
    transfer = max(0.0, times["decode in its process"] - decode)
    work = decode + transfer + transform + floats
    shares = [100 * part / work for part in (decode, transfer, transform, floats)]
    cost = (
        "a clip costs {:.0f} ms of one core: {:.0f} % decoding, {:.0f} % transfer of frames between processes, "
        "{:.0f} % crop and augmentation, {:.0f} % floats, which are made where the model is".format(work, *shares)
    )
    busy = work / times[f"loader, {workers} worker(s)"]
    if busy > 0.75 * cores:
        bound = (
            f"bound by the {cores} cores ({busy:.1f} busy): more cores, or smaller files (short side near "
            f"{short_side}, key frames every second or so) and DATA.REPEATS 2"
        )
    elif transform > decode:
        bound = "bound by the transforms: DATA.TRANSFORM_ON device, or fewer DATA.RAND_AUGMENT_LAYERS"
    else:
        bound = f"bound by {workers} worker(s) ({busy:.1f} of {cores} cores busy): raise DATA.WORKERS"
    return f"{cost}\n{bound}"


def build_loader_figures(cfg: CfgNode, clips: int, rounds: int, peers: Sequence[str]) -> Figures:
    """Time each step of loading training clips and test videos, print the tables and return the figures."""
    torch.set_num_threads(1)  # as in a worker, and so that no step uses the core of another
    shape = f"{cfg.DATA.FRAMES} frames of {cfg.DATA.SIZE}x{cfg.DATA.SIZE}"
    train = measure_steps(f"training: clips of {shape}", "clip", build_timers(cfg, clips, peers, True), rounds)
    timers = build_timers(cfg, max(1, clips // cfg.TEST.CLIPS), [], False)
    test = measure_steps(f"test: {cfg.TEST.CLIPS} x {cfg.TEST.CROPS} views of {shape}", "video", timers, rounds)
    advice = advise(train, cfg.DATA.WORKERS, len(os.sched_getaffinity(0)), cfg.DATA.SHORT_SIDE[0])
    print(advice, flush=True)
    return {"train": train, "test": test, "advice": advice}


def run_through(batches: Iterable[Any], work: Callable[[Any], int]) -> tuple[float, float]:
    """Work on all batches; return clips per second and the share of time spent waiting.

    From the second batch on: the workers load the first one while nothing is computed.
    """
    iterator = iter(batches)
    work(next(iterator))
    done, waited = 0, 0.0
    started = worked = time.perf_counter()
    for batch in iterator:
        waited += time.perf_counter() - worked
        done += work(batch)
        worked = time.perf_counter()
    return done / (worked - started), waited / (worked - started)


def build_end_to_end_figures(cfg: CfgNode, clips: int, rounds: int) -> Figures:
    """Time inference on the test list and training on the training list with each number of workers, in turn.

    Compiling, as COMPILE says, and starting the workers fall in a first round that is not counted.
    """
    run = open_benchmark(cfg, PLAIN_TRAINING, cfg.DEVICE)
    device = run.world.device
    model = run.model.to(run.world.device)
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
        training = what == "training"
        stage = "TRAIN" if training else "TEST"
        size = cfg[stage].BATCH_SIZE
        views = 1 if training else cfg.TEST.CLIPS * cfg.TEST.CROPS
        batches = 1 + max(MIN_BATCHES, -(-clips // (size * views)))  # the first one is not timed
        loaders = [build_loader(run, workers, training, batches) for workers in WORKERS]
        if len(loaders[0]) <= MIN_BATCHES:
            given = f"{len(loaders[0])} of {1 + MIN_BATCHES} batches"
            raise UsageError(f"The list gives {given} that are needed; lower {stage}.BATCH_SIZE {size}.")
        model.train(training)
        measured = run_rounds([partial(run_through, loader, work) for loader in loaders], rounds)
        for workers, found in zip(WORKERS, measured, strict=True):
            rates, waiting = map(list, zip(*found, strict=True))
            flows.append({"what": what, "workers": workers, "clips_per_second": rates, "waiting": waiting})
            rows.append((what, workers, f"{median(rates):.1f}", min_to_max(rates), f"{100 * median(waiting):.0f} %"))
    shape = f"{cfg.DATA.FRAMES} frames of {cfg.DATA.SIZE}x{cfg.DATA.SIZE}"
    conditions = {"device": device.type, "precision": cfg.PRECISION, "compiled": cfg.COMPILE}
    cost = f"{three_digits(run.cost.gflops)} GFLOPs a clip"
    how = describe_conditions(conditions)
    print(f"{cfg.MODEL.NAME}, {cost}, {device.type}, {how}: from video files, clips of {shape}")
    print(format_table(("", "workers", "clips/s", "min to max", "waits for data"), rows), flush=True)
    return {"model": cfg.MODEL.NAME, "gflops": run.cost.gflops, **conditions, "flows": flows}


class HeldBatches(list[Batch]):
    """A loader whose batches are in memory: decoding, whose time varies, is not measured."""

    batch_sampler = SimpleNamespace(load_state_dict=lambda state: None)
    dataset: Any

    def batches(self, stop: Callable[[], bool]) -> Iterator[Batch]:
        return iter(self)


def build_engine_figures(cfg: CfgNode, steps: int, rounds: int) -> Figures:
    """Time steps of a bare loop, which comes first, and of the engine; print the table and return the figures."""
    changes = {**PLAIN_TRAINING, **ONE_EPOCH, **NO_CHECKPOINTS, "TRAIN.MAX_STEPS": steps}
    run = open_benchmark(cfg, changes, cfg.DEVICE)
    run.videos.pop("val", None)  # no validation after the epoch
    trainer = build_trainer(run)
    settings = trainer.settings
    if settings.clip_grad <= 0 or trainer.scaler.is_enabled():
        raise UsageError("The engine is timed with OPTIM.CLIP_GRAD above 0 and PRECISION fp32, tf32 or bf16; set them.")
    batches = HeldBatches(islice(trainer.loader, steps))
    batches.dataset = trainer.loader.dataset
    trainer.loader = batches  # type: ignore[assignment]

    def bare_loop() -> Iterator[int]:
        model = trainer.wrapped.train()
        optimizer = trainer.optimizer
        precision = settings.precision
        options = {"clip": settings.clip_grad, "label_smoothing": settings.label_smoothing}
        for batch in batches:
            batch = batch.to(trainer.world.device)
            clips = batch.make_clips()
            labels = batch.clip_labels
            loss = train_step(model, optimizer, clips, labels, precision, **options)
            trainer.scheduler.step()
            loss.item()
            yield 1

    def engine_loop() -> Iterator[int]:
        """Train an epoch as a run does: logs, guards, stop signals and the checkpoint at its end included."""
        trainer.epoch = trainer.step = 0
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            run.folder = RunFolder(folder)
            run.folder.checkpoints.mkdir()
            try:
                with StopSignals(launched=False) as signals, open_records(run, 0) as (log, writer):
                    run_epochs(run, trainer, log, writer, signals)
            except Stopped as stopped:  # there is nothing to continue
                raise KeyboardInterrupt from stopped
        yield trainer.step

    timers = {"bare loop": timed(bare_loop, int), "engine": timed(engine_loop, int)}
    clips = f"{cfg.TRAIN.BATCH_SIZE} clips of {three_digits(run.cost.gflops)} GFLOPs held in memory"
    measured = measure_steps(f"training steps of {clips}", "step", timers, rounds)
    speed = 1 / measured[1]["ratio"]
    print(f"the engine takes {speed:.3f} of the bare loop's steps per second, checkpoint and logs included", flush=True)
    return {"engine": measured, "speed": speed}
