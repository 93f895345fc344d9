"""Which videos a configuration names, and what their labels are called."""

import hashlib
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from fvcore.common.config import CfgNode

from stvit_video.common.errors import UsageError
from stvit_video.data.lists.annotations import (
    Video,
    check_files,
    class_folders,
    is_media,
    read_classes,
    read_file,
    read_folder,
    read_list,
)
from stvit_video.data.lists.catalogues import find_videos, read_catalogue

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


def take_part(videos: Sequence[Video], part: int, shares: Sequence[int], root: str | Path) -> list[Video]:
    """Return the videos of ``part`` (its place in ``shares``, percentages that add up to 100), in their order.

    Each class is dealt out by itself, in an order that is drawn from the names of the files below ``root`` and nothing
    else: it is the same on every machine and for every seed. Where a share is above 0 it gets one video of a class at
    least. Raises UsageError for a class with too few.
    """
    classes: dict[int, list[Video]] = {}
    for video in videos:
        classes.setdefault(video.label, []).append(video)
    taken: set[str] = set()
    for members in classes.values():
        ordered = sorted(members, key=lambda video: _draw(video.path, root))
        edges = _edges(len(ordered), shares)
        if any(stop == start for share, start, stop in zip(shares, edges, edges[1:], strict=False) if share):
            folder = Path(members[0].path).parent
            raise UsageError(
                f"DATA.SPLIT {list(shares)}: the class of {folder} has {len(members)} videos; allowed: at least one "
                f"for each share above 0. Add some, or give lists of your own and DATA.SPLIT None."
            )
        taken.update(video.path for video in ordered[edges[part] : edges[part + 1]])
    return [video for video in videos if video.path in taken]


def _edges(count: int, shares: Sequence[int]) -> list[int]:
    """Return where each part begins and ends among ``count`` videos; parts after the first have one at least."""
    sizes = [max(1, round(count * share / 100)) if share else 0 for share in shares[1:]]
    sizes.insert(0, max(0, count - sum(sizes)))
    return [min(count, sum(sizes[:i])) for i in range(len(sizes) + 1)]


def _draw(path: str, root: str | Path) -> bytes:
    """Return a number for a file that depends on its name below ``root`` alone, however that is written."""
    name = unicodedata.normalize("NFC", os.path.relpath(path, root)).encode("utf-8", "surrogateescape")
    return hashlib.sha256(name).digest()
