"""Datasets and loaders: the same samples for any number of workers and processes, and no silent replacement."""

import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from fvcore.common.config import CfgNode

from stvit_video.common.errors import UsageError
from stvit_video.data.clips.from_pytorchvideo import SecondsSampler
from stvit_video.data.clips.sampling import ClipSampler, Sampling
from stvit_video.data.clips.transforms import Normalise, TestViews, TrainViews
from stvit_video.data.dataset import SampleKey, VideoDataset, collate
from stvit_video.data.decode.frames import Decoding
from stvit_video.data.failures import read_ledger
from stvit_video.data.lists.annotations import Video
from stvit_video.data.lists.videos import build_lists
from stvit_video.data.loader import EpochSampler, ShardedBatches, build_test_loader, build_train_loader, group_by_class
from stvit_video.data.workers import Loader
from stvit_video.runtime.world import World
from tests.conftest import copy_packets, data_config, numbered_frames, read_number
from tests.data.choices import Frozen

PLAIN = Normalise((0, 0, 0), (1, 1, 1))
CPU = torch.device("cpu")


def train_loader(cfg: CfgNode) -> Loader:
    return build_train_loader(cfg, World(0, 1, CPU), build_lists(cfg).videos("train"))


def views_loader(cfg: CfgNode, clips: int) -> Loader:
    return build_test_loader(cfg, World(0, 1, CPU), build_lists(cfg).videos("test"), clips=clips)


def views_of(loader: Loader, key: SampleKey | int) -> torch.Tensor:
    """Return one sample's views (V, 3, T, H, W)."""
    return loader.collate_fn([loader.dataset[key]]).make_clips()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 11, 12, 64])
def test_every_video_is_tested_once_for_any_world_size(world: int, length: int) -> None:
    shards = [list(ShardedBatches(length, 3, rank, world)) for rank in range(world)]
    batches = sorted(batch for shard in shards for batch in shard)
    assert [index for batch in batches for index in batch] == list(range(length))
    assert batches == sorted(ShardedBatches(length, 3, 0, 1))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_has_the_same_videos_for_any_world_size_and_accumulation(world: int, accumulate: int) -> None:
    def steps(world: int, accumulate: int) -> list[set[SampleKey]]:
        samplers = [EpochSampler(37, 16, accumulate, rank, world, seed=5) for rank in range(world)]
        for sampler in samplers:
            sampler.epoch = 2
        micro = [set().union(*parts) for parts in zip(*samplers, strict=True)]
        return [set().union(*micro[i : i + accumulate]) for i in range(0, len(micro), accumulate)]

    found = steps(world, accumulate)
    assert found == steps(1, 1)
    assert len(found) == 2
    assert all(len(step) == 16 for step in found)
    assert len(set().union(*found)) == 32


@pytest.mark.parametrize(("world", "accumulate"), [(1, 2), (2, 1), (3, 1)])
def test_a_balanced_epoch_draws_each_class_alike(world: int, accumulate: int) -> None:
    """31 videos of class 0, 6 of 1 and 2 of 2: 13 draws of each, in the same steps for any number of processes."""
    videos = [Video(str(i), label) for i, label in enumerate([0] * 31 + [1] * 6 + [2] * 2)]

    def epoch(number: int, rank: int = 0, world: int = 1, accumulate: int = 1) -> list[list[SampleKey]]:
        sampler = EpochSampler(39, 6, accumulate, rank, world, 5, group_by_class(videos))
        sampler.load_state_dict({"epoch": number, "start": 0})
        return list(sampler)

    whole = epoch(2)
    keys = [key for batch in whole for key in batch]
    assert len(set(keys)) == len(keys) == 36
    several = EpochSampler(39, 39, 1, 0, 1, 5, group_by_class(videos))
    drawn = Counter(key.index for key in next(iter(several)))
    assert Counter(videos[index].label for index in drawn.elements()) == {0: 13, 1: 13, 2: 13}
    assert [drawn[index] for index in (37, 38)] in ([6, 7], [7, 6])
    assert {drawn[index] for index in range(31, 37)} == {2, 3}
    ranks = [epoch(2, rank, world, accumulate) for rank in range(world)]
    micro = [set().union(*parts) for parts in zip(*ranks, strict=True)]
    steps = [set().union(*micro[i : i + accumulate]) for i in range(0, len(micro), accumulate)]
    assert steps == [set(batch) for batch in whole]
    assert epoch(3) != whole
    later = EpochSampler(39, 6, 1, 0, 1, 5, group_by_class(videos))
    later.load_state_dict({"epoch": 2, "start": 4})
    assert list(later) == whole[4:]


