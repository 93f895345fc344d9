"""Lists as Kinetics and Something-Something publish them."""

import json
import re
from pathlib import Path

import pytest

from stvit_video.common.errors import UsageError
from stvit_video.data.lists.annotations import Video
from stvit_video.data.lists.catalogues import find_clips
from stvit_video.data.lists.formats import read_catalogue
from tests.conftest import read_list, refusal, write_empty

HEADER = "label,youtube_id,time_start,time_end,split\n"


def read_videos(path: Path, root: Path, *classes: str) -> list[tuple[str, int, bool]]:
    """Read a catalogue and find its videos; their paths start from ``root``."""
    videos = read_list(path, root, classes)
    return [(str(Path(video.path).relative_to(root)), video.label, video.missing) for video in videos]


def test_kinetics_videos_are_found_wherever_they_lie(tmp_path: Path) -> None:
    rows = [
        "yoga,flat1234567,5,15,train",
        "tai chi,-class_0000,83,93,train",
        '"passing American football (in game)",_split-0000,0,10,train',
        "yoga,plain123456,1,11,train",
        "yoga,frames12345,100,110,train",
        "yoga,flat1234567,5,15,train",
        "riding a/b,absent12345,123456,123466,train",
    ]
    (tmp_path / "train.csv").write_text(HEADER + "\n".join(rows))
    write_empty(
        tmp_path,
        "flat1234567_000005_000015.MP4 flat1234567.mp4 tai_chi/-class_0000_000083_000093.webm "
        "train/passing/_split-0000_000000_000010.mkv old/plain123456.avi frames12345_000100_000110/img_00001.jpg",
    )
    assert read_videos(tmp_path / "train.csv", tmp_path) == [
        ("flat1234567_000005_000015.MP4", 3, False),
        ("tai_chi/-class_0000_000083_000093.webm", 2, False),
        ("train/passing/_split-0000_000000_000010.mkv", 0, False),
        ("old/plain123456.avi", 3, False),
        ("frames12345_000100_000110", 3, False),
        ("flat1234567_000005_000015.MP4", 3, False),
        ("riding a_b/absent12345_123456_123466.mp4", 1, True),
    ]


@pytest.mark.parametrize(
    "content",
    [
        b"label,youtube_id,time_start,time_end,split\nyoga,abc,1,11,train\n",
        b"\xef\xbb\xbflabel,youtube_id,time_start,time_end,split\r\n\r\nyoga,abc,1,11,train\r\n,,,,\r\n",
        b'"time_end","split","is_cc","label","youtube_id","time_start"\n"11","train","0","yoga","abc","1"\n',
        b"\n Label, YouTube_ID, time_start, time_end\n yoga, abc, 1, 11",
    ],
    ids=["as published", "from Windows", "other columns", "by hand"],
)
def test_kinetics_columns_may_come_in_any_form(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.csv").write_bytes(content)
    write_empty(tmp_path, "x/abc_000001_000011.mp4")
    assert read_videos(tmp_path / "train.csv", tmp_path, "walk", "yoga") == [("x/abc_000001_000011.mp4", 1, False)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("youtube_id,time_start,time_end,split\nabc,1,11,test\n", "has no column label: test lists are published"),
        ("label,video,time_start,time_end\nyoga,abc,1,11\n", "has no column youtube_id; its first line"),
        (HEADER, "has no rows below its header"),
        (HEADER + "\nyoga,abc,1\n", "train.csv, line 3 has 3 fields, not 5 as the header"),
        (HEADER + "yoga,on a mat,abc,1,11,train\n", "line 2 has 6 fields"),
        (HEADER + ",abc,1,11,train\n", "line 2: label '' is empty; give a class"),
        (HEADER + "yoga,#NAME?,1,11,train\n", "line 2: youtube_id '#NAME?'; give letters"),
        (HEADER + "yoga,abc,1,1.5,train\n", "line 2: times '1' and '1.5'; give whole seconds"),
        (HEADER + "yoga,abc,-1,9,train\n", "line 2: times '-1' and '9'"),
        (HEADER + "yoga,abc,1,99999999,train\n", "line 2: times '1' and '99999999'"),
        (HEADER + '"yoga,abc,1,11,train\n', "line 2: damaged CSV (unexpected end of data)"),
    ],
)
def test_damaged_kinetics_lists_are_named_by_line(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "train.csv").write_text(content)
    assert says in refusal(read_catalogue, tmp_path / "train.csv")


