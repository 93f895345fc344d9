"""Which videos a configuration names, and what their labels are called."""

from pathlib import Path

from fvcore.common.config import CfgNode

from stvit_video.data.annotations import (
    Video,
    check_files,
    class_folders,
    is_media,
    read_classes,
    read_file,
    read_folder,
    read_list,
)
from stvit_video.data.catalogues import find_videos, read_catalogue
from stvit_video.data.splitting import take_part
from stvit_video.errors import UsageError

SPLITS = ("train", "val", "test")


def build_videos(cfg: CfgNode, split: str) -> list[Video]:
    """Return the videos of ``split`` (train, val, test), its share of the one list where DATA.SPLIT is set."""
    videos = _read_videos(cfg, split)
    if cfg.DATA.SPLIT is None:
        return videos
    source = build_source(cfg, split)
    _refuse_split_folders(source)
    return take_part(videos, SPLITS.index(split), cfg.DATA.SPLIT, source if source.is_dir() else cfg.DATA.ROOT)


def _refuse_split_folders(source: Path) -> None:
    """Raise UsageError where what looks like class folders are the splits of a data set that is split already."""
    found = [entry.name for entry in source.iterdir() if entry.is_dir()] if source.is_dir() else []
    if set(found) & {"train", "training"} and set(found) & {"val", "valid", "validation", "test"}:
        raise UsageError(
            f"Folder {source} is split already ({', '.join(sorted(found))}); give DATA.SPLIT None and its parts, for "
            f"example DATA.TRAIN_LIST train DATA.VAL_LIST val DATA.TEST_LIST test."
        )


def _read_videos(cfg: CfgNode, split: str) -> list[Video]:
    """Return all videos of a list; relative lists, folders and paths start from DATA.ROOT.

    A list is what it looks like: a folder of class folders, one image or video, a Kinetics CSV, a Something-Something
    JSON, or else lines ``path label``. Raises UsageError where it is none of them, or where too many files are missing.
    """
    source = build_source(cfg, split)
    if source.is_dir() and cfg.DATA[f"{split.upper()}_LIST"]:
        return read_folder(source, _class_names(cfg, split))
    if not source.is_file():
        raise UsageError(
            f"DATA.{split.upper()}_LIST: {source} is missing; put lines `path label` there, or set DATA.ROOT and "
            f"DATA.{split.upper()}_LIST. To run without any data: --cfg configs/sample_stvit.yaml"
        )
    if is_media(source):
        return read_file(source, _named_classes(cfg) or [])
    catalogue = read_catalogue(source)
    if catalogue is None:
        videos = read_list(source, cfg.DATA.ROOT)
    else:
        videos = find_videos(catalogue, cfg.DATA.ROOT, _class_names(cfg, split))
    check_files(videos, cfg.DATA.MAX_FAILURES, source, cfg.DATA.ROOT)
    return videos


def build_source(cfg: CfgNode, split: str) -> Path:
    """Return where the list of ``split`` is: a file or a folder."""
    return Path(cfg.DATA.ROOT) / cfg.DATA[f"{split.upper()}_LIST"]


def build_classes(cfg: CfgNode) -> list[str]:
    """Return the class names: from DATA.CLASSES, else those that folders or a published list name, else numbers.

    They are those of the training list, or of the test list where there is no training list; numbers go up to
    MODEL.NUM_CLASSES or the largest label.
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
    """Return the class names that a file, folders or a published list give; None where there are only numbers."""
    if cfg.DATA.CLASSES:
        return read_classes(Path(cfg.DATA.ROOT) / cfg.DATA.CLASSES)
    source = build_source(cfg, _naming_split(cfg))
    if source.is_dir():
        return class_folders(source)
    catalogue = read_catalogue(source) if source.is_file() and not is_media(source) else None
    return catalogue.classes() if catalogue else None


def _class_names(cfg: CfgNode, split: str) -> list[str]:
    """Return the names that the classes of ``split`` take their labels from: the same for every list."""
    names = _named_classes(cfg)
    if names is None:
        raise UsageError(
            f"DATA.{split.upper()}_LIST {build_source(cfg, split)} gives its classes by name, but the labels of "
            f"{build_source(cfg, _naming_split(cfg))} have no names; give DATA.CLASSES, the names in their order."
        )
    return names
