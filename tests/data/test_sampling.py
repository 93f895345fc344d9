"""Clip indices: inside the video, evenly spread, and the same for any caller."""

import numpy as np
import pytest

from stvit_video.data.sampling import clip_indices, even_clips, random_clip


@pytest.mark.parametrize("length", [1, 2, 7, 16, 61, 300])
@pytest.mark.parametrize(("frames", "stride"), [(1, 1), (8, 2), (16, 4)])
@pytest.mark.parametrize("clips", [1, 2, 4])
def test_indices_stay_inside_and_cover_the_video(length: int, frames: int, stride: int, clips: int) -> None:
    found = even_clips(length, frames, stride, clips)
    assert len(found) == clips
    for clip in [*found, random_clip(length, frames, stride, np.random.default_rng(0))]:
        assert len(clip) == frames
        assert clip.min() >= 0
        assert clip.max() < length
        assert set(np.diff(clip)) <= set(range(stride + 1))
    span = (frames - 1) * stride + 1
    if length >= span and clips > 1:
        assert found[0][0] == 0
        assert found[-1][-1] == length - 1


def test_one_clip_is_centred() -> None:
    assert even_clips(21, 8, 2, 1)[0].tolist() == [3, 5, 7, 9, 11, 13, 15, 17]


def test_short_videos_repeat_their_last_frame() -> None:
    assert clip_indices(0, 4, 2, 3).tolist() == [0, 2, 2, 2]


def test_random_clips_start_everywhere_alike() -> None:
    rng = np.random.default_rng(0)
    starts = np.bincount([random_clip(10, 4, 2, rng)[0] for _ in range(4000)])
    assert len(starts) == 4
    assert np.abs(starts / 1000 - 1).max() < 0.15
