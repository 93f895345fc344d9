"""Videos, their labels and the parts of them that are labelled; whether labels and files are right."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from stvit_video.common.errors import UsageError
from stvit_video.data.decode.pictures import is_pattern

MAX_LOOKS = 512  # files to look at where a list is checked: a wrong root shows within seconds on any storage
LIST_FORM = "a text file with lines `path label`, or a CSV or JSON as data sets publish it"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a video, from ``start`` to before ``stop``: in seconds after its first frame, or in frames."""

    start: float
    stop: float
    in_frames: bool = False
    may_be_file: bool = False  # a file that is no longer than this part is taken for the part, cut out


@dataclass(frozen=True, slots=True)  # lists have hundreds of thousands
class Video:
    """One video of a list: where it is and its label, from 0. An image, or a folder of frames, is a video too.

    ``missing`` says that the list was read by searching for its files, and that this one was not found.
    """

    path: str
    label: int  # the first of ``labels`` where a video has several, -1 where it has none of them
    missing: bool = False
    section: Section | None = None  # the part that is labelled; None: all of it
    labels: tuple[int, ...] | None = None  # those of a multi-label set, ascending; None: ``label`` alone

    @property
    def name(self) -> str:
        """The path, with the section as a media fragment (a.mp4#t=3,12.5): two sections are two samples."""
        part = self.section
        return (
            self.path
            if part is None
            else f"{self.path}#{'frames' if part.in_frames else 't'}={part.start:g},{part.stop:g}"
        )


def labels_of(video: Video) -> tuple[int, ...]:
    """Return the labels of a video."""
    return (video.label,) if video.labels is None else video.labels


def parse_name(name: str) -> tuple[str, Section | None]:
    """Return the path and the section in the ``name`` of a video."""
    number = r"([0-9]+(?:\.[0-9]*)?(?:e\+[0-9]+)?)"  # as Video.name writes it
    match = re.fullmatch(rf"(.*)#(t|frames)={number},{number}", name, re.DOTALL)
    if match is None:
        return name, None
    return match[1], Section(float(match[3]), float(match[4]), match[2] == "frames", may_be_file=match[2] == "t")


def some_of(items: Sequence[T], count: int) -> Sequence[T]:
    """Return about ``count`` evenly spread items."""
    return items[:: max(1, len(items) // count)]


def check_labels(videos: list[Video], num_classes: int, source: str | Path) -> None:
    """Raise UsageError where a label lies outside 0 to ``num_classes`` - 1."""
    for video in videos:
        label = max(video.labels or (video.label,))
        if label >= num_classes:
            least = min(label for one in videos for label in one.labels or (one.label,))
            from_one = label == num_classes and least == 1
            raise UsageError(
                f"{source}: label {label} of {video.path} is out of range; allowed: 0 to {num_classes - 1}. "
                + ("They seem to count from 1: give DATA.CLASSES with lines `id name`." if from_one else "")
                + ("" if from_one else "Correct the list, DATA.CLASSES or MODEL.NUM_CLASSES.")
            )


def check_files(videos: list[Video], max_failures: float, source: str | Path, root: str | Path) -> None:
    """Raise UsageError where more than the share ``max_failures`` of the files is missing, naming the first."""
    missing, known = find_missing(videos)
    if len(missing) > max_failures * known:
        raise UsageError(
            f"{source}: {len(missing):,} of {known:,} files{'' if known == len(videos) else ' looked at'} are missing, "
            f"the first {missing[0]}; at most {100 * max_failures:g} % may fail (DATA.MAX_FAILURES). Check DATA.ROOT "
            f"{root} and the list, or download the files."
        )


def summarise_videos(videos: list[Video], split: str, recordings: int = 0) -> str:
    """Return a line for the user: how many videos ``split`` has, of how many recordings, and how many are missing."""
    missing, known = find_missing(videos)
    line = f"{split}: {len(videos):,} videos" + (f" of {recordings:,} recordings" if recordings else "")
    if missing:
        looked_at = "" if known == len(videos) else f" of {known:,} looked at"
        line += f", {len(missing):,}{looked_at} ({100 * len(missing) / known:.1f} %) missing, the first {missing[0]}; "
        line += "they count as failures and are listed in failures.csv"
    return line


def find_missing(videos: list[Video]) -> tuple[list[str], int]:
    """Return the paths that are missing, and of how many files this is known.

    It is known of all where a search left some unfound. Else about MAX_LOOKS evenly spread ones are looked at.
    """
    unfound = [video.path for video in videos if video.missing]
    if unfound:
        return unfound, len(videos)
    looked_at = [video.path for video in some_of(videos, MAX_LOOKS)]
    return [path for path in looked_at if not _is_there(path)], len(looked_at)


def _is_there(path: str) -> bool:
    """Say whether ``path`` is a file, or a folder of frames, which may be many, that is not empty."""
    path = os.path.dirname(path) if is_pattern(path) else path
    if not os.path.isdir(path):
        return os.path.isfile(path)
    with os.scandir(path) as entries:
        return next(entries, None) is not None
