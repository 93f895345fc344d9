"""Which videos a configuration names."""

import json
import shutil
from pathlib import Path

import pytest
from fvcore.common.config import CfgNode
from PIL import Image

from stvit_video.common.errors import UsageError
from stvit_video.data.lists.annotations import Video, find_missing
from stvit_video.data.lists.videos import ListReader, build_lists
from tests.conftest import data_config, write_empty


def test_class_count_comes_from_the_data(small_set: Path) -> None:
    assert build_lists(data_config(small_set)).classes == (small_set / "motion" / "classes.txt").read_text().split()
    assert build_lists(data_config(small_set, "DATA.CLASSES", "")).classes == [str(i) for i in range(8)]
    assert len(build_lists(data_config(small_set, "DATA.CLASSES", "", "MODEL.NUM_CLASSES", "11")).classes) == 11
    with pytest.raises(UsageError, match="names 8"):
        _ = build_lists(data_config(small_set, "MODEL.NUM_CLASSES", "9")).classes


def test_class_names_of_folders_are_those_of_the_training_list(small_set: Path, tmp_path: Path) -> None:
    root = tmp_path / "stills"
    shutil.copytree(small_set / "stills", root)
    shutil.rmtree(root / "val" / "bar")  # validation folders alone would count one class less
    folders = ["DATA.ROOT", str(root), "DATA.TRAIN_LIST", "train", "DATA.TEST_LIST", "val", "DATA.CLASSES", ""]
    cfg = data_config(small_set, *folders)
    names = build_lists(cfg).classes
    assert names == sorted((small_set / "shape" / "classes.txt").read_text().split())
    videos = build_lists(cfg).videos("test")
    assert videos
    assert all(names[video.label] == Path(video.path).parent.name for video in videos)
    with pytest.raises(UsageError, match="names 8; unset the first"):
        _ = build_lists(data_config(small_set, *folders, "MODEL.NUM_CLASSES", "9")).classes
    (root / "val" / "bars").mkdir()
    with pytest.raises(UsageError, match=r"val/bars is none of the 8 classes.*Did you mean bar\?"):
        build_lists(cfg).videos("test")
    unnamed = ["DATA.TRAIN_LIST", "shape/train.csv", "DATA.TEST_LIST", "stills/val", "DATA.CLASSES", ""]
    with pytest.raises(UsageError, match=r"labels of .*train\.csv have no names; give DATA\.CLASSES"):
        build_lists(data_config(small_set, *unnamed)).videos("test")
    with pytest.raises(UsageError, match="is missing"):
        build_lists(data_config(small_set, "DATA.TEST_LIST", "")).videos("test")


@pytest.fixture
def kinetics(tmp_path: Path) -> Path:
    """A root with Kinetics lists: three training videos of three classes, two test videos, one of them missing."""
    header = "label,youtube_id,time_start,time_end,split\n"
    rows = "yoga,aaa,1,11,train\ntai chi,bbb,2,12,train\nskiing,ccc,3,13,train\n"
    (tmp_path / "train.csv").write_text(header + rows)
    (tmp_path / "test.csv").write_text(header + "yoga,ddd,4,14,val\ntai chi,eee,5,15,val\n")
    (tmp_path / "videos").mkdir()
    for name in ("aaa_000001_000011", "bbb_000002_000012", "ccc_000003_000013", "ddd_000004_000014"):
        (tmp_path / "videos" / f"{name}.mp4").touch()
    return tmp_path


def named_config(root: Path, *overrides: str) -> CfgNode:
    lists = ["DATA.TRAIN_LIST", "train.csv", "DATA.TEST_LIST", "test.csv", "DATA.CLASSES", ""]
    return data_config(root, *lists, *overrides)


def test_kinetics_labels_are_those_of_the_training_list(kinetics: Path) -> None:
    cfg = named_config(kinetics, "DATA.MAX_FAILURES", "0.5")
    assert build_lists(cfg).classes == ["skiing", "tai chi", "yoga"]
    assert [video.label for video in build_lists(cfg).videos("train")] == [2, 1, 0]
    assert build_lists(cfg).videos("test") == [
        Video(f"{kinetics}/videos/ddd_000004_000014.mp4", 2),
        Video(f"{kinetics}/tai chi/eee_000005_000015.mp4", 1, missing=True),
    ]
    (kinetics / "names.txt").write_text("yoga\nskiing\ntai chi\n")
    assert [v.label for v in build_lists(named_config(kinetics, "DATA.CLASSES", "names.txt")).videos("train")] == [
        0,
        2,
        1,
    ]
    (kinetics / "names.txt").write_text("yoga\nskiing\ntai_chi\n")
    with pytest.raises(UsageError, match=r"label 'tai chi' is none of the 3 classes.*Did you mean tai_chi\?"):
        build_lists(named_config(kinetics, "DATA.CLASSES", "names.txt")).videos("train")


