"""Tables of videos: rows with named columns, as Kinetics, EPIC-Kitchens, Charades, HACS and pandas write them."""

import ast
import csv
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stvit_video.common.errors import UsageError, nearest
from stvit_video.data.lists.annotations import Section, some_of
from stvit_video.data.lists.catalogues import LOOKS, TRIMMED, Catalogue, Entry
from stvit_video.data.lists.folders import is_media, is_path

MAX_LABELS = 50_000  # letters of a list as Python writes it: reading it takes hundreds of bytes for each
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
IDENTIFIER = re.compile(r"[\w-]+")
DIGITS = re.compile("[0-9]+")
NUMBER = re.compile(r"[+-]?[0-9]+")
DECIMAL = re.compile(r"[+-]?[0-9]*\.?[0-9]+(e[+-]?[0-9]+)?", re.IGNORECASE)
CHARADES = re.compile(r"^(c[0-9]{3}) [0-9.]+ [0-9.]+")  # a class with its start and end in seconds
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
    line = line.lstrip("#% ")  # as NumPy writes it
    separator = find_separator(line)
    cells = line.split() if separator == " " else next(csv.reader([line], delimiter=separator))
    header = [normalise(cell) for cell in cells]
    known = [kind for kind, names in COLUMNS.items() if set(names.split()) & set(header)]
    if len(header) < 2 or any(map(is_media, header)):
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
    shared: dict[tuple[str, ...], tuple[str, ...]] = {}  # fields of labels: few differ
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
        fields = tuple([_to_text(row[place]) for place in labels])
        try:
            entries.append(parse(row, shared.setdefault(fields, fields), number - 1))
        except ValueError as error:
            raise UsageError(f"List {path}, {unit} {number}: {error}") from None
    if not entries:
        raise UsageError(f"List {path} has no rows below its header; give at least one video.")
    if negative:
        notes.append(f"{path}: {negative:,} clips that do not show their class (label -1) are left out")
    try:
        found, multi_label = split_labels(shared, reading.multi_label, header[labels[0]])
    except LabelError as error:
        place = next(entry.place for entry in entries if entry.labels == error.fields)
        raise UsageError(f"List {path}, {unit} {place + 1}: {error}") from None
    if any(fields != some for fields, some in found.items()):
        entries = [entry._replace(labels=found[tuple(map(str, entry.labels))]) for entry in entries]
    some = [entry.names[0] for entry in some_of(entries, LOOKS)]
    has_ids = not any(map(is_path, some))
    are_clips = is_kinetics or ("youtube_id" in header and entries[0].section is None)
    folder = DIGITS if all(map(str.isdecimal, some)) else TRIMMED if are_clips else None
    expected = "{label}/{name}.mp4" if is_kinetics else "{name}.mp4" if has_ids else "{name}"
    return Catalogue(path, entries, folder, expected, has_ids, multi_label, tuple(notes))


def _check_kinetics(header: Sequence[str], path: str | Path) -> bool:
    """Say whether a table is a Kinetics CSV; UsageError where it lacks one of its columns."""
    if {"time_start", "time_end"}.isdisjoint(header):
        return False
    absent = [name for name in KINETICS_COLUMNS if name not in header and (name != "label" or "tags" not in header)]
    if absent == ["label"]:
        raise UsageError(f"List {path} has no column label: test lists are published without; give one with it.")
    if absent:
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


def _row_parser(header: Sequence[str], is_kinetics: bool) -> Callable[[Sequence[Any], tuple[str, ...], int], Entry]:
    """Return the function from a row, its fields of labels and its place to an entry; it raises ValueError."""
    places = {kind: [header.index(name) for name in names.split() if name in header] for kind, names in COLUMNS.items()}
    at = {kind: found[0] for kind, found in places.items() if found}
    origin = 1 if "verb_class" in header else 0  # EPIC-Kitchens counts frames from 1
    path = at["path"]
    has_prefix = header[path] == "youtube_id" and not is_kinetics  # HACS and ActivityNet name files v_ID

    clips: dict[tuple[str, str], tuple[Section, str]] = {}  # few times differ

    def parse(row: Sequence[Any], labels: tuple[str, ...], place: int) -> Entry:
        name = str(row[path])
        names = (name, f"v_{name}") if has_prefix else (name,)
        subset = str(row[at["subset"]]) if "subset" in at else ""
        if is_kinetics:
            times = str(row[at["start"]]).removesuffix(".0"), str(row[at["stop"]]).removesuffix(".0")
            clip = clips.get(times)
            if clip is None or not IDENTIFIER.fullmatch(name):
                clip = clips[times] = _kinetics_clip(name, *times)
            return Entry(names, labels, clip[0], None, name + clip[1], subset, place)
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
        return Entry(names, labels, section or frames, frames, "", subset, place)

    return parse


def _kinetics_clip(name: str, start: str, stop: str) -> tuple[Section, str]:
    """Return the section of a Kinetics video, and what follows its id in the name of a file that is cut out."""
    if not IDENTIFIER.fullmatch(name):
        raise ValueError(f"youtube_id {name!r}; give letters, digits, -, _.")
    if not (start.isdecimal() and stop.isdecimal() and max(len(start), len(stop)) <= 6):
        raise ValueError(f"times {start!r} and {stop!r}; give whole seconds, as in 12 and 22.")
    return Section(float(start), float(stop), may_be_file=True), f"_{start:0>6}_{stop:0>6}"


