"""Tables of videos: rows with named columns, as Kinetics, EPIC-Kitchens, Charades, HACS and pandas write them."""

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stvit_video.common.errors import UsageError, nearest
from stvit_video.data.decode.types import MEDIA_SUFFIXES
from stvit_video.data.lists.annotations import Section
from stvit_video.data.lists.catalogues import TRIMMED, Catalogue, Entry

MAX_LABEL = 999_999  # more classes than any data set has: a larger number is an id or a time, read as a label
# What data sets call their columns, the likeliest first; compared in lower case, with _ for blanks.
COLUMNS = {
    "path": "path video_path filepath file_path clip_path video_file filename file_name file video clip clip_name "
    "video_name youtube_id video_id vid_name videoid vid clip_id name id",
    "label": "template label labels class classname class_name category action actions activity target tag tags "
    "verb_class",
    "start": "start time_start start_time t_start start_timestamp start_sec start_seconds",
    "stop": "stop end time_end end_time t_end stop_timestamp end_timestamp end_sec end_seconds",
    "start_frame": "start_frame frame_start offset",
    "stop_frame": "stop_frame end_frame frame_end",
    "frames": "frames num_frames total_frames n_frames",
    "subset": "subset split set partition",
}
KINETICS_COLUMNS = ("label", "youtube_id", "time_start", "time_end")
DIGITS = re.compile("[0-9]+")
NUMBER = re.compile(r"[+-]?[0-9]+")
SEVERAL = re.compile(r"[|;]|^\[.*\]$|^[0-9]+(\s*,\s*[0-9]+)+$")  # a field that holds several labels

Rows = Iterable[tuple[int, Sequence[Any]]]  # fields, with the number of the line or item


@dataclass(frozen=True)
class Reading:
    """How a list is to be read where it can be read in several ways."""

    columns: tuple[str, ...] = ()  # of a list without a header, in order (DATA.COLUMNS)
    label: str = ""  # the column of the labels, of several (DATA.LABEL)
    multi_label: bool | None = None  # whether videos have several labels (DATA.MULTI_LABEL); None: as the list says


AS_IT_SAYS = Reading()


def find_separator(line: str) -> str:
    """Return which of semicolon, tab and comma separates the fields of a line; a blank where there is none."""
    return max(";\t, ", key=lambda mark: line.count(mark) if mark != " " else 0.5)


def normalise(name: str) -> str:
    """Return the form in which the names of columns are compared."""
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def read_header(line: str) -> list[str] | None:
    """Return the columns that a list's first line names; None where it is no header."""
    separator = find_separator(line)
    cells = line.split() if separator == " " else next(csv.reader([line], delimiter=separator))
    header = [normalise(cell) for cell in cells]
    known = [kind for kind, names in COLUMNS.items() if set(names.split()) & set(header)]
    if len(header) < 2 or any(cell.endswith(MEDIA_SUFFIXES) for cell in header):
        return None
    # A single known word may be part of a path; a line of data has numbers, too.
    return header if len(known) > 1 or (known and not re.search("[0-9]", line)) else None


def read_table(lines: Sequence[str], header: list[str], path: str | Path, reading: Reading, skip: int = 1) -> Catalogue:
    """Read the rows of a table after the first ``skip``; UsageError, naming the line, where one is wrong."""
    first = next(line for line in lines if line.strip())
    separator = find_separator(first)
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
    rows: Iterator[tuple[int, list[str]]] = ((reader.line_num, [field.strip() for field in row]) for row in reader)
    if separator == " ":  # only the path, which comes first, may hold blanks
        cut = (line.rsplit(None, len(header) - 1) for line in lines)
        rows = ((number, [field.strip('"') for field in row]) for number, row in enumerate(cut, start=1))
    rows = ((number, row) for number, row in rows if any(row))  # no blank lines
    try:
        for _ in range(skip):
            next(rows)
        return read_rows(rows, header, path, reading, "line")
    except csv.Error as error:
        raise UsageError(f"List {path}, line {reader.line_num}: damaged CSV ({error}); correct its quotes.") from error


