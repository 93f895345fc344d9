"""Lists as data sets publish them: the Kinetics CSV and the Something-Something JSON, and where their videos lie."""

import csv
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from stvit_video.common.errors import UsageError, nearest
from stvit_video.data.decode.types import VIDEO_SUFFIXES
from stvit_video.data.lists.annotations import LIST_FORM, Video, read_lines

KINETICS_COLUMNS = ("label", "youtube_id", "time_start", "time_end")
YOUTUBE_ID = re.compile(r"[\w-]+")


class Entry(NamedTuple):
    """A video of a catalogue: its class, and the names without ending that it may have, the likeliest first."""

    label: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Catalogue:
    """A list that names classes and videos, but not where the videos are.

    ``clip_folder`` matches the names of folders with the frames of one clip. They are not searched: they hold millions
    of pictures. ``expected`` is where a video that is nowhere would have been, from its ``label`` and ``name``.
    """

    source: str
    entries: list[Entry]
    clip_folder: re.Pattern[str]
    expected: str

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
        return Catalogue(str(path), _read_something("".join(lines), path), re.compile("[0-9]+"), "{name}.webm")
    if not {"youtube_id", "time_start", "time_end"}.isdisjoint(re.split(r"[\s,;\"]+", first.lower())):
        clip_folder = re.compile(".+_[0-9]{6}_[0-9]{6}")
        return Catalogue(str(path), _read_kinetics(lines, path), clip_folder, "{label}/{name}.mp4")
    return None


def find_videos(
    catalogue: Catalogue, root: str | Path, classes: Sequence[str], clips: Mapping[str, str] | None = None
) -> list[Video]:
    """Return the catalogue's videos in its order, labelled by the place of their class in ``classes``.

    ``clips`` is what ``find_clips`` found under ``root``; it is searched where that is not given.

    One whose file is nowhere under ``root`` stays, marked as missing, with the path where it is expected. Raises
    UsageError where a class is not in ``classes``.
    """
    labels: dict[str, int] = {}
    for name in catalogue.classes():
        if name in classes:
            labels[name] = classes.index(name)
        else:
            raise UsageError(
                f"List {catalogue.source}: label {name!r} is none of the {len(classes)} classes ({classes[0]} to "
                f"{classes[-1]}); correct it, or give all names in DATA.CLASSES.{nearest(name, list(classes))}"
            )
    found = find_clips(root, catalogue.clip_folder) if clips is None else clips
    videos = []
    for entry in catalogue.entries:
        path = next((found[name] for name in entry.names if name in found), None)
        expected = catalogue.expected.format(label=entry.label.replace("/", "_"), name=entry.names[0])
        videos.append(Video(path or os.path.join(root, expected), labels[entry.label], missing=path is None))
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
        identity = (status.st_dev, status.st_ino)
        if identity in seen:  # links that lead back up would have no end
            folders.clear()
            continue
        seen.add(identity)
        for name in sorted(files):
            stem, ending = os.path.splitext(name)
            if ending.lower() in VIDEO_SUFFIXES:
                found.setdefault(stem, os.path.join(place, name))
        for name in filter(clip_folder.fullmatch, folders):
            found.setdefault(name, os.path.join(place, name))
        folders[:] = sorted(name for name in folders if name[0] != "." and not clip_folder.fullmatch(name))
    return found


def _read_kinetics(lines: list[str], path: str | Path) -> list[Entry]:
    reader = csv.reader(lines, skipinitialspace=True, strict=True)
    rows: list[tuple[int, list[str]]] = []  # number of the line, fields; without blank ones
    try:
        for row in reader:
            fields = [field.strip() for field in row]
            if any(fields):
                rows.append((reader.line_num, fields))
    except csv.Error as error:
        raise UsageError(
            f"List {path}, line {reader.line_num}: damaged CSV ({error}); correct its quotation marks."
        ) from error
    header = [name.lower() for name in rows[0][1]]
    absent = [name for name in KINETICS_COLUMNS if name not in header]
    if absent == ["label"]:
        raise UsageError(
            f"List {path} has no column label: test lists are published without; give one with labels, as the "
            f"validation list."
        )
    if absent:
        raise UsageError(
            f"List {path} looks like a Kinetics CSV but has no column {', '.join(absent)}; its first line must hold "
            f"{','.join(KINETICS_COLUMNS)}, separated by commas. Correct it, or give lines `path label`."
        )
    entries = []
    for number, row in rows[1:]:
        if len(row) != len(header):
            raise UsageError(
                f"List {path}, line {number} has {len(row)} fields, not {len(header)} as the header; put a label that "
                f"holds a comma in quotation marks."
            )
        label, name, start, end = (row[header.index(column)] for column in KINETICS_COLUMNS)
        if not label or not YOUTUBE_ID.fullmatch(name):
            raise UsageError(
                f"List {path}, line {number}: label {label!r}, youtube_id {name!r}; give a class, and letters, digits, "
                f"- or _."
            )
        if not (start.isdecimal() and end.isdecimal() and max(len(start), len(end)) <= 6):
            raise UsageError(
                f"List {path}, line {number}: times {start!r} and {end!r}; give whole seconds, as in 12 and 22."
            )
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
            f"List {path} is not a JSON list of videos; give one such as something-something-v2-train.json. The file "
            f"with the names of the classes goes to DATA.CLASSES."
        )
    entries = []
    for number, item in enumerate(content, start=1):
        place, name = f"List {path}, entry {number}", item.get("id") if isinstance(item, dict) else None
        if type(name) not in (str, int) or not str(name):
            raise UsageError(
                f'{place} has no id; give {{"id": "1", "template": "Holding [something]"}} for each video.'
            )
        if "template" not in item:
            raise UsageError(
                f"{place} (id {name}) has no template: test lists are published without labels; give one with them, as "
                f"the validation list."
            )
        template = item["template"]
        if not isinstance(template, str) or not template.strip():
            raise UsageError(f"{place} (id {name}): template {template!r} is not text; give the name of a class.")
        entries.append(Entry(template.replace("[", "").replace("]", "").strip(), (str(name),)))
    return entries
