"""Lists as data sets publish them: what each says is read, and a run trains and tests on it."""

import csv
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stvit_video import run
from stvit_video.common.errors import UsageError
from stvit_video.data.lists.annotations import Section, Video
from stvit_video.data.lists.class_names import read_classes
from stvit_video.data.lists.tables import Reading
from stvit_video.data.lists.videos import ListReader
from tests.conftest import numbered_frames, read_list, refusal, write_empty

# path from the root, class or classes, section
Row = tuple[str, str | tuple[str, ...], Section | None]


@dataclass(frozen=True)
class Published:
    """A small copy of a data set: its list files, its videos, and what the lists say of these."""

    lists: Mapping[str, str | bytes]
    videos: str  # with blanks between them; folders of frames end in /
    train: list[Row]
    test: list[Row]
    keys: Mapping[str, str] = field(default_factory=dict)
    train_list: str = "train"
    test_list: str = "test"


EPIC = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame,"
    "narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes\n"
)
EPIC_TRAIN = (
    "P01_01_0,P01,P01_01,00:00:00.080,00:00:00.20,00:00:00.80,6,21,open door,open,1,door,0,['door'],[0]\n"
    'P01_01_1,P01,P01_01,00:00:00.500,00:00:00.60,00:00:01.20,16,31,"take cup, plate",take,0,cup,1,'
    "\"['cup', 'plate']\",\"[1, 2]\"\n"
)
SEGMENTS = {
    "version": "VERSION 1.3",
    "taxonomy": [],
    "database": {
        "abcdefghij1": {
            "duration": 1.6,
            "subset": "training",
            "annotations": [{"segment": [0.2, 0.8], "label": "Surfing"}, {"segment": [0.9, 1.5], "label": "Archery"}],
        },
        "abcdefghij2": {
            "duration": 1.6,
            "subset": "validation",
            "annotations": [{"segment": [0.1, 1.1], "label": "Surfing"}],
        },
        "abcdefghij3": {"duration": 1.6, "subset": "testing", "annotations": []},
    },
}
CHARADES = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length\n"
KINETICS = "label,youtube_id,time_start,time_end,split\n"
HMDB = "testTrainMulti_7030_splits"

