"""The videos and class names of a run: each list is read once, each root is walked once."""

import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

from fvcore.common.config import CfgNode

from stvit_video.common.errors import UsageError
from stvit_video.data.decode.pictures import find_frames, is_pattern, is_picture
from stvit_video.data.decode.types import DecodeError
from stvit_video.data.lists.annotations import Video, check_files, check_labels, some_of
from stvit_video.data.lists.catalogues import SUBSETS, Catalogue, find_clips, find_videos
from stvit_video.data.lists.checks import check_names, label_by_name
from stvit_video.data.lists.class_names import ClassNames, compared, read_classes
from stvit_video.data.lists.folders import are_numbers, class_folders, is_media, read_file, read_folder
from stvit_video.data.lists.formats import find_hmdb, read_catalogue
from stvit_video.data.lists.splitting import split_videos
from stvit_video.data.lists.tables import AS_IT_SAYS, Reading

SPLITS = ("train", "val", "test")
MANY_CLASSES = 10_000  # of numbers alone: more have to have videos, as a classifier is made for them


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
    frames: int = 1  # of a clip: with several, folders of pictures are videos
    frame_pattern: str = ""  # names of frames, as img_{:05}.jpg
    group: str = ""  # what names the recording in a path, see ``find_recordings``
    trained: Sequence[str] = ()  # classes of the checkpoint: the same names are labelled in its order
    natural: bool = True  # class folders that are numbers are labelled in the order of these, not of their text
    continues: bool = False  # the labels are those of a run that has begun
    reading: Reading = AS_IT_SAYS  # of lists that can be read in several ways

    def __post_init__(self) -> None:
        if self.frame_pattern and not is_pattern(os.path.join(os.devnull, self.frame_pattern)):
            raise UsageError(
                f"DATA.FRAME_PATTERN {self.frame_pattern!r} names no frames; give a template or a glob with the ending "
                f"of the pictures, as img_{{:05}}.jpg or img_*.jpg."
            )
        self._catalogue = cache(lambda source: read_catalogue(source, self.root, self.reading))
        self._find_clips = cache(lambda clip_folder: find_clips(self.root, clip_folder))
        self._parts = cache(self._split)
        self._lists: dict[tuple[Path, str], list[Video]] = {}
        self.notes: list[str] = []  # on what was taken for what in the lists that were read

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
        videos = self._read_once(split)
        if self.shares is not None:
            videos = self._parts(self.source(split))[SPLITS.index(split)]
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
            if count > max(MANY_CLASSES, 100 * len(videos)) and self.num_classes is None:
                raise UsageError(
                    f"{self.source(self._naming_split)}: its largest label is {count - 1:,} of {len(videos):,} videos; "
                    f"correct it, or give DATA.CLASSES or MODEL.NUM_CLASSES if there are so many classes."
                )
            return [str(label) for label in range(count)]
        names = list(self._named_classes.names)
        if self.num_classes not in (None, len(names)):
            origin = "DATA.CLASSES" if self.class_file else self.source(self._naming_split)
            raise UsageError(f"MODEL.NUM_CLASSES {self.num_classes}: {origin} names {len(names)}; unset the first.")
        return names

    def _split(self, source: Path) -> list[list[Video]]:
        """Return the videos of each split in the list that serves as all of them."""
        assert self.shares is not None
        found = [entry.name for entry in source.iterdir() if entry.is_dir()] if source.is_dir() else []
        parts = {part for part, words in SUBSETS.items() for name in found if name.lower() in words}
        if len(parts) > 1 and "train" in parts:
            raise UsageError(
                f"Folder {source} is split already ({', '.join(sorted(found))}); give DATA.SPLIT None and its parts, "
                f"for example DATA.TRAIN_LIST train DATA.VAL_LIST val DATA.TEST_LIST test."
            )
        root = source if source.is_dir() else self.root
        return split_videos(self._lists[source, ""], self.shares, root, self.group)

    def _read_once(self, split: str) -> list[Video]:
        """Return all videos of the list of ``split``, which may be that of other splits too."""
        whole = self._whole_list(split)
        catalogue = whole.of_split(split) if whole and self.shares is None else whole
        key = self.source(split), "" if catalogue is whole else split
        if key not in self._lists:
            self._lists[key] = self._read(split, catalogue)
        return self._lists[key]

    def _whole_list(self, split: str) -> Catalogue | None:
        """Return the list file of ``split`` with all of its subsets; None for a folder, a video or a missing file."""
        source = self.source(split)
        is_list = not source.is_dir() and self.exists(split) and not is_media(source)
        return self._catalogue(source) if is_list else None

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
            videos = read_file(source, names)
        elif not names.names and (catalogue is None or not catalogue.has_numbers):
            raise UsageError(
                f"DATA.{split.upper()}_LIST {source} gives its classes by name, but the labels of "
                f"{self.source(self._naming_split)} have no names; give DATA.CLASSES, the names in their order."
            )
        elif catalogue is None:
            videos, notes = read_folder(source, names, frames=self.frames, pattern=self.frame_pattern)
            self.notes += notes
        else:
            videos = find_videos(catalogue, self.root, names, self._find_clips)
            self.notes += catalogue.notes
            repeated = self._find_clips(catalogue.clip_folder).repeated if catalogue.has_ids else ()
            if several := [video.path for video in videos if repeated and Path(video.path).stem in repeated]:
                self.notes.append(
                    f"{source}: {len(several):,} of {len(videos):,} videos lie under one name in several folders; the "
                    f"first is taken, as {several[0]}"
                )
            if catalogue.has_numbers and not names.ids and not catalogue.multi_label:
                videos = self._label(videos, names.names, split)
            check_files(videos, self.max_failures, source, self.root)
            videos = self._name_frames(videos, source)
        if self.reading.multi_label:
            videos = [replace(video, labels=(video.label,)) if video.labels is None else video for video in videos]
        check_frames(videos, source)
        return videos

    def _name_frames(self, videos: list[Video], source: Path) -> list[Video]:
        """Return the videos of a list, folders as their frames of the pattern; note where pictures are samples."""
        pictures = sum(is_picture(Path(video.path).name) for video in videos) if self.frames > 1 else 0
        if pictures:
            self.notes.append(
                f"{source}: {pictures:,} of {len(videos):,} paths are pictures, each shown in all {self.frames} frames "
                f"of a clip; for a video give the folder of its frames"
            )
        if not self.frame_pattern:
            return videos
        return [
            video if is_media(video.path) else replace(video, path=os.path.join(video.path, self.frame_pattern))
            for video in videos
        ]

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
        return "train" if self.exists("train") else "test"

    @cached_property
    def _named_classes(self) -> ClassNames | None:
        """The class names that a file, folders or a published list give; None where there are only numbers."""
        if self.class_file:
            return read_classes(self.root / self.class_file)
        source, is_test = self.source(self._naming_split), self._naming_split == "test"
        if source.is_dir():
            if found := find_hmdb(source):
                number = found.rpartition("split")[2]
                raise UsageError(
                    f"DATA.TRAIN_LIST {source} holds the split files of HMDB51; name one of its three splits by a "
                    f"pattern, as '{source.name}/*_test_split{number}', in DATA.TRAIN_LIST and DATA.TEST_LIST."
                )
            names = class_folders(source)
        else:
            catalogue = self._whole_list(self._naming_split)
            listed = catalogue.classes() if catalogue else None
            if listed is None:
                return ClassNames(self.trained) if self.trained and is_test else None
            names = listed
        names = sorted(names, key=int) if self.natural and are_numbers(names) else sorted(names)
        given, known = ({compared(name) for name in some} for some in (names, self.trained))
        is_told = len(known) == len(self.trained)  # else a name of the checkpoint stands for several classes
        return ClassNames(self.trained if is_told and (given == known or (is_test and given < known)) else names)


def check_frames(videos: Sequence[Video], source: Path) -> None:
    """Raise UsageError where of a few folders of frames, evenly spread, none can be read."""
    folders = [video.path for video in videos if not is_media(video.path) or is_pattern(video.path)]
    errors = []
    for path in some_of(folders, 4):
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
        reading=Reading(tuple(cfg.DATA.COLUMNS.split()), cfg.DATA.LABEL, cfg.DATA.MULTI_LABEL),
        frames=cfg.DATA.FRAMES,
        frame_pattern=cfg.DATA.FRAME_PATTERN,
        group=cfg.DATA.GROUP,
    )
