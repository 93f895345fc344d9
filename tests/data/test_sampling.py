"""Clip indices: inside the video, evenly spread, and the same for any caller."""

from dataclasses import dataclass

import numpy as np
import pytest

from stvit_video.data.clips.sampling import (
    ClipSampler,
    EvenClips,
    RandomClips,
    clip_indices,
    even_clips,
    even_segments,
    random_clip,
    random_segments,
)


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


@pytest.mark.parametrize("length", [1, 2, 7, 8, 16, 61, 300])
@pytest.mark.parametrize("frames", [1, 8, 16])
def test_segments_are_inside_the_video_and_in_order(length: int, frames: int) -> None:
    rng = np.random.default_rng(0)
    for clip in [*even_segments(length, frames, 3), *(random_segments(length, frames, rng) for _ in range(50))]:
        assert clip.dtype == np.int64
        assert len(clip) == frames
        assert clip.min() >= 0
        assert clip.max() < length
        assert (np.diff(clip) >= 0).all()
        if length >= frames:
            assert len(set(clip)) == frames
        starts = np.arange(frames) * length / frames
        assert (clip > starts - 1).all()
        assert (clip < starts + max(1, length / frames)).all()


def test_test_clips_have_closed_forms() -> None:
    assert even_segments(64, 8, 1)[0].tolist() == [4, 12, 20, 28, 36, 44, 52, 60]  # the middles
    assert [clip.tolist() for clip in even_segments(48, 4, 3)] == [[2, 14, 26, 38], [6, 18, 30, 42], [10, 22, 34, 46]]
    assert even_segments(8, 8, 1)[0].tolist() == list(range(8))
    assert even_segments(3, 6, 1)[0].tolist() == [0, 0, 1, 1, 2, 2]  # a short video repeats frames
    assert even_segments(1, 4, 2)[1].tolist() == [0, 0, 0, 0]


def test_random_segments_take_every_frame_alike() -> None:
    rng = np.random.default_rng(0)
    clips = np.stack([random_segments(12, 4, rng) for _ in range(6000)])
    assert np.abs(np.bincount(clips.ravel(), minlength=12) / 2000 - 1).max() < 0.15
    assert [sorted(set(column)) for column in clips.T] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    clips = np.stack([random_segments(10, 4, rng) for _ in range(200)])
    assert [sorted(set(column)) for column in clips.T] == [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]
    assert random_segments(3, 6, rng).tolist() == [0, 0, 1, 1, 2, 2]


@dataclass
class Video:
    """A file of ``length`` frames shown at ``stamps``, in seconds."""

    length: int
    stamps: np.ndarray | None = None

    def times(self) -> np.ndarray:
        assert self.stamps is not None
        return self.stamps


def test_a_sampler_is_one_of_two_kinds() -> None:
    dense, uniform, video = ClipSampler("dense", 4, 2), ClipSampler("uniform", 4, 2), Video(20)
    assert [dense.even(video, 1)[0].tolist(), uniform.even(video, 1)[0].tolist()] == [[6, 8, 10, 12], [2, 7, 12, 17]]
    same = [function(20, *rest, np.random.default_rng(1)).tolist() for function, rest in
            ((random_clip, (4, 2)), (random_segments, (4,)))]  # fmt: skip
    assert [sampler.random(video, np.random.default_rng(1)).tolist() for sampler in (dense, uniform)] == same
    with pytest.raises(ValueError, match="dense or uniform"):
        ClipSampler("random", 4)


@pytest.mark.parametrize("rate", [12.5, 25.0, 30.0, 50.0, 59.94])
def test_clips_at_a_target_rate_span_the_same_time_in_any_file(rate: float) -> None:
    video = Video(int(10 * rate), np.arange(int(10 * rate)) / rate)
    sampler, rng = ClipSampler("dense", 16, 2, rate=25), np.random.default_rng(0)
    clips = [sampler.random(video, rng) for _ in range(200)] + sampler.even(video, 4)
    for clip in clips:
        assert clip.min() >= 0
        assert clip.max() < video.length
        moments = video.stamps[clip]
        np.testing.assert_allclose(moments - moments[0], np.arange(16) * 0.08, atol=1.01 / rate)
    first, last = video.stamps[clips[-4]], video.stamps[clips[-1]]
    assert first[0] == 0
    assert last[-1] == pytest.approx(video.stamps[-1], abs=1.01 / rate)


def test_at_the_files_own_rate_time_and_number_agree() -> None:
    for rate in (25, 30, 29.97):
        video = Video(300, np.round(np.arange(300) / rate, 6))
        by_time, by_number = ClipSampler("dense", 16, 4, rate=rate), ClipSampler("dense", 16, 4)
        for clips in (3, 5, 10):
            pairs = zip(by_time.even(video, clips), by_number.even(video, clips), strict=True)
            assert all(np.abs(a - b).max() <= 1 and set(np.diff(a)) == {4} for a, b in pairs)


def test_a_video_shorter_than_its_clip_repeats_its_last_frame_at_any_rate() -> None:
    short = ClipSampler("dense", 6, 2, rate=10)
    assert short.even(Video(3, np.array([0, 0.2, 0.4])), 2)[1].tolist() == [0, 1, 2, 2, 2, 2]
    assert short.random(Video(1, np.zeros(1)), np.random.default_rng(0)).tolist() == [0] * 6


def test_choices_are_clips_one_after_the_other_fixed_by_their_seed() -> None:
    video, sampler = Video(100), ClipSampler("dense", 4, 2)
    first = RandomClips(sampler, 3, (0, 1))(video)
    assert first.shape == (12,)
    assert (np.diff(first.reshape(3, 4)) == 2).all()
    np.testing.assert_array_equal(first, RandomClips(sampler, 3, (0, 1))(video))
    assert first.tolist() != RandomClips(sampler, 3, (0, 2))(video).tolist()
    assert EvenClips(sampler, 2)(video).tolist() == [0, 2, 4, 6, 93, 95, 97, 99]
