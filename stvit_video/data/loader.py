"""Loaders from a configuration: which process reads which videos, in what order."""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count

import torch
from fvcore.common.config import CfgNode
from torch.utils.data import Sampler

from stvit_video.common.errors import UsageError
from stvit_video.data.clips.from_pytorchvideo import SecondsSampler
from stvit_video.data.clips.sampling import ClipSampler, Sampling
from stvit_video.data.clips.transforms import Augment, Mix, Normalise, TestViews, TrainViews
from stvit_video.data.dataset import SampleKey, VideoDataset, collate
from stvit_video.data.decode.frames import Decoding, find_decoder
from stvit_video.data.lists.annotations import Video, labels_of
from stvit_video.data.workers import FILES_PER_WORKER, Loader
from stvit_video.runtime.limits import reserve_files
from stvit_video.runtime.world import World

LOADERS = 3  # of a run, for training, validation and the test
SPARE_FILES = 10  # that a loader or its decoder opens besides


class EpochSampler(Sampler[list[SampleKey]]):
    """Batches of a shuffled epoch for one process. The order depends on seed and epoch alone.

    A step of ``step_size`` videos is the same set for any number of processes and accumulated batches; a last
    incomplete one is left out. An epoch has ``accumulate`` batches a step, of which the first ``start`` are skipped:
    epoch and start are the position that ``state_dict`` saves. With ``groups``, indices of each class, an epoch draws
    as many videos of each group, those of small groups several times and of large ones not all.
    """

    def __init__(
        self,
        length: int,
        step_size: int,
        accumulate: int,
        rank: int,
        world: int,
        seed: int,
        groups: Sequence[Sequence[int]] = (),
    ) -> None:
        self.length, self.step_size, self.batch = length, step_size, step_size // accumulate
        self.accumulate, self.rank, self.world, self.seed = accumulate, rank, world, seed
        self.groups = groups
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.length // self.step_size * self.accumulate

    def __iter__(self) -> Iterator[list[SampleKey]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator).tolist()
        drawn = self._draw_alike(generator) if self.groups else []
        for i in range(self.start, len(self)):
            places = order[i * self.batch : (i + 1) * self.batch][self.rank :: self.world]
            yield [SampleKey(self.epoch, *(drawn[place] if drawn else (place,))) for place in places]

    def _draw_alike(self, generator: torch.Generator) -> list[tuple[int, int]]:
        """Draw ``length`` videos, of each group as many or one more, and none again before all of its group.

        Return their indices, each with how often the video was drawn before.
        """
        quota, rest = divmod(self.length, len(self.groups))
        larger = torch.randperm(len(self.groups), generator=generator)[:rest].tolist()
        indices: list[int] = []
        for place, group in enumerate(self.groups):
            end = len(indices) + quota + (place in larger)
            while len(indices) < end:
                part = torch.randperm(len(group), generator=generator)[: end - len(indices)].tolist()
                indices += [group[i] for i in part]
        draws: defaultdict[int, Iterator[int]] = defaultdict(count)
        return [(index, next(draws[index])) for index in indices]

    def state_dict(self) -> dict[str, int]:
        """Return the position: an epoch, and the batches of it that are done."""
        return {"epoch": self.epoch, "start": self.start}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a position; the loader's next iterator begins there."""
        self.epoch, self.start = state["epoch"], state["start"]


class ShardedBatches(Sampler[list[int]]):
    """Consecutive batches of a list, sharded over the processes; no video twice, none left out.

    A batch holds the same videos for any number of processes, so their logits are the same too. ``done`` holds the
    first videos of batches that are skipped.
    """

    def __init__(self, length: int, batch: int, rank: int, world: int) -> None:
        self.length, self.batch, self.rank, self.world = length, batch, rank, world
        self.done: set[int] = set()

    def _starts(self) -> list[int]:
        return [start for start in range(0, self.length, self.batch) if start not in self.done][self.rank :: self.world]

    def __len__(self) -> int:
        return len(self._starts())

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(start, min(start + self.batch, self.length))) for start in self._starts())


def build_train_loader(cfg: CfgNode, world: World, videos: list[Video], label_columns: int | None = None) -> Loader:
    """Return the training loader of ``videos``; its ``batch_sampler`` is an EpochSampler of micro-batches.

    ``label_columns`` is the number of classes of a multi-label set.
    """
    repeats = cfg.DATA.REPEATS
    per_step = world.size * cfg.TRAIN.ACCUMULATE * repeats
    if cfg.TRAIN.BATCH_SIZE % per_step:
        raise UsageError(
            f"TRAIN.BATCH_SIZE {cfg.TRAIN.BATCH_SIZE} does not divide by {world.size} processes x TRAIN.ACCUMULATE "
            f"{cfg.TRAIN.ACCUMULATE} x DATA.REPEATS {repeats}; choose a multiple of {per_step}, or "
            f"continue a run with as many as it had."
        )
    videos_per_step = cfg.TRAIN.BATCH_SIZE // repeats
    if len(videos) < videos_per_step:
        raise UsageError(
            f"The training list has {len(videos)} videos for steps of {videos_per_step} on {world.size} processes x "
            f"TRAIN.ACCUMULATE {cfg.TRAIN.ACCUMULATE}; add videos, or use fewer of both and a smaller TRAIN.BATCH_SIZE."
        )
    views = TrainViews(
        clips=repeats,
        frames=cfg.DATA.FRAMES,
        size=cfg.DATA.SIZE,
        normalise=Normalise(tuple(cfg.DATA.MEAN), tuple(cfg.DATA.STD)),
        short_side=tuple(cfg.DATA.SHORT_SIDE),
        area=tuple(cfg.DATA.CROP_AREA) if cfg.DATA.CROP == "random_resized" else None,
        ratio=tuple(cfg.DATA.CROP_RATIO),
        flip=cfg.DATA.FLIP,
        augment=Augment(
            cfg.DATA.RAND_AUGMENT_LAYERS, cfg.DATA.RAND_AUGMENT_MAGNITUDE, cfg.DATA.COLOR_JITTER, cfg.DATA.ERASE
        ),
        late=cfg.DATA.TRANSFORM_ON == "device",
    )
    decoding = build_decoding(cfg, cfg.DATA.SHORT_SIDE[1])
    dataset = VideoDataset(
        videos=videos,
        sampler=build_sampler(cfg),
        views=views,
        decoding=decoding,
        stage="train",
        label_columns=label_columns,
        seed=cfg.SEED,
    )
    groups = group_by_class(videos) if cfg.TRAIN.BALANCED else ()
    sampler = EpochSampler(len(videos), videos_per_step, cfg.TRAIN.ACCUMULATE, world.rank, world.size, cfg.SEED, groups)
    return _build_loader(cfg, world, dataset, sampler)


