"""Names of classes, and the numbers or codes that lists give them."""

import csv
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stvit_video.common.errors import UsageError, nearest
from stvit_video.data.lists.text import check_lengths, parse_json, read_lines, unquoted

CLASS_FORM = "one class name a line, in the order of the labels"
HEADERS = {"class", "classes", "class_name", "classname", "name", "label", "labels", "action", "category", "key"}
ID_HEADERS = {"id", "class_id", "class_index", "label_id", "index", "number", "label", "class"}


@dataclass(frozen=True)
class ClassNames:
    """Class names in the order of the labels, with the ids by which lists may call them instead: 1 or c000."""

    names: Sequence[str]
    ids: Sequence[str] = ()  # as many as names; empty: their places, from 0
    _places: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        places: dict[str, int] = {}
        for place, name in enumerate(self.names):  # of equal names the first gives the label
            places.setdefault(compared(name), place)
        object.__setattr__(self, "_places", {**places, **{key: place for place, key in enumerate(self.ids)}})

    def find(self, label: str | int) -> int | None:
        """Return the label of a class from its name, its id or its number; None where there is none."""
        if isinstance(label, int) and not self.ids:
            return label  # whether it is out of range is checked with all others
        return self._places.get(compared(str(label)))

    def label_of(self, label: str | int, given: str) -> int:
        """Return what ``find`` returns; UsageError, which begins with what was ``given``, where that is None."""
        place = self.find(label)
        if place is None:
            known = self.ids if isinstance(label, int) and self.ids else self.names
            raise UsageError(
                f"{given} is none of the {len(known)} classes{f' ({known[0]} to {known[-1]})' if known else ''}; "
                f"correct it or DATA.CLASSES.{nearest(str(label), known)}"
            )
        return place


def compared(name: str) -> str:
    """Return the form in which names are compared: macOS writes letters and their accents apart."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def read_classes(path: str | Path) -> ClassNames:
    """Read class names in the order of the labels, with their ids where the file has any.

    The file has a name a line, or ``id name`` or ``name,id`` with ids from 0 or 1 without gaps (UCF101, Charades,
    Moments in Time), or is a CSV with a header (EPIC-Kitchens), or JSON: {name: label}, {label: name} or a list of
    names (Diving48). Raises UsageError for any other file.
    """
    text = "".join(read_lines(path, "Class file", CLASS_FORM)).strip()
    if str(path).lower().endswith(".json") or text.startswith(("{", "[")):
        return ClassNames(_read_json(text, path))
    lines = check_lengths([line.strip() for line in text.split("\n") if line.strip()], f"Class file {path}")
    if not lines:
        raise UsageError(f"Class file {path} is empty; give {CLASS_FORM}.")
    return _read_table(lines, path) or _read_numbered(lines, path) or _read_names(lines)


def _read_names(lines: list[str]) -> ClassNames:
    has_header = lines[0].lower() in HEADERS and len(lines) > 1
    return ClassNames(list(map(unquoted, lines[has_header:])))


def _read_table(lines: list[str], path: str | Path) -> ClassNames | None:
    """Read a CSV whose header names the columns of ids and of names."""
    separator = max(",;\t ", key=lines[0].count)
    header = [cell.strip().lower().replace(" ", "_") for cell in next(csv.reader(lines[:1], delimiter=separator))]
    try:
        rows = list(csv.reader(lines[1:], delimiter=separator, skipinitialspace=True))
    except csv.Error:  # a quote that does not end
        return None
    rows = [row for row in rows if len(row) == len(header)]
    if not rows or len(header) < 2:
        return None
    are_numbers = [all(cell.strip().isdecimal() for cell in column) for column in zip(*rows, strict=True)]
    ids = [i for i, cell in enumerate(header) if cell in ID_HEADERS and are_numbers[i]]
    names = [i for i, cell in enumerate(header) if cell in HEADERS and not are_numbers[i]]
    if not ids or not names:
        return None
    return _in_order([(row[ids[0]].strip(), row[names[0]].strip()) for row in rows], path)


def _read_numbered(lines: list[str], path: str | Path) -> ClassNames | None:
    """Read lines of an id and a name, or of a name, a comma and a number."""
    first = [re.fullmatch(r"([a-zA-Z]?[0-9]+)[\s,;:]+(.*\S.*)", line) for line in lines]
    last = [re.fullmatch(r"(.*\S)\s*[,;\t]\s*([0-9]+)", line) for line in lines]
    if all(first):
        return _in_order([(match[1], match[2]) for match in first if match], path)
    if all(last):
        return _in_order([(match[2], match[1]) for match in last if match], path)
    if all(re.fullmatch(r"(.*\S)\s+([0-9]+)", line) for line in lines):
        return _in_order([(line.split()[-1], line.rsplit(None, 1)[0]) for line in lines], path, required=False)
    if len(lines) > 2 and (all(first[1:]) or all(last[1:])):  # the first line names the columns
        return _read_numbered(lines[1:], path)
    return None


def _in_order(pairs: Sequence[tuple[str, str]], path: str | Path, required: bool = True) -> ClassNames | None:
    """Return names in the order of their ids, which count from 0 or 1; None, or UsageError, where they do not."""
    by_number = {int(re.sub("[^0-9]", "", key)[:18] or -1): (key, name) for key, name in pairs}
    numbers = sorted(by_number)
    start = numbers[0] if numbers else -1
    if start not in (0, 1) or numbers != list(range(start, start + len(pairs))):
        if not required:
            return None
        raise UsageError(
            f"Class file {path} has ids that do not count from 0 or 1 without gaps ({', '.join(map(str, numbers[:5]))} "
            f"...); correct them, or give {CLASS_FORM}, without ids."
        )
    ids = [by_number[number][0] for number in numbers]
    names = [by_number[number][1].strip('"') for number in numbers]
    # Lists write numbers without leading zeros.
    plain = [str(int(key)) if key.isdecimal() else key for key in ids]
    return ClassNames(names, () if plain == [str(place) for place in range(len(plain))] else plain)


def _read_json(text: str, path: str | Path) -> list[str]:
    try:
        content = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"Class file {path} is not JSON ({error}); give {CLASS_FORM}.") from error
    if isinstance(content, list) and content:
        # Diving48 names a dive by its parts.
        names = ["_".join(map(str, item)) if isinstance(item, list) else item for item in content]
        if all(isinstance(name, str) and name for name in names):
            return names
    # The names of Kinetics' classes circulate in quotes of their own.
    labels = {key.strip('"'): label for key, label in content.items()} if isinstance(content, dict) else {}
    numbers = [str(label) for label in range(len(labels))]
    by_label = {str(label): name for name, label in labels.items()}  # published as text and as numbers
    if labels and by_label.keys() != set(numbers) and labels.keys() == set(numbers):
        by_label = labels
    if not labels or by_label.keys() != set(numbers) or not all(isinstance(name, str) for name in by_label.values()):
        raise UsageError(
            f'Class file {path} does not give each name its label, from 0 without gaps, as {{"walking": 0, '
            f'"running": 1}}; correct it, or give one class name a line.'
        )
    return [by_label[number] for number in numbers]
