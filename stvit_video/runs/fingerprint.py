"""What the lists of a run were: kept in its checkpoints, and compared where it continues or is finished already.

Of the video files themselves, names count, not contents: to look at each would take minutes on network storage.
"""

import hashlib
import json
import os
import zlib
from collections import Counter
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

Lists = dict[str, bytes]  # by split: its videos in order, each with its classes' names, as packed JSON
TITLES = {"train": "the training list", "val": "the validation list", "test": "the test list"}
# Keys that are not noted where they change: what a start is for, and what Trainer.setup notes.
SILENT_KEYS = {
    "MODE", "OUTPUT_DIR", "OVERWRITE", "TRAIN.RESUME", "DEVICE", "COMPILE", "TRAIN.ACCUMULATE", "PARALLEL.STRATEGY",
}  # fmt: skip
OLDER = "note: this run is of a version that did not record its lists; see that they are the same"


def record_lists(root: str, videos: Mapping[str, Sequence[Video]], classes: Sequence[str]) -> Lists:
    """Return the videos of each split as a checkpoint keeps them; paths below ``root`` start from it."""
    bases = tuple(os.path.join(base, "") for base in (Path(root), os.path.abspath(root)))

    def describe(video: Video) -> str:
        names = [classes[label] for label in labels_of(video) if label >= 0]
        path = os.path.normpath(video.name.removeprefix(bases[0]).removeprefix(bases[1]))
        return f"{path} ({', '.join(names) or 'no class'})"

    return {split: zlib.compress(json.dumps([*map(describe, listed)]).encode()) for split, listed in videos.items()}


def hash_lists(lists: Lists, classes: Sequence[str]) -> dict[str, str]:
    """Return a SHA-256 of each list with its classes, as results say them: ``test_list_sha256``."""
    names = json.dumps(list(classes)).encode()
    return {
        f"{split}_list_sha256": hashlib.sha256(names + zlib.decompress(packed)).hexdigest()
        for split, packed in lists.items()
    }


def find_change(
    then: Mapping[str, bytes], now: Lists, classes_then: Sequence[str], classes: Sequence[str]
) -> tuple[str, str] | None:
    """Return what differs first between recorded lists and those of now, "classes" or a split, and how."""
    if words := _compare_classes(classes_then, classes):
        return "classes", words
    for split, title in TITLES.items():
        if (split in then) != (split in now):
            return split, f"{title} is {'gone' if split in then else 'new'}"
        if split in now and (words := _compare_videos(_unpack(then[split]), _unpack(now[split]))):
            return split, f"{title} has {words}"
    return None


def _unpack(packed: bytes) -> list[str]:
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


def _compare_videos(then: list[str], now: list[str]) -> str:
    """Return how many videos are missing, new or elsewhere, each with an example; "" for none."""
    if then == now:
        return ""
    count = f"{len(now):,} videos" if len(then) == len(now) else f"{len(now):,} videos, not {len(then):,}"
    differences = (("missing", Counter(then) - Counter(now)), ("new", Counter(now) - Counter(then)))
    parts = [f"{rows.total():,} {what}, as {next(iter(rows))}" for what, rows in differences if rows]
    if not parts:
        old, new = next(pair for pair in zip(then, now, strict=True) if pair[0] != pair[1])
        parts = [f"in another order, as {new} in the place of {old}"]
    return f"{count}: {'; '.join(parts)}"