SETS = {
    "ucf101": Published(
        {
            "lists/classInd.txt": "1 ApplyEyeMakeup\r\n2 YoYo\r\n",
            "lists/trainlist01.txt": "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\r\nYoYo/v_YoYo_g09_c02.avi 2\r\n",
            "lists/testlist01.txt": "YoYo/v_YoYo_g01_c01.avi\r\nApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\r\n",
        },
        "UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi "
        "UCF-101/YoYo/v_YoYo_g09_c02.avi UCF-101/YoYo/v_YoYo_g01_c01.avi",
        [
            ("UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", "ApplyEyeMakeup", None),
            ("UCF-101/YoYo/v_YoYo_g09_c02.avi", "YoYo", None),
        ],
        [
            ("UCF-101/YoYo/v_YoYo_g01_c01.avi", "YoYo", None),
            ("UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi", "ApplyEyeMakeup", None),
        ],
        {"DATA.CLASSES": "lists/classInd.txt"},
        "lists/trainlist01.txt",
        "lists/testlist01.txt",
    ),
    "hmdb51": Published(
        {
            f"{HMDB}/wave_test_split1.txt": "a_wave_u_cm_np1_fr_med_0.avi 1 \nb_wave_u_cm_np1_fr_med_1.avi 2 \n",
            f"{HMDB}/brush_hair_test_split1.txt": "c_brush.avi 0 \nd [x] brush.avi 1 \ne_brush.avi 2 \n",
            f"{HMDB}/wave_test_split2.txt": "a_wave_u_cm_np1_fr_med_0.avi 2 \n",
        },
        "wave/a_wave_u_cm_np1_fr_med_0.avi wave/b_wave_u_cm_np1_fr_med_1.avi brush_hair/c_brush.avi "
        "brush_hair/d\\0[x]\\0brush.avi brush_hair/e_brush.avi",
        [("brush_hair/d [x] brush.avi", "brush_hair", None), ("wave/a_wave_u_cm_np1_fr_med_0.avi", "wave", None)],
        [("brush_hair/e_brush.avi", "brush_hair", None), ("wave/b_wave_u_cm_np1_fr_med_1.avi", "wave", None)],
        {},
        f"{HMDB}/*_test_split1.txt",
        f"{HMDB}/*_test_split1.txt",
    ),
    "kinetics json, whole and cut files": Published(
        {
            "train.json": json.dumps(
                {
                    "abcdefghij1": {"annotations": {"label": "yoga", "segment": [0.0, 1.0]}, "subset": "train"},
                    "abcdefghij2": {"annotations": {"label": "ski jump", "segment": [9.0, 19.0]}, "subset": "train"},
                }
            ),
            "test.csv": KINETICS + "yoga,abcdefghij3,1,2,validate\nski jump,abcdefghij4,0,10,validate\n",
        },
        "abcdefghij1.mp4 ski/abcdefghij2_000009_000019.mp4 yoga/abcdefghij3_000001_000002.mp4 abcdefghij4.mp4",
        [
            ("abcdefghij1.mp4", "yoga", Section(0, 1, may_be_file=True)),
            ("ski/abcdefghij2_000009_000019.mp4", "ski jump", None),
        ],
        [
            ("yoga/abcdefghij3_000001_000002.mp4", "yoga", None),
            ("abcdefghij4.mp4", "ski jump", Section(0, 10, may_be_file=True)),
        ],
        {},
        "train.json",
        "test.csv",
    ),
    "something-something v1": Published(
        {
            "labels.csv": "Pushing something, gently\nHolding something\n",
            "train": "100218;Holding something\n24413;Pushing something, gently\n",
            "test": "7;Holding something\n",
        },
        "20bn-something-something-v1/100218/ 20bn-something-something-v1/24413/ 20bn-something-something-v1/7/",
        [
            ("20bn-something-something-v1/100218", "Holding something", None),
            ("20bn-something-something-v1/24413", "Pushing something, gently", None),
        ],
        [("20bn-something-something-v1/7", "Holding something", None)],
        {"DATA.CLASSES": "labels.csv"},
    ),
    "diving48": Published(
        {
            "vocab.json": json.dumps([["Back", "15som", "05Twis", "FREE"], ["Forward", "Dive", "NoTwis", "PIKE"]]),
            "train": json.dumps(
                [
                    {"vid_name": "x_00012", "label": 1, "start_frame": 0, "end_frame": 176},
                    {"vid_name": "x_00013", "label": 0, "start_frame": 0, "end_frame": 88},
                ]
            ),
            "test": json.dumps([{"vid_name": "y_00001", "label": 1, "start_frame": 0, "end_frame": 9}]),
        },
        "rgb/x_00012.mp4 rgb/x_00013.mp4 rgb/y_00001.mp4",
        [("rgb/x_00012.mp4", "Forward_Dive_NoTwis_PIKE", None), ("rgb/x_00013.mp4", "Back_15som_05Twis_FREE", None)],
        [("rgb/y_00001.mp4", "Forward_Dive_NoTwis_PIKE", None)],
        {"DATA.CLASSES": "vocab.json"},
    ),
    "moments in time": Published(
        {
            "categories.txt": "clapping,0\nadult+female+singing,1\n",
            "train": "clapping/yt-1.mp4,clapping,3,1\nadult+female+singing/v_2.mp4,adult+female+singing,4,0\n",
            "test": "clapping/fl-3.mp4,clapping,3,0\n",
        },
        "clapping/yt-1.mp4 adult+female+singing/v_2.mp4 clapping/fl-3.mp4",
        [("clapping/yt-1.mp4", "clapping", None), ("adult+female+singing/v_2.mp4", "adult+female+singing", None)],
        [("clapping/fl-3.mp4", "clapping", None)],
        {"DATA.CLASSES": "categories.txt"},
    ),
    "mini-kinetics": Published(
        {"classes": "dance\nyoga\n", "train": "abcdefghij1\n-bcdefghij2\n", "test": "_bcdefghij3\n"},
        "yoga/abcdefghij1_000001_000011.mp4 dance/-bcdefghij2.mp4 yoga/_bcdefghij3.webm",
        [("yoga/abcdefghij1_000001_000011.mp4", "yoga", None), ("dance/-bcdefghij2.mp4", "dance", None)],
        [("yoga/_bcdefghij3.webm", "yoga", None)],
        {"DATA.CLASSES": "classes"},
    ),
    "epic-kitchens, verbs": Published(
        {"verbs.csv": "id,key,instances,category\n0,take,\"['take', 'get']\",retrieve\n1,open,\"['open']\",access\n"}
        | {"train": EPIC + EPIC_TRAIN, "test": EPIC + EPIC_TRAIN.replace("P01_01", "P02_101")},
        "P01/videos/P01_01.MP4 P02/rgb_frames/P02_101/",
        [("P01/videos/P01_01.MP4", "open", Section(0.2, 0.8)), ("P01/videos/P01_01.MP4", "take", Section(0.6, 1.2))],
        [
            ("P02/rgb_frames/P02_101", "open", Section(5, 21, in_frames=True)),
            ("P02/rgb_frames/P02_101", "take", Section(15, 31, in_frames=True)),
        ],
        {"DATA.CLASSES": "verbs.csv"},
    ),
    "epic-kitchens, nouns": Published(
        {"train": EPIC + EPIC_TRAIN, "test": EPIC + EPIC_TRAIN.replace("P01_01", "P02_101")},
        "P01_01.MP4 P02_101.MP4",
        [("P01_01.MP4", "0", Section(0.2, 0.8)), ("P01_01.MP4", "1", Section(0.6, 1.2))],
        [("P02_101.MP4", "0", Section(0.2, 0.8)), ("P02_101.MP4", "1", Section(0.6, 1.2))],
        {"DATA.LABEL": "noun_class"},
    ),
    "activitynet": Published(
        {"activity_net.v1-3.min.json": json.dumps(SEGMENTS)},
        "videos/v_abcdefghij1.mp4 videos/abcdefghij2.mkv",
        [
            ("videos/v_abcdefghij1.mp4", "Surfing", Section(0.2, 0.8)),
            ("videos/v_abcdefghij1.mp4", "Archery", Section(0.9, 1.5)),
        ],
        [("videos/abcdefghij2.mkv", "Surfing", Section(0.1, 1.1))],
        {},
        "activity_net.v1-3.min.json",
        "activity_net.v1-3.min.json",
    ),
    "hacs clips": Published(
        {
            "clips.csv": "classname,youtube_id,subset,start,end,label\n"
            "Archery,a2X2hz1G6i8,training,0.2,1.2,1\nArchery,a2X2hz1G6i8,training,0.4,1.4,-1\n"
            "Yo-yo,b2X2hz1G6i8,training,0.0,1.0,1\nYo-yo,c2X2hz1G6i8,validation,0.5,1.5,1\n"
        },
        "Archery/v_a2X2hz1G6i8.mp4 b2X2hz1G6i8.mp4 c2X2hz1G6i8.mp4",
        [
            ("Archery/v_a2X2hz1G6i8.mp4", "Archery", Section(0.2, 1.2)),
            ("b2X2hz1G6i8.mp4", "Yo-yo", Section(0, 1)),
        ],
        [("c2X2hz1G6i8.mp4", "Yo-yo", Section(0.5, 1.5))],
        {},
        "clips.csv",
        "clips.csv",
    ),
    "charades": Published(
        {
            "classes.txt": "c000 Holding some clothes\nc001 Putting clothes somewhere\nc002 Closing a door\n",
            "train": CHARADES
            + '46GP8,HR43,Kitchen,6,7,Yes,"He cooks; she, too.",food;stove,"",c002 11.90 21.20;c000 0.00 12.60;'
            + "c002 1 2,24.83\nN11GT,0KZ7,Stairs,7,7,Yes,x,y,z,,18.33\n",
            "test": CHARADES + "0IH69,4IHQ,Bed,7,7,No,x,y,z,c001 0.0 1.0,30.1\n",
        },
        "Charades_v1_480/46GP8.mp4 Charades_v1_480/N11GT.mp4 Charades_v1_480/0IH69.mp4",
        [
            ("Charades_v1_480/46GP8.mp4", ("Holding some clothes", "Closing a door"), None),
            ("Charades_v1_480/N11GT.mp4", (), None),
        ],
        [("Charades_v1_480/0IH69.mp4", ("Putting clothes somewhere",), None)],
        {"DATA.CLASSES": "classes.txt"},
    ),
    "mmaction2, several labels": Published(
        {"train": "a.mp4 1 3\nb.mp4 0\n", "test": "c d.mp4 2 0 2\n"},
        "a.mp4 b.mp4 c\\0d.mp4",
        [("a.mp4", ("1", "3"), None), ("b.mp4", ("0",), None)],
        [("c d.mp4", ("0", "2"), None)],
        {"DATA.MULTI_LABEL": "True"},
    ),
    "mmaction2, frames": Published(
        {"train": "frames/a 40 1\nframes/b 40 0\n", "test": "frames/c 12 20 1\nframes/c 12 8 0\n"},
        "frames/a/ frames/b/ frames/c/",
        [("frames/a", "1", None), ("frames/b", "0", None)],
        [
            ("frames/c", "1", Section(12, 32, in_frames=True)),
            ("frames/c", "0", Section(12, 20, in_frames=True)),
        ],
    ),
    "start and stop": Published(
        {"train": "a b.mp4 3 20 1\na b.mp4 22 40 0\n", "test": "c.mp4 0 9 1\n"},
        "a\\0b.mp4 c.mp4",
        [("a b.mp4", "1", Section(3, 20, in_frames=True)), ("a b.mp4", "0", Section(22, 40, in_frames=True))],
        [("c.mp4", "1", Section(0, 9, in_frames=True))],
        {"DATA.COLUMNS": "path start_frame stop_frame label"},
    ),
    "pandas": Published(
        {
            "train": ',Video Path,class_name\n0,"clips\\one, two.mp4",tai chi\n1,clips\\b.mp4,"yoga, on a mat"\n',
            "test": "\ufeffUnnamed: 0;label;file\r\n17;tai chi;clips/c.mp4\r\n".encode(),
        },
        "clips/one,\\0two.mp4 clips/b.mp4 clips/c.mp4",
        [("clips/one, two.mp4", "tai chi", None), ("clips/b.mp4", "yoga, on a mat", None)],
        [("clips/c.mp4", "tai chi", None)],
    ),
    "other letters": Published(
        {
            "train": "caf\xe9/a.mp4 1\nb.mp4 0\n".encode("latin-1"),  # the name on disk is UTF-8
            "test": "re\u0301sume\u0301.mp4\t1\r\n".encode("utf-16"),  # é of two letters, as macOS writes it
        },
        "caf\xe9/a.mp4 b.mp4 r\xe9sum\xe9.mp4",
        [("caf\xe9/a.mp4", "1", None), ("b.mp4", "0", None)],
        [("r\xe9sum\xe9.mp4", "1", None)],
    ),
}


