"""The classes of a checkpoint's classifier and those of the data, which are compared by name."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from stvit_video.common.errors import UsageError
from stvit_video.data.lists.annotations import Video
from stvit_video.data.lists.class_names import compared
from stvit_video.data.lists.folders import are_numbers

SHOWN = 4  # names of a list in a message


def place_classes(known: Sequence[str], classes: Sequence[str], *, part: bool) -> list[int] | None:
    """Return the place of each of the data's ``classes`` among the ``known`` ones of a classifier.

    None where names do not tell it: some are not known, one stands for two classes, or, unless the data may have a
    ``part`` of the classes, some are missing.
    """
    if list(known) == list(classes):
        return list(range(len(classes)))
    names = [compared(name) for name in known]
    places = {name: place for place, name in enumerate(names)}
    found = [places.get(compared(name), -1) for name in classes]
    enough = len(found) == len(known) or (part and len(found) < len(known))
    return found if enough and len(places) == len(names) and len(set(found) - {-1}) == len(found) else None


def label_by_place(videos: Sequence[Video], places: Sequence[int]) -> list[Video]:
    """Return the videos with each label replaced by its class's place."""
    moved = []
    for video in videos:
        labels = None if video.labels is None else tuple(sorted(places[label] for label in video.labels))
        label = places[video.label] if labels is None else (*labels, -1)[0]
        moved.append(replace(video, label=label, labels=labels))
    return moved


def check_classes(
    source: str, known: Sequence[str] | None, classes: Sequence[str], remedy: str, *, by_place: bool = False
) -> str:
    """Return a sentence on classes that no name tells, "" where names do.

    The data's ``classes`` are in the order of the classifier already if they are the same. ``by_place`` says that where
    one side has numbers alone, they may be places on the other. Raises UsageError, which ends with the ``remedy``,
    where the classifier is for others.
    """
    if known is None:
        shown = f"its {len(classes)} outputs are taken for those of the data in order ({_shorten(classes)})"
        return f"it names no classes: {shown}"
    if list(known) == list(classes):
        return ""
    if by_place and are_numbers(known) != are_numbers(classes) and len(known) == len(classes):
        owner, other, names = ("its", "the data's", classes) if are_numbers(known) else ("the data's", "its", known)
        return f"{owner} classes are numbers: they are taken for places among {other} ({_shorten(names)})"
    raise UsageError(
        f"{source}: its classifier is for other classes than the data's: {_describe(known, classes)}. {remedy}"
    )


def _describe(known: Sequence[str], classes: Sequence[str]) -> str:
    """Return how two lists of classes differ."""
    for owner, names in (("the file", known), ("the data", classes)):
        if twice := [name for name, count in Counter(map(compared, names)).items() if count > 1]:
            return f"{owner} has several of one name ({_shorten(twice)}), in another order or number"
    own, other = ({compared(name) for name in names} for names in (known, classes))
    extra = [name for name in known if compared(name) not in other]
    strange = [name for name in classes if compared(name) not in own]
    parts = [
        f"only {owner} has {_shorten(names)}" for owner, names in (("the file", extra), ("the data", strange)) if names
    ]
    spelled = {_plain(name): name for name in extra}
    alike = next(((spelled[_plain(name)], name) for name in strange if _plain(name) in spelled), None)
    hint = f"; {alike[0]!r} and {alike[1]!r} are spelled differently: write them alike if they are one" if alike else ""
    return ", ".join(parts) + hint if parts else "the same names in another order"


def _shorten(names: Sequence[str]) -> str:
    shown = ", ".join(name[:40] for name in names[:SHOWN])
    return f"{shown} and {len(names) - SHOWN:,} more" if len(names) > SHOWN else shown


def _plain(name: str) -> str:
    """Return a name without what spellings differ in: capitals, blanks, lines and quotes."""
    return re.sub(r"[\W_]+", "", name).casefold()
