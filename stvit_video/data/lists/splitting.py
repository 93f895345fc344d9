"""One list as training, validation and test videos, and which videos are of one recording."""

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from stvit_video.common.errors import UsageError
from stvit_video.data.decode.types import IMAGE_SUFFIXES, MEDIA_SUFFIXES
from stvit_video.data.lists.annotations import Video

MAX_LINKS = 20_000  # files of a list that are asked whether they are links: on slow storage, more would take minutes
# Names of cuts of one recording, without ending, by a text that they hold; the group names the recording.
CUTS = {
    "v_": re.compile(
        r"(v_.+?_g[0-9]+)_c[0-9]+(?:_.+)?|(v_[a-z_]+_[0-9]{2})_[0-9]{2}"
    ),  # UCF101: v_Archery_g01_c02; UCF11
    # HMDB51: NAME_VERB_f_cm_np1_fr_bad_0, where some verbs are of two words
    "_np": re.compile(
        r"(.+?)_(?:brush_hair|climb_stairs|draw_sword|fall_floor|flic_flac|kick_ball|ride_bike|ride_horse|shake_hands"
        r"|shoot_ball|shoot_bow|shoot_gun|swing_baseball|sword_exercise|[a-z]+)_[a-z]_[a-z]{2}_np[0-9]_[a-z]{2}_[a-z]{3}_.+"
    ),
    "_0": re.compile(r"([\w-]+)_[0-9]{6}_[0-9]{6}"),  # Kinetics: YOUTUBEID_000001_000011
}


def find_recordings(paths: Sequence[str], root: str | Path, group: str) -> list[str | None]:
    """Return what names the recording of each path, None where nothing does.

    ``group`` is a regular expression that is searched in paths below ``root``; ``auto`` knows the names of CUTS, for
    pictures and patterns of frames also as those of their folders.
    """
    if not group:
        return [None] * len(paths)
    if group != "auto":
        matches = [re.search(group, os.path.relpath(path, root)) for path in paths]
        return [next(filter(None, match.groups()), None) if match else None for match in matches]
    found = []
    for path in paths:
        folder, _, name = path.rpartition("/")
        recording = _recording_of(name[: name.rfind(".")] if "." in name else name)
        if recording is None and path.lower().endswith((*IMAGE_SUFFIXES, "*")):
            recording = _recording_of(folder.rpartition("/")[2])
        found.append(recording)
    return found


def _recording_of(name: str) -> str | None:
    """Return the recording in the name of a cut, without ending; None where it is of none of CUTS."""
    for part, pattern in CUTS.items():
        if part in name and (match := pattern.fullmatch(name)):
            return match[match.lastindex or 0]
    return None


def find_origins(videos: Sequence[Video], root: str | Path, group: str) -> list[str]:
    """Return a name for what each video was taken from; those with equal names are never in two parts of a split.

    That is the recording, or else the file, behind links and whatever its ending. Pictures that are numbered without
    gaps are the frames of their folder, where a class has several such folders. Without a ``group`` it is the path.
    """
    paths = [video.path for video in videos]
    if not group:
        return paths
    real = real_paths(paths)
    frames: dict[str, list[str]] = {}  # by folder
    for path in dict.fromkeys(real):
        if path.lower().endswith(IMAGE_SUFFIXES):
            folder, name = os.path.split(os.path.splitext(path)[0])
            frames.setdefault(folder, []).append(name)
    numbered = {folder for folder, names in frames.items() if _are_numbered(names)}
    of_class: dict[int, set[str]] = {}  # the folders of each class
    for video, path in zip(videos, real, strict=True) if numbered else ():
        of_class.setdefault(video.label, set()).add(os.path.dirname(path))
    origins = []
    for video, path, recording in zip(videos, real, find_recordings(paths, root, group), strict=True):
        folder = os.path.dirname(path)
        if recording is not None:
            origins.append(f"recording {recording}")
        elif folder in numbered and path.lower().endswith(IMAGE_SUFFIXES) and len(of_class[video.label]) > 1:
            origins.append(folder)
        else:
            is_file = group == "auto" and path.lower().endswith(MEDIA_SUFFIXES)  # a.avi was made from a.mp4
            origins.append(os.path.splitext(path)[0] if is_file else path)
    return origins


