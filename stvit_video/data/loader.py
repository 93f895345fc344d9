"""Loaders from a configuration: which process reads which videos, in what order."""

from collections.abc import Iterator
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from torch.utils.data import DataLoader, Sampler

from stvit_video.data.annotations import (
    Video,
    check_files,
    check_labels,
    class_folders,
    read_classes,
    read_folder,
    read_list,
)
from stvit_video.data.dataset import SampleKey, TestDataset, TrainDataset, collate
from stvit_video.data.sampling import ClipSampler
from stvit_video.data.transforms import Normalise, TestTransform, TrainTransform
from stvit_video.distributed import World
from stvit_video.errors import UsageError


class EpochSampler(Sampler[list[SampleKey]]):
    """Batches of a shuffled epoch for one process. The order depends on seed and epoch alone.

    A step of ``step_size`` clips is the same set of videos for any number of processes and accumulated batches; a
    last incomplete one is left out. An epoch has ``accumulate`` batches a step.
    """

    def __init__(self, length: int, step_size: int, accumulate: int, rank: int, world: int, seed: int) -> None:
        self.length, self.step_size, self.accumulate = length, step_size, accumulate
        self.rank, self.world, self.seed = rank, world, seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.length // self.step_size * self.accumulate

    def __iter__(self) -> Iterator[list[SampleKey]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator).tolist()
        size = self.step_size // self.accumulate
        for i in range(len(self)):
            batch = order[i * size : (i + 1) * size]
            yield [SampleKey(self.epoch, index) for index in batch[self.rank :: self.world]]


class ShardedBatches(Sampler[list[int]]):
    """Consecutive batches of a list, dealt out to the processes in turn; no video twice, none left out.

    A batch holds the same videos for any number of processes, so their logits are the same too.
    """

    def __init__(self, length: int, batch: int, rank: int, world: int) -> None:
        starts = range(0, length, batch)
        self.batches = [list(range(start, min(start + batch, length))) for start in starts][rank::world]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def build_videos(cfg: CfgNode, split: str) -> list[Video]:
    """Return the videos of ``split`` (train, val, test); relative lists, folders and paths start from DATA.ROOT."""
    source = build_source(cfg, split)
    if source.is_dir() and cfg.DATA[f"{split.upper()}_LIST"]:
        return read_folder(source, _folder_classes(cfg, split))
    if not source.is_file():
        raise UsageError(
            f"DATA.{split.upper()}_LIST: {source} is missing; put lines `path label` there, or set DATA.ROOT and "
            f"DATA.{split.upper()}_LIST. To run without any data: --cfg configs/sample_stvit.yaml"
        )
    videos = read_list(source, cfg.DATA.ROOT)
    check_files(videos, cfg.DATA.MAX_FAILURES, source)
    return videos


def build_source(cfg: CfgNode, split: str) -> Path:
    """Return where the list of ``split`` is: a file, or a folder of class folders."""
    return Path(cfg.DATA.ROOT) / cfg.DATA[f"{split.upper()}_LIST"]


def build_classes(cfg: CfgNode) -> list[str]:
    """Return the class names: from DATA.CLASSES, else the names of class folders, else numbers.

    Folders and numbers are those of the training list, or of the test list where there is no training list; numbers
    go up to MODEL.NUM_CLASSES or the largest label.
    """
    names = _named_classes(cfg)
    if names is None:
        count = cfg.MODEL.NUM_CLASSES or max(video.label for video in build_videos(cfg, _naming_split(cfg))) + 1
        return [str(label) for label in range(count)]
    if cfg.MODEL.NUM_CLASSES not in (None, len(names)):
        origin = "DATA.CLASSES" if cfg.DATA.CLASSES else str(build_source(cfg, _naming_split(cfg)))
        raise UsageError(
            f"MODEL.NUM_CLASSES is {cfg.MODEL.NUM_CLASSES} but {origin} names {len(names)}; unset the first."
        )
    return names


def _naming_split(cfg: CfgNode) -> str:
    return "train" if cfg.DATA.TRAIN_LIST and build_source(cfg, "train").exists() else "test"