def read_rows(rows: Rows, header: Sequence[str], path: str | Path, reading: Reading, unit: str) -> Catalogue:
    """Read rows one by one, as there may be millions, whose columns ``header`` names.

    ``unit`` is what the number of a row counts. Raises UsageError, naming the row, where one is wrong.
    """
    if not set(COLUMNS["path"].split()) & set(header):
        raise UsageError(
            f"List {path} has the columns {', '.join(header)[:200]}, none of which is known to name the videos; call "
            f"that one path."
        )
    notes: list[str] = []
    is_kinetics = _check_kinetics(header, path)
    labels = _find_labels(header, path, reading, notes)
    parse = _row_parser(header, is_kinetics)
    # HACS: 1 where the clip shows the class, -1 where it does not.
    votes = header.index("label") if "classname" in header and "label" in header else None
    entries: list[Entry] = []
    texts: list[list[Any]] = []
    negative = 0
    for number, row in rows:
        if len(row) != len(header):
            raise UsageError(
                f"List {path}, {unit} {number} has {len(row)} fields, not {len(header)} as the header; quote commas in "
                f"labels."
            )
        if votes is not None and str(row[votes]) == "-1":
            negative += 1
            continue
        try:
            entries.append(parse(row, number))
        except ValueError as error:
            raise UsageError(f"List {path}, {unit} {number}: {error}") from None
        texts.append([row[place] for place in labels])
    if not entries:
        raise UsageError(f"List {path} has no rows below its header; give at least one video.")
    if negative:
        notes.append(f"{path}: {negative:,} clips that do not show their class (label -1) are left out")
    numbers = [entry.place for entry in entries]
    found, multi_label = read_labels(texts, numbers, f"List {path}, {unit}", reading, "actions" in header)
    entries = [entry._replace(labels=some, place=entry.place - 1) for entry, some in zip(entries, found, strict=True)]
    has_ids = not any("/" in entry.names[0] or is_media(entry.names[0]) for entry in entries)
    folder = DIGITS if all(entry.names[0].isdecimal() for entry in entries) else TRIMMED if is_kinetics else None
    expected = "{label}/{name}.mp4" if is_kinetics else "{name}.mp4" if has_ids else "{name}"
    return Catalogue(path, entries, folder, expected, has_ids, multi_label, tuple(notes))


def is_media(name: str) -> bool:
    """Say whether a name ends like that of an image or a video."""
    return name.lower().endswith(MEDIA_SUFFIXES)


def _check_kinetics(header: Sequence[str], path: str | Path) -> bool:
    """Say whether a table is a Kinetics CSV; UsageError where it lacks one of its columns."""
    if {"youtube_id", "time_start", "time_end"}.isdisjoint(header):
        return False
    absent = [name for name in KINETICS_COLUMNS if name not in header and (name != "label" or "tags" not in header)]
    if absent == ["label"]:
        raise UsageError(f"List {path} has no column label: test lists are published without; give one with it.")
    if absent and not ("youtube_id" not in absent and {"start", "end"} <= set(header)):
        raise UsageError(
            f"List {path}, a Kinetics CSV, has no column {', '.join(absent)}; its first line must hold "
            f"{','.join(KINETICS_COLUMNS)}. Correct it, or give lines `path label`."
        )
    return not absent


def _find_labels(header: Sequence[str], path: str | Path, reading: Reading, notes: list[str]) -> list[int]:
    """Return the places of the columns of labels."""
    if reading.label:
        wanted = normalise(reading.label)
        if wanted not in header:
            raise UsageError(
                f"DATA.LABEL {reading.label}: {path} has the columns {', '.join(header)}; choose one of them."
                f"{nearest(wanted, header)}"
            )
        return [header.index(wanted)]
    known = [name for name in COLUMNS["label"].split() if name in header]
    if "classname" in known and "youtube_id" in header:
        known = ["classname"]
    if not known:
        raise UsageError(
            f"List {path} has the columns {', '.join(header)[:200]}, none of which is known to hold labels (test lists "
            f"are published without); set DATA.LABEL to the one that does."
        )
    if known[0] == "verb_class":
        notes.append(f"{path}: the labels are those of the column verb_class; DATA.LABEL noun_class takes the nouns")
    return [place for place, name in enumerate(header) if name == known[0]]


def _row_parser(header: Sequence[str], is_kinetics: bool) -> Callable[[Sequence[Any], int], Entry]:
    """Return the function from a row and its number to an entry without labels; it raises ValueError."""
    places = {kind: [header.index(name) for name in names.split() if name in header] for kind, names in COLUMNS.items()}
    at = {kind: found[0] for kind, found in places.items() if found}
    origin = 1 if "verb_class" in header else 0  # EPIC-Kitchens counts frames from 1
    path = at["path"]

    def parse(row: Sequence[Any], number: int) -> Entry:
        name = str(row[path])
        names = (name, f"v_{name}") if header[path] == "youtube_id" else (name,)
        subset = str(row[at["subset"]]) if "subset" in at else ""
        if is_kinetics:
            clip, cut = _kinetics_clip(name, str(row[at["start"]]), str(row[at["stop"]]))
            return Entry(names, (), clip, None, cut, subset, number)
        if not name:
            raise ValueError(f"the column {header[path]} is empty; give the path or the id of a video.")
        section: Section | None = None
        frames: Section | None = None
        if "start" in at and "stop" in at:
            section = Section(to_seconds(row[at["start"]]), to_seconds(row[at["stop"]]))
        if "start_frame" in at and ("stop_frame" in at or "frames" in at):
            first = to_whole(row[at["start_frame"]]) - origin
            stop = to_whole(row[at["stop_frame"]]) if "stop_frame" in at else first + to_whole(row[at["frames"]])
            frames = Section(first, stop, in_frames=True)
        return Entry(names, (), section or frames, frames, "", subset, number)

    return parse