def check_continued(
    folder: RunFolder, state: dict[str, Any], lists: Lists, classes: list[str], multi_label: bool
) -> list[str]:
    """Return notes on what has changed since the run began; raise UsageError where it changes what a step sees."""
    setup = state["setup"]
    recorded = setup.get("settings") or folder.recorded_config() or {}
    free = (*FREE_KEYS, "DATA.ROOT") if "lists" in setup else FREE_KEYS  # what lies there is compared
    if changed := describe_changes(recorded, folder.settings, free):
        raise UsageError(f"{folder.checkpoints} are of a run with other settings: {changed}; {folder.way_on()}")
    notes, change = [], None
    noted = {*FREE_KEYS, "DATA.ROOT"} - SILENT_KEYS
    if noticed := describe_changes(recorded, folder.settings, set(complete(flatten(folder.settings))) - noted):
        notes.append(f"note: changed since the last checkpoint: {noticed}")
    if setup.get("multi_label", False) != multi_label:
        change = "train", f"a video has {LABELS[multi_label]}, and had {LABELS[not multi_label]}"
    elif "lists" in setup:
        change = find_change(setup["lists"], lists, setup["classes"], classes)
    else:
        change = _compare_older(folder, state, lists, classes)
        notes.append(OLDER)
    part, words = change or ("", "")
    if part == "test":  # training does not see it; scores of an interrupted test are not mixed
        notes.append(f"note: changed since the run began: {words}; the test will be of the list as it is now")
    elif part:
        raise UsageError(
            f"the data are not those that the run in {folder.path} began with: {words}. Put them back, or "
            f"{folder.way_on(new_head=part == 'classes')}"
        )
    return notes


def _compare_older(
    folder: RunFolder, state: dict[str, Any], lists: Lists, classes: list[str]
) -> tuple[str, str] | None:
    """Return what differs from the little that a run of an older version recorded, as ``find_change`` does."""
    known, count = state["setup"].get("classes") or classes_of(folder), len(_unpack(lists["train"]))
    heads = [len(value) for name, value in state["model"].items() if name.endswith("head.proj.weight")]
    if known is not None and (words := _compare_classes(known, classes)):
        return "classes", words
    if known is None and heads and heads[0] != len(classes):
        return "classes", f"{len(classes)} classes, not {heads[0]}"
    if (videos := state["setup"].get("videos", count)) != count:
        return "train", f"{TITLES['train']} has {count:,} videos, not {videos:,}"
    return None


def classes_of(folder: RunFolder) -> list[str] | None:
    """Return the class names in the weights that a folder holds; None where no file says them."""
    files = [file for file in (folder.weights, folder.best_weights) if file.is_file()]
    return read_metadata(files[0]).get("classes") if files else None


def check_finished(folder: RunFolder, results: dict[str, Any], lists: Lists, classes: list[str]) -> str:
    """Return a note on what cannot be compared; raise UsageError where a finished run had other lists than now."""
    part = words = note = ""
    found, known, count = hash_lists(lists, classes), classes_of(folder), len(_unpack(lists["test"]))
    recorded = {split: results.get(f"{split}_list_sha256") for split in TITLES}
    if not recorded["test"]:
        note = f"{OLDER}\n"
        if (videos := results.get("videos", count)) != count:
            part, words = "test", f"{TITLES['test']} has {count:,} videos, not {videos:,}"
    elif others := [split for split, sha in recorded.items() if sha and sha != found.get(f"{split}_list_sha256")]:
        part, words = others[0], f"{TITLES[others[0]]} is another"
        if (setup := _newest_setup(folder)) and "lists" in setup:
            part, words = find_change(setup["lists"], lists, setup["classes"], classes) or (part, words)
    if known is not None and (renamed := _compare_classes(known, classes)):
        part, words = "classes", renamed
    if part:
        test = f"test its weights on the new list (MODE test MODEL.INIT {folder.weights} and another OUTPUT_DIR), or "
        raise UsageError(
            f"OUTPUT_DIR {folder.path} is finished, but on other data: {words}. Put them back, or "
            f"{test if part == 'test' else ''}{folder.way_on(new_head=part == 'classes')}"
        )
    return note


def check_start(folder: RunFolder, lists: Lists, classes: list[str], multi_label: bool) -> None:
    """Raise UsageError where a run of these lists would be refused in the folder, of which nothing is changed."""
    folder.check()
    if folder.settings["MODE"] != "train" or folder.settings["OVERWRITE"]:
        return
    if folder.is_finished():
        check_finished(folder, folder.read_results(), lists, classes)
    elif (state := load_newest(folder.checkpoints)) is not None:
        check_continued(folder, state, lists, classes, multi_label)


def _newest_setup(folder: RunFolder) -> dict[str, Any] | None:
    """Return what the newest checkpoint says of its run; None where no checkpoint is left or whole."""
    try:
        state = load_newest(folder.checkpoints)
    except UsageError:
        return None
    return None if state is None else state["setup"]
