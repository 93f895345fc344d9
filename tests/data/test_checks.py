"""What is said of the lists of a run, and what is refused."""

from pathlib import Path

import pytest

from stvit_video.common.errors import UsageError
from stvit_video.data.lists.annotations import Section, Video
from stvit_video.data.lists.checks import (
    check_count,
    check_lists,
    check_names,
    describe_classes,
    describe_lists,
    find_copies,
    label_by_name,
    name_recordings,
)


def videos_of(*names: str, label: int = 0) -> list[Video]:
    return [Video(f"/set/{name}", label) for name in names]


def part_of(name: str, start: float, stop: float) -> Video:
    return Video(f"/set/{name}", 0, section=Section(start, stop))


def notes_of(group: str = "auto", **lists: list[Video]) -> list[str]:
    sources = {split: f"/set/{split}.csv" for split in lists}
    return check_lists(lists, sources, name_recordings(lists, "/set", group), group)


def test_classes_are_counted() -> None:
    line = describe_classes(["cartoon", "riding bikes", "yoga"], {0: 14, 1: 1208})
    assert line == "3 classes: cartoon 14, riding bikes 1,208, yoga 0"
    assert describe_classes(["a"], {0: 2}).startswith("1 class: a 2\nnote: there is one class alone")
    many = describe_classes([f"c{i}" for i in range(400)], dict.fromkeys(range(1, 400), 1000))
    assert many.startswith("400 classes of 0 to 1,000 videos: c0 0, c1 1,000, ")
    assert many.endswith("c11 1,000, ...")


def test_lists_are_described_with_recordings_and_gaps() -> None:
    train = videos_of(*(f"v_A_g{g:02d}_c{c:02d}.avi" for g in (1, 2) for c in (1, 2)))
    lists = {"train": train, "val": videos_of("x.mp4", label=2), "test": videos_of("x.mp4", label=2)}
    lines = describe_lists(["a", "b", "c"], lists, name_recordings(lists, "/set", "auto"))
    assert lines[0] == "3 classes: a 4, b 0, c 1"  # a list that serves twice is counted once
    assert lines[1].startswith("train: 4 videos of 2 recordings, 4 (100.0 %) missing")
    assert lines[2] == "note: train has no video of 2 of 3 classes: b, c"
    assert lines[3].startswith("val: 1 videos, 1 (100.0 %) missing")
    two = [Video("a", 0, labels=(0, 1)), Video("b", -1, labels=())]
    assert describe_lists(["a", "b"], {"test": two}, {"test": [None, None]})[0] == "2 classes: a 1, b 1"


def test_labels_that_count_from_one_are_refused() -> None:
    videos = {"train": videos_of("1", label=1) + videos_of("2", label=2), "test": videos_of("3", label=2)}
    with pytest.raises(UsageError, match=r"train: labels are 1 to 2 and none is 0.*Subtract 1 .*NUM_CLASSES 3 if"):
        check_count(["0", "1", "2"], videos, "train")
    check_count(["nothing", "a", "b"], videos, "train")  # the names say that there is such a class
    videos["test"] += videos_of("4")
    check_count(["0", "1", "2"], videos, "train")


@pytest.mark.parametrize(
    ("train", "test", "says"),
    [
        (
            "a.mp4 b.mp4",
            "b.mp4 c.mp4",
            r"1 of 2 videos of /set/test.csv are in /set/train.csv too, the first /set/b",
        ),
        ("a.mp4", "x/../a.mp4", r"1 of 1 videos of /set/test.csv are in /set/train.csv too"),
        ("1_x.mp4", "1_y.mp4", r"1 of 1 test videos are of recordings that training has too, the first 1"),
    ],
)
def test_what_would_leak_is_refused(train: str, test: str, says: str) -> None:
    lists = {"train": videos_of(*train.split()), "test": videos_of(*test.split())}
    with pytest.raises(UsageError, match=says):
        notes_of("([0-9])_" if "_" in train else "auto", **lists)