def test_a_video_drawn_again_is_augmented_anew(small_set: Path) -> None:
    loader = train_loader(data_config(small_set))
    first, again = (views_of(loader, SampleKey(0, 3, draw)) for draw in (0, 1))
    assert first.shape == again.shape
    assert not torch.equal(first, again)


def test_videos_of_several_labels_are_in_several_groups() -> None:
    videos = [Video("a", 1, labels=(1, 2)), Video("b", -1, labels=()), Video("c", 2, labels=(2,))]
    assert group_by_class(videos) == [[1], [0], [0, 2]]


def test_epochs_differ_in_order_and_augmentation(small_set: Path) -> None:
    loader = train_loader(data_config(small_set))
    order = list(loader.batch_sampler)
    loader.batch_sampler.epoch = 1
    assert [key.index for batch in order for key in batch] != [
        key.index for batch in loader.batch_sampler for key in batch
    ]
    first, second = (views_of(loader, SampleKey(epoch, 0)) for epoch in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, views_of(loader, SampleKey(0, 0)))


def test_the_first_batch_is_the_same_for_any_number_of_workers(small_set: Path) -> None:
    batches = []
    for workers in (0, 1, 3):
        loader = train_loader(data_config(small_set, "DATA.WORKERS", str(workers)))
        batches.append(next(iter(loader)))
    for batch in batches[1:]:
        assert torch.equal(batch.make_clips(), batches[0].make_clips())
        assert torch.equal(batch.indices, batches[0].indices)


def test_views_are_clips_times_crops(write_clip: Callable[..., Path]) -> None:
    path = write_clip(numbered_frames(61, 48, 96)[:, :, :96])
    dataset = VideoDataset(
        videos=[Video(str(path), 3)],
        sampler=ClipSampler("dense", 4, 5),
        views=TestViews(clips=3, crops=3, frames=4, size=48, normalise=PLAIN, short_side=48),
        decoding=Decoding("decord", 60, 48),
        stage="test",
    )
    views = collate([dataset[0]], dataset.views).make_clips()
    assert views.shape == (9, 3, 4, 48, 48)
    starts = []
    for view in views[::3]:  # the left crop of each clip shows bits 0 to 2 and 4 to 6
        pictures = (view * 1.0).permute(1, 2, 3, 0).numpy() * 255
        numbers = [read_number(np.pad(picture, ((0, 0), (0, 16), (0, 0)))) & 0b1110111 for picture in pictures]
        starts.append(numbers)
    expected = [[start + 5 * i for i in range(4)] for start in (0, 22, 45)]
    assert starts == [[number & 0b1110111 for number in clip] for clip in expected]


def test_repeats_count_in_the_batch_size(small_set: Path) -> None:
    loader = train_loader(data_config(small_set, "DATA.REPEATS", "2"))
    assert len(loader) == 32 * 2 // 8
    batch = next(iter(loader))
    assert len(batch.labels) == 4
    assert batch.make_clips().shape[0] == 8
    assert batch.clip_labels.tolist() == [label for label in batch.labels.tolist() for _ in range(2)]
    assert not torch.equal(batch.make_clips()[0], batch.make_clips()[1])
    single = train_loader(data_config(small_set))
    twice = views_of(loader, SampleKey(0, 5))
    assert twice.shape == (2, 3, 8, 64, 64)
    assert torch.equal(twice[0], views_of(single, SampleKey(0, 5))[0])
    with pytest.raises(UsageError, match=r"x DATA\.REPEATS 3; choose a multiple of 3"):
        train_loader(data_config(small_set, "DATA.REPEATS", "3"))