def _named_classes(cfg: CfgNode) -> list[str] | None:
    """Return the class names that a file or folders give; None where there are only numbers."""
    if cfg.DATA.CLASSES:
        return read_classes(Path(cfg.DATA.ROOT) / cfg.DATA.CLASSES)
    source = build_source(cfg, _naming_split(cfg))
    return class_folders(source) if source.is_dir() else None


def _folder_classes(cfg: CfgNode, split: str) -> list[str]:
    """Return the names that the class folders of ``split`` take their labels from: the same for every list."""
    names = _named_classes(cfg)
    if names is None:
        raise UsageError(
            f"DATA.{split.upper()}_LIST {build_source(cfg, split)} is a folder, but the labels of "
            f"{build_source(cfg, _naming_split(cfg))} have no names; give DATA.CLASSES, the names in their order."
        )
    return names


def build_train_loader(cfg: CfgNode, world: World, num_classes: int) -> DataLoader:
    """Return the training loader; its ``batch_sampler`` is an EpochSampler of micro-batches."""
    videos = build_videos(cfg, "train")
    check_labels(videos, num_classes, cfg.DATA.TRAIN_LIST)
    per_step = world.size * cfg.TRAIN.ACCUMULATE
    if cfg.TRAIN.BATCH_SIZE % per_step:
        raise UsageError(
            f"TRAIN.BATCH_SIZE {cfg.TRAIN.BATCH_SIZE} does not divide by {world.size} processes x TRAIN.ACCUMULATE "
            f"{cfg.TRAIN.ACCUMULATE}; choose a multiple of {per_step}."
        )
    if len(videos) < cfg.TRAIN.BATCH_SIZE:
        raise UsageError(
            f"TRAIN.BATCH_SIZE {cfg.TRAIN.BATCH_SIZE} exceeds the {len(videos)} videos of the training list; lower it."
        )
    area = tuple(cfg.DATA.CROP_AREA) if cfg.DATA.CROP == "random_resized" else None
    transform = TrainTransform(
        size=cfg.DATA.SIZE,
        normalise=_build_normalise(cfg),
        short_side=tuple(cfg.DATA.SHORT_SIDE),
        area=area,
        ratio=tuple(cfg.DATA.CROP_RATIO),
        flip=cfg.DATA.FLIP,
    )
    dataset = TrainDataset(
        videos,
        sampler=_build_sampler(cfg),
        transform=transform,
        decode_side=cfg.DATA.SHORT_SIDE[1],
        seed=cfg.SEED,
    )
    sampler = EpochSampler(len(videos), cfg.TRAIN.BATCH_SIZE, cfg.TRAIN.ACCUMULATE, world.rank, world.size, cfg.SEED)
    return _loader(cfg, world, dataset, sampler)


def build_test_loader(
    cfg: CfgNode, world: World, split: str, num_classes: int, *, clips: int = 1, crops: int = 1
) -> DataLoader:
    """Return a loader of ``clips`` x ``crops`` views of each video of ``split``."""
    videos = build_videos(cfg, split)
    check_labels(videos, num_classes, cfg.DATA[f"{split.upper()}_LIST"])
    dataset = TestDataset(
        videos,
        sampler=_build_sampler(cfg),
        clips=clips,
        transform=TestTransform(cfg.DATA.SIZE, _build_normalise(cfg), cfg.TEST.SHORT_SIDE, crops),
        decode_side=cfg.TEST.SHORT_SIDE,
        stage=split,
    )
    # As many views a batch as in the test, whatever the number of views a video.
    batch = max(1, cfg.TEST.BATCH_SIZE * cfg.TEST.CLIPS * cfg.TEST.CROPS // (clips * crops))
    return _loader(cfg, world, dataset, ShardedBatches(len(videos), batch, world.rank, world.size))


def _build_sampler(cfg: CfgNode) -> ClipSampler:
    return ClipSampler(cfg.DATA.SAMPLING, cfg.DATA.FRAMES, cfg.DATA.STRIDE)


def _build_normalise(cfg: CfgNode) -> Normalise:
    return Normalise(tuple(cfg.DATA.MEAN), tuple(cfg.DATA.STD))


def _loader(cfg: CfgNode, world: World, dataset: TrainDataset | TestDataset, sampler: Sampler) -> DataLoader:
    workers = cfg.DATA.WORKERS
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=world.device.type == "cuda",
        persistent_workers=workers > 0 and isinstance(dataset, TrainDataset),
    )
