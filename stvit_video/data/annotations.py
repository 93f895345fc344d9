"""Annotation lists and class folders: which videos there are, and what they show."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets.folder import make_dataset

from stvit_video.data.decode import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from stvit_video.errors import UsageError, nearest


@dataclass(frozen=True)
class Video:
    """One line of a list or file of a class folder: where it is and its label, from 0. An image is a video too."""

    path: str
    label: int


def read_list(path: str | Path, root: str | Path = "") -> list[Video]:
    """Read lines ``path label``, separated by space, comma or tab; paths may hold spaces and start from ``root``.

    Blank lines are passed over. Raises UsageError, naming the line, where one has no label.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"List {path} is not a file; give a text file with lines `path label`.")
    videos = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"List {path} is not UTF-8 text ({error.reason}); give lines `path label`.") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            videos.append(_parse_line(line.strip(), f"{path}, line {number}", Path(root)))
    if not videos:
        raise UsageError(f"List {path} is empty; give at least one line `path label`.")
    return videos


def _parse_line(line: str, place: str, root: Path) -> Video:
    cut = max(line.rfind(separator) for separator in (" ", ",", "\t"))
    name, label = line[: max(cut, 0)].rstrip(" ,\t").strip('"'), line[cut + 1 :]
    if not name or not re.fullmatch(r"[+-]?[0-9]+", label):
        raise UsageError(
            f"{place}: {line!r} has no label; write the path, a space, comma or tab, and the label as a whole number."
        )
    if int(label) < 0:
        raise UsageError(f"{place}: label {label} is negative; labels count from 0.")
    return Video(str(root / name), int(label))


def class_folders(path: str | Path) -> list[str]:
    """Return the sorted names of the class folders in ``path``, without hidden ones; UsageError where there is none."""
    path = Path(path)
    names = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UsageError(f"Folder {path} has no class folders; put files at {path}/CLASS/FILE, one folder a class.")
    return names


def read_folder(path: str | Path, classes: Sequence[str] | None = None) -> list[Video]:
    """Read class folders of images and videos, their sub-folders included, sorted by path.

    A label is the folder's place in ``classes``, or else among the folders' sorted names; a class may have no files
    and no folder. Hidden files and files that are neither image nor video by their ending are passed over. Raises
    UsageError where a folder is not in ``classes``, or where there are no class folders or no images and videos at all.
    """
    path = Path(path)
    folders = class_folders(path)
    names = folders if classes is None else list(classes)
    for folder in folders:
        if folder not in names:
            raise UsageError(
                f"Folder {path / folder} is of none of the {len(names)} classes ({names[0]} to {names[-1]}); "
                f"rename it or correct DATA.CLASSES.{nearest(folder, names)}"
            )
    labels = {name: names.index(name) for name in folders}

    def is_media(name: str) -> bool:
        seen = f"{os.sep}." not in name.removeprefix(str(path))
        return seen and name.lower().endswith(IMAGE_SUFFIXES + VIDEO_SUFFIXES)

    found = make_dataset(str(path), labels, is_valid_file=is_media, allow_empty=True)
    if not found:
        raise UsageError(
            f"Folder {path}: none of its {len(folders)} class folders holds an image or a video; give files ending in "
            f"{', '.join(IMAGE_SUFFIXES + VIDEO_SUFFIXES)}."
        )
    return [Video(name, label) for name, label in found]


def read_classes(path: str | Path) -> list[str]:
    """Read class names, one a line, in the order of the labels."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"Class file {path} is not a file; give one class name a line, in the order of the labels.")
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UsageError(
            f"Class file {path} is not UTF-8 text ({error.reason}); give one class name a line."
        ) from error
    if not names:
        raise UsageError(f"Class file {path} is empty; give one class name a line.")
    return names


def check_labels(videos: list[Video], num_classes: int, source: str | Path) -> None:
    """Raise UsageError where a label lies outside 0 to ``num_classes`` - 1."""
    for video in videos:
        if video.label >= num_classes:
            raise UsageError(
                f"{source}: label {video.label} of {video.path} is out of range; allowed: 0 to {num_classes - 1}. "
                f"Correct the list, DATA.CLASSES or MODEL.NUM_CLASSES."
            )


def check_files(videos: list[Video], max_failures: float, source: str | Path) -> None:
    """Raise UsageError where more than ``max_failures`` of the files are missing, naming the first.

    At most 512 evenly spread files are looked at: enough to catch a wrong root within seconds on any storage.
    """
    step = max(1, len(videos) // 512)
    looked_at = videos[::step]
    missing = [video.path for video in looked_at if not Path(video.path).is_file()]
    if len(missing) > max_failures * len(looked_at):
        raise UsageError(
            f"{source}: {len(missing)} of {len(looked_at)} files looked at are missing, the first {missing[0]}; "
            f"at most {100 * max_failures:g} % may fail (DATA.MAX_FAILURES). Check DATA.ROOT and the paths in the list."
        )