def test_sampler_state_round_trips(small_set: Path) -> None:
    whole = EpochSampler(32, 8, 2, 0, 2, seed=3)
    whole.epoch = 4
    keys = list(whole)
    later = EpochSampler(32, 8, 2, 0, 2, seed=3)
    later.load_state_dict({**whole.state_dict(), "start": 3})
    assert list(later) == keys[3:]
    assert later.state_dict() == {"epoch": 4, "start": 3}
    loader = train_loader(data_config(small_set, "DATA.WORKERS", "2"))
    all_clips = [batch.make_clips() for batch in loader]
    loader.batch_sampler.load_state_dict({"epoch": 0, "start": 2})
    rest = [batch.make_clips() for batch in loader]
    assert len(rest) == 2
    assert all(torch.equal(a, b) for a, b in zip(rest, all_clips[2:], strict=True))


@pytest.fixture
def damaged_set(small_set: Path, tmp_path: Path) -> Path:
    """The small set with three unreadable training videos and two unreadable test videos."""
    root = tmp_path / "damaged"
    shutil.copytree(small_set, root)
    for name in ("train_00001", "train_00002", "train_00009", "test_00003"):
        (root / "videos" / f"{name}.mp4").write_bytes(b"broken")
    os.unlink(root / "videos" / "test_00015.mp4")
    return root


def test_training_replaces_unreadable_videos_and_reports_them(damaged_set: Path) -> None:
    loader = train_loader(data_config(damaged_set))
    sample = loader.dataset[SampleKey(0, 1)]
    assert sample.index == 3
    assert [Path(failure.path).name for failure in sample.failures] == ["train_00001.mp4", "train_00002.mp4"]
    batch = loader.collate_fn([sample, loader.dataset[SampleKey(0, 9)]])
    assert len(batch.labels) == 2
    assert len(batch.failures) == 3


def test_an_unreadable_video_does_not_change_other_samples_of_the_batch(damaged_set: Path) -> None:
    """The decoder holds several requests, and a replacement must not get the frames of another video."""
    dataset = train_loader(data_config(damaged_set)).dataset
    keys = [SampleKey(0, index) for index in (1, 5, 9, 12, 20)]
    together, alone = dataset.__getitems__(keys), [dataset[key] for key in keys]
    assert [sample.index for sample in together] == [3, 5, 10, 12, 20]
    for a, b in zip(together, alone, strict=True):
        assert (a.index, a.label, a.seed) == (b.index, b.label, b.seed)
        assert torch.equal(a.pixels, b.pixels)


def test_testing_replaces_no_video(damaged_set: Path) -> None:
    loader = views_loader(data_config(damaged_set, "DATA.MAX_FAILURES", "0.5"), clips=2)
    batch = next(iter(loader))
    assert batch.indices.tolist() == [i for i in range(16) if i not in (3, 15)]
    assert sorted(Path(failure.path).name for failure in batch.failures) == ["test_00003.mp4", "test_00015.mp4"]
    assert all(failure.stage == "test" for failure in batch.failures)


def test_training_gives_up_after_max_tries(tmp_path: Path) -> None:
    videos = [Video(str(tmp_path / f"{i}.mp4"), 0) for i in range(30)]
    sampler = ClipSampler("dense", 2)
    decoding = Decoding("decord", 60)
    views = TrainViews(clips=1, frames=2, size=32, normalise=PLAIN, short_side=(32, 32))
    dataset = VideoDataset(videos=videos, sampler=sampler, views=views, decoding=decoding, stage="train")
    batch = collate([dataset[SampleKey(0, 0)]], views)
    assert batch.missing == 1
    assert [failure.path for failure in batch.failures] == [video.path for video in videos[:10]]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["TRAIN.BATCH_SIZE", "7", "TRAIN.ACCUMULATE", "2"], "does not divide by 1 processes x TRAIN.ACCUMULATE 2"),
        (["TRAIN.BATCH_SIZE", "64"], "The training list has 32 videos for steps of 64"),
        (["DATA.ROOT", "/nowhere"], "/nowhere/motion/train.csv is missing"),
    ],
)
def test_invalid_settings_are_named(small_set: Path, overrides: list[str], says: str) -> None:
    with pytest.raises(UsageError) as error:
        train_loader(data_config(small_set, *overrides))
    assert says in str(error.value)


