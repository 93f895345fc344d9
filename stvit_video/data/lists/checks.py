"""What is wrong with the lists of a run taken together, and what the run says of them at its start."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from stvit_video.common.errors import UsageError
from stvit_video.data.lists.annotations import Section, Video, labels_of, summarise_videos
from stvit_video.data.lists.folders import are_numbers
from stvit_video.data.lists.splitting import find_recordings, real_paths

SHOWN = 12  # classes whose counts are all shown
MAX_COMPARED = 2_000  # videos of a run whose files are compared by content
READ_BYTES = 1 << 20  # of a file, where files of one size are compared


Recordings = Mapping[str, Sequence[str | None]]  # by split, what names the recording of each video


def name_recordings(videos: Mapping[str, list[Video]], root: str | Path, group: str) -> Recordings:
    """Return the recordings of all videos, see ``find_recordings``. Raises UsageError where ``group`` matches none."""
    found = {split: find_recordings([video.path for video in part], root, group) for split, part in videos.items()}
    if group not in ("", "auto") and not any(any(names) for names in found.values()):
        raise UsageError(
            f"DATA.GROUP {group!r} matches none of the paths, the first being {next(iter(videos.values()))[0].path}; "
            f"correct it, or give auto."
        )
    for split, part in videos.items():  # parts of one file are of one recording
        names = zip(found[split], part, strict=True)
        found[split] = [name or (video.path if group and video.section else None) for name, video in names]
    return found


def describe_lists(classes: Sequence[str], videos: Mapping[str, list[Video]], recordings: Recordings) -> list[str]:
    """Return lines with the videos of each class and of each split."""
    lists = {tuple(found) for found in videos.values()}  # one list may be that of several splits
    counts = Counter(label for found in lists for video in found for label in labels_of(video))
    lines = [describe_classes(classes, counts)]
    for split, found in videos.items():
        lines.append(summarise_videos(found, split, len({*recordings[split]} - {None})))
        lines += _describe_gaps(split, classes, found)
    return lines


def describe_classes(classes: Sequence[str], counts: Mapping[int, int]) -> str:
    """Return a line with the number of classes and the videos of each; of many classes, of the first."""
    many = f"{len(classes):,} class{'es'[: 2 * (len(classes) > 1)]}"
    shown = [f"{name} {counts.get(label, 0):,}" for label, name in enumerate(classes[:SHOWN])]
    if len(classes) > SHOWN:
        numbers = [counts.get(label, 0) for label in range(len(classes))]
        many += f" of {min(numbers):,} to {max(numbers):,} videos"
        shown.append("...")
    line = f"{many}: {', '.join(shown)}"
    if len(classes) == 1:
        line += "\nnote: there is one class alone, so every prediction is right; give class folders or labels of more"
    return line


def _describe_gaps(split: str, classes: Sequence[str], videos: Sequence[Video]) -> list[str]:
    """Return a note where classes have no video in a split."""
    there = {label for video in videos for label in labels_of(video)}
    without = [name for label, name in enumerate(classes) if label not in there]
    if not without:
        return []
    shown = ", ".join(without[:5]) + (", ..." if len(without) > 5 else "")
    return [f"note: {split} has no video of {len(without):,} of {len(classes):,} classes: {shown}"]


def check_count(classes: Sequence[str], videos: Mapping[str, list[Video]], source: str) -> None:
    """Raise UsageError where classes that only numbers name do not begin with 0: a class would have no video."""
    labels = {label for found in videos.values() for video in found for label in labels_of(video)}
    if min(labels) > 0 and list(classes) == [str(i) for i in range(len(classes))]:
        raise UsageError(
            f"{source}: labels are {min(labels)} to {max(labels)} and none is 0, but classes count from 0: there would "
            f"be classes without a video. Subtract {min(labels)} from each label, or give DATA.CLASSES, or "
            f"MODEL.NUM_CLASSES {len(classes)} if there are such classes."
        )


def check_lists(
    videos: Mapping[str, list[Video]], sources: Mapping[str, str], recordings: Recordings, group: str
) -> list[str]:
    """Return notes on what lists hold several times, and on what training and other splits share.

    ``sources`` are where the lists are. Raises UsageError where videos of the test are in another list for training, or
    of a recording, as ``group`` names it, of which training has videos.
    """
    keys = {split: _keys_of(found) for split, found in videos.items()}
    notes = []
    for split, found in videos.items():
        if again := len(found) - len(set(keys[split])):
            labels: dict[object, set[tuple[int, ...]]] = {}
            for key, video in zip(keys[split], found, strict=True):
                labels.setdefault(key, set()).add(labels_of(video))
            other = sum(len(several) > 1 for several in labels.values())
            text = f"{again:,} of {len(found):,} {split} videos are in the list more than once"
            notes.append(f"{text}, {other:,} files with different labels" if other else text)
    train = videos.get("train")
    if train is None:
        return notes
    learned: dict[str, list[Section | None]] = {}  # parts by file
    for path, section in keys["train"]:
        learned.setdefault(path, []).append(section)
    trained = {*recordings["train"]} - {None}
    for split in [name for name in videos if name != "train"]:
        found = videos[split]
        shared = [
            video.name
            for (path, section), video in zip(keys[split], found, strict=True)
            if any(_overlap(section, other) for other in learned.get(path, ()))
        ]
        cuts = [name for name in recordings[split] if name in trained]
        text = ""
        if shared and found == train and sources[split] == sources["train"]:
            notes.append(f"{split} is the training list: its accuracy is of videos that were learned")
            continue
        if shared:
            text = f"{len(shared):,} of {len(found):,} videos of {sources[split]} are in {sources['train']} too"
            text += f", the first {shared[0]}"
        elif cuts:
            text = f"{len(cuts):,} of {len(found):,} {split} videos are of recordings that training has too"
            text += f", the first {cuts[0]}"
        if split == "test" and (shared or (cuts and group != "auto")):
            raise UsageError(f"{text}: the test would be of videos that were learned. Remove them from one list.")
        notes += [text] if text else []
        if not shared and len(train) + len(found) <= MAX_COMPARED:
            others = [video.path for (path, _), video in zip(keys[split], found, strict=True) if path not in learned]
            copies = find_copies([video.path for video in train], others)
            if copies:
                text = f"{len(copies):,} {split} videos have the same content as training videos"
                notes.append(f"{text}, the first {copies[0][1]} and {copies[0][0]}")
    return notes


def _keys_of(videos: Sequence[Video]) -> list[tuple[str, Section | None]]:
    """Return what makes a sample what it is: its file and, where it is a part of that, which."""
    paths = real_paths([video.path for video in videos])
    return [(path, video.section) for path, video in zip(paths, videos, strict=True)]


def _overlap(one: Section | None, other: Section | None) -> bool:
    """Return whether two parts of a file are known to share frames; None is all of it."""
    if one is None or other is None:
        return True
    return one.in_frames == other.in_frames and one.start < other.stop and other.start < one.stop


def find_copies(first: Iterable[str], second: Iterable[str]) -> list[tuple[str, str]]:
    """Return pairs of a file of ``first`` and one of ``second`` with equal content (of their first READ_BYTES)."""

    def by_size(paths: Iterable[str]) -> dict[int, list[str]]:
        sizes: dict[int, list[str]] = {}
        for path in dict.fromkeys(paths):
            size = os.path.getsize(path) if os.path.isfile(path) else 0
            sizes.setdefault(size, []).append(path)
        return sizes

    def checksum(path: str) -> bytes:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read(READ_BYTES)).digest()

    here, there = by_size(first), by_size(second)
    pairs = []
    for size in (here.keys() & there.keys()) - {0}:
        known = {checksum(path): path for path in reversed(here[size])}
        pairs += [(known[found], path) for path in there[size] if (found := checksum(path)) in known]
    return sorted(pairs, key=lambda pair: pair[1])


def check_names(videos: Sequence[Video], classes: Sequence[str], source: str | Path) -> bool:
    """Return whether all videos lie in the folder of the class that their label is the place of.

    Raises UsageError where most that lie in a class folder have another label.
    """
    places = {name: label for label, name in enumerate(classes)}
    named = [(video, places[folder]) for video in videos if (folder := Path(video.path).parent.name) in places]
    wrong = [(video, place) for video, place in named if place not in labels_of(video)]
    if 2 * len(wrong) > len(named):
        video, place = wrong[0]
        known = repr(classes[video.label]) if video.label < len(classes) else f"none of the {len(classes)} classes"
        raise UsageError(
            f"{source}: {video.path} has label {video.label}, which is {known}, but its folder is class {place}; so it "
            f"is for {len(wrong):,} of {len(named):,} videos. Give DATA.CLASSES, the names in the order of the labels."
        )
    return len(named) == len(videos) and not wrong


def label_by_name(videos: Sequence[Video], classes: Sequence[str], source: str | Path) -> list[Video] | None:
    """Return a list of numbered labels for classes whose names are numbers; None where they are words."""
    if not are_numbers(classes):
        return None
    places = {int(name): place for place, name in enumerate(classes)}
    absent = next((video for video in videos if video.label not in places), None)
    if absent is not None:
        raise UsageError(
            f"{source}: label {absent.label} of {absent.path} is none of the {len(classes)} class folders "
            f"({classes[0]} to {classes[-1]}); correct the list."
        )
    return [Video(video.path, places[video.label], video.missing, video.section) for video in videos]