def something(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8-sig")
    return path


def test_something_videos_are_found_wherever_they_lie(tmp_path: Path) -> None:
    holding = {"template": "Holding [something] next to [something]", "label": "holding a cup", "placeholders": []}
    names = ["78687", 2, "3", "4", "1", "78687"]
    content = [{"id": name, **holding} for name in names] + [{"id": "5", "template": "Closing [something]"}]
    path = something(tmp_path / "train.json", content)
    write_empty(tmp_path, "78687.webm 20bn/2.MP4 frames/3/1.jpg frames/3/1.mp4 4/img_00001.jpg a/b/5.webm")
    assert read_videos(path, tmp_path) == [
        ("78687.webm", 1, False),
        ("20bn/2.MP4", 1, False),
        ("frames/3", 1, False),
        ("4", 1, False),
        ("1.webm", 1, True),  # what lies in a folder of frames is no video
        ("78687.webm", 1, False),
        ("a/b/5.webm", 0, False),
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[", "is not JSON (Expecting value"),
        ("[" * 200_000, "is not JSON ("),
        ("walk.mp4 1", "is not JSON (Expecting value"),
        ("[]", "is not a JSON list of videos"),
        ('{"Holding something": "0"}', "the names of the classes goes to DATA.CLASSES"),
        ('["1"]', "entry 1 has no id"),
        ('[{"id": "1", "template": "Holding [something]"}, {"id": null}]', "train.json, entry 2 has no id"),
        ('[{"id": true, "template": "Holding [something]"}]', "entry 1 has no id"),
        ('[{"id": "7"}]', "entry 1 (id 7) has no template: test lists are published without labels"),
        ('[{"id": 7, "template": ["Holding"]}]', "entry 1 (id 7): template ['Holding'] is not text"),
        ('[{"id": 7, "template": ""}]', "entry 1 (id 7): template '' is not text"),
    ],
)
def test_damaged_something_lists_are_named_by_entry(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "train.json").write_text(content)
    assert says in refusal(read_catalogue, tmp_path / "train.json")


@pytest.mark.parametrize("name", ["a.mp4", "[a]/b.mp4", "[", "label time_starts.mp4", "path label.mp4"])
def test_lines_that_look_like_others_are_lines(tmp_path: Path, name: str) -> None:
    (tmp_path / "list.csv").write_text(f"{name} 1\n")
    (video,) = read_list(tmp_path / "list.csv", tmp_path)
    assert (video.path, video.label) == (f"{tmp_path}/{name}", 1)


def test_a_json_list_needs_no_ending(tmp_path: Path) -> None:
    path = something(tmp_path / "train.txt", [{"id": "1", "template": "Holding [something]"}])
    assert read_videos(path, tmp_path) == [("1.webm", 0, True)]
    path.write_text('\n[\n {"id": "1", "template": "Holding [something]"}\n]\n')
    assert read_videos(path, tmp_path) == [("1.webm", 0, True)]


def test_a_class_that_is_not_known_is_named_with_its_nearest(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(HEADER + "tai chi,abc,1,11,train\n")
    with pytest.raises(UsageError, match=r"'tai chi' is none of the 2 classes \(skiing to tai_chi\).*mean tai_chi\?"):
        read_videos(tmp_path / "train.csv", tmp_path, "skiing", "tai_chi")


def test_equal_names_hidden_folders_and_circular_links_change_nothing(tmp_path: Path) -> None:
    write_empty(tmp_path, "b/1.mp4 a/1.webm a/1.mp4 a/2.txt .trash/2.mp4 away/3.mp4")
    root = tmp_path / "root"
    root.mkdir()
    for name in ("b", "a", ".trash"):
        (tmp_path / name).rename(root / name)
    (root / "linked").symlink_to(tmp_path / "away")
    (root / "a" / "up").symlink_to(root)
    found = find_clips(root, re.compile("[0-9]+"))
    assert found.paths == {"1": f"{root}/a/1.mp4", "3": f"{root}/linked/3.mp4"}
    assert found.repeated == {"1"}
    (root / "b" / "4").write_bytes(b"\0\0\0\x20ftypisom")  # a video without ending
    assert find_clips(root, None).paths["4"] == f"{root}/b/4"
    assert find_clips(tmp_path / "absent", re.compile("[0-9]+")).paths == {}


def test_of_equal_class_names_the_first_gives_the_label(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(HEADER + "yoga,abc,1,11,train\n")
    missing = Video(f"{tmp_path}/yoga/abc_000001_000011.mp4", 1, missing=True)
    assert read_list(tmp_path / "train.csv", tmp_path, ["ski", "yoga", "yoga"]) == [missing]
