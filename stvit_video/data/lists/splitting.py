"""One list as training, validation and test videos."""

import hashlib
import os
import unicodedata
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from stvit_video.common.errors import UsageError
from stvit_video.data.lists.annotations import Video


def take_part(videos: Sequence[Video], part: int, shares: Sequence[int], root: str | Path) -> list[Video]:
    """Return the videos of ``part`` (its place in ``shares``, percentages that add up to 100), in their order.

    Each class is split by itself, in an order that depends on the names of its files below ``root`` alone: it is the
    same on every machine and for every seed. A share above 0 gets at least one video of each class. Raises UsageError
    for a class with too few.
    """

    def sort_key(video: Video) -> bytes:
        name = unicodedata.normalize("NFC", os.path.relpath(video.path, root))
        return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()

    classes: dict[int, list[Video]] = {}
    for video in videos:
        classes.setdefault(video.label, []).append(video)
    taken: set[str] = set()
    for members in classes.values():
        ordered = sorted(members, key=sort_key)
        sizes = [max(1, round(len(members) * share / 100)) if share else 0 for share in shares[1:]]
        sizes.insert(0, max(0, len(members) - sum(sizes)))
        edges = [min(len(members), edge) for edge in accumulate(sizes, initial=0)]  # where each part begins and ends
        if any(stop == start for share, start, stop in zip(shares, edges, edges[1:], strict=False) if share):
            folder = Path(members[0].path).parent
            raise UsageError(
                f"DATA.SPLIT {list(shares)}: the class of {folder} has {len(members)} videos; allowed: at least one "
                f"for each share above 0. Add some, or give lists of your own and DATA.SPLIT None."
            )
        taken.update(video.path for video in ordered[edges[part] : edges[part + 1]])
    return [video for video in videos if video.path in taken]
