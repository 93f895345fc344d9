"""Which videos a configuration names."""

import shutil
from pathlib import Path

import pytest

from stvit_video.data.videos import build_classes, build_videos
from stvit_video.errors import UsageError
from tests.conftest import data_config


def test_class_count_comes_from_the_data(small_set: Path) -> None:
    assert build_classes(data_config(small_set)) == (small_set / "motion" / "classes.txt").read_text().split()
    assert build_classes(data_config(small_set, "DATA.CLASSES", "")) == [str(i) for i in range(8)]
    assert len(build_classes(data_config(small_set, "DATA.CLASSES", "", "MODEL.NUM_CLASSES", "11"))) == 11
    with pytest.raises(UsageError, match="names 8"):
        build_classes(data_config(small_set, "MODEL.NUM_CLASSES", "9"))


def test_class_names_of_folders_are_those_of_the_training_list(small_set: Path, tmp_path: Path) -> None:
    root = tmp_path / "stills"
    shutil.copytree(small_set / "stills", root)
    shutil.rmtree(root / "val" / "bar")  # validation folders alone would count one class less
    folders = ["DATA.ROOT", str(root), "DATA.TRAIN_LIST", "train", "DATA.TEST_LIST", "val", "DATA.CLASSES", ""]
    cfg = data_config(small_set, *folders)
    names = build_classes(cfg)
    assert names == sorted((small_set / "shape" / "classes.txt").read_text().split())
    videos = build_videos(cfg, "test")
    assert videos
    assert all(names[video.label] == Path(video.path).parent.name for video in videos)
    with pytest.raises(UsageError, match="names 8; unset the first"):
        build_classes(data_config(small_set, *folders, "MODEL.NUM_CLASSES", "9"))
    (root / "val" / "bars").mkdir()
    with pytest.raises(UsageError, match=r"val/bars is of none of the 8 classes.*Did you mean bar\?"):
        build_videos(cfg, "test")
    unnamed = ["DATA.TRAIN_LIST", "shape/train.csv", "DATA.TEST_LIST", "stills/val", "DATA.CLASSES", ""]
    with pytest.raises(UsageError, match=r"labels of .*train\.csv have no names; give DATA\.CLASSES"):
        build_videos(data_config(small_set, *unnamed), "test")
    with pytest.raises(UsageError, match="is missing"):
        build_videos(data_config(small_set, "DATA.TEST_LIST", ""), "test")
