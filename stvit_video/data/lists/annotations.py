"""Which videos there are, and what they show: text lists, class folders, and lists as data sets publish them."""

import csv
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torchvision.datasets.folder import make_dataset

from stvit_video.common.errors import UsageError, nearest
from stvit_video.data.decode.types import MEDIA_SUFFIXES, VIDEO_SUFFIXES

MAX_LABEL = 999_999  # more classes than any data set has: a larger number is an id or a time, read as a label
MAX_LOOKS = 512  # files to look at where a list is checked: a wrong root shows within seconds on any storage
LIST_FORM = "a text file with lines `path label`, a Kinetics CSV or a Something-Something JSON"
CLASS_FORM = "one class name a line, in the order of the labels"
KINETICS_COLUMNS = ("label", "youtube_id", "time_start", "time_end")


@dataclass(frozen=True, slots=True)  # lists have hundreds of thousands
class Video:
    """One video of a list: where it is and its label, from 0. An image, or a folder of frames, is a video too.

    ``missing`` says that the list was read by searching for its files, and that this one was not found.
    """

    path: str
    label: int
    missing: bool = False


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
    and no folder. Hidden and other files are skipped. Raises UsageError where a folder is not in ``classes``, or where
    there are no class folders or no images and videos at all.
    """
    path, folders = Path(path), class_folders(path)
    names = folders if classes is None else classes
    of_none = f"is of none of the {len(names)} classes ({names[0]} to {names[-1]}); rename it or correct DATA.CLASSES."
    labels = {name: _label_of(name, names, f"Folder {path / name} {of_none}") for name in folders}

    def is_shown(name: str) -> bool:
        return f"{os.sep}." not in name.removeprefix(str(path)) and is_media(name)

    found = make_dataset(str(path), labels, is_valid_file=is_shown, allow_empty=True)
    if not found:
        raise UsageError(
            f"Folder {path}: none of its {len(folders)} class folders holds an image or a video; give files ending in "
            f"{', '.join(MEDIA_SUFFIXES)}."
        )
    return [Video(name, label) for name, label in found]


def _label_of(name: str, classes: Sequence[str], refusal: str) -> int:
    """Return the place of a class; UsageError with the ``refusal`` and the nearest name where there is none."""
    if name not in classes:
        raise UsageError(refusal + nearest(name, classes))
    return classes.index(name)


def is_media(name: str | Path) -> bool:
    """Return whether a file is an image or a video by its ending."""
    return str(name).lower().endswith(MEDIA_SUFFIXES)


def read_file(path: str | Path, classes: Sequence[str]) -> list[Video]:
    """Return one image or video as a list, labelled by the folder it lies in; UsageError where that is no class."""
    folder = Path(path).absolute().parent.name
    refusal = (
        f"{path} is one file without a label: its folder {folder!r} is none of the {len(classes)} class names; put it "
        f"into the folder of its class, or give a text file with the line `path label`."
    )
    return [Video(str(path), _label_of(folder, classes, refusal))]


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


class Entry(NamedTuple):
    """A video of a catalogue: its class, and the names without ending that it may have, the likeliest first."""

    label: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Catalogue:
    """A list that names classes and videos, but not where the videos are."""

    source: str | Path
    entries: list[Entry]
    clip_folder: re.Pattern[str]  # names of folders with the millions of frames of clips, which are not searched
    expected: str  # path, from the root, of a file that is not there: a form of label and name

    def classes(self) -> list[str]:
        """Return the sorted names of all classes that occur."""
        return sorted({entry.label for entry in self.entries})


def read_catalogue(path: str | Path) -> Catalogue | None:
    """Read a Kinetics CSV or a Something-Something JSON; None where the file begins like neither.

    Raises UsageError, naming line or entry, where it is one of them but damaged or without labels.
    """
    lines = read_lines(path, "List", LIST_FORM)
    first = next((line for line in lines if line.strip()), "")
    # A bracket alone does not make it JSON: a path may begin with one.
    if str(path).lower().endswith(".json") or re.match(r"\s*\[\s*(\{|$)", first):
        return Catalogue(path, _read_something("".join(lines), path), re.compile("[0-9]+"), "{name}.webm")
    if not {"youtube_id", "time_start", "time_end"}.isdisjoint(re.split(r"[\s,;\"]+", first.lower())):
        entries = _read_kinetics(lines, path)
        return Catalogue(path, entries, re.compile(".+_[0-9]{6}_[0-9]{6}"), "{label}/{name}.mp4")
    return None


def find_videos(
    catalogue: Catalogue, root: str | Path, classes: Sequence[str], clips: Mapping[str, str]
) -> list[Video]:
    """Return the catalogue's videos in its order, labelled by the place of their class in ``classes``.

    ``clips`` is what ``find_clips`` found under ``root``. A video whose file is not there is kept, marked as missing,
    with the path where it is expected. Raises UsageError where a class is not in ``classes``.
    """
    of_none = f"is none of the {len(classes)} classes ({classes[0]} to {classes[-1]}); correct it or DATA.CLASSES."
    labels = {
        name: _label_of(name, classes, f"List {catalogue.source}: label {name!r} {of_none}")
        for name in catalogue.classes()
    }
    videos = []
    for entry in catalogue.entries:
        path = next((clips[name] for name in entry.names if name in clips), None)
        if path is None:
            expected = catalogue.expected.format(label=entry.label.replace("/", "_"), name=entry.names[0])
            videos.append(Video(os.path.join(root, expected), labels[entry.label], missing=True))
        else:
            videos.append(Video(path, labels[entry.label]))
    return videos


def find_clips(root: str | Path, clip_folder: re.Pattern[str]) -> dict[str, str]:
    """Return the path of each video file and each ``clip_folder`` anywhere under ``root``, by name without ending.

    Of several with one name the first is taken, by folder and then by file. Hidden folders are skipped, and so
    are folders that may not be read (as lost+found): what they hold counts as missing.
    """
    found: dict[str, str] = {}
    seen: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(root, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:  # links that lead back up would have no end
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        for name in sorted(files):
            stem, ending = os.path.splitext(name)
            if ending.lower() in VIDEO_SUFFIXES:
                found.setdefault(stem, os.path.join(place, name))
        for name in filter(clip_folder.fullmatch, folders):
            found.setdefault(name, os.path.join(place, name))
        folders[:] = sorted(name for name in folders if name[0] != "." and not clip_folder.fullmatch(name))
    return found


def _read_kinetics(lines: list[str], path: str | Path) -> list[Entry]:
    """Return the entries of a Kinetics CSV; its rows are read one by one, as there may be millions."""
    reader = csv.reader(lines, skipinitialspace=True, strict=True)
    try:
        return _parse_kinetics(reader, path)
    except csv.Error as error:
        raise UsageError(f"List {path}, line {reader.line_num}: damaged CSV ({error}); correct its quotes.") from error


def _parse_kinetics(reader: Any, path: str | Path) -> list[Entry]:
    rows = (row for row in ([field.strip() for field in fields] for fields in reader) if any(row))  # no blank lines
    header = [name.lower() for name in next(rows)]
    absent = [name for name in KINETICS_COLUMNS if name not in header]
    if absent == ["label"]:
        raise UsageError(f"List {path} has no column label: test lists are published without; give one with it.")
    if absent:
        raise UsageError(
            f"List {path}, a Kinetics CSV, has no column {', '.join(absent)}; its first line must hold "
            f"{','.join(KINETICS_COLUMNS)}, separated by commas. Correct it, or give lines `path label`."
        )
    columns = [header.index(name) for name in KINETICS_COLUMNS]
    entries = []
    for row in rows:
        problem = ""
        if len(row) != len(header):
            problem = f" has {len(row)} fields, not {len(header)} as the header; quote commas in labels."
        else:
            label, name, start, end = (row[column] for column in columns)
            if not label or not re.fullmatch(r"[\w-]+", name):
                problem = f": label {label!r}, youtube_id {name!r}; give a class, and letters, digits, -, _."
            elif not (start.isdecimal() and end.isdecimal() and max(len(start), len(end)) <= 6):
                problem = f": times {start!r} and {end!r}; give whole seconds, as in 12 and 22."
        if problem:
            raise UsageError(f"List {path}, line {reader.line_num}{problem}")
        entries.append(Entry(label, (f"{name}_{start:0>6}_{end:0>6}", name)))
    if not entries:
        raise UsageError(f"List {path} has no rows below its header; give at least one video.")
    return entries


def _read_something(text: str, path: str | Path) -> list[Entry]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"List {path} is not JSON ({error}); give a whole file, as it is published.") from error
    if not isinstance(content, list) or not content:
        raise UsageError(
            f"List {path} is not a JSON list of videos; give one: the file with the names of the classes goes to "
            f"DATA.CLASSES."
        )
    entries = []
    for number, item in enumerate(content, start=1):
        name = item.get("id") if isinstance(item, dict) else None
        problem = ""
        if type(name) not in (str, int) or not str(name):
            problem = ' has no id; give {"id": "1", "template": "Holding [something]"} for each.'
        elif "template" not in item:
            problem = f" (id {name}) has no template: test lists are published without labels; give one with it."
        elif not isinstance(item["template"], str) or not item["template"].strip():
            problem = f" (id {name}): template {item['template']!r} is not text; give the name of a class."
        if problem:
            raise UsageError(f"List {path}, entry {number}{problem}")
        entries.append(Entry(item["template"].replace("[", "").replace("]", "").strip(), (str(name),)))
    return entries


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


def summarise_videos(videos: list[Video], split: str) -> str:
    """Return a line for the user: how many videos ``split`` has, and how many of them are missing."""
    missing, known = find_missing(videos)
    line = f"{split}: {len(videos):,} videos"
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
    if not os.path.isdir(path):
        return os.path.isfile(path)
    with os.scandir(path) as entries:
        return next(entries, None) is not None
