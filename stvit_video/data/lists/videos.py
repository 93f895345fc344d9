"""The videos and class names of a run: each list is read once, each root is walked once."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

from fvcore.common.config import CfgNode

from stvit_video.common.errors import UsageError
from stvit_video.data.decode.pictures import find_frames, is_pattern, is_picture
from stvit_video.data.decode.types import DecodeError
from stvit_video.data.lists.annotations import (
    Video,
    check_files,
    check_labels,
    read_classes,
    read_list,
)
from stvit_video.data.lists.catalogues import find_clips, find_videos, read_catalogue
from stvit_video.data.lists.checks import check_names, label_by_name
from stvit_video.data.lists.folders import are_numbers, class_folders, is_media, read_file, read_folder
from stvit_video.data.lists.splitting import take_part

SPLITS = ("train", "val", "test")


@dataclass(eq=False, kw_only=True)
class ListReader:
    """Reads the lists of the splits train, val and test, and remembers what it has read.

    A list is what it looks like: a folder of class folders, one image or video, a Kinetics CSV, a Something-Something
    JSON, or else lines ``path label``.
    """

    root: Path
    lists: Mapping[str, str]
    class_file: str = ""  # file of class names, from root; empty: the lists name the classes, or are of numbers
    num_classes: int | None = None  # of numbered labels; None: as many as the largest label asks for
    shares: Sequence[int] | None = None  # percent of one list that serves as all splits
    max_failures: float = 0.0  # share of a list's files that may be missing
    frames: int = 1  # of a clip: with several, folders of pictures are videos
    frame_pattern: str = ""  # names of frames, as img_{:05}.jpg
    group: str = ""  # what names the recording in a path, see ``find_recordings``
    trained: Sequence[str] = ()  # classes of the checkpoint: the same names are labelled in its order
    natural: bool = True  # class folders that are numbers are labelled in the order of these, not of their text
    continues: bool = False  # the labels are those of a run that has begun

    def __post_init__(self) -> None:
        if self.frame_pattern and not is_pattern(os.path.join(os.devnull, self.frame_pattern)):
            raise UsageError(
                f"DATA.FRAME_PATTERN {self.frame_pattern!r} names no frames; give a template or a glob with the ending "
                f"of the pictures, as img_{{:05}}.jpg or img_*.jpg."
            )
        self.notes: list[str] = []  # on what was taken for what in the lists that were read
        self._catalogue = cache(read_catalogue)
        self._find_clips = cache(find_clips)
        self._lists: dict[Path, list[Video]] = {}

    def source(self, split: str) -> Path:
        """Return the file or folder that the list of ``split`` is."""
        return self.root / self.lists[split]

    def videos(self, split: str) -> list[Video]:
        """Return the videos of ``split``; its share of the one list where there are shares.

        Raises UsageError where the list is of no known form, a label is out of range, or too many files are missing.
        """
        source = self.source(split)
        videos = self._read_once(split)
        if self.shares is not None:
            found = [entry.name for entry in source.iterdir() if entry.is_dir()] if source.is_dir() else []
            if set(found) & {"train", "training"} and set(found) & {"val", "valid", "validation", "test"}:
                raise UsageError(
                    f"Folder {source} is split already ({', '.join(sorted(found))}); give DATA.SPLIT None and its "
                    f"parts, for example DATA.TRAIN_LIST train DATA.VAL_LIST val DATA.TEST_LIST test."
                )
            root = source if source.is_dir() else self.root
            videos = take_part(videos, SPLITS.index(split), self.shares, root, self.group)
        check_labels(videos, len(self.classes), self.lists[split])
        return videos

    @cached_property
    def classes(self) -> list[str]:
        """The class names: of the class file, else those that folders or a published list name, else numbers.

        They are those of the training list, or of the test list where there is no training list.
        """
        names = self._named_classes
        if names is None:
            count = self.num_classes or max(video.label for video in self._read_once(self._naming_split)) + 1
            return [str(label) for label in range(count)]
        if self.num_classes not in (None, len(names)):
            origin = "DATA.CLASSES" if self.class_file else self.source(self._naming_split)
            raise UsageError(f"MODEL.NUM_CLASSES {self.num_classes}: {origin} names {len(names)}; unset the first.")
        return names

    def _read_once(self, split: str) -> list[Video]:
        """Return all videos of the list of ``split``, which may be that of other splits too."""
        source = self.source(split)
        if source not in self._lists:
            self._lists[source] = self._read(split)
        return self._lists[source]

    def _read(self, split: str) -> list[Video]:
        """Return all videos of the list of ``split``; relative paths start from root."""
        source = self.source(split)
        is_folder = self.lists[split] and source.is_dir()
        if not is_folder and not source.is_file():
            raise UsageError(
                f"DATA.{split.upper()}_LIST: {source} is missing; put lines `path label` there, or set DATA.ROOT and "
                f"DATA.{split.upper()}_LIST. To run without any data: --cfg configs/sample_stvit.yaml"
            )
        names = self._named_classes or []
        if not is_folder and is_media(source):
            return read_file(source, names)
        catalogue = None if is_folder else self._catalogue(source)
        if not names and (is_folder or catalogue):
            raise UsageError(
                f"DATA.{split.upper()}_LIST {source} gives its classes by name, but the labels of "
                f"{self.source(self._naming_split)} have no names; give DATA.CLASSES, the names in their order."
            )
        if is_folder:
            videos, notes = read_folder(source, names, frames=self.frames, pattern=self.frame_pattern)
            self.notes += notes
            check_frames(videos, source)
            return videos
        if catalogue is None:
            videos = self._label(read_list(source, self.root), names, split)
        else:
            clips = self._find_clips(self.root, catalogue.clip_folder)
            videos = find_videos(catalogue, self.root, names, clips)
        check_files(videos, self.max_failures, source, self.root)
        pictures = sum(is_picture(Path(video.path).name) for video in videos) if self.frames > 1 else 0
        if pictures:
            self.notes.append(
                f"{source}: {pictures:,} of {len(videos):,} paths are pictures, each shown in all {self.frames} frames "
                f"of a clip; for a video give the folder of its frames"
            )
        if self.frame_pattern:
            videos = [
                video if is_media(video.path) else replace(video, path=os.path.join(video.path, self.frame_pattern))
                for video in videos
            ]
        check_frames(videos, source)
        return videos

    def _label(self, videos: list[Video], names: Sequence[str], split: str) -> list[Video]:
        """Return a list of numbers labelled by the ``names`` of the classes; its own labels where they have none."""
        source = self.source(split)
        if not names or self.continues:
            return videos
        by_name = None if self.class_file else label_by_name(videos, names, source)
        if by_name is not None:
            return by_name
        if check_names(videos, names, source) or self.class_file:
            return videos
        if self._naming_split == "test":
            self.notes.append(f"labels of {source} are taken for places among the checkpoint's classes")
            return videos
        raise UsageError(
            f"DATA.{split.upper()}_LIST {source} has numbers for labels, but {self.source(self._naming_split)} names "
            f"its classes ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''}); give DATA.CLASSES, the names in "
            f"the order of the numbers."
        )

    @property
    def _naming_split(self) -> str:
        return "train" if self.lists["train"] and self.source("train").exists() else "test"

    @cached_property
    def _named_classes(self) -> list[str] | None:
        """The class names that a file, folders or a published list give; None where there are only numbers."""
        if self.class_file:
            return read_classes(self.root / self.class_file)
        source, is_test = self.source(self._naming_split), self._naming_split == "test"
        if source.is_dir():
            names = class_folders(source)
        else:
            catalogue = self._catalogue(source) if source.is_file() and not is_media(source) else None
            if catalogue is None:
                return list(self.trained) or None if is_test else None
            names = catalogue.classes()
        names = sorted(names, key=int) if self.natural and are_numbers(names) else sorted(names)
        is_part = is_test and set(names) < set(self.trained)  # a test may be of some classes
        return list(self.trained) if is_part or set(names) == set(self.trained) else names


def check_frames(videos: Sequence[Video], source: Path) -> None:
    """Raise UsageError where of a few folders of frames, evenly spread, none can be read."""
    folders = [video.path for video in videos if not is_media(video.path) or is_pattern(video.path)]
    errors = []
    for path in folders[:: max(1, len(folders) // 4)]:
        try:
            if not os.path.isfile(path):
                find_frames(path)
            return
        except DecodeError as error:
            errors.append(error)
    if errors and not any("cannot be listed" in error.message for error in errors):
        raise UsageError(f"{source}: folder of frames {errors[0]}")


def build_lists(cfg: CfgNode) -> ListReader:
    """Return the reader of the configured lists."""
    return ListReader(
        root=Path(cfg.DATA.ROOT),
        lists={split: cfg.DATA[f"{split.upper()}_LIST"] for split in SPLITS},
        class_file=cfg.DATA.CLASSES,
        num_classes=cfg.MODEL.NUM_CLASSES,
        shares=cfg.DATA.SPLIT,
        max_failures=cfg.DATA.MAX_FAILURES,
        frames=cfg.DATA.FRAMES,
        frame_pattern=cfg.DATA.FRAME_PATTERN,
        group=cfg.DATA.GROUP,
    )