def numbers(views: torch.Tensor) -> list[list[int]]:
    """Read back the frame numbers of views (V, 3, T, 64, 64), which are in the upper 48 rows."""
    pictures = (views * 255).permute(0, 2, 3, 4, 1).numpy()
    return [[read_number(picture[:48]) for picture in view] for view in pictures]


def test_equal_views_are_computed_once(write_clip: Callable[..., Path]) -> None:
    """One clip fits the first video, none the second, two the third, and all of its square crops are the same."""
    lengths, sampler = ((10, 48, 64), (7, 48, 64), (11, 48, 48), (60, 48, 64)), ClipSampler("dense", 4, 3)
    paths = [write_clip(numbered_frames(n, h, w), f"{n}.mp4") for n, h, w in lengths]
    dataset = VideoDataset(
        videos=[Video(str(path), 0) for path in paths],
        sampler=sampler,
        views=TestViews(clips=3, crops=3, frames=4, size=48, normalise=PLAIN, short_side=48),
        decoding=Decoding("pyav", 60.0),
        stage="test",
    )
    batch = collate(dataset.__getitems__(range(4)), dataset.views)
    assert batch.short.tolist() == [False, True, False, False]
    assert batch.different_views == [3, 3, 2, 9]
    clips = batch.make_clips()
    assert len(clips) == 17
    every = batch.expand(clips)
    assert every.shape == (4, 9, 3, 4, 48, 48)
    assert torch.equal(batch.expand(torch.arange(17))[2], torch.tensor([6, 6, 6, 6, 6, 6, 7, 7, 7]))
    starts = ([0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 25, 50])
    one = replace(dataset.views, clips=1)
    for i, (length, _, width) in enumerate(lengths):
        for view, found in enumerate(every[i]):  # each as if it were computed by itself
            clip, crop = divmod(view, 3)
            indices = tuple(min(starts[i][clip] + step, length - 1) for step in (0, 3, 6, 9))
            frames = dataset.decoding.read(dataset.decoding.request(str(paths[i]), Frozen(indices)))
            left = (width - 48) // 2 * crop
            expected = PLAIN(one.prepare(frames)[:, :, left : left + 48], torch.empty(3, 4, 48, 48))
            assert torch.equal(found, expected), (i, view)


@pytest.mark.parametrize(
    "sampler", [ClipSampler("dense", 4, 5, rate=25), ClipSampler("uniform", 4), SecondsSampler(4, 0.6)], ids=str
)
def test_clips_of_a_file_with_a_gap_are_on_one_side(
    write_clip: Callable[..., Path], tmp_path: Path, sampler: Sampling
) -> None:
    """A camera stores 20 frames, and after an hour 40 more."""

    def wait(packet: av.Packet) -> av.Packet:
        late = packet.pts * packet.time_base * 25 >= 20
        packet.pts = packet.dts = packet.pts + late * round(3600 / packet.time_base)
        return packet

    path = copy_packets(write_clip(numbered_frames(60, 64, 64), "dense.mkv", bf="0"), tmp_path / "gap.mkv", wait)
    views = TestViews(clips=3, crops=1, frames=4, size=64, normalise=PLAIN, short_side=64)
    dataset = VideoDataset(
        videos=[Video(str(path), 0)], sampler=sampler, views=views, decoding=Decoding("pyav", 60.0), stage="test"
    )
    keys = [0, *(SampleKey(epoch, 0) for epoch in range(12))]
    batch = collate(dataset.__getitems__(keys), dataset.views)
    clips = batch.expand(batch.make_clips()).flatten(0, 1)
    found = numbers(clips)
    assert len(found) == 39
    assert {clip[0] < 20 for clip in found} == {True, False}
    for clip in found:
        assert (clip[0] < 20) == (clip[-1] < 20)
        assert len(set(clip)) == 4