def build(name: str, root: Path, video: Path | None = None, frames: int = 1) -> list[str]:
    """Write a set to ``root``, with copies of ``video`` or else empty files; return the keys of its configuration."""
    published = SETS[name]
    for file, content in published.lists.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    for file in published.videos.split():
        path = root / file.replace("\\0", " ")
        (path if file.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if file.endswith("/"):
            for i in range(40 if name == "mmaction2, frames" else frames):
                Image.fromarray(np.full((64, 64, 3), i, np.uint8)).save(path / f"{i + 1:05}.jpg")
        elif video is None:
            path.touch()
        else:
            os.link(video, path)
    keys = {"DATA.ROOT": str(root), "DATA.CLASSES": "", **published.keys}
    lists = {"DATA.TRAIN_LIST": published.train_list, "DATA.TEST_LIST": published.test_list, "DATA.VAL_LIST": ""}
    return [word for pair in {**keys, **lists}.items() for word in pair]


@pytest.mark.parametrize("name", SETS)
def test_a_published_list_says_what_it_says(name: str, tmp_path: Path) -> None:
    build(name, tmp_path)
    published = SETS[name]
    keys = {key.rpartition(".")[2]: value for key, value in published.keys.items()}
    reader = ListReader(
        root=tmp_path,
        lists={"train": published.train_list, "val": "", "test": published.test_list},
        class_file=keys.get("CLASSES", ""),
        reading=Reading(
            tuple(keys.get("COLUMNS", "").split()), keys.get("LABEL", ""), True if "MULTI_LABEL" in keys else None
        ),
    )
    for split, expected in (("train", published.train), ("test", published.test)):
        found: list[Row] = []
        for video in reader.videos(split):
            assert not video.missing
            assert Path(video.path).exists()
            labels = video.labels
            classes = reader.classes[video.label] if labels is None else tuple(reader.classes[i] for i in labels)
            found.append((os.path.relpath(video.path, tmp_path), classes, video.section))
        assert found == expected


# Each published form once in the whole pipeline; the others differ from these in reading alone.
SHORT = ("ucf101", "activitynet", "charades")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in SHORT else pytest.mark.long) for name in SETS],
)
def test_a_run_trains_and_tests_on_a_published_list(
    name: str, tmp_path: Path, write_clip: Callable[..., Path], small_run: Callable[..., list[str]]
) -> None:
    keys = build(name, tmp_path / "data", write_clip(numbered_frames(40, 64, 64)), frames=40)
    assert run.main(small_run("TRAIN.MAX_STEPS", "1", "TEST.CLIPS", "2", *keys)) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["scored"] == results["videos"] == len(SETS[name].test)
    with (tmp_path / "run" / "predictions.csv").open(newline="") as file:
        assert len({row["path"] for row in csv.DictReader(file)}) == len(
            SETS[name].test
        )  # a section is named by itself


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a.mp4 1 3\nb.mp4 2 4\n", r"'a.mp4 1 3' has several numbers .* DATA.MULTI_LABEL True .* DATA.COLUMNS"),
        ("a.mp4 1\nb.mp4 2 4\n", r"'b.mp4 2 4' has several numbers"),
        ("a.mp4 1 3 5\n", r"has several numbers"),
        ("a.mp4 1.5 3 5\n", r"has several numbers .* 'path start stop label' .seconds."),
        ("3 a.mp4\n", r"'3 a.mp4' seems to begin with its label; .*DATA.COLUMNS 'label path'"),
        ("f 3 0\n", r"'f 3 0' has several numbers"),  # the folder has two frames
        ("clip,gt\na.mp4,yoga\n", r"columns clip, gt, none of which is known to hold labels"),
        ("which,gt\na.mp4,yoga\nb.mp4,ski\n", r"'which,gt' names columns, none of which is known"),
        (",which,gt\n0,a.mp4,yoga\n1,b.mp4,ski\n", r"',which,gt' names columns, none of which is known"),
        ("which gt\na.mp4 3\n", r"line 1: 'which gt' has no label"),
        ("path,score\na.mp4,3\n", r"columns path, score, none of which is known to hold labels.*DATA.LABEL"),
        ("path,start,end,label\na.mp4,1,x,ski\n", r"line 2: time 'x'; give seconds, as in 12.5"),
        ("path,start_frame,end_frame,label\na.mp4,1,2.5,ski\n", r"line 2: frame '2.5'; give a whole number"),
        ("path,label\na.mp4,ski\nb.mp4,\n", r"line 3: label '' is empty"),
        ('path,labels\na.mp4,"[0, 1, 1]"\n', r"line 2: labels 0 1 1 say yes or no to each class"),
        ("path,label\na.mp4,0.25\nb.mp4,1\n", r"line 2: label 0.25 is no whole number; give"),
        ('[{"path": "a.mp4", "label": null}]', r"entry 1: label '' is empty"),
        ("path,label\na.mp4,-1\n", r"line 2: label -1 is negative"),
        ("path,label\na.mp4,ski\nb.mp4,yoga,mat\n", r"line 3 has 3 fields, not 2"),
        ('{"a": 1}', r"is not a JSON list of videos"),
        ('[{"label": "a", "score": 1}]', r"columns label, score, none of which is known to name the videos"),
        ('[{"path": "a.mp4", "label": "a"}, {"path": "b.mp4"}]', r"entry 2 has other keys than the first"),
        ('{"a": {"annotations": [{"label": "x"}]}}', r"video a: .* is no segment; give"),
        ("a.mp4\u00a01.5 3\n", r"has several numbers"),  # a blank that no line breaks at
        ('{"a": {"annotations": {"segment": [0, 1]}}}', r"no labelled videos: test lists are published without"),
    ],
)
def test_a_list_that_may_mean_several_things_is_refused(tmp_path: Path, content: str, says: str) -> None:
    write_empty(tmp_path, "f/1.jpg f/2.jpg")
    (tmp_path / "list").write_text(content)
    assert re.search(says, refusal(read_list, tmp_path / "list", tmp_path))


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ("label start", "write one path and at least one label"),
        ("path number label", "allowed: path, label, start, stop"),
        ("label path", "separates its columns by blanks; the path has to come first"),
    ],
)
def test_wrong_columns_are_refused(tmp_path: Path, columns: str, says: str) -> None:
    (tmp_path / "list").write_text("a.mp4 1 3\n")
    with pytest.raises(UsageError, match=says):
        read_list(tmp_path / "list", tmp_path, columns=tuple(columns.split()))


