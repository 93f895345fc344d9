"""Lists of videos, right and wrong."""

from pathlib import Path

import pytest

from stvit_video.common.errors import UsageError
from stvit_video.data.lists.annotations import (
    Video,
    check_files,
    check_labels,
    find_missing,
    summarise_videos,
)
from stvit_video.data.lists.class_names import ClassNames, read_classes
from tests.conftest import read_list, refusal


@pytest.mark.parametrize("separator", [" ", ",", "\t", ", ", "  "])
def test_separators_and_paths_with_spaces(tmp_path: Path, separator: str) -> None:
    (tmp_path / "list.csv").write_text(f"a.mp4{separator}3\n\nmy videos/b c.mp4{separator}0\r\n")
    assert read_list(tmp_path / "list.csv", "root") == [Video("root/a.mp4", 3), Video("root/my videos/b c.mp4", 0)]


def test_quoted_fields_are_what_they_hold(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text('"a.mp4","3"\n"my videos/b, c.mp4",0\n')
    assert read_list(tmp_path / "list.csv", "root") == [Video("root/a.mp4", 3), Video("root/my videos/b, c.mp4", 0)]


def test_absolute_paths_stay_and_a_byte_order_mark_is_no_part_of_the_path(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(b"\xef\xbb\xbf/v/\xc3\xa4.mp4 1\n")
    assert read_list(tmp_path / "list.csv", "root") == [Video("/v/ä.mp4", 1)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"a.mp4 1\nb.mp4\n", "line 2: 'b.mp4' has no label"),
        (b"a.mp4 1\nb.mp4 walking\n", "line 2: 'b.mp4 walking' has no label"),
        (b"a.mp4 1.5\n", "has no label"),
        (b"a.mp4 -1\n", "label -1 is negative"),
        (b'"clips/video 3"\n', "has no label"),  # a folder of frames
        (b'a.mp4 " 3"\n', "has no label"),
        (b"3\n", "has no label"),
        (b"a.mp4 --5\n", "has no label"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"\x00\x01 \x02\n" * 9, "line 1: '\\x00\\x01 \\x02' has no label"),
        (b"a.mp4 1000000\n", "label 1000000 is above 999,999"),
        (b"a.mp4 " + b"9" * 10_000, "label 99999999999999999999 is above 999,999"),
        (b"a" * 10_000, "line 1: 'aaa"),
    ],
)
def test_wrong_lists_are_named_by_line(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "list.csv").write_bytes(content)
    assert says in refusal(read_list, tmp_path / "list.csv")


def test_labels_out_of_range_and_missing_files(tmp_path: Path) -> None:
    videos = [Video(str(tmp_path / f"{i}.mp4"), i) for i in range(4)]
    check_labels(videos, 4, "list")
    with pytest.raises(UsageError, match=r"label 3 of .*3\.mp4 is out of range; allowed: 0 to 2"):
        check_labels(videos, 3, "list")
    with pytest.raises(UsageError, match=r"4 of 4 files are missing, the first .*0\.mp4"):
        check_files(videos, 0.5, "list", tmp_path)
    for video in videos[:2]:
        Path(video.path).touch()
    check_files(videos, 0.5, "list", tmp_path)


def test_a_folder_of_frames_is_a_file_unless_it_is_empty(tmp_path: Path) -> None:
    for name in ("full", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "1.jpg").touch()
    (tmp_path / "list.txt").write_text("full 0\nempty 1\nfull/1.jpg 2\nabsent.mp4 2\n")
    videos = read_list(tmp_path / "list.txt", tmp_path)
    assert find_missing(videos) == ([f"{tmp_path}/empty", f"{tmp_path}/absent.mp4"], 4)


@pytest.mark.parametrize(
    ("videos", "says"),
    [
        ([Video("absent.mp4", 0)] * 10, "10 of 10 files are missing, the first absent.mp4;"),
        ([Video("absent.mp4", 0)] * 5120, "512 of 512 files looked at are missing, the first absent.mp4;"),
        (
            [Video(__file__, 0)] * 8999 + [Video("gone.mp4", 0, missing=True)] * 1001,
            "1,001 of 10,000 files are missing",
        ),
    ],
    ids=["all looked at", "some looked at", "searched for"],
)
def test_too_many_missing_files_are_an_error_that_says_how_many(videos: list[Video], says: str) -> None:
    said = refusal(check_files, videos, 0.1, "train.csv", "/data")
    assert f"train.csv: {says}" in said
    assert "Check DATA.ROOT /data and the list" in said
    check_files(videos, 1.0, "train.csv", "/data")


@pytest.mark.parametrize(
    ("videos", "line"),
    [
        ([Video(__file__, 0)] * 1234, "val: 1,234 videos"),
        (
            [Video("gone.mp4", 0, missing=True)] * 56 + [Video("unseen.mp4", 0)] * 1178,
            "val: 1,234 videos, 56 (4.5 %) missing, the first gone.mp4; "
            "they count as failures and are listed in failures.csv",
        ),
        (
            [Video("gone.mp4", 0), Video(__file__, 0)] * 2500,
            "val: 5,000 videos, 278 of 556 looked at (50.0 %) missing, the first gone.mp4; "
            "they count as failures and are listed in failures.csv",
        ),
    ],
    ids=["none", "searched for", "looked at"],
)
def test_a_list_is_summarised_with_what_is_missing(videos: list[Video], line: str) -> None:
    assert summarise_videos(videos, "val") == line


@pytest.mark.parametrize(
    "content", [b"a b\nc\n", b"\xef\xbb\xbfa b\r\n\r\nc", b'{"c": "1", "a b": 0}', b'{"a b":"0","c":"1"}']
)
def test_class_names_come_one_a_line_or_with_their_labels(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "labels").write_bytes(content)
    assert read_classes(tmp_path / "labels") == ClassNames(["a b", "c"])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is not JSON"),
        ('{"a": 0', "is not JSON"),
        ("[" * 200_000, "is not JSON"),
        ("{}", "does not give each name its label"),
        ('["a", 2]', "does not give each name its label"),
        ('{"a": 1}', "does not give each name its label"),
        ('{"a": 0, "b": "0"}', "does not give each name its label"),
        ('{"a": 0, "b": [1]}', "does not give each name its label"),
        ('{"a": 0.0}', "does not give each name its label"),
        ('{"a": true}', "does not give each name its label"),
    ],
)
def test_wrong_labels_of_class_names_are_refused(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "labels.json").write_text(content)
    assert says in refusal(read_classes, tmp_path / "labels.json")


def test_class_names(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("riding a bike\nskiing\n\n")
    assert read_classes(tmp_path / "classes.txt").names == ["riding a bike", "skiing"]
    (tmp_path / "classes.txt").write_text("\n")
    with pytest.raises(UsageError, match="is empty"):
        read_classes(tmp_path / "classes.txt")
    with pytest.raises(UsageError, match="is not a file"):
        read_list(tmp_path / "absent.csv")
