"""PyTorchVideo's lists and samplers in our loaders, against PyTorchVideo itself."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorchvideo.data import LabeledVideoDataset, make_clip_sampler
from pytorchvideo.data.labeled_video_paths import LabeledVideoPaths

from stvit_video.data.clips.from_pytorchvideo import SecondsSampler, videos_of
from stvit_video.data.decode.frames import open_video
from stvit_video.data.lists.annotations import Video
from stvit_video.data.lists.videos import build_lists
from stvit_video.data.loader import build_train_loader
from stvit_video.runtime.world import World
from tests.conftest import data_config, numbered_frames, read_number


def test_videos_keep_order_and_labels(small_set: Path) -> None:
    paths = LabeledVideoPaths.from_path(str(small_set / "motion" / "train.csv"))
    videos = videos_of(LabeledVideoDataset(paths, make_clip_sampler("random", 1), decode_audio=False))
    assert videos == [Video(*line.split()[:1], int(line.split()[1])) for line in
                      (small_set / "motion" / "train.csv").read_text().splitlines()]  # fmt: skip
    assert videos_of([("a.mp4", {"label": 3})]) == [Video("a.mp4", 3)]
    with pytest.raises(ValueError, match=r"a\.mp4 has the label -1; give each video a whole number"):
        videos_of([("a.mp4", None)])


@pytest.mark.parametrize("clips", [1, 2, 5])
def test_test_clips_equal_those_of_pytorchvideo(write_clip: Callable[..., Path], clips: int) -> None:
    path = str(write_clip(numbered_frames(100), rate=25))
    theirs = LabeledVideoDataset(
        [(path, {"label": 0})], make_clip_sampler("constant_clips_per_video", 0.8, clips), decode_audio=False
    )
    expected = []
    for item in theirs:
        pictures = item["video"].permute(1, 2, 3, 0).numpy()  # all frames of the clip
        numbers = [read_number(picture) for picture in pictures]
        expected.append([numbers[i] for i in torch.linspace(0, len(numbers) - 1, 8).long()])
    assert len(expected) == clips
    ours = SecondsSampler(8, 0.8)(open_video(path), clips).reshape(clips, 8)
    assert np.abs(ours - expected).max() <= 1  # they cut off parts of a frame at either end
    assert all(set(np.diff(clip)) <= {2, 3} for clip in ours)


def test_random_clips_draw_from_the_sample_seed_only(write_clip: Callable[..., Path]) -> None:
    video, sampler = open_video(str(write_clip(numbered_frames(100), rate=25))), SecondsSampler(8, 1.0)
    random.seed(5)
    state = random.getstate()
    clips = [sampler(video, 1, (seed,)) for seed in range(40)]
    assert random.getstate() == state
    np.testing.assert_array_equal(clips[0], sampler(video, 1, (0,)))
    assert len({clip[0] for clip in clips}) > 20
    for clip in clips:
        assert 0 <= clip[0] <= clip[-1] < 100
        assert 23 <= clip[-1] - clip[0] <= 25
    short = SecondsSampler(6, 9.0)
    assert short(video, 2)[6:].tolist() == np.linspace(0, 99, 6).astype(int).tolist()


@pytest.mark.parametrize("decoder", ["pyav", "decord"])  # of which PyTorchVideo changes the second as it is imported
def test_sampling_by_seconds_is_configurable(small_set: Path, decoder: str) -> None:
    words = ["DATA.SAMPLING", "seconds", "DATA.CLIP_SECONDS", "0.5", "DATA.DECODER", decoder]
    cfg = data_config(small_set, *words)
    loader = build_train_loader(cfg, World(0, 1, torch.device("cpu")), build_lists(cfg).videos("train"))
    assert loader.dataset.sampler == SecondsSampler(8, 0.5)
    batch = next(iter(loader))
    assert batch.make_clips().shape == (8, 3, 8, 64, 64)
    assert batch.failures == []
