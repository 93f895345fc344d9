"""Lists as data sets publish them, which name classes and videos but not where the files are."""

import csv
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stvit_video.common.errors import UsageError
from stvit_video.data.decode.types import VIDEO_SUFFIXES
from stvit_video.data.lists.annotations import LIST_FORM, Video, label_of, read_lines

KINETICS_COLUMNS = ("label", "youtube_id", "time_start", "time_end")


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
        name: label_of(name, classes, f"List {catalogue.source}: label {name!r} {of_none}")
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
