"""Lists without a header: lines of a path and numbers, or of a name and its class."""

import csv
import os
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from stvit_video.common.errors import UsageError
from stvit_video.data.decode.types import IMAGE_SUFFIXES, MEDIA_SUFFIXES
from stvit_video.data.lists.annotations import some_of
from stvit_video.data.lists.catalogues import LOOKS, TRIMMED, Catalogue, Entry, find_start
from stvit_video.data.lists.folders import is_media
from stvit_video.data.lists.tables import (
    COLUMNS,
    NUMBER,
    Reading,
    check_one_hot,
    find_separator,
    read_table,
    wrong_number,
)
from stvit_video.data.lists.text import find_file, unquoted

WIDE = re.compile(r"(.*?\S)((?:[\s,;]+[0-9]+(?:\.[0-9]+)?)+)")  # a path and more numbers than the label
LABEL_FIRST = re.compile(r"[0-9]+[\s,;]+\S.*")
AFTER_ENDING = re.compile(rf"({'|'.join(map(re.escape, MEDIA_SUFFIXES))})\s+", re.IGNORECASE)
YOUTUBE_ID = re.compile(r"[\w-]{11}")
KINDS = "path, label, start, stop (seconds), start_frame, stop_frame, offset, frames, or - for one to pass over"


def read_lines_list(lines: Sequence[str], path: str | Path, root: str | Path, reading: Reading) -> Catalogue:
    """Read lines ``path label``, separated by blank, comma, semicolon or tab, and what mmaction2 adds to them.

    Where the lines say it, or DATA.COLUMNS does, there are also frames, start and stop, or several labels; where
    neither does, UsageError says what to set. Labels are numbers, or all names; where no line has one, folders name the
    classes. Blank lines are skipped.
    """
    if reading.columns:
        return _read_columns(lines, path, reading)
    if named := _named(lines, path):
        return read_table(*named, path, reading, skip=0)
    rows = [(number, *_cut(line.strip())) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise UsageError(f"List {path} is empty; give at least one line `path label`.")
    if all(is_media(unquoted(line)) for _, line, _, _ in rows):
        if all(LABEL_FIRST.fullmatch(line) for _, line, _, _ in rows) and not os.path.lexists(
            find_file(root, rows[0][1])
        ):
            raise UsageError(
                f"List {path}: {rows[0][1][:120]!r} seems to begin with its label; write the path first, or separate "
                f"them by commas and give DATA.COLUMNS 'label path'."
            )
        return Catalogue(path, [Entry((unquoted(line),), (), place=number - 1) for number, line, _, _ in rows])
    if all(YOUTUBE_ID.fullmatch(line) and not NUMBER.fullmatch(line) for _, line, _, _ in rows):  # Mini-Kinetics
        entries = [Entry((line,), (), place=number - 1) for number, line, _, _ in rows]
        return Catalogue(path, entries, TRIMMED, "{name}.mp4", has_ids=True)
    if reading.multi_label is None or not reading.multi_label:
        header = _find_columns(rows, path, root)
        if header:
            return read_table(lines, header, path, reading, skip=0)
    entries = []
    for number, line, name, label in rows:
        if not name or not (label.isdecimal() or NUMBER.fullmatch(label.removesuffix(".0"))):
            raise UsageError(
                f"{path}, line {number}: {line[:120]!r} has no label; write path, space, comma or tab, and a whole "
                f"number."
            )
        labels = [label.removesuffix(".0")]  # pandas writes whole numbers so where some are missing
        if reading.multi_label and name[-1].isdigit() and (wide := WIDE.fullmatch(name)):
            name, labels = wide[1], [*_numbers_of(wide), label]
        if problem := check_one_hot(labels):
            raise UsageError(f"{path}, line {number}: {problem}")
        for one in labels:
            if problem := wrong_number(one) if NUMBER.fullmatch(one) else f"{one} is no whole number; give labels.":
                raise UsageError(f"{path}, line {number}: {problem}")
        entries.append(Entry((name,), tuple(map(int, labels)), place=number - 1))
    return Catalogue(path, entries, multi_label=bool(reading.multi_label))


def _cut(line: str) -> tuple[str, str, str]:
    """Return a line, and the path and the label in it."""
    cut = max(line.rfind(" "), line.rfind(","), line.rfind("\t"), line.rfind(";"))
    return line, unquoted(line[: max(cut, 0)].rstrip(" ,\t;")), unquoted(line[cut + 1 :])


def _numbers_of(wide: re.Match[str]) -> list[str]:
    """Return the numbers in a match of WIDE."""
    return re.findall(r"[0-9.]+", wide[2])


def _named(lines: Iterable[str], path: str | Path) -> tuple[list[str], list[str]] | None:
    """Return lines that name classes, with their columns: ``id;name`` (Jester), ``path,name,...`` or ``path name``.

    Return None where there are no names. Raises UsageError where the first line names columns that are not known.
    """
    some = list(islice((line.strip() for line in lines if line.strip()), LOOKS))
    if not some:
        return None
    if find_separator(some[0]) == " ":
        if not all(AFTER_ENDING.search(line) for line in some):
            return None
        some = [AFTER_ENDING.sub("\\1\t", line, count=1) for line in some]
        lines = (AFTER_ENDING.sub("\\1\t", line, count=1) for line in lines)
    try:
        rows = list(csv.reader(some, delimiter=find_separator(some[0]), skipinitialspace=True, strict=True))
    except csv.Error:
        return None
    if len({len(row) for row in rows}) > 1 or len(rows[0]) < 2:
        return None
    is_header = len(rows) > 1 and not any(is_media(cell) or cell.isdecimal() for cell in rows[0])
    if is_header and all(any(map(is_media, row)) for row in rows[1:]):
        raise UsageError(
            f"List {path}: its first line {some[0][:80]!r} names columns, none of which is known to hold paths; call "
            f"them path and label there."
        )
    if any(not row[0] or AFTER_ENDING.search(f"{row[1]} ") or not re.search(r"[^\W\d_]", row[1]) for row in rows):
        return None
    return list(lines), ["path", "label", *["-"] * (len(rows[0]) - 2)]


def _find_columns(rows: Sequence[tuple[int, str, str, str]], path: str | Path, root: str | Path) -> list[str] | None:
    """Return the columns of lines with several numbers after the path; None where there is the label alone.

    A path may itself end with a number. Raises UsageError where the numbers may mean several things.
    """
    wide = [(name, match) for _, _, name, _ in rows if name[-1:].isdigit() and (match := WIDE.fullmatch(name))]
    some = some_of(wide, LOOKS)
    if not wide or find_start([name for name, _ in some], str(root)):
        return None
    start = find_start([match[1] for _, match in some], str(root)) or root
    there = [(file, match) for _, match in some if os.path.lexists(file := find_file(start, match[1]))]
    if not there and len(wide) < len(rows) and not all(is_media(match[1]) for _, match in some):
        return None
    numbers = [[float(text) for text in _numbers_of(match)] for _, match in wide]
    counts = {len(found) for found in numbers} | ({0} if len(wide) < len(rows) else set())
    if counts == {1} and there and all(_count_frames(file) == float(_numbers_of(match)[0]) for file, match in there):
        return ["path", "frames", "label"]
    if counts == {2} and any(second <= first for first, second in numbers):
        return ["path", "offset", "frames", "label"]
    line = next(line for _, line, name, _ in rows if name == wide[0][0])
    raise UsageError(
        f"List {path}: {line[:120]!r} has several numbers after its path; say what they are: DATA.MULTI_LABEL True if "
        f"all are labels, or DATA.COLUMNS, as in 'path frames label', 'path start_frame stop_frame label' (frames) or "
        f"'path start stop label' (seconds)."
    )


def _count_frames(folder: str) -> int:
    """Return how many images a folder holds, without those of optical flow; -1 where it is none."""
    if not os.path.isdir(folder):
        return -1
    return sum(name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("flow") for name in os.listdir(folder))


def _read_columns(lines: Sequence[str], path: str | Path, reading: Reading) -> Catalogue:
    """Read lines whose columns the user names."""
    columns = list(reading.columns)
    known = {*COLUMNS, *" ".join(COLUMNS.values()).split(), "-"}
    if columns.count("path") != 1 or "label" not in columns or not set(columns) <= known:
        raise UsageError(f"DATA.COLUMNS {' '.join(columns)}: write one path and at least one label; allowed: {KINDS}.")
    first, second = [*(line for line in lines if line.strip()), "", ""][:2]
    separator = find_separator(first)
    if separator == " " and columns[0] != "path":
        raise UsageError(
            f"DATA.COLUMNS {' '.join(columns)}: {path} separates its columns by blanks; the path has to come first."
        )
    rows = [one.rsplit(None, len(columns) - 1) if separator == " " else one.split(separator) for one in (first, second)]
    is_header = False
    if len(rows[0]) == len(rows[1]) == len(columns):
        (name, other), place = [row[columns.index("path")] for row in rows], range(len(columns))
        numbers = [i for i in place if re.search("[0-9]", rows[1][i]) and not re.search("[0-9]", rows[0][i])]
        is_header = (is_media(other) and not is_media(name)) or any(columns[i] not in ("path", "-") for i in numbers)
    return read_table(lines, columns, path, reading, skip=int(is_header))