def test_a_folder_that_ends_with_a_number_is_no_count_of_frames(tmp_path: Path) -> None:
    (tmp_path / "clips" / "video 3").mkdir(parents=True)
    (tmp_path / "list").write_text("clips/video 3 1\n")
    assert read_list(tmp_path / "list", tmp_path) == [Video(f"{tmp_path}/clips/video 3", 1)]


def test_a_file_name_in_two_folders_is_not_guessed(tmp_path: Path) -> None:
    write_empty(tmp_path, "x/a.mp4 y/a.mp4")
    (tmp_path / "list").write_text("a 1\n")
    assert "a lies in several folders" in refusal(read_list, tmp_path / "list", tmp_path)
    (tmp_path / "x" / "a.mp4").unlink()
    assert read_list(tmp_path / "list", tmp_path) == [Video(f"{tmp_path}/y/a.mp4", 1)]
    (tmp_path / "list").write_text("a.mp4 1\n")  # a file of the root, which is not there
    assert read_list(tmp_path / "list", tmp_path) == [Video(f"{tmp_path}/a.mp4", 1)]


@pytest.mark.parametrize(
    ("content", "names", "ids"),
    [
        ("1 a b\r\n2 c\r\n", ["a b", "c"], ["1", "2"]),
        ("0 a b\n1 c\n", ["a b", "c"], []),
        ("c000 a b\nc001 c\n", ["a b", "c"], ["c000", "c001"]),
        ("c,1\na b,0\n", ["a b", "c"], []),
        ("id,key,instances\n0,a b,\"['a', 'b']\"\n1,c,['c']\n", ["a b", "c"], []),
        ("label\na b\nc\n", ["a b", "c"], []),
        ("nr,action\n1,c\n0,a b\n", ["a b", "c"], []),
        ('{"0": "a b", "1": "c"}', ["a b", "c"], []),
        ('{"\\"a b\\"": 0, "c": 1}', ["a b", "c"], []),  # as PyTorchVideo has Kinetics' names
        ('[["a b"], "c"]', ["a b", "c"], []),
        ("3 pointer, 2 pointer\nsomething, something\n", ["3 pointer, 2 pointer", "something, something"], []),
    ],
)
def test_class_names_with_ids_and_headers(tmp_path: Path, content: str, names: list[str], ids: list[str]) -> None:
    (tmp_path / "classes").write_text(content)
    found = read_classes(tmp_path / "classes")
    assert (list(found.names), list(found.ids)) == (names, ids)


