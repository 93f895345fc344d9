"""The videos and class names of a run: each list is read once, each root is walked once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from fvcore.common.config import CfgNode

from stvit_video.common.errors import UsageError
from stvit_video.data.lists.annotations import (
    Video,
    check_files,
    check_labels,
    read_classes,
    read_list,
)
from stvit_video.data.lists.catalogues import find_clips, find_videos, read_catalogue
from stvit_video.data.lists.folders import class_folders, is_media, read_file, read_folder
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

    def __post_init__(self) -> None:
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
            videos = take_part(videos, SPLITS.index(split), self.shares, source if source.is_dir() else self.root)
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
            return read_folder(source, names)
        if catalogue is None:
            videos = read_list(source, self.root)
        else:
            clips = self._find_clips(self.root, catalogue.clip_folder)
            videos = find_videos(catalogue, self.root, names, clips)
        check_files(videos, self.max_failures, source, self.root)
        return videos

    @property
    def _naming_split(self) -> str:
        return "train" if self.lists["train"] and self.source("train").exists() else "test"

    @cached_property
    def _named_classes(self) -> list[str] | None:
        """The class names that a file, folders or a published list give; None where there are only numbers."""
        if self.class_file:
            return read_classes(self.root / self.class_file)
        source = self.source(self._naming_split)
        if source.is_dir():
            return class_folders(source)
        catalogue = self._catalogue(source) if source.is_file() and not is_media(source) else None
        return catalogue.classes() if catalogue else None


def build_lists(cfg: CfgNode) -> ListReader:
    """Return the reader of the configured lists."""
    return ListReader(
        root=Path(cfg.DATA.ROOT),
        lists={split: cfg.DATA[f"{split.upper()}_LIST"] for split in SPLITS},
        class_file=cfg.DATA.CLASSES,
        num_classes=cfg.MODEL.NUM_CLASSES,
        shares=cfg.DATA.SPLIT,
        max_failures=cfg.DATA.MAX_FAILURES,
    )
