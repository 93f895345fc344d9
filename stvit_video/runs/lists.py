"""The lists of a run: read by one process, checked, and described for the user."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from stvit_video.common.errors import UsageError
from stvit_video.common.files import nearest_path
from stvit_video.common.text import printable
from stvit_video.data import sample
from stvit_video.data.lists.annotations import Video
from stvit_video.data.lists.checks import check_count, check_lists, describe_lists, name_recordings
from stvit_video.data.lists.videos import ListReader, build_lists
from stvit_video.models.weights.claims import check_class_names
from stvit_video.models.weights.files import Checkpoint
from stvit_video.models.zoo import build_model
from stvit_video.runs.classes import label_by_place, place_classes
from stvit_video.runtime.world import World, on_main

KINETICS_CLASSES = 400  # assumed where there are no data to count; the classifier's share of the cost is small
SOME_CLASSES = 2  # to see whether a network can be built, before its data are there to count
LABELS = {False: "one label", True: "several labels"}  # of a video, by whether the set is multi-label
WEIGHTS_ADVICE = "MODEL.INIT is a .pth or .safetensors file, such as a finished run leaves in its OUTPUT_DIR"


def build_class_count(cfg: CfgNode) -> int | None:
    """Return how many classes the data have, or will have when they are generated; None where that is not known."""
    with suppress(UsageError):  # there may be no data yet
        return len(build_lists(cfg).classes)
    labels, _ = sample.LABELS.get(cfg.DATA.GENERATE, {}).get(Path(cfg.DATA.CLASSES).parent.name, ((), 1))
    return cfg.MODEL.NUM_CLASSES or len(labels) or None


def is_multi_label(videos: Mapping[str, Sequence[Video]]) -> bool:
    """Return whether a video may have several labels, or none. Raises UsageError for a split without any label."""
    for split, found in videos.items():
        if not any(video.label >= 0 for video in found):
            raise UsageError(
                f"DATA.{split.upper()}_LIST: none of its {len(found):,} videos has a label, so there is nothing to "
                f"learn or to measure; correct the list."
            )
    return any(video.labels is not None for found in videos.values() for video in found)


def build_known(
    cfg: CfgNode, read: Callable[[str], Checkpoint], source: str, state: dict[str, Any] | None
) -> Sequence[str] | None:
    """Return the class names whose order the labels keep: those of the run that is continued or of the classifier.

    None where a run is continued that recorded none: its class folders were sorted as text.
    """
    if state is not None:
        return state["setup"].get("classes")
    if not source or (cfg.MODE == "train" and (cfg.MODEL.NEW_HEAD or cfg.MODEL.INIT_DEPTH is not None)):
        return ()
    return read(source).classes or ()


def open_lists(
    cfg: CfgNode,
    world: World,
    *,
    needs_weights: bool,
    known: Callable[[], Sequence[str] | None] = tuple,
    continues: bool = False,
) -> tuple[list[str], dict[str, list[Video]], list[str]]:
    """Return the class names, the videos of each split that MODE uses, and lines on both for the user.

    The set of DATA.GENERATE is generated first. ``known`` is called as ``build_known``; what would be refused at the
    start of a run is said where one ``continues``.
    """
    lists = build_lists(cfg)
    weights = cfg.MODEL.INIT if needs_weights else ""
    trains = cfg.MODE == "train" or (cfg.MODE == "transfer" and cfg.TRANSFER.FINETUNE)
    splits = ["train", "val", "test"] if trains else ["test"] if cfg.MODE == "test" else ["train", "test"]

    # By rank 0, and sent to the others.
    def read() -> tuple[list[str], dict[str, list[Video]], list[str]]:
        if cfg.DATA.GENERATE:  # takes minutes: first what can be wrong before
            if not sample.is_complete(cfg.DATA.ROOT):
                build_model(cfg, cfg.MODEL.NUM_CLASSES or SOME_CLASSES)
            if weights and not Path(weights).exists():
                raise UsageError(f"MODEL.INIT {weights} is missing; {WEIGHTS_ADVICE}.")
            sample.prepare(cfg.DATA.ROOT, sample.Spec(clips=tuple(cfg.DATA.GENERATE_CLIPS), name=cfg.DATA.GENERATE))
        _check_files(lists, splits, weights, cfg.MODE)
        trained = known()
        lists.trained, lists.natural, lists.continues = trained or (), trained is not None, continues
        videos = {split: lists.videos(split) for split in splits if lists.lists[split]}
        classes = lists.classes
        check_class_names(classes, "The data")  # before weights are trained that cannot be read
        places = place_classes(trained or (), classes, part=cfg.MODE == "test")
        # DATA.CLASSES has an order of its own. A run that continues has to have its own data, which is compared later.
        if trained and places is not None and classes != list(trained) and not continues:
            if len(classes) > 1:
                lists.notes.append(f"labels are those of the {len(trained)} classes in the checkpoint's order, by name")
            videos = {split: label_by_place(found, places) for split, found in videos.items()}
            classes = list(trained)
        return classes, videos, _build_account(cfg, lists, classes, videos, continues)

    return on_main(world, read)


def _check_files(lists: ListReader, splits: Sequence[str], weights: str, mode: str) -> None:
    """Raise UsageError where lists, class names or weights are not there; all that is missing is named at once."""
    advice: dict[str, str] = {}  # by what is missing
    for split in splits:
        name = lists.lists[split]
        file = lists.source(split)
        if (split != "val" or name) and not lists.exists(split):
            advice[f"DATA.{split.upper()}_LIST {file if name else repr('')}"] = (
                f"a list holds lines `path label`, paths starting from DATA.ROOT {lists.root}, or is a CSV or JSON "
                f"as data sets publish it, or a folder CLASS/FILE"
            )
    if lists.class_file and not (lists.root / lists.class_file).is_file():
        missing = f"DATA.CLASSES {lists.root / lists.class_file}"
        advice[missing] = "DATA.CLASSES holds one class name a line, or is '' for numbers"
    if weights and not Path(weights).exists():
        advice[f"MODEL.INIT {weights}"] = f"{WEIGHTS_ADVICE}{nearest_path(weights)}"
    if advice:
        root = "" if lists.root.is_dir() else f" DATA.ROOT {lists.root} is no folder.{nearest_path(lists.root)}"
        raise UsageError(
            f"MODE {mode} needs files that are missing: {', '.join(advice)}. Put them there or set these keys: "
            f"{'; '.join(dict.fromkeys(advice.values()))}.{root} Without a download this runs now: "
            f"python -m stvit_video.run --cfg configs/sample_stvit.yaml"
        )


def _build_account(
    cfg: CfgNode, lists: ListReader, classes: list[str], videos: dict[str, list[Video]], continues: bool
) -> list[str]:
    """Return lines on the lists that were read. Raises UsageError where labels or splits are certainly wrong."""
    recordings = name_recordings(videos, lists.root, cfg.DATA.GROUP)
    lines = describe_lists(classes, videos, recordings)
    if is_multi_label(videos):
        lines.insert(0, "several labels a video: a sigmoid for each class, measured by mAP")
    sources = {split: str(lists.source(split)) for split in videos}
    try:
        if "train" in videos and lists.num_classes is None:
            check_count(classes, videos, sources["train"])
        notes = check_lists(videos, sources, recordings, cfg.DATA.GROUP)
    except UsageError as error:
        if not continues:
            raise
        notes = [str(error)]
    if lists.shares is not None:
        ways = (
            "those of one recording together"
            if any(map(any, recordings.values()))
            else "each by itself, also cuts of one recording"
        )
        lines.append(
            f"DATA.SPLIT: {' / '.join(map(str, lists.shares))} % of each class for training / validation / test, "
            f"drawn from file names, {ways} (DATA.GROUP {cfg.DATA.GROUP!r})"
        )
    return list(map(printable, [*lines, *(f"note: {note}" for note in dict.fromkeys([*lists.notes, *notes]))]))