def test_ids_of_classes_with_gaps_are_refused(tmp_path: Path) -> None:
    (tmp_path / "classes").write_text("1 a\n3 b\n")
    assert "do not count from 0 or 1 without gaps (1, 3 ...)" in refusal(read_classes, tmp_path / "classes")
    (tmp_path / "classes").write_text("1 a\n2 b\n")
    (tmp_path / "list").write_text("x.mp4 0\n")
    names = read_classes(tmp_path / "classes")
    assert "label 0 is none of the 2 classes (1 to 2)" in refusal(names.label_of, 0, "List x: label 0")


def test_one_file_of_hmdb_is_not_a_list(tmp_path: Path) -> None:
    build("hmdb51", tmp_path)
    assert "give the files of all classes by a pattern" in refusal(read_list, tmp_path / HMDB / "wave_test_split1.txt")
    assert "matches 3 files, the first" in refusal(read_list, tmp_path / HMDB / "*_test_split?.txt")
    assert "matches 0 files" in refusal(read_list, tmp_path / HMDB / "*_test_split3.txt")
    reader = ListReader(root=tmp_path, lists={"train": HMDB, "val": "", "test": HMDB})
    assert f"its three splits by a pattern, as '{HMDB}/*_test_split1.txt'" in refusal(reader.videos, "train")


