"""Clip indices: inside the video, evenly spaced, and reproducible."""

from dataclasses import dataclass

import numpy as np
import pytest

from stvit_video.data.clips.from_pytorchvideo import SecondsSampler
from stvit_video.data.clips.sampling import ClipSampler, Sampling
from stvit_video.data.clips.timeline import KnownTimes
from stvit_video.data.decode.types import find_segments


@dataclass
class Video:
    """A file of ``length`` frames shown at ``stamps``, in seconds."""

    length: int
    stamps: np.ndarray | None = None

    def times(self) -> np.ndarray:
        assert self.stamps is not None
        return self.stamps

    def segments(self) -> list[tuple[int, int]]:
        return [(0, self.length)] if self.stamps is None else find_segments(self.stamps)


def random(sampler: ClipSampler, length: int, count: int, seed: int = 0) -> np.ndarray:
    """Return ``count`` random clips (count, frames)."""
    return sampler(Video(length), count, (seed,)).reshape(count, -1)


def even(sampler: ClipSampler, length: int, clips: int) -> list[list[int]]:
    return sampler(Video(length), clips).reshape(clips, -1).tolist()


CAMERA = np.arange(40) / 25  # 1.6 s


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (np.arange(300) / 30, [(0, 300)]),
        (np.zeros(1), [(0, 1)]),
        (np.arange(50) * 10.0, [(0, 50)]),  # a slide show of a picture every 10 s
        (np.arange(50) * 3600.0, [(0, 50)]),  # a time lapse
        (np.cumsum([0, 5, 60, 20, 8, 90, 30, 12.0]), [(0, 8)]),  # slides that are explained for different times
        (np.concatenate([CAMERA, 1.6 + 8 + CAMERA]), [(0, 80)]),  # a screen where nothing moves for 8 s
        (np.array([0, 0.04, 0.04, 0.08]), [(0, 4)]),  # a time twice
        (np.concatenate([CAMERA, 3600 + CAMERA[:10]]), [(0, 40), (40, 50)]),  # a camera that waits for motion
        (np.concatenate([CAMERA, CAMERA]), [(0, 40), (40, 80)]),  # a recording joined to itself
        (np.concatenate([CAMERA, CAMERA + 2**33 / 90_000]), [(0, 40), (40, 80)]),  # MPEG's clock has run over
        (np.concatenate([CAMERA - 2**32 / 1000, CAMERA]), [(0, 40), (40, 80)]),  # FLV's clock, of 32 bits
        (np.concatenate([[0], 60 + CAMERA, [120]]), [(0, 1), (1, 41), (41, 42)]),
        (np.concatenate([60 * i + CAMERA[:2] for i in range(300)]), [(2 * i, 2 * i + 2) for i in range(300)]),
        (np.concatenate([np.arange(9) * 60.0, 86400 + np.arange(9) * 60.0]), [(0, 9), (9, 18)]),  # by night it rests
    ],
)
def test_time_is_interrupted_where_it_leaps_or_goes_back(times: np.ndarray, expected: list[tuple[int, int]]) -> None:
    assert find_segments(times) == expected


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="dense or uniform"):
        ClipSampler("random", 4)


@pytest.mark.parametrize("length", [1, 2, 7, 16, 61, 300])
@pytest.mark.parametrize(("frames", "stride"), [(1, 1), (8, 2), (16, 4)])
@pytest.mark.parametrize("clips", [1, 2, 4])
def test_dense_clips_are_inside_and_cover_the_video(length: int, frames: int, stride: int, clips: int) -> None:
    sampler = ClipSampler("dense", frames, stride)
    found = sampler(Video(length), clips).reshape(clips, frames)
    for clip in [*found, *random(sampler, length, 1)]:
        assert clip.dtype == np.int64
        assert len(clip) == frames
        assert clip.min() >= 0
        assert clip.max() < length
        assert set(np.diff(clip)) <= set(range(stride + 1))
    span = (frames - 1) * stride + 1
    if length >= span and clips > 1:
        assert found[0][0] == 0
        assert found[-1][-1] == length - 1


def test_one_dense_clip_is_centred() -> None:
    assert even(ClipSampler("dense", 8, 2), 21, 1) == [[3, 5, 7, 9, 11, 13, 15, 17]]


def test_short_videos_repeat_their_last_frame() -> None:
    assert even(ClipSampler("dense", 4, 2), 3, 1) == [[0, 2, 2, 2]]


def test_random_dense_clips_start_uniformly() -> None:
    starts = np.bincount(random(ClipSampler("dense", 4, 2), 10, 4000)[:, 0])
    assert len(starts) == 4
    assert np.abs(starts / 1000 - 1).max() < 0.15


