"""Splits of one list, and which videos are of one recording."""

from collections import Counter
from pathlib import Path

import pytest

from stvit_video.common.errors import UsageError
from stvit_video.data.lists.annotations import Section, Video
from stvit_video.data.lists.splitting import find_recordings, split_videos


def test_the_split_does_not_depend_on_the_folders_path() -> None:
    names = [(f"{label}/clip {i}.mp4", label) for label in range(3) for i in range(20 * (label + 1))]
    here = [Video(f"/here/{name}", label) for name, label in names]
    there = [Video(f"/elsewhere/deep/{name}", label) for name, label in reversed(names)]
    parts = split_videos(here, [70, 15, 15], Path("/here"))
    assert sorted(v.path for part in parts for v in part) == sorted(v.path for v in here)
    for label in range(3):
        counts = [Counter(video.label for video in part)[label] for part in parts]
        assert counts == [14 * (label + 1), 3 * (label + 1), 3 * (label + 1)]
    moved = split_videos(there, [70, 15, 15], Path("/elsewhere/deep"))
    for part, other in zip(parts, moved, strict=True):
        assert {v.path.removeprefix("/here/") for v in part} == {v.path.removeprefix("/elsewhere/deep/") for v in other}
    assert [v.path for v in parts[0]] != [v.path for v in here[: len(parts[0])]]  # sampled, not the first ones


def test_small_classes_are_split_or_refused() -> None:
    three = [Video(f"/here/a/{i}.mp4", 0) for i in range(3)]
    assert [len(part) for part in split_videos(three, [70, 15, 15], Path("/here"))] == [1, 1, 1]
    assert [len(part) for part in split_videos(three, [80, 0, 20], Path("/here"))] == [2, 0, 1]
    with pytest.raises(UsageError, match="has 2 videos; allowed: at least one for each share"):
        split_videos(three[:2], [70, 15, 15], "/here")


@pytest.mark.parametrize("group", ["", "auto"])
def test_files_without_recordings_are_split_as_ever(group: str) -> None:
    """The split is written down: a run that continues, or tests, finds its videos where they were."""
    videos = [Video(f"/set/{name}/clip {i}.mp4", label) for label, name in enumerate("ab") for i in range(7)]
    parts = split_videos(videos, [50, 20, 30], "/set", group)
    names = [" ".join(video.path[5] + video.path[12] for video in part) for part in parts]
    assert names == ["a1 a3 a5 a6 b0 b1 b3 b5", "a4 b2", "a0 a2 b4 b6"]


@pytest.mark.parametrize(
    ("name", "recording"),
    [
        ("v_Archery_g01_c02.avi", "v_Archery_g01"),
        ("v_HandstandPushups_g12_c03", "v_HandstandPushups_g12"),
        ("v_A_g01_c02/img_00001.jpg", "v_A_g01"),
        ("v_A_g01_c02/img_{:05}.jpg", "v_A_g01"),
        ("v_A_g01_c02_00001.jpg", "v_A_g01"),
        ("v_biking_03_02.mpg", "v_biking_03"),
        ("April_09_brush_hair_u_nm_np1_ba_goo_0.avi", "April_09"),
        ("RATRACE_wave_f_nm_np1_fr_goo_37.avi", "RATRACE"),
        ("Kung_Fu_ride_bike_f_cm_np1_le_bad_1.avi", "Kung_Fu"),
        ("-a_bcDEF012_000010_000020.mp4", "-a_bcDEF012"),
        ("clip 1.mp4", None),
        ("img_00001.jpg", None),
        ("g01_c02.mp4", None),
    ],
)
def test_recordings_are_known_by_published_names(name: str, recording: str | None) -> None:
    assert find_recordings([f"/set/class/{name}"], "/set", "auto") == [recording]


def test_a_recording_is_in_one_part() -> None:
    names = [f"c{c}/v_C{c}_g{g:02d}_c{k:02d}.avi" for c in range(3) for g in range(1, 11) for k in range(1, 5)]
    movies = [
        f"c{c}/Film{m}_{verb}_f_cm_np1_fr_med_{k}.avi"
        for m in range(10)
        for c, verb in ((3, "run"), (4, "jump"))
        for k in range(2)
    ]
    videos = [Video(f"/set/{name}", int(name[1])) for name in names + movies]
    for shares, counts in (([60, 20, 20], [24, 8, 8]), ([80, 0, 20], [32, 0, 8])):
        parts = split_videos(videos, shares, "/set", "auto")
        groups = [set(find_recordings([video.path for video in part], "/set", "auto")) for part in parts]
        assert sum(map(len, groups)) == len(set.union(*groups)) == 40
        assert [sum(video.label == 0 for video in part) for part in parts] == counts
        assert [sum(video.label == 4 for video in part) for part in parts] == [count // 2 for count in counts]


def test_an_expression_names_recordings() -> None:
    videos = [Video(f"/set/{c}/day{d} cam{k}.mp4", 0) for c in "a" for d in range(4) for k in range(3)]
    parts = split_videos(videos, [50, 25, 25], "/set", "(day[0-9]+)")
    days = [{video.path[7:11] for video in part} for part in parts]
    assert sorted(map(len, days)) == [1, 1, 2]
    assert len(set.union(*days)) == 4
    with pytest.raises(UsageError, match=r"has 12 videos of 1 recording \(recording a\); .* DATA.GROUP ''"):
        split_videos(videos, [50, 25, 25], "/set", "^(a)/")


def test_a_file_is_in_one_part_whatever_its_lines(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for i in range(6):
        (tmp_path / "a" / f"{i}.mp4").touch()
    (tmp_path / "a" / "link.mp4").symlink_to("0.mp4")
    (tmp_path / "again").symlink_to("a")
    names = [f"a/{i}.mp4" for i in range(6)] * 2 + ["a/link.mp4", "a/1.webm", "again/2.mp4"]
    videos = [Video(str(tmp_path / name), 0) for name in names]
    videos += [Video(f"{tmp_path}/a/3.mp4", 0, section=Section(i, i + 1.0)) for i in range(5)]
    parts = split_videos(videos, [50, 25, 25], tmp_path, "auto")
    files = [{Path(video.path).resolve().stem for video in part} for part in parts]
    assert sum(map(len, parts)) == len(videos)
    assert sum(map(len, files)) == 6 == len(set.union(*files))


def test_frames_of_one_folder_are_in_one_part() -> None:
    frames = [Video(f"/set/a/v{v}/img_{i:05}.jpg", 0) for v in range(4) for i in range(9)]
    parts = split_videos(frames, [50, 25, 25], "/set", "auto")
    assert [len(part) for part in parts] == [18, 9, 9]
    folders = [Video(f"/set/a/clip.{i}", 0) for i in range(8)]
    assert [len(part) for part in split_videos(folders, [50, 25, 25], "/set", "auto")] == [4, 2, 2]
    stills = [Video(f"/set/a/{i:05}.jpg", 0) for i in range(8)]  # of a class, not of a video
    assert [len(part) for part in split_videos(stills, [50, 25, 25], "/set", "auto")] == [4, 2, 2]