def test_too_many_missing_kinetics_videos_stop_the_run(kinetics: Path) -> None:
    with pytest.raises(UsageError) as error:
        build_lists(named_config(kinetics)).videos("test")
    assert f"1 of 2 files are missing, the first {kinetics}/tai chi/eee_000005_000015.mp4; at most 10 % may" in str(
        error.value
    )
    assert f"Check DATA.ROOT {kinetics}" in str(error.value)


def test_numbered_training_lists_give_named_test_lists_no_labels(kinetics: Path) -> None:
    (kinetics / "numbers.txt").write_text("videos/aaa_000001_000011.mp4 1\n")
    with pytest.raises(UsageError, match=r"test\.csv gives its classes by name, but the labels of .*numbers\.txt have"):
        build_lists(named_config(kinetics, "DATA.TRAIN_LIST", "numbers.txt")).videos("test")


def test_an_id_of_several_folders_is_said(tmp_path: Path) -> None:
    write_empty(tmp_path, "old/1.mp4 new/1.mp4 new/2.mp4")
    (tmp_path / "list").write_text("id,label\n1,ski\n2,yoga\n")
    reader = ListReader(root=tmp_path, lists={"train": "list", "val": "", "test": "list"})
    assert [video.path for video in reader.videos("train")] == [f"{tmp_path}/new/1.mp4", f"{tmp_path}/new/2.mp4"]
    (note,) = reader.notes
    assert f"1 of 2 videos lie under one name in several folders; the first is taken, as {tmp_path}/new/1.mp4" in note


def test_something_labels_are_those_of_the_labels_file(tmp_path: Path) -> None:
    templates = {"1": "Holding [something] next to [something]", "2": "Closing [something]"}
    content = [{"id": name, "template": template} for name, template in templates.items()]
    (tmp_path / "train.json").write_text(json.dumps(content))
    labels = {"Holding something next to something": "0", "Closing something": "1", "Opening something": "2"}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    (tmp_path / "1.webm").touch()
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "1.jpg").touch()
    videos = [str(tmp_path / "1.webm"), str(tmp_path / "2")]
    cfg = named_config(tmp_path, "DATA.TRAIN_LIST", "train.json")
    assert build_lists(cfg).classes == ["Closing something", "Holding something next to something"]
    assert [(video.path, video.label) for video in build_lists(cfg).videos("train")] == [(videos[0], 1), (videos[1], 0)]
    cfg = named_config(tmp_path, "DATA.TRAIN_LIST", "train.json", "DATA.CLASSES", "labels.json")
    assert build_lists(cfg).classes == list(labels)
    assert [(video.path, video.label) for video in build_lists(cfg).videos("train")] == [(videos[0], 0), (videos[1], 1)]


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """Class folders 0 to 11 for training, and a list with numbers of the same videos' copies for the test."""
    for label in range(12):
        for folder in ("train", "held out"):
            (tmp_path / folder / str(label)).mkdir(parents=True)
            (tmp_path / folder / str(label) / "v.mp4").touch()
    (tmp_path / "test.txt").write_text("".join(f"held out/{label}/v.mp4 {label}\n" for label in range(12)))
    return tmp_path


def test_numbers_of_a_list_are_the_numbers_of_class_folders(numbered: Path) -> None:
    cfg = named_config(numbered, "DATA.TRAIN_LIST", "train", "DATA.TEST_LIST", "test.txt")
    lists = build_lists(cfg)
    assert lists.classes == [str(label) for label in range(12)]
    older = build_lists(cfg)  # a run that began when numbers were sorted as text
    older.natural = False
    assert older.classes == sorted(lists.classes)
    tested = build_lists(cfg)  # with such a run's weights
    tested.trained = older.classes
    alone = build_lists(named_config(numbered, "DATA.TRAIN_LIST", "absent", "DATA.TEST_LIST", "test.txt"))
    alone.trained = older.classes
    for reader in (lists, older, tested, alone):
        names = reader.classes
        for split in ("test",) if reader is alone else ("train", "test"):
            assert [names[video.label] == Path(video.path).parent.name for video in reader.videos(split)] == [True] * 12
    assert older.classes == tested.classes == alone.classes
    part = build_lists(named_config(numbered, "DATA.TRAIN_LIST", "absent", "DATA.TEST_LIST", "held out"))
    shutil.rmtree(numbered / "held out" / "3")
    part.trained = older.classes
    assert part.classes == older.classes  # a test of some of the classes


