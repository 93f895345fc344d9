"""What lists hold, and where under a root the videos are that they name."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from stvit_video.common.errors import UsageError
from stvit_video.data.lists.annotations import Section, Video, some_of
from stvit_video.data.lists.class_names import ClassNames, compared
from stvit_video.data.lists.folders import FLOW_FOLDER, FOREIGN_FOLDERS, PREVIEW_FOLDER, is_path, list_folder
from stvit_video.data.lists.text import find_file

LOOKS = 32  # entries of a list that are looked up to see what its names are
TRIMMED = re.compile(".+_[0-9]{6}_[0-9]{6}")  # names of Kinetics' clips: id, start and end
SUBSETS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validate", "validation"),
    "test": ("test", "testing"),
}
# Where a file has no labelled videos of its own for these: many sets keep the labels of their test videos.
INSTEAD = {"train": (), "val": ("test",), "test": ("val",)}


class Entry(NamedTuple):
    """A video of a list: the names that it may have, the likeliest first, and its classes by name or number."""

    names: tuple[str, ...]  # paths from the root, or ids, which are names without ending or folder
    labels: tuple[str, ...] | tuple[int, ...]  # none: the folder in which the file lies names the class
    section: Section | None = None  # the labelled part
    frames: Section | None = None  # the same part of a folder of frames, where that is known
    trimmed: str = ""  # the id of a file that is this part alone
    subset: str = ""  # train, val or test, in any of the words of SUBSETS
    place: int = 0  # of its line, from 0, or of its item


class Clips(NamedTuple):
    """Videos found under a root, by name without ending; ``repeated`` ones lie in several folders."""

    paths: dict[str, str]
    repeated: set[str]


@dataclass(frozen=True)
class Catalogue:
    """A list as it was read: what it names, but not yet where that is."""

    source: str | Path
    entries: list[Entry]
    clip_folder: re.Pattern[str] | None = None  # names of folders of frames, which are not listed: there are millions
    expected: str = "{name}"  # path, from the root, of a video that is not found: a form of label and name
    has_ids: bool = False  # the names are not paths
    multi_label: bool = False
    notes: tuple[str, ...] = ()  # what the user has to know about how it was understood

    def classes(self) -> list[str] | None:
        """Return the sorted names of all classes that occur; None where they are numbers or not given."""
        if self.has_numbers:
            return None
        names = sorted({str(label) for entry in self.entries for label in entry.labels})
        return list({compared(name): name for name in reversed(names)}.values())[::-1] or None

    @property
    def has_numbers(self) -> bool:
        """Whether the labels are numbers."""
        return isinstance(next((entry.labels[0] for entry in self.entries if entry.labels), ""), int)

    def of_split(self, split: str) -> "Catalogue":
        """Return the part of a file with several subsets that ``split`` (train, val, test) is; else all of it.

        Raises UsageError where there is none.
        """
        by_subset: dict[str, list[Entry]] = {}
        for entry in self.entries:
            by_subset.setdefault(entry.subset, []).append(entry)
        if len(by_subset) < 2:
            return self
        for wanted in (split, *INSTEAD[split]):
            words = [word for word in by_subset if word.lower() in SUBSETS[wanted]]
            found = [entry for word in words for entry in by_subset[word] if entry.labels or self.multi_label]
            if found:
                note = f"{split}: the {found[0].subset} videos of {self.source}"
                if wanted != split:
                    note += ", which has no labelled ones of its own for this list"
                return replace(self, entries=found, notes=(*self.notes, note))
        raise UsageError(
            f"List {self.source} has the subsets {', '.join(sorted(by_subset))}, and no labelled videos of "
            f"{SUBSETS[split][0]}; give DATA.{split.upper()}_LIST another file."
        )


def find_videos(
    catalogue: Catalogue,
    root: str | Path,
    classes: ClassNames | None,
    search: Callable[[re.Pattern[str] | None], Clips],
) -> list[Video]:
    """Return the catalogue's videos in its order, with labels in ``classes``; where that is None, all are 0.

    ``search`` is ``find_clips`` of the root; it is called where names are no paths. A video that it does not find is
    kept, marked as missing, with the path where it is expected. Raises UsageError where a class is not in ``classes``.
    """
    for entry in catalogue.entries:
        if "\0" in entry.names[0] or "\0" in entry.trimmed:
            raise UsageError(
                f"List {catalogue.source} names {entry.names[0]!r:.80}; no file has a zero byte in its name."
            )
    catalogue = _without_slash(catalogue, str(root))
    entries = catalogue.entries
    folder, clips = _where(catalogue, str(root), search)
    labels = {
        label: 0 if classes is None else classes.label_of(label, f"List {catalogue.source}: label {label!r}")
        for label in dict.fromkeys(label for entry in entries for label in entry.labels)
    }
    videos = [_find(entry, catalogue, folder, labels, clips) for entry in entries]
    if classes is None:
        return videos
    if any(not entry.labels for entry in entries) and not catalogue.multi_label:
        videos = [video if video.label >= 0 else _by_folder(video, classes, catalogue.source) for video in videos]
    return videos


def _without_slash(catalogue: Catalogue, root: str) -> Catalogue:
    """Return a catalogue whose paths are relative where they begin with a slash at the root, as on Kaggle."""
    names = [entry.names[0] for entry in some_of(catalogue.entries, LOOKS)]
    if not all(name[:1] == "/" for name in names) or any(map(os.path.lexists, names)):
        return catalogue
    if not any(os.path.lexists(root + name) for name in names):
        return catalogue
    entries = [entry._replace(names=(entry.names[0].lstrip("/"),)) for entry in catalogue.entries]
    return replace(catalogue, entries=entries)


def find_start(names: Sequence[str], root: str) -> str | None:
    """Return the root if one of the paths leads somewhere from there, else the only folder in it of which that is true.

    Return None where there is none. Names without a folder start from the root alone.
    """

    def leads_somewhere(folder: str) -> bool:
        return any(os.path.lexists(find_file(folder, name)) for name in names)

    if leads_somewhere(root):
        return root
    if not all("/" in name or "\\" in name for name in names) or not os.path.isdir(root):
        return None
    folders = [item.path for item in os.scandir(root) if item.name[0] != "." and item.is_dir()]
    found = [folder for folder in folders if leads_somewhere(folder)]
    return found[0] if len(found) == 1 else None


def _where(
    catalogue: Catalogue, root: str, search: Callable[[re.Pattern[str] | None], Clips]
) -> tuple[str, Clips | None]:
    """Return the folder from which a list's paths start: the root, or the only folder in it where they lead somewhere.

    Where names are ids, return also what was found of these.
    """
    names = [entry.names[0] for entry in some_of(catalogue.entries, LOOKS)]
    if not catalogue.has_ids:
        start = find_start(names, root)
        if start or any(map(is_path, names)):
            return start or root, None
    clips = search(catalogue.clip_folder)
    if not catalogue.has_ids:
        for name in filter(clips.repeated.__contains__, names):
            raise UsageError(
                f"List {catalogue.source}: {name} lies in several folders, of which {clips.paths[name]} is one; write "
                f"it with its folder, from DATA.ROOT {root}."
            )
    # Ids alone, of clips whose names also say their times.
    if catalogue.clip_folder is TRIMMED and not catalogue.entries[0].trimmed:
        clips = Clips(
            {name[:-14]: path for name, path in clips.paths.items() if TRIMMED.fullmatch(name)} | clips.paths,
            clips.repeated,
        )
    return root, clips


def _find(
    entry: Entry, catalogue: Catalogue, root: str | Path, labels: Mapping[str | int, int], clips: Clips | None
) -> Video:
    several = tuple(sorted({labels[label] for label in entry.labels})) if catalogue.multi_label else None
    first = several[0] if several else labels[entry.labels[0]] if entry.labels else -1
    if clips is None:
        path = find_file(root, entry.names[0])
    else:
        if entry.trimmed in clips.paths:
            return Video(clips.paths[entry.trimmed], first, labels=several)
        found = next((clips.paths[name] for name in entry.names if name in clips.paths), None)
        if found is None:
            name = entry.trimmed or entry.names[0]
            label = str(entry.labels[0]).replace("/", "_") if entry.labels else ""
            path = os.path.join(root, catalogue.expected.format(label=label, name=name))
            return Video(path, first, True, None if entry.trimmed else entry.section, several)
        path = found
    section = entry.section
    if entry.frames is not None and (section is None or os.path.isdir(path)):
        section = entry.frames
    return Video(path, first, section=section, labels=several)


def _by_folder(video: Video, classes: ClassNames, source: str | Path) -> Video:
    """Return a video with the class that its folder names; a missing one, which is never scored, with the first."""
    if video.missing:
        return replace(video, label=0)
    folder = os.path.basename(os.path.dirname(video.path))
    given = f"List {source} has no labels, and the folder {folder!r} of {os.path.basename(video.path)}"
    return replace(video, label=classes.label_of(folder, given))


def find_clips(root: str | Path, clip_folder: re.Pattern[str] | None) -> Clips:
    """Find each video file and each folder of frames anywhere under ``root``.

    A folder of frames has a name of ``clip_folder``, or begins with images alone. Of several videos with one name the
    first is taken, by folder and then by file. Hidden folders are skipped, and so are folders that may not be read (as
    lost+found): what they hold counts as missing.
    """
    found = Clips({}, set())
    seen: set[tuple[int, int]] = set()
    waiting = [str(root)]
    while waiting:
        place = waiting.pop()
        try:
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in seen:  # links that lead back up would have no end
                continue
            seen.add((status.st_dev, status.st_ino))
            files, pictures, _, folders = list_folder(place, quick=True)
        except OSError:
            continue
        if pictures and not folders and not files and place != str(root):
            _add(found, os.path.basename(place), place)
        for name in sorted(files):
            _add(found, os.path.splitext(name)[0], os.path.join(place, name))
        inside = sorted(name for name in folders if not _holds_no_frames(name))
        for name in inside:
            if clip_folder and clip_folder.fullmatch(name):
                _add(found, name, os.path.join(place, name))
        waiting += [
            os.path.join(place, name) for name in reversed(inside) if not (clip_folder and clip_folder.fullmatch(name))
        ]
    return found


def _holds_no_frames(folder: str) -> bool:
    """Say whether a folder is called like those of optical flow or previews, or added by a system."""
    return folder in FOREIGN_FOLDERS or bool(
        len(folder) > 1 and (FLOW_FOLDER.fullmatch(folder) or PREVIEW_FOLDER.fullmatch(folder))
    )


def _add(found: Clips, stem: str, path: str) -> None:
    first = found.paths.setdefault(stem, path)
    if first != path and os.path.dirname(first) != os.path.dirname(path):
        found.repeated.add(stem)