@pytest.mark.parametrize("sampling", ["dense", "uniform"])
def test_samples_have_the_frames_of_their_sampler(
    small_set: Path, tmp_path: Path, write_clip: Callable[..., Path], sampling: str
) -> None:
    for split in ("train", "test"):
        write_clip(numbered_frames(60, 64, 64), f"{split}.mp4")
        (tmp_path / f"{split}.csv").write_text(f"{split}.mp4 0\n")
    words = f"DATA.ROOT {tmp_path} DATA.TRAIN_LIST train.csv DATA.TEST_LIST test.csv DATA.CLASSES  DATA.FRAMES 4"
    plain = "DATA.SHORT_SIDE [64,64] DATA.MEAN [0,0,0] DATA.STD [1,1,1] DATA.STRIDE 5 TRAIN.BATCH_SIZE 1"
    cfg = data_config(small_set, *words.split(" "), *plain.split(" "), "DATA.SAMPLING", sampling)
    views = views_of(views_loader(cfg, clips=2), 0)
    dense = [[0, 5, 10, 15], [44, 49, 54, 59]]
    uniform = [[3, 18, 33, 48], [11, 26, 41, 56]]  # at 1/4 and 3/4 of each segment of 15 frames
    assert numbers(views) == {"dense": dense, "uniform": uniform}[sampling]
    train = train_loader(cfg)
    clips = [numbers(views_of(train, SampleKey(epoch, 0)))[0] for epoch in range(8)]
    if sampling == "dense":
        assert all(np.diff(clip).tolist() == [5, 5, 5] for clip in clips)
    else:
        assert all([n // 15 for n in clip] == [0, 1, 2, 3] for clip in clips)
    assert len({tuple(clip) for clip in clips}) > 3


@pytest.mark.parametrize("frames", [1, 4])
def test_a_still_is_a_clip_of_equal_frames(small_set: Path, frames: int) -> None:
    lists = ["DATA.TRAIN_LIST", "stills/train", "DATA.TEST_LIST", "stills/val", "DATA.CLASSES", "shape/classes.txt"]
    cfg = data_config(small_set, *lists, "DATA.FRAMES", str(frames))
    loaders = train_loader(cfg), views_loader(cfg, clips=2)
    train, test = views_of(loaders[0], SampleKey(0, 5)), views_of(loaders[1], 5)
    assert train.shape == (1, 3, frames, 64, 64)
    assert test.shape == (1, 3, frames, 64, 64)  # both clips are the same
    for views in (train, test):
        assert (views == views[:1, :, :1]).all()
        assert views.std() > 0.1
    names = (small_set / "shape" / "classes.txt").read_text().split()
    assert names[loaders[1].dataset[5].label] == Path(build_lists(cfg).videos("test")[5].path).parent.name


def test_failures_are_listed_when_the_run_stops(
    small_run: Callable[..., list[str]], refused: Callable[[list[str]], str], damaged_set: Path, tmp_path: Path
) -> None:
    words = ["DATA.ROOT", str(damaged_set), "DATA.VAL_LIST", ""]
    assert "3 of 32 train videos could not be read" in refused(small_run(*words, "DATA.MAX_FAILURES", "0.08"))
    rows = read_ledger(tmp_path / "run" / "failures.csv")
    assert {Path(row.path).name for row in rows} == {f"train_0000{i}.mp4" for i in (1, 2, 9)}
    for path in (damaged_set / "videos").glob("test_*.mp4"):
        path.write_bytes(b"broken")
    again = ["OUTPUT_DIR", str(tmp_path / "again")]
    assert "None of the 16 videos could be read" in refused(small_run(*words, *again, "DATA.MAX_FAILURES", "0.99"))
    rows = read_ledger(tmp_path / "again" / "failures.csv")
    assert sum(row.stage == "test" for row in rows) == 16
