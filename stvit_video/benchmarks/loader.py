"""The benchmark of the loader: each step from files to batches alone, all of them together, and another library."""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from fractions import Fraction
from functools import partial
from itertools import cycle, islice
from statistics import median
from typing import Any

import decord
import numpy as np
import torch
import torchvision.transforms._functional_tensor as functional_tensor
from fvcore.common.config import CfgNode
from torch.utils.data import DataLoader, RandomSampler
from torchvision.transforms import v2

from stvit_video.benchmarks.rounds import Figures, build_loader, measure_steps, open_benchmark, timed
from stvit_video.common.errors import UsageError
from stvit_video.data.dataset import Batch, Sample, SampleKey, collate
from stvit_video.data.decode.frames import Decoding, FrameRequest, open_video, read_file
from stvit_video.data.decode.readers import to_numpy
from stvit_video.data.decode.types import DecodeError, Frames, Indices
from stvit_video.data.loader import shorten

BATCH = 8  # videos: with fewer batches the first one, which nothing overlaps with, would count too much


def bare_decord(path: str, indices: Indices) -> Frames:
    """Open, decode and convert with decord alone: the reference."""
    return to_numpy(decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1).get_batch(indices))


def build_timers(cfg: CfgNode, count: int, peers: Sequence[str], training: bool) -> dict[str, Callable[[], float]]:
    """Return timers per training clip, or per test video, the reference first. Raises UsageError as training would.

    A round reads ``count`` of them, in small batches.
    """
    repeats = cfg.DATA.REPEATS if training else 1
    sizes = {"TRAIN.BATCH_SIZE": BATCH * repeats, "TRAIN.ACCUMULATE": 1, "TEST.BATCH_SIZE": BATCH}
    run = open_benchmark(cfg, sizes, "cpu")
    dataset: Any = build_loader(run, 0, training).dataset
    requests: dict[FrameRequest, Indices] = {}  # those that decord can answer, with the frames that each asks for
    for i in range(min(len(dataset), -(-count // repeats))):
        request = dataset.request(SampleKey(0, i) if training else i)
        try:
            with closing(open_video(request.path, decoder="decord")) as reader:
                requests[request] = np.unique(request.choice(reader))
            bare_decord(request.path, requests[request])
        except (DecodeError, RuntimeError, decord.DECORDError):
            requests.pop(request, None)
    if not requests:
        raise UsageError("decord, which is the reference, can read none of the videos; give DATA.ROOT others.")
    decoding, views = Decoding(("pyav", "decord"), 600.0), dataset.views
    frames = read_file(next(iter(requests)))
    sample, some = Sample(views.prepare(frames, (0, 0, 0)), 0, 0, (0, 0, 0), []), range(min(len(requests), 8))

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
        loader = build_loader(run, workers, training)
        shorten(loader, -(-count // (BATCH * repeats)))
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
    labelled = [(path, {"label": 0}) for path in islice(cycle(paths), clips)]
    dataset = LabeledVideoDataset(
        labelled, make_clip_sampler("random", seconds), RandomSampler, ApplyTransformToKey("video", steps),
        decode_audio=False, decoder="decord",
    )  # fmt: skip
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
