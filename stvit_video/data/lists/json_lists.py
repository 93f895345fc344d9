"""Lists in JSON: Something-Something and Diving48, and what ActivityNet, HACS and Kinetics write for each video."""

import json
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from stvit_video.common.errors import UsageError
from stvit_video.data.lists.annotations import Section
from stvit_video.data.lists.catalogues import TRIMMED, Catalogue, Entry
from stvit_video.data.lists.tables import DIGITS, Reading, normalise, read_rows
from stvit_video.data.lists.text import MAX_LINE, parse_json


def load_json(text: str, path: str | Path) -> Any:
    """Return the content of a JSON file, or of one with an object a line; UsageError where it is damaged."""
    try:
        content = parse_json(text)
        return [content] if str(path).lower().endswith(".jsonl") and isinstance(content, dict) else content
    except (ValueError, RecursionError) as error:
        try:
            items = [parse_json(line) for line in text.splitlines() if line.strip()]
        except (ValueError, RecursionError):
            items = []
        if len(items) > 1:
            return items
        raise UsageError(f"List {path} is not JSON ({error}); give a whole file, as it is published.") from error


def read_json(text: str, path: str | Path, reading: Reading) -> Catalogue:
    """Read a JSON list of videos. Raises UsageError, naming the entry, where it is none, damaged or without labels."""
    content = load_json(text, path)
    if isinstance(content, dict) and isinstance(content.get("database"), dict):
        content = content["database"]
    if isinstance(content, dict) and content and all(isinstance(item, dict) for item in content.values()):
        return _read_segments(content, path)
    if not isinstance(content, list) or not content:
        raise UsageError(
            f"List {path} is not a JSON list of videos; give one: the file with the names of the classes goes to "
            f"DATA.CLASSES."
        )
    first = content[0]
    if isinstance(first, dict) and "template" not in first and ("label" in first or "id" not in first):
        return _read_records(content, path, reading)
    return _read_something(content, path)


def _read_records(content: Sequence[Any], path: str | Path, reading: Reading) -> Catalogue:
    """Read a table whose rows are objects (Diving48, pandas)."""
    header = [normalise(name) for name in content[0]]
    for number, item in enumerate(content, start=1):
        if not isinstance(item, dict) or item.keys() != content[0].keys():
            raise UsageError(f"List {path}, entry {number} has other keys than the first ({', '.join(header)[:200]}).")
        if wrong := [name for name in item if not _is_field(item[name])]:
            raise UsageError(f"List {path}, entry {number}: {wrong[0][:80]} is no short text or number, or a list.")
    rows = ((number, list(item.values())) for number, item in enumerate(content, start=1))
    found = read_rows(rows, header, path, reading, "entry")
    if "vid_name" in header:  # Diving48: the files are cut out already, and the frames are those of each file
        found.entries[:] = [entry._replace(section=None, frames=None) for entry in found.entries]
    return found


def _read_something(content: Sequence[Any], path: str | Path) -> Catalogue:
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
        label = item["template"].replace("[", "").replace("]", "").strip()
        entries.append(Entry((str(name),), (label,), place=number - 1))
    return Catalogue(path, entries, DIGITS, "{name}.webm", has_ids=True)


def _is_field(value: Any) -> bool:
    """Return whether a value of an object may be a field of a table: one value, or several in a list."""
    parts = value if isinstance(value, list) else [value]
    return not any(isinstance(one, list | dict) or (isinstance(one, str) and len(one) > MAX_LINE) for one in parts)


def segments_of(item: Mapping[str, Any]) -> Any:
    """Return a video's segments, in the order in which entries count them: a list, or one alone."""
    return item.get("annotations", item.get("annotation", ()))


def keep_entries(text: str, path: str | Path, keep: Callable[[int], bool]) -> bytes:
    """Return a JSON list of videos with the entries alone whose place is to be kept."""
    content = load_json(text, path)
    if isinstance(content, list):
        items = [json.dumps(item).encode() for place, item in enumerate(content) if keep(place)]
        return b"[\n" + b",\n".join(items) + b"\n]\n"
    videos = content["database"] if isinstance(content.get("database"), dict) else content
    place = -1
    for name, item in list(videos.items()):
        found = segments_of(item)
        kept = []
        for segment in [found] if isinstance(found, dict) else found:
            place += 1
            kept += [segment] if keep(place) else []
        if not kept:
            del videos[name]
        elif isinstance(found, list):
            found[:] = kept
    return json.dumps(content).encode() + b"\n"


def _read_segments(content: Mapping[str, Mapping[str, Any]], path: str | Path) -> Catalogue:
    """Read videos with labelled segments: one each in Kinetics, whose clips are cut out, several in ActivityNet."""
    entries = []
    has_clips = False
    place = -1
    for name, item in content.items():
        found = segments_of(item)
        is_clip = isinstance(found, dict)
        has_clips = has_clips or is_clip
        if not is_clip and not isinstance(found, list | tuple):
            raise UsageError(f"List {path}, video {name:.80}: {str(found)[:80]} is no list of segments; give one.")
        for segment in [found] if is_clip else found:
            place += 1
            try:
                label, (start, stop) = segment["label"], map(float, segment["segment"])
                if not isinstance(label, str | int) or not isfinite(start) or not isfinite(stop):
                    raise ValueError
            except (KeyError, TypeError, ValueError, OverflowError):
                if is_clip and "label" not in found:
                    continue  # a test video
                raise UsageError(
                    f"List {path}, video {name:.80}: {str(segment)[:80]} is no segment; give "
                    f'{{"label": "yoga", "segment": [start, stop]}} in seconds.'
                ) from None
            cut = f"{name}_{int(start):06}_{int(stop):06}" if is_clip else ""
            section = Section(start, stop, may_be_file=is_clip)
            subset = str(item.get("subset", ""))
            entries.append(Entry((name, f"v_{name}"), (str(label),), section, None, cut, subset, place))
    if not entries:
        raise UsageError(
            f"List {path} has no labelled videos: test lists are published without labels; give one with them."
        )
    expected = "{label}/{name}.mp4" if has_clips else "{name}.mp4"
    return Catalogue(path, entries, TRIMMED if has_clips else None, expected, has_ids=True)
