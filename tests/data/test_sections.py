"""Sections of untrimmed videos: clips from inside them only, each a sample of its own."""

import json
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from stvit_video import check_videos
from stvit_video.data.clips.sampling import ClipSampler
from stvit_video.data.clips.sections import SectionReader, within
from stvit_video.data.clips.transforms import Normalise, TestViews
from stvit_video.data.dataset import VideoDataset
from stvit_video.data.decode.frames import Decoding, FrameRequest, check_whole, open_video, read_file
from stvit_video.data.decode.readers import AvReader
from stvit_video.data.decode.types import Choice, DecodeError
from stvit_video.data.failures import merge, read_ledger
from stvit_video.data.lists.annotations import Section, Video, parse_name
from stvit_video.pages.run_page import _mistake_rows
from stvit_video.runs.record import ScoredVideo
from tests.conftest import numbered_frames, read_number


@pytest.fixture
def clip(write_clip: Callable[..., Path]) -> str:
    """A video of 100 numbered frames, 25 per second: four seconds."""
    return str(write_clip(numbered_frames(100)))


@pytest.mark.parametrize("section", [Section(0.8, 2.0), Section(20, 50, in_frames=True)], ids=["seconds", "frames"])
@pytest.mark.parametrize(
    ("choice", "numbers"),
    [
        (partial(ClipSampler("uniform", 5), clips=1), [23, 29, 35, 41, 47]),
        (partial(ClipSampler("dense", 4, 8), clips=2), [20, 28, 36, 44, 25, 33, 41, 49]),
        (partial(ClipSampler("dense", 4, 8, rate=25.0), clips=2), [20, 28, 36, 44, 25, 33, 41, 49]),
        (partial(ClipSampler("dense", 3, 40), clips=1), [20, 49, 49]),
        (check_whole, [20]),
    ],
)
def test_clips_are_those_of_a_file_of_the_section_alone(
    clip: str, section: Section, choice: Choice, numbers: list[int]
) -> None:
    frames = read_file(FrameRequest(clip, within(choice, section, clip)))
    assert [read_number(frame) for frame in frames] == numbers


@pytest.mark.parametrize("kind", ["dense", "uniform"])
def test_random_clips_stay_inside(clip: str, kind: str) -> None:
    sampler = ClipSampler(kind, 4, 2)
    with closing(open_video(clip, decoder="pyav")) as video:
        chosen = [within(partial(sampler, clips=3, seed=(seed,)), Section(1.0, 1.8), clip)(video) for seed in range(20)]
        assert np.min(chosen) >= 25
        assert np.max(chosen) < 45
        assert len(np.unique(chosen)) > 10
        choice = partial(sampler, clips=3, seed=(1,))
        assert np.array_equal(within(choice, None, clip)(video), choice(video))


@pytest.mark.parametrize(
    ("section", "frames"),
    [
        (Section(0.0, 4.0), (0, 100)),
        (Section(3.6, 4.9), (90, 100)),  # times are rounded
        (Section(1.0, 1.001), (25, 26)),  # at least one frame
        (Section(1.013, 1.1), (26, 28)),  # frames are shown at 1.04 and 1.08
        (Section(99, 101, in_frames=True), (99, 100)),
        (Section(10.0, 20.0, may_be_file=True), (0, 100)),  # the file is no longer than the section
        (Section(1.0, 2.0, may_be_file=True), (25, 50)),
    ],
)
def test_the_frames_of_a_section(clip: str, section: Section, frames: tuple[int, int]) -> None:
    with closing(open_video(clip, decoder="pyav")) as video:
        part = SectionReader(video, section, clip)
        assert (part.start, part.start + part.length) == frames
        assert part.times()[0] == 0.0
        assert part.segments() == [(0, part.length)]


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (Section(5.0, 6.0), r"section \(5 to 6 s\) is outside of the video, which ends at 4 s"),
        (Section(3.0, 6.0), r"section \(3 to 6 s\) is outside"),
        (Section(2.0, 2.0), r"section \(2 to 2 s\) ends before it begins"),
        (Section(90, 102, in_frames=True), r"section \(90 to 102 frames\) is outside of the video, which ends at 100"),
    ],
)
def test_a_section_outside_of_the_video_is_an_error(clip: str, section: Section, says: str) -> None:
    with closing(open_video(clip, decoder="pyav")) as video, pytest.raises(DecodeError, match=says):
        SectionReader(video, section, clip)