@pytest.mark.parametrize("train", [part_of("a", 1, 6), Video("/set/a", 0)])
@pytest.mark.parametrize("source", ["/set/train.csv", "/set/test.csv"])
def test_parts_of_a_file_with_frames_in_common_are_refused(train: Video, source: str) -> None:
    lists = {"train": [train], "test": [part_of("a", 9, 10), part_of("a", 5, 9)]}
    lists["train"] += [part_of("b", 0, 99)]
    sources = {"train": "/set/train.csv", "test": source}  # one file may hold both, in two subsets
    says = rf"{2 - bool(train.section)} of 2 videos of {source} are in /set/train.csv too, the first /set/a#t="
    with pytest.raises(UsageError, match=says):
        check_lists(lists, sources, name_recordings(lists, "/set", "auto"), "auto")


def test_the_same_file_behind_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"content")
    (tmp_path / "link.mp4").symlink_to("a.mp4")
    lists = {name: [Video(str(tmp_path / f"{file}.mp4"), 0)] for name, file in (("train", "a"), ("test", "link"))}
    with pytest.raises(UsageError, match=r"1 of 1 videos of /set/test.csv are in /set/train.csv too"):
        notes_of(**lists)


def test_what_lists_share_otherwise_is_said(tmp_path: Path) -> None:
    lists = {"train": videos_of("a.mp4", "a.mp4"), "val": videos_of("a.mp4"), "test": videos_of("c.mp4")}
    assert notes_of(**lists) == [
        "1 of 2 train videos are in the list more than once",
        "1 of 1 videos of /set/val.csv are in /set/train.csv too, the first /set/a.mp4",
    ]
    assert "1 files with different labels" in notes_of(test=videos_of("a") + videos_of("a", label=1))[0]
    parts = {"train": [part_of("a", 0, 5)], "test": [part_of("a", 5, 9)]}
    assert notes_of(**parts) == ["1 of 1 test videos are of recordings that training has too, the first /set/a"]
    assert notes_of("", **parts) == []
    ucf = {"train": videos_of("v_A_g01_c01.avi"), "test": videos_of("v_A_g01_c02.avi")}
    assert notes_of(**ucf) == ["1 of 1 test videos are of recordings that training has too, the first v_A_g01"]
    same = {"train": (videos := videos_of("a.mp4")), "test": videos}
    sources = dict.fromkeys(same, "/set/all.csv")
    (note,) = check_lists(same, sources, name_recordings(same, "/set", "auto"), "auto")
    assert note == "test is the training list: its accuracy is of videos that were learned"
    for name, content in (("1", b"content"), ("2", b"content"), ("3", b"CONTENT"), ("4", b""), ("5", b"")):
        (tmp_path / name).write_bytes(content)
    first, second = ([str(tmp_path / name) for name in names] for names in ("14", "235"))
    assert find_copies(first, second) == [(f"{tmp_path}/1", f"{tmp_path}/2")]


def test_an_expression_that_matches_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"DATA.GROUP '\(x\)' matches none of the paths, the first being /set/a"):
        name_recordings({"train": videos_of("a")}, "/set", "(x)")


def test_numbers_are_compared_with_the_folders_that_videos_lie_in() -> None:
    right = videos_of("ski/1", "ski/2") + videos_of("yoga/3", label=1)
    assert check_names(right, ["ski", "yoga"], "list")
    assert not check_names([*right, *videos_of("other/4")], ["ski", "yoga"], "list")
    with pytest.raises(UsageError, match=r"list: /set/ski/1 has label 0, which is 'yoga', .* for 3 of 3 videos"):
        check_names(right, ["yoga", "ski"], "list")
    numbers = [str(i) for i in (0, 1, 10, 2)]
    found = label_by_name(videos_of("a", label=10) + videos_of("b", label=2), numbers, "list")
    assert [video.label for video in found or ()] == [2, 3]
    with pytest.raises(UsageError, match="label 3 of /set/a is none of the 4 class folders"):
        label_by_name(videos_of("a", label=3), numbers, "list")
    assert label_by_name(right, ["ski", "1"], "list") is None