def _kinetics_clip(name: str, start: str, stop: str) -> tuple[Section, str]:
    """Return the section of a Kinetics video, and the name of a file that is cut out already."""
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"youtube_id {name!r}; give letters, digits, -, _.")
    first, last = (re.sub(r"\.0+$", "", time) for time in (start, stop))
    if not (first.isdecimal() and last.isdecimal() and max(len(first), len(last)) <= 6):
        raise ValueError(f"times {start!r} and {stop!r}; give whole seconds, as in 12 and 22.")
    return Section(float(first), float(last), may_be_file=True), f"{name}_{first:0>6}_{last:0>6}"


def to_seconds(text: Any) -> float:
    """Read a time in seconds, or in hours, minutes and seconds with colons; ValueError for anything else."""
    if not re.fullmatch(r"([0-9]+:){0,2}[0-9]+([.,][0-9]+)?", str(text)):
        raise ValueError(f"time {str(text)[:40]!r}; give seconds, as in 12.5, or 00:00:12.5.")
    parts = str(text).replace(",", ".").split(":")
    return sum(float(part) * 60**power for power, part in enumerate(reversed(parts)))


def to_whole(text: Any) -> int:
    """Read the number of a frame; ValueError for anything else."""
    if not re.fullmatch(r"[0-9]+(\.0*)?", str(text)):
        raise ValueError(f"frame {str(text)[:40]!r}; give a whole number.")
    return int(float(text))


def read_labels(
    texts: Sequence[Sequence[Any]], numbers: Sequence[int], place: str, reading: Reading, is_charades: bool
) -> tuple[list[tuple[Any, ...]], bool]:
    """Return the labels of each row, and whether these are several; numbers where all are numbers, else names.

    Raises UsageError, naming the row after ``place``, for a row without a label where videos have one each.
    """
    several = is_charades or any(len(row) > 1 for row in texts) or any(_holds_several(row[0]) for row in texts)
    multi_label = several if reading.multi_label is None else reading.multi_label
    if is_charades and not multi_label:
        raise UsageError(f"{place} {numbers[0]}: its videos have several actions each; unset DATA.MULTI_LABEL.")
    split = [
        [part for field in row for part in (_split(field) if multi_label else [str(field).strip()])] for row in texts
    ]
    are_numbers = all(NUMBER.fullmatch(label) for row in split for label in row)
    for number, row in zip(numbers, split, strict=True):
        if not multi_label and not row[0]:
            raise UsageError(f"{place} {number}: label {row[0]!r} is empty; give a class.")
        for label in row if are_numbers else ():
            if problem := wrong_number(label):
                raise UsageError(f"{place} {number}: {problem}")
    return [tuple(map(int, row) if are_numbers else row) for row in split], multi_label


def wrong_number(label: str) -> str:
    """Return what is wrong with a whole number as a label; empty where there is nothing."""
    number = int(label) if len(label) < 20 else MAX_LABEL + 1  # Python refuses numbers of many thousand digits
    if 0 <= number <= MAX_LABEL:
        return ""
    problem = "is negative" if number < 0 else f"is above {MAX_LABEL:,}"
    return f"label {label[:20]} {problem}; give class numbers, counted from 0."


def _holds_several(field: Any) -> bool:
    return isinstance(field, list) or bool(SEVERAL.search(str(field)))


def _split(field: Any) -> list[str]:
    """Return the labels of one field, between which are | or ; or, in brackets and between numbers, commas."""
    if isinstance(field, list):
        return [str(part) for part in field]
    text = str(field).strip()
    marks = r"[|;,]" if SEVERAL.search(text) and not re.search("[|;]", text) else "[|;]"
    parts = [part.strip(" '\"") for part in re.split(marks, text.strip("[]"))]
    # Charades: a class with its start and end in seconds.
    return [re.sub(r"^(c[0-9]{3}) [0-9.]+ [0-9.]+$", r"\1", part) for part in parts if part]