def test_lists_of_one_run_are_of_one_kind(tmp_path: Path) -> None:
    build("mmaction2, several labels", tmp_path)
    lists = {"train": "train", "val": "", "test": "other"}
    (tmp_path / "train").write_text("path,labels\na.mp4,ski|yoga\nb.mp4,ski\n")
    (tmp_path / "other").write_text("path,label\na.mp4,ski\n")
    reader = ListReader(root=tmp_path, lists=lists)
    assert [video.labels for video in reader.videos("train")] == [(0, 1), (0,)]
    with pytest.raises(
        UsageError, match=r"DATA.TEST_LIST .*other has one label a video, .*train several; give lists of"
    ):
        reader.videos("test")


@pytest.mark.parametrize(
    ("content", "files", "expected"),
    [
        (
            "clip_path,label\n/train/Swing/v.avi,Swing\n",
            "train/Swing/v.avi",
            [("train/Swing/v.avi", 0, None)],
        ),  # Kaggle
        ("# path label\na.mp4 3\n", "a.mp4", [("a.mp4", 3, None)]),
        ("sep=;\npath;label\na.mp4;ski\n", "a.mp4", [("a.mp4", 0, None)]),
        ("a.mp4,3.0\n", "a.mp4", [("a.mp4", 3, None)]),
        ("a, b.mp4 3\n", "a.mp4", [("a, b.mp4", 3, None)]),
        ("walk/1 2 5\n", "rgb/walk/1/1.jpg rgb/walk/1/2.jpg", [("rgb/walk/1", 5, None)]),
        ("a.mp4,caf\u00e9\nb.mp4,cafe\u0301\n", "a.mp4", [("a.mp4", 0, None), ("b.mp4", 0, None)]),
        ("path,label\na.mp4,3.0\n", "a.mp4", [("a.mp4", 3, None)]),
        (
            "run/a.mp4 run\nski jump/b.mp4 ski jump\n",
            "run/a.mp4",
            [("run/a.mp4", 0, None), ("ski jump/b.mp4", 1, None)],
        ),
        ("walk\\a.mp4 1\n", "videos/walk/a.mp4", [("videos/walk/a.mp4", 1, None)]),
        ("b_E_002184_A_0035 56\n", "gym/b_E_002184_A_0035.mp4", [("gym/b_E_002184_A_0035.mp4", 56, None)]),  # FineGym
        ("7;Fall\n", "flow/7/1.jpg rgb/7/1.jpg", [("rgb/7", 0, None)]),
        ('path,labels\na.mp4,"ski, yoga"\n', "a.mp4", [("a.mp4", 0, (0, 1))]),
        ('path,label\na.mp4,"ski, yoga"\n', "a.mp4", [("a.mp4", 0, None)]),
        ("path,label\na.mp4,\"['x, y', 'z']\"\n", "a.mp4", [("a.mp4", 0, (0, 1))]),
        (
            '{"path": "a.mp4", "label": 2}\n{"path": "b.mp4", "label": 0}\n',
            "a.mp4",
            [("a.mp4", 2, None), ("b.mp4", 0, None)],
        ),
        ('[{"path": "a.mp4", "labels": [2, 0]}]', "a.mp4", [("a.mp4", 0, (0, 2))]),
    ],
)
def test_habits_of_other_writers(
    tmp_path: Path, content: str, files: str, expected: list[tuple[str, int, tuple[int, ...] | None]]
) -> None:
    write_empty(tmp_path, files)
    (tmp_path / "list").write_text(content)
    found = read_list(tmp_path / "list", tmp_path)
    assert [(os.path.relpath(video.path, tmp_path), video.label, video.labels) for video in found] == expected


def test_labels_that_are_a_flag_for_each_class_are_refused(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("a.mp4 1 0\nb.mp4 0 1 1\n")
    says = refusal(lambda: read_list(tmp_path / "list", tmp_path, multi_label=True))
    assert "line 2: labels 0 1 1 say yes or no to each class" in says