def test_numbers_for_classes_that_folders_name_need_their_names(numbered: Path) -> None:
    (numbered / "train" / "0").rename(numbered / "train" / "yoga")
    (numbered / "held out" / "0").rename(numbered / "held out" / "yoga")
    cfg = named_config(numbered, "DATA.TRAIN_LIST", "train", "DATA.TEST_LIST", "test.txt")
    (numbered / "test.txt").write_text("elsewhere/v.mp4 0\n")
    with pytest.raises(UsageError, match=r"test.txt has numbers for labels, but .*/train names its classes \(1, 10,"):
        build_lists(cfg).videos("test")
    (numbered / "test.txt").write_text("held out/yoga/v.mp4 0\nheld out/1/v.mp4 1\n")
    with pytest.raises(UsageError, match=r"yoga/v.mp4 has label 0, which is '1', but its folder is class 11"):
        build_lists(cfg).videos("test")
    (numbered / "test.txt").write_text("held out/yoga/v.mp4 11\nheld out/1/v.mp4 0\n")
    assert [video.label for video in build_lists(cfg).videos("test")] == [11, 0]  # as the folders say too


def test_folders_of_frames_are_videos(tmp_path: Path) -> None:
    for kind, name in ((kind, name) for kind in ("left", "right") for name in ("a/v", "a/w", "b/v")):
        for number in (1, 2, 10):
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{kind}_{number:05}.jpg")
    (tmp_path / "list.txt").write_text("a/v 0\na/w 0\nb/v 1\n")
    for source in (".", "list.txt"):
        lists = ["DATA.TRAIN_LIST", source, "DATA.TEST_LIST", source, "DATA.FRAMES", "8"]
        with pytest.raises(UsageError, match=r"folder of frames .*a/v: holds pictures of 2 kinds .*DATA.FRAME_PATTERN"):
            build_lists(named_config(tmp_path, *lists)).videos("train")
        lists += ["DATA.FRAME_PATTERN", "left_{:05}.jpg"]
        reader = build_lists(named_config(tmp_path, *lists))
        paths = [video.path for video in reader.videos("train")]
        assert paths == [f"{tmp_path}/{name}/left_{{:05}}.jpg" for name in ("a/v", "a/w", "b/v")]
        assert find_missing(reader.videos("train")) == ([], 3)
    pictures = "".join(f"a/v/left_{number:05}.jpg 0\n" for number in (1, 2, 10))
    (tmp_path / "list.txt").write_text(pictures)
    reader = build_lists(named_config(tmp_path, "DATA.TRAIN_LIST", "list.txt", "DATA.TEST_LIST", ""))
    assert len(reader.videos("train")) == 3
    assert "3 of 3 paths are pictures, each shown in all 8 frames of a clip" in reader.notes[0]


def test_one_file_is_a_list_where_its_folder_is_a_class(kinetics: Path) -> None:
    (kinetics / "tai chi").mkdir()
    path = kinetics / "tai chi" / "mine.MP4"
    path.touch()
    shutil.copy(path, kinetics / "videos")
    assert build_lists(named_config(kinetics, "DATA.TEST_LIST", "tai chi/mine.MP4")).videos("test") == [
        Video(str(path), 1)
    ]
    assert build_lists(named_config(kinetics, "DATA.TEST_LIST", str(path))).videos("test") == [Video(str(path), 1)]
    with pytest.raises(UsageError, match=r"'videos' is none of the 3 class names; .* line `path label`"):
        build_lists(named_config(kinetics, "DATA.TEST_LIST", "videos/mine.MP4")).videos("test")
    alone = named_config(kinetics, "DATA.TRAIN_LIST", "", "DATA.TEST_LIST", "tai chi/mine.MP4")
    with pytest.raises(UsageError, match="'tai chi' is none of the 0 class names"):
        _ = build_lists(alone).classes