@pytest.mark.parametrize("length", [1, 2, 7, 8, 16, 61, 300])
@pytest.mark.parametrize("frames", [1, 8, 16])
def test_uniform_clips_take_one_frame_of_each_segment(length: int, frames: int) -> None:
    sampler = ClipSampler("uniform", frames)
    for clip in [*sampler(Video(length), 3).reshape(3, frames), *random(sampler, length, 50)]:
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


def test_even_uniform_clips_have_closed_forms() -> None:
    assert even(ClipSampler("uniform", 8), 64, 1) == [[4, 12, 20, 28, 36, 44, 52, 60]]  # the middles
    assert even(ClipSampler("uniform", 4), 48, 3) == [[2, 14, 26, 38], [6, 18, 30, 42], [10, 22, 34, 46]]
    assert even(ClipSampler("uniform", 8), 8, 1) == [list(range(8))]
    assert even(ClipSampler("uniform", 6), 3, 1) == [[0, 0, 1, 1, 2, 2]]  # a short video repeats frames
    assert even(ClipSampler("uniform", 4), 1, 2)[1] == [0, 0, 0, 0]


def test_random_uniform_clips_take_every_frame_equally_often() -> None:
    clips = random(ClipSampler("uniform", 4), 12, 6000)
    assert np.abs(np.bincount(clips.ravel(), minlength=12) / 2000 - 1).max() < 0.15
    assert [sorted(set(column)) for column in clips.T] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    clips = random(ClipSampler("uniform", 4), 10, 200)
    assert [sorted(set(column)) for column in clips.T] == [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]
    assert random(ClipSampler("uniform", 6), 3, 1).tolist() == [[0, 0, 1, 1, 2, 2]]


def test_random_clips_of_old_runs_do_not_change() -> None:
    """A resumed run must see the clips that it would have seen: these were drawn by an older version."""
    times = np.arange(100) / 25
    seen = [
        sampler(Video(100, times), 1, (3, 1, 4, 0)).tolist()
        for sampler in (ClipSampler("dense", 4, 5), ClipSampler("uniform", 4), ClipSampler("dense", 4, 5, rate=12.5))
    ]
    assert seen == [[30, 35, 40, 45], [8, 43, 56, 97], [49, 59, 69, 79]]


@pytest.mark.parametrize("rate", [12.5, 25.0, 30.0, 50.0, 59.94])
def test_clips_at_a_target_rate_span_the_same_time_in_any_file(rate: float) -> None:
    video = Video(int(10 * rate), np.arange(int(10 * rate)) / rate)
    sampler = ClipSampler("dense", 16, 2, rate=25)
    clips = np.concatenate([sampler(video, 200, (0,)), sampler(video, 4)]).reshape(204, 16)
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
            timed, numbered = (sampler(video, clips).reshape(clips, 16) for sampler in (by_time, by_number))
            assert np.abs(timed - numbered).max() <= 1
            assert (np.diff(timed) == 4).all()


def test_a_video_shorter_than_its_clip_repeats_its_last_frame_at_any_rate() -> None:
    short = ClipSampler("dense", 6, 2, rate=10)
    assert short(Video(3, np.array([0, 0.2, 0.4])), 2)[6:].tolist() == [0, 1, 2, 2, 2, 2]
    assert short(Video(1, np.zeros(1)), 1, (0,)).tolist() == [0] * 6


def test_choices_are_concatenated_clips_determined_by_their_seed() -> None:
    video, sampler = Video(100), ClipSampler("dense", 4, 2)
    first = sampler(video, 3, (0, 1))
    assert first.shape == (12,)
    assert (np.diff(first.reshape(3, 4)) == 2).all()
    np.testing.assert_array_equal(first, sampler(video, 3, (0, 1)))
    assert first.tolist() != sampler(video, 3, (0, 2)).tolist()
    assert sampler(video, 2).tolist() == [0, 2, 4, 6, 93, 95, 97, 99]
    stamps = np.arange(100) / 25
    assert sampler.starting_at(Video(100, stamps), 1.0).tolist() == [25, 27, 29, 31]
    assert sampler.starting_at(Video(100, stamps), 9.0).tolist() == [99, 99, 99, 99]
    assert ClipSampler("dense", 4, 2, rate=12.5).starting_at(Video(100, stamps), 1.0).tolist() == [25, 29, 33, 37]


def recording(*lengths: int, rate: float = 25.0, pause: float = 60.0) -> Video:
    """A camera that waits for motion: segments of so many frames, with a pause between two."""
    times, start = [], 0.0
    for length in lengths:
        times.append(start + np.arange(length) / rate)
        start = times[-1][-1] + pause
    return Video(sum(lengths), np.concatenate(times))


