"""One folder of class folders for training, validation and test: which video goes where."""

import hashlib
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from stvit_video.data.annotations import Video
from stvit_video.errors import UsageError


def take_part(videos: Sequence[Video], part: int, shares: Sequence[int], root: str | Path) -> list[Video]:
    """Return the videos of ``part`` (its place in ``shares``, percentages that add up to 100), in their order.

    Each class is dealt out by itself, in an order that is drawn from the names of the files below ``root`` and nothing
    else: it is the same on every machine and for every seed. Where a share is above 0 it gets one video of a class at
    least. Raises UsageError for a class with too few.
    """
    classes: dict[int, list[Video]] = {}
    for video in videos:
        classes.setdefault(video.label, []).append(video)
    taken: set[str] = set()
    for members in classes.values():
        ordered = sorted(members, key=lambda video: _draw(video.path, root))
        edges = _edges(len(ordered), shares)
        if any(stop == start for share, start, stop in zip(shares, edges, edges[1:], strict=False) if share):
            folder = Path(members[0].path).parent
            raise UsageError(
                f"DATA.SPLIT {list(shares)}: the class of {folder} has {len(members)} videos; allowed: at least one "
                f"for each share above 0. Add some, or give lists of your own and DATA.SPLIT None."
            )
        taken.update(video.path for video in ordered[edges[part] : edges[part + 1]])
    return [video for video in videos if video.path in taken]


def _edges(count: int, shares: Sequence[int]) -> list[int]:
    """Return where each part begins and ends among ``count`` videos; parts after the first have one at least."""
    sizes = [max(1, round(count * share / 100)) if share else 0 for share in shares[1:]]
    sizes.insert(0, max(0, count - sum(sizes)))
    return [min(count, sum(sizes[:i])) for i in range(len(sizes) + 1)]


def _draw(path: str, root: str | Path) -> bytes:
    """Return a number for a file that depends on its name below ``root`` alone, however that is written."""
    name = unicodedata.normalize("NFC", os.path.relpath(path, root)).encode("utf-8", "surrogateescape")
    return hashlib.sha256(name).digest()
