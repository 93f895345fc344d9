"""The videos and class names of a run: each list is read once, each root is walked once."""

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

from fvcore.common.config import CfgNode

from stvit_video.common.errors import UsageError
from stvit_video.data.lists.annotations import Video, check_files, check_labels
from stvit_video.data.lists.catalogues import Catalogue, find_clips, find_videos
from stvit_video.data.lists.class_names import ClassNames, read_classes
from stvit_video.data.lists.folders import class_folders, is_media, read_file, read_folder
from stvit_video.data.lists.formats import find_hmdb, read_catalogue
from stvit_video.data.lists.splitting import take_part
from stvit_video.data.lists.tables import AS_IT_SAYS, Reading

SPLITS = ("train", "val", "test")


@dataclass(eq=False, kw_only=True)
class ListReader:
    """Reads the lists of the splits train, val and test, and remembers what it has read.

    A list is what it looks like: a folder of class folders, one image or video, or any file of ``read_catalogue``.
    """

    root: Path
    lists: Mapping[str, str]
    class_file: str = ""  # file of class names, from root; empty: the lists name the classes, or are of numbers
    num_classes: int | None = None  # of numbered labels; None: as many as the largest label asks for
    shares: Sequence[int] | None = None  # percent of one list that serves as all splits
    max_failures: float = 0.0  # share of a list's files that may be missing
    reading: Reading = AS_IT_SAYS  # of lists that can be read in several ways

    def __post_init__(self) -> None:
        self._catalogue = cache(lambda source: read_catalogue(source, self.root, self.reading))
        self._find_clips = cache(lambda clip_folder: find_clips(self.root, clip_folder))
        self._lists: dict[tuple[Path, str], list[Video]] = {}
        self.notes: list[str] = []  # what the user has to know about how the lists were understood

    def source(self, split: str) -> Path:
        """Return the file or folder that the list of ``split`` is."""
        return self.root / self.lists[split]

    def exists(self, split: str) -> bool:
        """Say whether the list of ``split`` is there: a file, a folder, or a pattern that matches some files."""
        source = self.source(split)
        return bool(self.lists[split]) and (source.exists() or bool(glob.glob(str(source))))

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
        naming = self._read_once(self._naming_split)
        if (videos[0].labels is None) != (naming[0].labels is None):
            one, several = (split, self._naming_split)[:: 1 if videos[0].labels is None else -1]
            raise UsageError(
                f"DATA.{one.upper()}_LIST {self.source(one)} has one label a video, {self.source(several)} several; "
                f"give lists of one kind, or DATA.MULTI_LABEL True."
            )
        return videos

    @cached_property
    def classes(self) -> list[str]:
        """The class names: of the class file, else those that folders or a published list name, else numbers.

        They are those of the training list, or of the test list where there is no training list.
        """
        if self._named_classes is None:
            videos = self._read_once(self._naming_split)
            count = self.num_classes or max(max(video.labels or (video.label,)) for video in videos) + 1
            return [str(label) for label in range(count)]
        names = list(self._named_classes.names)
        if self.num_classes not in (None, len(names)):
            origin = "DATA.CLASSES" if self.class_file else self.source(self._naming_split)
            raise UsageError(f"MODEL.NUM_CLASSES {self.num_classes}: {origin} names {len(names)}; unset the first.")
        return names

    def _read_once(self, split: str) -> list[Video]:
        """Return all videos of the list of ``split``, which may be that of other splits too."""
        source = self.source(split)
        catalogue = None
        if not source.is_dir() and self.exists(split) and not is_media(source):
            whole = self._catalogue(source)
            catalogue = whole if self.shares is not None else whole.of_split(split)
            key = source, "" if catalogue is whole else split
        else:
            key = source, ""
        if key not in self._lists:
            self._lists[key] = self._read(split, catalogue)
        return self._lists[key]

    def _read(self, split: str, catalogue: Catalogue | None) -> list[Video]:
        """Return all videos of the list of ``split``; relative paths start from root."""
        source = self.source(split)
        if not self.exists(split):
            raise UsageError(
                f"DATA.{split.upper()}_LIST: {source} is missing; put lines `path label` there, or set DATA.ROOT and "
                f"DATA.{split.upper()}_LIST. To run without any data: --cfg configs/sample_stvit.yaml"
            )
        names = self._named_classes or ClassNames(())
        if catalogue is None and not source.is_dir():
            videos = read_file(source, names.names)
        elif not names.names and (catalogue is None or not catalogue.has_numbers):
            raise UsageError(
                f"DATA.{split.upper()}_LIST {source} gives its classes by name, but the labels of "
                f"{self.source(self._naming_split)} have no names; give DATA.CLASSES, the names in their order."
            )
        elif catalogue is None:
            videos = read_folder(source, names.names)
        else:
            videos = find_videos(catalogue, self.root, names, self._find_clips)
            self.notes += catalogue.notes
            check_files(videos, self.max_failures, source, self.root)
        if self.reading.multi_label:
            videos = [replace(video, labels=(video.label,)) if video.labels is None else video for video in videos]
        return videos

    @property
    def _naming_split(self) -> str:
        return "train" if self.exists("train") else "test"

    @cached_property
    def _named_classes(self) -> ClassNames | None:
        """The class names that a file, folders or a published list give; None where there are only numbers."""
        if self.class_file:
            return read_classes(self.root / self.class_file)
        source = self.source(self._naming_split)
        if source.is_dir():
            if found := find_hmdb(source):
                number = found.rpartition("split")[2]
                raise UsageError(
                    f"DATA.TRAIN_LIST {source} holds the split files of HMDB51; name one of its three splits by a "
                    f"pattern, as '{source.name}/*_test_split{number}', in DATA.TRAIN_LIST and DATA.TEST_LIST."
                )
            return ClassNames(class_folders(source))
        if not self.exists(self._naming_split) or is_media(source):
            return None
        names = self._catalogue(source).classes()
        return None if names is None else ClassNames(names)


def build_lists(cfg: CfgNode) -> ListReader:
    """Return the reader of the configured lists."""
    return ListReader(
        root=Path(cfg.DATA.ROOT),
        lists={split: cfg.DATA[f"{split.upper()}_LIST"] for split in SPLITS},
        class_file=cfg.DATA.CLASSES,
        num_classes=cfg.MODEL.NUM_CLASSES,
        shares=cfg.DATA.SPLIT,
        max_failures=cfg.DATA.MAX_FAILURES,
        reading=Reading(tuple(cfg.DATA.COLUMNS.split()), cfg.DATA.LABEL, cfg.DATA.MULTI_LABEL),
    )
