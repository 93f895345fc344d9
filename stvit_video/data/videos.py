"""Which videos a configuration names, and what their labels are called."""

from pathlib import Path

from fvcore.common.config import CfgNode

from stvit_video.data.annotations import Video, check_files, class_folders, read_classes, read_folder, read_list
from stvit_video.errors import UsageError


def build_videos(cfg: CfgNode, split: str) -> list[Video]:
    """Return the videos of ``split`` (train, val, test); relative lists, folders and paths start from DATA.ROOT."""
    source = build_source(cfg, split)
    if source.is_dir() and cfg.DATA[f"{split.upper()}_LIST"]:
        return read_folder(source, _folder_classes(cfg, split))
    if not source.is_file():
        raise UsageError(
            f"DATA.{split.upper()}_LIST: {source} is missing; put lines `path label` there, or set DATA.ROOT and "
            f"DATA.{split.upper()}_LIST. To run without any data: --cfg configs/sample_stvit.yaml"
        )
    videos = read_list(source, cfg.DATA.ROOT)
    check_files(videos, cfg.DATA.MAX_FAILURES, source)
    return videos


def build_source(cfg: CfgNode, split: str) -> Path:
    """Return where the list of ``split`` is: a file, or a folder of class folders."""
    return Path(cfg.DATA.ROOT) / cfg.DATA[f"{split.upper()}_LIST"]


def build_classes(cfg: CfgNode) -> list[str]:
    """Return the class names: from DATA.CLASSES, else the names of class folders, else numbers.

    Folders and numbers are those of the training list, or of the test list where there is no training list; numbers
    go up to MODEL.NUM_CLASSES or the largest label.
    """
    names = _named_classes(cfg)
    if names is None:
        count = cfg.MODEL.NUM_CLASSES or max(video.label for video in build_videos(cfg, _naming_split(cfg))) + 1
        return [str(label) for label in range(count)]
    if cfg.MODEL.NUM_CLASSES not in (None, len(names)):
        origin = "DATA.CLASSES" if cfg.DATA.CLASSES else str(build_source(cfg, _naming_split(cfg)))
        raise UsageError(
            f"MODEL.NUM_CLASSES is {cfg.MODEL.NUM_CLASSES} but {origin} names {len(names)}; unset the first."
        )
    return names


def _naming_split(cfg: CfgNode) -> str:
    return "train" if cfg.DATA.TRAIN_LIST and build_source(cfg, "train").exists() else "test"


def _named_classes(cfg: CfgNode) -> list[str] | None:
    """Return the class names that a file or folders give; None where there are only numbers."""
    if cfg.DATA.CLASSES:
        return read_classes(Path(cfg.DATA.ROOT) / cfg.DATA.CLASSES)
    source = build_source(cfg, _naming_split(cfg))
    return class_folders(source) if source.is_dir() else None


def _folder_classes(cfg: CfgNode, split: str) -> list[str]:
    """Return the names that the class folders of ``split`` take their labels from: the same for every list."""
    names = _named_classes(cfg)
    if names is None:
        raise UsageError(
            f"DATA.{split.upper()}_LIST {build_source(cfg, split)} is a folder, but the labels of "
            f"{build_source(cfg, _naming_split(cfg))} have no names; give DATA.CLASSES, the names in their order."
        )
    return names