SAMPLERS = [
    ClipSampler("dense", 4, 2),
    ClipSampler("dense", 4, 2, rate=25),
    ClipSampler("dense", 4, 2, rate=50),
    ClipSampler("dense", 4, 2, rate=12.5),
    ClipSampler("uniform", 4),
    SecondsSampler(4, 0.28),
]
LENGTHS = [(30, 50), (3, 60), (60, 3), (1, 1, 40, 1), (2, 2), (2, 1, 2), (7,) * 300, (40, 7, 9, 100), (13, 8)]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: str(lengths[:9]))
@pytest.mark.parametrize("pause", [60.0, -0.5], ids=["pause", "restart"])
def test_no_clip_spans_a_gap(sampler: Sampling, lengths: tuple[int, ...], pause: float) -> None:
    video = recording(*lengths, pause=pause)
    segments = [range(a, b) for a, b in video.segments()]
    assert [len(segment) for segment in segments] == list(lengths)
    fit = [sampler.places(KnownTimes(video.stamps[s] - video.stamps[s][0])) > 0 for s in segments]
    assert sampler.is_short(video) == (not any(fit))
    clips = [*sampler(video, 1).reshape(1, 4), *sampler(video, 5).reshape(5, 4)]
    clips += [clip for seed in range(20) for clip in sampler(video, 2, (seed,)).reshape(2, 4)]
    for clip in clips:
        assert clip.dtype == np.int64
        (inside,) = [i for i, segment in enumerate(segments) if clip[0] in segment and clip[-1] in segment]
        assert (np.diff(clip) >= 0).all()
        assert fit[inside] or not any(fit)  # what is too short is used where all is


def test_clips_are_shared_over_segments_by_the_places_where_they_can_start() -> None:
    video = recording(10, 16, 100)  # 4, 10 and 94 places for a clip of 7 frames
    for sampler in (ClipSampler("dense", 4, 2), ClipSampler("dense", 4, 2, rate=25)):
        drawn = np.concatenate([sampler(video, 1, (seed,))[:1] for seed in range(3000)])
        counts = np.histogram(drawn, [0, 10, 26, 126])[0] / 3000
        assert np.abs(counts - np.array([4, 10, 94]) / 108).max() < 0.02
        starts = sampler(video, 11).reshape(11, 4)[:, 0]
        assert np.histogram(starts, [0, 10, 26, 126])[0].tolist() in ([0, 1, 10], [1, 1, 9])
        assert sampler(video, 1)[0] == 26 + 46 or sampler.rate  # in the middle of the longest
    equal = recording(*[20] * 100)
    starts = ClipSampler("dense", 4, 2)(equal, 4).reshape(4, 4)[:, 0] // 20
    assert np.abs(starts - [12, 37, 62, 87]).max() <= 1
    assert ClipSampler("uniform", 4)(recording(10, 40, 12), 1).tolist() == [15, 25, 35, 45]
    assert ClipSampler("uniform", 4)(recording(2, 3), 1).tolist() == [2, 2, 3, 4]  # none holds a clip: the longest
    assert ClipSampler("uniform", 4)(recording(2, 3), 2).tolist() == [0, 0, 1, 1, 2, 2, 3, 4]


@pytest.mark.parametrize(
    ("sampler", "lengths", "short"),
    [
        (ClipSampler("dense", 16, 4), (60, 61, 300), (True, False, False)),
        (ClipSampler("dense", 1), (1, 2), (False, False)),
        (ClipSampler("dense", 16, 4, rate=25), (60, 61, 300), (True, False, False)),
        (ClipSampler("dense", 16, 4, rate=50), (30, 31, 300), (True, False, False)),
        (ClipSampler("dense", 16, 4, rate=24), (60, 62, 63, 300), (True, True, False, False)),  # 2.5 s
        (ClipSampler("uniform", 16), (15, 16), (True, False)),
        (SecondsSampler(16, 2.0), (49, 50, 300), (True, False, False)),
    ],
    ids=str,
)
def test_a_video_is_short_where_no_clip_fits(sampler: Sampling, lengths: tuple[int, ...], short: tuple[bool]) -> None:
    for length, expected in zip(lengths, short, strict=True):
        assert sampler.is_short(recording(length)) == expected, length
        assert sampler.is_short(recording(length, 1, length)) == expected, length


def test_a_clip_from_a_time_on_stays_in_its_segment() -> None:
    video = recording(30, 40, pause=100)  # up to 1.16 s; from 101.16 s on
    for sampler in (ClipSampler("dense", 4, 5), ClipSampler("dense", 4, 5, rate=25)):
        assert sampler.starting_at(video, 1.0).tolist() == [25, 29, 29, 29]
        assert sampler.starting_at(video, 50.0).tolist() == [30, 35, 40, 45]
        assert sampler.starting_at(video, 101.16 + 0.4).tolist() == [40, 45, 50, 55]
        assert sampler.starting_at(video, 500.0).tolist()[-1] == 69
