"""What the lists of a run were: kept in its checkpoints, and compared where it continues or is finished already.

Of the video files themselves, names count, not contents: to look at each would take minutes on network storage.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stvit_video.common.errors import UsageError
from stvit_video.config.schema import complete, flatten
from stvit_video.data.lists.annotations import Video, labels_of
from stvit_video.models.weights.files import read_metadata
from stvit_video.runs.checkpoint import load_newest
from stvit_video.runs.folder import FREE_KEYS, RunFolder, describe_changes
from stvit_video.runs.lists import LABELS

Lists = dict[str, bytes]  # by split: its videos in order, each with its labels, as packed JSON
TITLES = {"train": "the training list", "val": "the validation list", "test": "the test list"}
# Keys that are not noted where they change: what a start is for, and what Trainer.setup notes.
SILENT_KEYS = {
    "MODE", "OUTPUT_DIR", "OVERWRITE", "TRAIN.RESUME", "DEVICE", "COMPILE", "TRAIN.ACCUMULATE", "PARALLEL.STRATEGY",
}  # fmt: skip


def record_lists(root: str, videos: Mapping[str, Sequence[Video]]) -> Lists:
    """Return the videos of each split as a checkpoint keeps them; paths below ``root`` start from it."""
    bases = tuple(os.path.join(base, "") for base in (Path(root), os.path.abspath(root)))

    def pack(listed: Sequence[Video]) -> bytes:
        rows = [(video.name.removeprefix(bases[0]).removeprefix(bases[1]), labels_of(video)) for video in listed]
        return zlib.compress(json.dumps(rows).encode())

    return {split: pack(listed) for split, listed in videos.items()}


def hash_lists(lists: Lists, classes: Sequence[str]) -> dict[str, str]:
    """Return a SHA-256 of each list with its classes, as results say them: ``test_list_sha256``."""
    names = json.dumps(list(classes)).encode()
    return {
        f"{split}_list_sha256": hashlib.sha256(names + zlib.decompress(packed)).hexdigest()
        for split, packed in lists.items()
    }


def find_changes(
    then: Mapping[str, bytes], now: Lists, classes_then: Sequence[str], classes: Sequence[str]
) -> dict[str, str]:
    """Return what differs between recorded lists and those of now, by "classes" and split, each in some words."""
    changes = {"classes": _compare_classes(classes_then, classes)}
    for split in TITLES:
        if (split in then) != (split in now):
            changes[split] = f"{TITLES[split]} is {'gone' if split in then else 'new'}"
        elif then.get(split) != now.get(split):
            old, new = ([(name, tuple(labels)) for name, labels in _unpack(one[split])] for one in (then, now))
            changes[split] = _compare_videos(TITLES[split], old, new, classes_then, classes)
    if changes.get("train"):  # parts of one folder change together: one line names one list
        changes = {part: changes[part] for part in ("classes", "train")}
    return {part: words for part, words in changes.items() if words}


def _unpack(packed: bytes) -> list[tuple[str, list[int]]]:
    return json.loads(zlib.decompress(packed))


def _compare_classes(then: Sequence[str], now: Sequence[str]) -> str:
    gone, new = ([name for name in one if name not in set(other)] for one, other in ((then, now), (now, then)))
    if len(gone) == len(new) == 1:
        return f"class {gone[0]!r} is now {new[0]!r}"
    if gone or new:
        parts = (("missing", gone), ("new", new))
        return "; ".join(
            f"{len(names)} of the classes {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in parts
            if names
        )
    if list(then) == list(now):
        return ""
    label = next(label for label, pair in enumerate(zip(then, now, strict=False)) if pair[0] != pair[1])
    return f"the classes are in another order (label {label} was {then[label]!r}, now {now[label]!r})"


def _compare_videos(
    title: str,
    then: list[tuple[str, tuple[int, ...]]],
    now: list[tuple[str, tuple[int, ...]]],
    classes_then: Sequence[str],
    classes: Sequence[str],
) -> str:
    """Return how many videos are new, missing or of another label, each with an example."""

    def named(labels: Sequence[int], names: Sequence[str]) -> str:
        return ", ".join(names[label] for label in labels if label >= 0) or "no class"

    old = {name: named(labels, classes_then) for name, labels in then}
    new = {name: named(labels, classes) for name, labels in now}
    added, gone = [name for name in new if name not in old], [name for name in old if name not in new]
    moved = [name for name in new if old.get(name, new[name]) != new[name]]
    parts = [f"{len(names):,} {what}, as {names[0]}" for names, what in ((added, "new"), (gone, "missing")) if names]
    if moved:
        example = f"{moved[0]} ({old[moved[0]]}, now {new[moved[0]]})"
        parts.append(f"{len(moved):,} moved to another label, as {example}")
    if not parts and len(then) != len(now):
        parts.append("some listed another number of times")
    elif not parts and (pairs := [pair for pair in zip(then, now, strict=True) if pair[0][0] != pair[1][0]]):
        parts.append(f"in another order, as {pairs[0][1][0]} in the place of {pairs[0][0][0]}")
    elif not parts:  # the labels have other numbers, as the classes are in another order
        return ""
    count = f"{len(now):,} videos" if len(then) == len(now) else f"{len(now):,} videos, not {len(then):,}"
    return f"{title} has {count}: {'; '.join(parts)}"


def check_continued(
    folder: RunFolder, state: dict[str, Any], lists: Lists, classes: list[str], multi_label: bool
) -> list[str]:
    """Return notes on what has changed since the run began; raise UsageError where it changes what a step sees."""
    setup = state["setup"]
    if setup.get("multi_label", False) != multi_label:
        raise UsageError(
            f"the run began with videos of {LABELS[not multi_label]} each, and those of DATA.TRAIN_LIST now have "
            f"{LABELS[multi_label]}; put the list back, give another OUTPUT_DIR, or OVERWRITE True."
        )
    recorded = setup.get("settings") or folder.recorded_config() or {}
    free = (*FREE_KEYS, "DATA.ROOT") if "lists" in setup else FREE_KEYS  # what lies there is compared
    if changed := describe_changes(recorded, folder.settings, free):
        raise UsageError(f"{folder.checkpoints} are of a run with other settings: {changed}; {folder.way_on()}")
    notes = []
    if noted := describe_changes(recorded, folder.settings, set(complete(flatten(folder.settings))) - _noted_keys()):
        notes.append(f"note: changed since the last checkpoint: {noted}")
    if "lists" in setup:
        changes = find_changes(setup["lists"], lists, setup["classes"], classes)
        if test := changes.pop("test", ""):  # training does not see it; scores of an interrupted test are not mixed
            notes.append(f"note: changed since the run began: {test}; the test will be of the list as it is now")
    else:
        changes = _compare_older(folder, state, lists, classes)
        notes.append("note: this run is of a version that did not record its lists; see that they are the same")
    if changes:
        raise UsageError(
            f"the data are not those that the run in {folder.path} began with: {'; '.join(changes.values())}. "
            f"Put them back, or {folder.way_on(new_head='classes' in changes)}"
        )
    return notes


def _noted_keys() -> set[str]:
    return {key for key in (*FREE_KEYS, "DATA.ROOT") if key not in SILENT_KEYS and not key.startswith("TRANSFER.")}


def _compare_older(folder: RunFolder, state: dict[str, Any], lists: Lists, classes: list[str]) -> dict[str, str]:
    """Return what differs from the little that a run of an older version recorded."""
    setup, changes = state["setup"], {}
    known = setup.get("classes") or classes_of(folder)
    heads = [len(value) for name, value in state["model"].items() if name.endswith("head.proj.weight")]
    if known is not None:
        changes["classes"] = _compare_classes(known, classes)
    elif heads and heads[0] != len(classes):
        changes["classes"] = f"{len(classes)} classes, not {heads[0]}"
    count = len(_unpack(lists["train"]))
    if setup.get("videos", count) != count:
        changes["train"] = f"{TITLES['train']} has {count:,} videos, not {setup['videos']:,}"
    return {part: words for part, words in changes.items() if words}


def classes_of(folder: RunFolder) -> list[str] | None:
    """Return the class names in the weights that a folder holds; None where no file says them."""
    files = [file for file in (folder.weights, folder.best_weights) if file.is_file()]
    return read_metadata(files[0]).get("classes") if files else None


def check_finished(folder: RunFolder, results: dict[str, Any], lists: Lists, classes: list[str]) -> str:
    """Return a note on what cannot be compared; raise UsageError where a finished run had other lists than now."""
    known, note = classes_of(folder), ""
    found = hash_lists(lists, classes)
    recorded = {split: results.get(f"{split}_list_sha256") for split in TITLES}
    if recorded["test"]:  # a later MODE test in the folder records no others
        other = [split for split, known in recorded.items() if known and known != found.get(f"{split}_list_sha256")]
        changes = {split: f"{TITLES[split]} is another" for split in other}
        if changes and (setup := _newest_setup(folder)) and "lists" in setup:
            changes = find_changes(setup["lists"], lists, setup["classes"], classes) or changes
        elif changes and known is not None and (renamed := _compare_classes(known, classes)):
            changes = {"classes": renamed}
    else:
        note = "note: this run is of a version that did not record its lists; see that they are the same\n"
        count, changes = len(_unpack(lists["test"])), {}
        if known is not None and (renamed := _compare_classes(known, classes)):
            changes["classes"] = renamed
        if results.get("videos", count) != count:
            changes["test"] = f"{TITLES['test']} has {count:,} videos, not {results['videos']:,}"
    if changes:
        test = f"test its weights on the new list (MODE test MODEL.INIT {folder.weights} and another OUTPUT_DIR), or "
        raise UsageError(
            f"OUTPUT_DIR {folder.path} is finished, but on other data: {'; '.join(changes.values())}. Put them back, "
            f"or {test if changes.keys() == {'test'} else ''}{folder.way_on(new_head='classes' in changes)}"
        )
    return note


def _newest_setup(folder: RunFolder) -> dict[str, Any] | None:
    """Return what the newest checkpoint says of its run; None where no checkpoint is left or whole."""
    try:
        state = load_newest(folder.checkpoints)
    except UsageError:
        return None
    return None if state is None else state["setup"]