def to_seconds(text: Any) -> float:
    """Read a time in seconds, or in hours, minutes and seconds with colons; ValueError for anything else."""
    if not re.fullmatch(r"([0-9]{1,15}:){0,2}[0-9]{1,15}([.,][0-9]+)?", str(text)):
        raise ValueError(f"time {str(text)[:40]!r}; give seconds, as in 12.5, or 00:00:12.5.")
    parts = str(text).replace(",", ".").split(":")
    return sum(float(part) * 60**power for power, part in enumerate(reversed(parts)))


def to_whole(text: Any) -> int:
    """Read the number of a frame; ValueError for anything else."""
    if not re.fullmatch(r"[0-9]{1,15}(\.0*)?", str(text)):
        raise ValueError(f"frame {str(text)[:40]!r}; give a whole number.")
    return int(float(text))


class LabelError(ValueError):
    """What is wrong with the ``fields`` of a row's labels."""

    def __init__(self, fields: tuple[str, ...], problem: str) -> None:
        super().__init__(problem)
        self.fields = fields


def split_labels(
    rows: Iterable[tuple[str, ...]], multi_label: bool | None, column: str
) -> tuple[dict[tuple[str, ...], tuple[str, ...] | tuple[int, ...]], bool]:
    """Return the labels in each row of fields, and whether these are several; numbers where all are, else names.

    A ``column`` whose name is a plural may separate them by commas too. Raises LabelError for a row without a label
    where videos have one each, or of a number that is none.
    """
    rows = list(rows)
    several = SEVERAL if column not in ("labels", "tags", "actions") else re.compile(f"{SEVERAL.pattern}|,")
    is_charades = column == "actions" and any(CHARADES.search(row[0]) for row in rows)
    if multi_label is None:
        multi_label = is_charades or any(len(row) > 1 or several.search(row[0]) for row in rows)
    elif is_charades and not multi_label:
        raise LabelError(rows[0], "its videos have several actions each; unset DATA.MULTI_LABEL.")
    found = {row: tuple(_split(row, several)) if multi_label else row for row in rows}
    # pandas writes whole numbers as 3.0 where some are missing.
    whole = {row: [label.removesuffix(".0") for label in labels] for row, labels in found.items()}
    are_numbers = all(NUMBER.fullmatch(number) for numbers in whole.values() for number in numbers)
    are_scores = not are_numbers and all(DECIMAL.fullmatch(label) for labels in found.values() for label in labels)
    for row, labels in found.items():
        for label, number in zip(labels, whole[row], strict=True) if are_scores else ():
            if not NUMBER.fullmatch(number):
                raise LabelError(row, f"label {label[:20]} is no whole number; give the number or the name of a class.")
        if not multi_label and not row[0]:
            raise LabelError(row, f"label {row[0]!r} is empty; give a class.")
        problems = map(wrong_number, whole[row]) if are_numbers else ()
        for problem in (check_one_hot(labels), *problems):
            if problem:
                raise LabelError(row, problem)
    return {row: tuple(map(int, whole[row])) if are_numbers else labels for row, labels in found.items()}, multi_label


def check_one_hot(labels: Sequence[str]) -> str:
    """Return what is wrong with labels that are a 0 or 1 for each class; empty where there is nothing."""
    if len(labels) < 3 or not set(labels) <= {"0", "1"}:
        return ""
    return f"labels {' '.join(labels)[:40]} say yes or no to each class; give the numbers of those that are there."


def wrong_number(label: str) -> str:
    """Return what is wrong with a whole number as a label; empty where there is nothing."""
    number = int(label) if len(label) < 20 else MAX_LABEL + 1  # Python refuses numbers of many thousand digits
    if 0 <= number <= MAX_LABEL:
        return ""
    problem = "is negative" if number < 0 else f"is above {MAX_LABEL:,}"
    return f"label {label[:20]} {problem}; give class numbers, counted from 0."


def _to_text(field: Any) -> str:
    """Return a field of labels as text; JSON may hold numbers and lists."""
    if isinstance(field, list):
        return "|".join(map(str, field))
    return "" if field is None or field != field else str(field)  # pandas writes NaN where there is none


def _split(fields: Sequence[str], several: re.Pattern[str]) -> list[str]:
    """Return the labels of fields: lists of Python, or separated by | or ;, or by commas where there are neither."""
    parts: list[str] = []
    for text in fields:
        if text.startswith("[") and text.endswith("]"):
            try:
                parts += map(str, ast.literal_eval(text if len(text) <= MAX_LABELS else ""))
                continue
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # the last two: nested too deep
                text = text.strip("[]")
        marks = "," if several.search(text) and not re.search("[|;]", text) else "[|;]"
        parts += [part.strip(" '\"") for part in re.split(marks, text)]
    return [CHARADES.sub(r"\1", part) for part in parts if part]
