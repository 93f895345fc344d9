"""Which videos there are, and what they show: text lists and class names."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stvit_video.common.errors import UsageError, nearest
from stvit_video.data.decode.pictures import is_pattern

MAX_LABEL = 999_999  # more classes than any data set has: a larger number is an id or a time, read as a label
MAX_LOOKS = 512  # files to look at where a list is checked: a wrong root shows within seconds on any storage
LIST_FORM = "a text file with lines `path label`, a Kinetics CSV or a Something-Something JSON"
CLASS_FORM = "one class name a line, in the order of the labels"


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a video, from ``start`` to before ``stop``: in seconds after its first frame, or in frames."""

    start: float
    stop: float
    in_frames: bool = False


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


def read_lines(path: str | Path, what: str, form: str) -> list[str]:
    """Return a text file's lines, with their ends; UsageError, naming ``what`` it is and the ``form`` to give."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{what} {path} is not a file; give {form}.")
    try:
        with path.open(encoding="utf-8-sig") as file:
            return list(file)  # line by line, so that a large binary file is refused at its first bytes
    except UnicodeDecodeError as error:
        raise UsageError(f"{what} {path} is not UTF-8 text ({error.reason}); give {form}.") from error


def read_list(path: str | Path, root: str | Path = "") -> list[Video]:
    """Read lines ``path label``, separated by space, comma or tab; paths may hold spaces and start from ``root``.

    Blank lines are skipped. Raises UsageError, naming the line, where one has no label.
    """
    lines = enumerate(read_lines(path, "List", LIST_FORM), start=1)
    videos = [_parse_line(line.strip(), f"{path}, line {number}", Path(root)) for number, line in lines if line.strip()]
    if not videos:
        raise UsageError(f"List {path} is empty; give at least one line `path label`.")
    return videos


def _parse_line(line: str, place: str, root: Path) -> Video:
    cut = max(line.rfind(separator) for separator in (" ", ",", "\t"))
    name, label = line[: max(cut, 0)].rstrip(" ,\t"), line[cut + 1 :]
    name, label = (text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text for text in (name, label))
    if not name or not re.fullmatch(r"[+-]?[0-9]+", label):
        raise UsageError(f"{place}: {line[:120]!r} has no label; write path, space, comma or tab, and a whole number.")
    number = int(label) if len(label) < 20 else MAX_LABEL + 1  # Python refuses numbers of many thousand digits
    if not 0 <= number <= MAX_LABEL:
        problem = "is negative" if number < 0 else f"is above {MAX_LABEL:,}"
        raise UsageError(f"{place}: label {label[:20]} {problem}; give class numbers, counted from 0.")
    return Video(str(root / name), number)


def label_of(name: str, classes: Sequence[str], refusal: str) -> int:
    """Return the place of a class; UsageError with the ``refusal`` and the nearest name where there is none."""
    if name not in classes:
        raise UsageError(refusal + nearest(name, classes))
    return classes.index(name)


def read_classes(path: str | Path) -> list[str]:
    """Read class names in the order of the labels: one a line, or JSON with the label of each name."""
    text = "".join(read_lines(path, "Class file", CLASS_FORM)).strip()
    if not str(path).lower().endswith(".json") and not text.startswith("{"):
        names = [line.strip() for line in text.split("\n") if line.strip()]
        if not names:
            raise UsageError(f"Class file {path} is empty; give {CLASS_FORM}.")
        return names
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"Class file {path} is not JSON ({error}); give {CLASS_FORM}.") from error
    labels = content if isinstance(content, dict) else {}
    by_label = {str(label): name for name, label in labels.items()}  # published as text and as numbers
    numbers = [str(label) for label in range(len(labels))]
    if not labels or by_label.keys() != set(numbers):
        raise UsageError(
            f'Class file {path} does not give each name its label, from 0 without gaps, as {{"walking": 0, '
            f'"running": 1}}; correct it, or give one class name a line.'
        )
    return [by_label[number] for number in numbers]


def check_labels(videos: list[Video], num_classes: int, source: str | Path) -> None:
    """Raise UsageError where a label lies outside 0 to ``num_classes`` - 1."""
    for video in videos:
        if video.label >= num_classes:
            raise UsageError(
                f"{source}: label {video.label} of {video.path} is out of range; allowed: 0 to {num_classes - 1}. "
                f"Correct the list, DATA.CLASSES or MODEL.NUM_CLASSES."
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
    looked_at = [video.path for video in videos[:: max(1, len(videos) // MAX_LOOKS)]]
    return [path for path in looked_at if not _is_there(path)], len(looked_at)


def _is_there(path: str) -> bool:
    """Say whether ``path`` is a file, or a folder of frames, which may be many, that is not empty."""
    path = os.path.dirname(path) if is_pattern(path) else path
    if not os.path.isdir(path):
        return os.path.isfile(path)
    with os.scandir(path) as entries:
        return next(entries, None) is not None