def group_by_class(videos: Sequence[Video]) -> list[list[int]]:
    """Return the indices of the videos of each class that has any; those without a label are a class of their own."""
    groups: dict[int, list[int]] = {}
    for index, video in enumerate(videos):
        for label in labels_of(video) or (-1,):
            groups.setdefault(label, []).append(index)
    return [groups[label] for label in sorted(groups)]


def build_mix(cfg: CfgNode, world: World, num_classes: int) -> Mix | None:
    """Return the mixing configured by TRAIN.MIXUP and TRAIN.CUTMIX; None where both are 0."""
    if cfg.TRAIN.MIXUP == 0 and cfg.TRAIN.CUTMIX == 0:
        return None
    parts = world.size * cfg.TRAIN.ACCUMULATE * cfg.DATA.REPEATS
    if cfg.TRAIN.BATCH_SIZE // parts < 2:
        raise UsageError(
            f"TRAIN.BATCH_SIZE {cfg.TRAIN.BATCH_SIZE} over {world.size} processes x TRAIN.ACCUMULATE "
            f"{cfg.TRAIN.ACCUMULATE} x DATA.REPEATS {cfg.DATA.REPEATS} leaves no other video to mix with; raise it to "
            f"{2 * parts}, adding training videos if need be, or set TRAIN.MIXUP and TRAIN.CUTMIX to 0."
        )
    return Mix(
        mixup=cfg.TRAIN.MIXUP,
        cutmix=cfg.TRAIN.CUTMIX,
        probability=cfg.TRAIN.MIX_PROBABILITY,
        switch=cfg.TRAIN.MIX_SWITCH,
        num_classes=num_classes,
    )


def build_test_loader(
    cfg: CfgNode,
    world: World,
    videos: list[Video],
    split: str = "test",
    *,
    clips: int = 1,
    crops: int = 1,
    label_columns: int | None = None,
) -> Loader:
    """Return a loader of ``clips`` x ``crops`` views of each of the videos of ``split``."""
    views = build_test_views(cfg, clips, crops)
    decoding = build_decoding(cfg, cfg.TEST.SHORT_SIDE)
    dataset = VideoDataset(
        videos=videos,
        sampler=build_sampler(cfg),
        views=views,
        decoding=decoding,
        stage=split,
        label_columns=label_columns,
    )
    # As many views a batch as in the test, whatever the number of views a video.
    batch = max(1, cfg.TEST.BATCH_SIZE * cfg.TEST.CLIPS * cfg.TEST.CROPS // (clips * crops))
    return _build_loader(cfg, world, dataset, ShardedBatches(len(videos), batch, world.rank, world.size))


def shorten(loader: Loader, batches: int) -> None:
    """Let a loader end after so many batches, so that its workers load no more."""
    sampler = loader.batch_sampler
    sampler.length = min(sampler.length, batches * sampler.batch)


def build_test_views(cfg: CfgNode, clips: int, crops: int) -> TestViews:
    """Return how frames become the ``clips`` x ``crops`` views that a video is scored by."""
    return TestViews(
        clips=clips,
        crops=crops,
        frames=cfg.DATA.FRAMES,
        size=cfg.DATA.SIZE,
        normalise=Normalise(tuple(cfg.DATA.MEAN), tuple(cfg.DATA.STD)),
        short_side=cfg.TEST.SHORT_SIDE,
    )


def build_sampler(cfg: CfgNode) -> Sampling:
    """Return the configured way of taking clips out of a video."""
    if cfg.DATA.SAMPLING == "seconds":
        return SecondsSampler(cfg.DATA.FRAMES, cfg.DATA.CLIP_SECONDS)
    return ClipSampler(cfg.DATA.SAMPLING, cfg.DATA.FRAMES, cfg.DATA.STRIDE, cfg.DATA.FPS)


def build_decoding(cfg: CfgNode, short_side: int, in_run: bool = True) -> Decoding:
    """Return what reads frames, with the configured decoder and deadline, and indexes kept in the run's folder."""
    cache = os.path.join(cfg.OUTPUT_DIR, "index") if in_run and cfg.OUTPUT_DIR else None
    return Decoding(find_decoder(cfg.DATA.DECODER, "DATA.DECODER"), cfg.DATA.DEADLINE_S, short_side, cache)


def _build_loader(cfg: CfgNode, world: World, dataset: VideoDataset, sampler: EpochSampler | ShardedBatches) -> Loader:
    workers = cfg.DATA.WORKERS
    files = LOADERS * (workers * FILES_PER_WORKER + SPARE_FILES)
    reserve_files(files, f"DATA.WORKERS {workers}", ", or lower DATA.WORKERS" if workers else "")
    return Loader(dataset, sampler, partial(collate, views=dataset.views), workers, world.device)