def real_paths(paths: Sequence[str]) -> list[str]:
    """Return paths without links; of long lists, links to single files stay."""
    folders: dict[str, str] = {}
    found = []
    for path in paths:
        folder, _, name = path.rpartition("/")
        if folder not in folders:
            folders[folder] = os.path.realpath(folder or ("/" if path[:1] == "/" else os.curdir))
        real = f"{folders[folder]}/{name}"
        is_link = len(paths) <= MAX_LINKS and os.path.islink(real)
        found.append(os.path.realpath(real) if is_link else real)
    return found


def _are_numbered(names: Sequence[str]) -> bool:
    """Return whether the names differ in their last number alone, which counts without gaps."""
    parts = [re.fullmatch(r"(.*?)([0-9]{1,18})(\D*)", name) for name in names]
    numbers = {int(part[2]) for part in parts if part}
    texts = {(part[1], part[3]) if part else None for part in parts}
    return len(names) > 1 and len(texts) == 1 and None not in texts and max(numbers) - min(numbers) < len(names)


def split_videos(
    videos: Sequence[Video], shares: Sequence[int], root: str | Path, group: str = ""
) -> list[list[Video]]:
    """Return the videos of each part, in their order; ``shares`` are their percentages, which add up to 100.

    What is of one origin (see ``find_origins``) is in one part. Each class is split by itself, in an order that depends
    on the names of its files below ``root`` alone: it is the same on every machine and for every seed. A share above 0
    gets at least one origin of each class. Raises UsageError for a class with too few.
    """
    origins = find_origins(videos, root, group)
    sizes = Counter(origins)
    names: dict[str, str] = {}  # of each origin: what its place in the order is drawn from

    for video, origin in zip(videos, origins, strict=True):
        name = unicodedata.normalize("NFC", os.path.relpath(video.path, root))
        name = origin if sizes[origin] > 1 and origin.startswith("recording ") else name
        names[origin] = min(name, names.get(origin, name))

    def sort_key(origin: str) -> bytes:
        return hashlib.sha256(names[origin].encode("utf-8", "surrogateescape")).digest()

    classes: dict[int, dict[str, Video]] = {}
    for video, origin in zip(videos, origins, strict=True):
        for label in video.labels or (video.label,):
            classes.setdefault(label, {})[origin] = video
    parts: dict[str, int] = {}
    for _, members in sorted(classes.items()):
        free = sorted((origin for origin in members if origin not in parts), key=sort_key)
        taken = Counter(parts[origin] for origin in members if origin in parts)  # by classes before
        wanted = _sizes(len(members), shares)
        left = [max(0, size - taken[i]) for i, size in enumerate(wanted)]
        while sum(left) > len(free):  # a part has more than its share already
            left[left.index(max(left))] -= 1
        left[0] += len(free) - sum(left)
        edges = list(accumulate(left, initial=0))
        for i, share in enumerate(shares):
            parts |= dict.fromkeys(free[edges[i] : edges[i + 1]], i)
            if share and not left[i] and not taken[i]:
                raise UsageError(_too_few(next(iter(members.values())), members, shares, sizes))
    found: list[list[Video]] = [[] for _ in shares]
    for video, origin in zip(videos, origins, strict=True):
        found[parts[origin]].append(video)
    return found


def _sizes(count: int, shares: Sequence[int]) -> list[int]:
    """Return how many of ``count`` origins each part gets; the first what the others leave."""
    sizes = [max(1, round(count * share / 100)) if share else 0 for share in shares[1:]]
    return [max(0, count - sum(sizes)), *sizes]


def _too_few(first: Video, members: dict[str, Video], shares: Sequence[int], sizes: Counter[str]) -> str:
    total, count = sum(sizes[origin] for origin in members), len(members)
    many, remedy = f"{total} videos", "Add some, or give lists of your own and DATA.SPLIT None."
    if total > count:
        many += f" of {count} recording{'s'[: count != 1]} ({next(iter(members))})"
        remedy = "Add some, or DATA.GROUP '' lets cuts of one recording be in several parts."
    return (
        f"DATA.SPLIT {list(shares)}: the class of {Path(first.path).parent} has {many}; allowed: at least one for each "
        f"share above 0. {remedy}"
    )