def test_frames_of_a_folder_have_no_seconds(tmp_path: Path) -> None:
    for i in range(3):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"{i}.png")
    with closing(open_video(str(tmp_path))) as video:
        assert SectionReader(video, Section(1, 3, in_frames=True), "x").length == 2
        with pytest.raises(DecodeError, match=r"its section is given in seconds \(0 to 1\).*give DATA.COLUMNS"):
            SectionReader(video, Section(0.0, 1.0), "x")


def test_two_sections_of_a_file_are_two_samples(clip: str) -> None:
    sections = [Section(0.0, 1.0), Section(50, 75, in_frames=True), Section(7.0, 8.0), Section(9.0, 9.5), None]
    dataset = VideoDataset(
        videos=[Video(clip, 0, section=section) for section in sections],
        sampler=ClipSampler("uniform", 2),
        views=TestViews(
            clips=1, crops=1, frames=2, size=48, normalise=Normalise((0.0,) * 3, (1.0,) * 3), short_side=48
        ),
        decoding=Decoding("pyav", 60.0),
        stage="test",
    )
    first, second, *wrong, whole = dataset.__getitems__([0, 1, 2, 3, 4])
    numbers = [[read_number(frame.numpy()) for frame in one.pixels] for one in (first, second, whole)]  # type: ignore[union-attr]
    assert numbers == [[6, 18], [56, 68], [25, 75]]
    failures = merge(failure for sample in wrong for failure in sample.failures)
    assert [failure.path for failure in failures] == [f"{clip}#t=7,8", f"{clip}#t=9,9.5"]
    assert [video.name for video in dataset.videos[1::3]] == [f"{clip}#frames=50,75", clip]
    assert {parse_name(video.name)[0] for video in dataset.videos} == {clip}
    assert parse_name(f"{clip}#frames=50,75") == (clip, sections[1])


def test_check_videos_finds_sections_outside_of_their_video(clip: str, tmp_path: Path) -> None:
    header = "path,start,end,label\n"
    good = ["clip.mp4,0.5,1.5,ski\n", "clip.mp4,2,3,yoga\n"]
    (tmp_path / "list.csv").write_text("".join([header, good[0], "clip.mp4,8,9,yoga\n", good[1]]))
    assert check_videos.main([str(tmp_path / "list.csv"), "--output", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert (tmp_path / "out" / "clean.txt").read_text() == header + "".join(good)
    (failure,) = read_ledger(tmp_path / "out" / "failures.csv")
    assert failure.path == f"{clip}#t=8,9"
    assert "is outside of the video" in failure.message


def test_a_file_of_many_sections_is_checked_once(clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checked, check = [], AvReader.check
    monkeypatch.setattr(AvReader, "check", lambda video: checked.append(video.path) or check(video))
    opened: dict = {}
    for start in range(3):
        choice = within(check_whole, Section(start, start + 1.0), clip)
        (frame,) = read_file(FrameRequest(clip, choice, keep_open=True), opened)
        assert read_number(frame) == start * 25
    assert checked == [clip]


def test_check_videos_keeps_the_form_of_segments_in_json(clip: str, tmp_path: Path) -> None:
    segments = [{"segment": [0, 1], "label": "ski"}, {"segment": [8, 9], "label": "ski"}]
    content = {"version": "1", "database": {"clip": {"annotations": segments}, "gone": {"annotations": segments[:1]}}}
    (tmp_path / "list.json").write_text(json.dumps(content))
    assert check_videos.main([str(tmp_path / "list.json"), "--output", str(tmp_path / "out"), "--workers", "1"]) == 0
    kept = json.loads((tmp_path / "out" / "clean.txt").read_text())
    assert kept == {"version": "1", "database": {"clip": {"annotations": segments[:1]}}}


def test_a_report_shows_the_section_of_a_mistake(clip: str) -> None:
    run = SimpleNamespace(find_video=Path, roots=[Path(clip).parent])
    mistakes = [ScoredVideo(f"{clip}{part}", ("ski",), "yoga", 0.9, 0.05) for part in ("", "#t=0,1", "#frames=0,25")]
    whole, seconds, frames = (row["frames"] for row in _mistake_rows(run, mistakes))  # type: ignore[arg-type]
    assert len(whole) == 3
    assert seconds == frames
    assert seconds != whole
