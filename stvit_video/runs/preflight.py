"""Opening a run: what it needs is read once, checked before anything is written, and handed on as plain values."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from fvcore.common.config import CfgNode
from torch import nn

from stvit_video.common.errors import RunFailure, UsageError
from stvit_video.common.files import write_atomically
from stvit_video.common.tables import three_digits
from stvit_video.config.clip_settings import read_views, view_settings
from stvit_video.config.load import override
from stvit_video.data.lists.annotations import Video
from stvit_video.data.lists.folders import are_numbers
from stvit_video.data.lists.videos import SPLITS, build_lists
from stvit_video.data.loader import build_decoding, build_sampler
from stvit_video.data.short_videos import count_short
from stvit_video.models import LoadReport, load_pretrained
from stvit_video.models.cost import Cost, count_training_memory, measure_cost
from stvit_video.models.weights.files import Checkpoint, read_checkpoint
from stvit_video.models.zoo import build_model
from stvit_video.runs.checkpoint import check_all_loaded, load_newest, save_weights
from stvit_video.runs.classes import check_classes
from stvit_video.runs.fingerprint import Lists, check_continued, check_finished, classes_of, record_lists
from stvit_video.runs.folder import RunFolder, build_run_folder, describe_changes
from stvit_video.runs.lists import (
    KINETICS_CLASSES,
    LABELS,
    build_class_count,
    build_known,
    is_multi_label,
    open_lists,
)
from stvit_video.runs.log import describe_results
from stvit_video.runtime.limits import usable_cores
from stvit_video.runtime.world import World, gather_objects, on_main

# run: as MODE says. rehearse: the same, but nothing is written or continued. measure: OUTPUT_DIR and weights are not
# read, as for a benchmark.
Purpose = Literal["run", "rehearse", "measure"]


@dataclass
class OpenRun:
    """A run whose inputs are read and checked; nothing in its folder has been changed yet."""

    cfg: CfgNode  # for the functions that build parts of the run; all else is a plain value
    world: World
    folder: RunFolder
    classes: list[str]
    videos: dict[str, list[Video]]  # by split
    account: list[str]  # lines for the user on both
    lists: Lists  # the videos as checkpoints keep them
    views: dict[str, Any]  # how videos become clips, to be saved beside weights
    model: nn.Module  # on the CPU, with its weights
    cost: Cost
    summary: str  # lines for the user: the model, where it runs, the lists
    checkpoint: Checkpoint | None = None  # MODEL.INIT, in MODE transfer, which loads it more than once
    report: LoadReport | None = None  # which of the checkpoint's weights were loaded
    state: dict[str, Any] | None = None  # the training state to continue from
    multi_label: bool = False  # a video may have several labels, or none
    weights: Mapping[str, Any] = field(default_factory=dict)  # which those of MODEL.INIT are, of their run

    @property
    def label_columns(self) -> int | None:
        """The number of classes of a multi-label set; None where a video has one label."""
        return len(self.classes) if self.multi_label else None

    def save_weights(self, path: Path, model: nn.Module, weights: Mapping[str, Any]) -> None:
        """Write a model with all that using it takes, and which ``weights`` of the run these are."""
        save_weights(path, model, self.classes, self.views, self.multi_label, weights)

    def claim(self, *, keep_report: bool = True) -> None:
        """Make the folder this run's, and say what it is; from here on files are written."""

        def claim() -> None:
            self.folder.claim()
            if self.report is not None and keep_report:
                write_atomically(self.folder.path / "load_report.json", self.report.to_json().encode())
            print("\n".join(filter(None, [str(self.report or ""), self.summary])), flush=True)

        on_main(self.world, claim)


def open_run(cfg: CfgNode, world: World, purpose: Purpose = "run", *, opened: OpenRun | None = None) -> OpenRun | None:
    """Read and check what a run needs: folder, lists, checkpoint and model, each once.

    Return None where a training run is finished already: its results are printed. ``opened`` is a run of the same lists
    and MODEL.INIT, which are then not read again. Raises UsageError for everything that can be found wrong before the
    first batch, RunFailure where the processes find different checkpoints.
    """
    if cfg.MODE == "transfer" and not cfg.MODEL.INIT:
        raise UsageError("MODE transfer needs a checkpoint to evaluate; give MODEL.INIT FILE.")
    starts, trains = purpose != "measure", cfg.MODE == "train"
    folder = build_run_folder(cfg)
    if purpose == "run":
        on_main(world, folder.lock)  # what is decided by a look at the folder is decided under its lock
        on_main(world, folder.check)
    if starts and cfg.LOG.WANDB and importlib.util.find_spec("wandb") is None:
        raise UsageError(f"LOG.WANDB {cfg.LOG.WANDB}: wandb is not installed; pip install wandb, or LOG.WANDB ''.")
    state = None
    if purpose == "run" and trains:
        if on_main(world, folder.is_finished) and not cfg.OVERWRITE:
            said = build_finished_answer(cfg, world, folder, opened)
            print(said if world.is_main else "", end="", flush=True)
            return None
        state = _build_state(cfg, world, folder)

    needs_weights = starts and state is None
    source = build_source(cfg, folder) if needs_weights else ""
    read = cache(read_checkpoint)
    if opened:
        classes, videos, account = opened.classes, opened.videos, opened.account
    else:
        known = partial(build_known, cfg, read, source, state)
        classes, videos, account = open_lists(
            cfg, world, needs_weights=needs_weights, known=known, continues=state is not None
        )
    checkpoint = opened.checkpoint if opened else read(source) if source else None
    multi_label = is_multi_label(videos)
    lists = on_main(world, lambda: record_lists(cfg.DATA.ROOT, videos, classes))
    notes = on_main(world, lambda: check_continued(folder, state, lists, classes, multi_label)) if state else []

    if starts and trains:
        cfg, line = build_filled_batch(cfg, world, len(videos.get("train", ())), state)
        notes.append(line)
    torch.manual_seed(cfg.SEED)  # for weights that no file holds
    model = build_model(cfg, len(classes))
    report = build_weights(cfg, model, checkpoint, classes, multi_label) if source and checkpoint else None
    if starts:
        cfg, line = build_fitting_sampling(cfg, world, videos, state, checkpoint)
        notes.append(line)
    cost = measure_cost(model, (cfg.DATA.FRAMES, cfg.DATA.SIZE, cfg.DATA.SIZE))
    summary = _build_summary(cfg, world, cost, len(classes), [*account, *filter(None, notes)])
    weights = {"weights": checkpoint.path, **(checkpoint.metadata.get("weights") or {})} if checkpoint else {}
    checkpoint = checkpoint if cfg.MODE == "transfer" else None
    read_in = (cfg, world, folder, classes, videos, account, lists, view_settings(cfg))
    return OpenRun(*read_in, model, cost, summary, checkpoint, report, state, multi_label, weights)


def build_finished_answer(cfg: CfgNode, world: World, folder: RunFolder, opened: OpenRun | None) -> str:
    """Return the results of a finished run that is started again. Raises UsageError where its data were others.

    Data that are gone cannot be compared, which the answer says; nothing is generated.
    """
    results = on_main(world, folder.read_results)
    answer = f"{cfg.OUTPUT_DIR} is finished (OVERWRITE True runs it again):\n{describe_results(results)}\n"
    report = folder.path / "load_report.json"
    dates = [file.stat().st_mtime for file in (Path(cfg.MODEL.INIT), report) if cfg.MODEL.INIT and file.exists()]
    if len(dates) == 2 and dates[0] > dates[1]:
        answer += f"note: MODEL.INIT {cfg.MODEL.INIT} was written after this run began, with what it held then\n"
    if opened:
        classes, videos = opened.classes, opened.videos
    else:
        cfg = override(cfg, [("DATA.GENERATE", ""), ("DATA.MAX_FAILURES", 1.0)], "a finished run")
        lists = build_lists(cfg)
        gone = on_main(world, lambda: [split for split in SPLITS if lists.lists[split] and not lists.exists(split)])
        if gone and on_main(world, lambda: describe_changes(folder.recorded_config() or {}, folder.settings)) == "":
            return f"{answer}note: its data are gone ({lists.source(gone[0])}), so they cannot be compared with now's\n"
        known = partial(classes_of, folder)
        classes, videos, _ = open_lists(cfg, world, needs_weights=False, known=known, continues=True)
    rest = partial(record_lists, cfg.DATA.ROOT, videos, classes)
    return answer + on_main(world, lambda: check_finished(folder, results, rest(), classes))


def _build_state(cfg: CfgNode, world: World, folder: RunFolder) -> dict[str, Any] | None:
    """Return the state that a training run continues from; None where it begins."""
    state = None if cfg.OVERWRITE else load_newest(folder.checkpoints)
    steps = gather_objects(world, None if state is None else int(state["step"]))
    if len(set(steps)) > 1:
        seen = [f"rank {rank} {'none' if step is None else f'step {step}'}" for rank, step in enumerate(steps)]
        raise RunFailure(
            f"the processes find different newest checkpoints in {folder.checkpoints}: {', '.join(seen[:8])}; "
            f"OUTPUT_DIR has to be one folder that all machines share. If it is, start again: one saw it late."
        )
    return state


def build_source(cfg: CfgNode, folder: RunFolder) -> str:
    """Return the checkpoint that a run begins with, "" for none. A missing MODEL.INIT is reported with the lists."""
    if cfg.MODE != "test" or cfg.MODEL.INIT:
        return cfg.MODEL.INIT
    if not folder.weights.is_file():
        raise UsageError(
            f"MODE test: {folder.weights} is missing; give MODEL.INIT FILE or a finished run's OUTPUT_DIR."
        )
    return str(folder.weights)


def build_filled_batch(
    cfg: CfgNode, world: World, videos: int, state: dict[str, Any] | None = None
) -> tuple[CfgNode, str]:
    """Return the configuration with the largest batch that a shorter training list fills, and a line where it is lower.

    The batch of the run that ``state`` continues stays, also on another number of processes.
    """
    parts = world.size * cfg.TRAIN.ACCUMULATE
    kept = None if state is None else state["setup"].get("batch")
    most = kept or videos // parts * parts * cfg.DATA.REPEATS
    if not 0 < most < cfg.TRAIN.BATCH_SIZE:
        return cfg, ""
    reason = "there are no more training videos" if state is None else "as the run began"
    line = f"TRAIN.BATCH_SIZE {cfg.TRAIN.BATCH_SIZE} is lowered to {most}: {reason}"
    return override(cfg, [("TRAIN.BATCH_SIZE", most)], "the training list"), line


def build_fitting_sampling(
    cfg: CfgNode,
    world: World,
    videos: dict[str, list[Video]],
    state: dict[str, Any] | None,
    checkpoint: Checkpoint | None,
) -> tuple[CfgNode, str]:
    """Return the configuration with sampling that fits the videos, and lines on those that are shorter than a clip.

    What fits is found, where DATA.SHORT_VIDEOS asks for it, when a training run begins. After that it is the run's.
    """
    known, reason = None, ""
    if state is not None:
        known, reason = state["setup"].get("sampling", cfg.DATA.SAMPLING), "as the run began"
    elif cfg.DATA.SHORT_VIDEOS == "repeat" or cfg.MODE == "transfer":
        known = cfg.DATA.SAMPLING
    elif cfg.MODE == "test" and checkpoint is not None:
        known = read_views(checkpoint.metadata, checkpoint.path).get("DATA.SAMPLING", cfg.DATA.SAMPLING)
        reason = "as for training"
    uniform = override(cfg, [("DATA.SAMPLING", "uniform")], "DATA.SHORT_VIDEOS")
    samplers = [build_sampler(cfg), build_sampler(uniform)]
    split = "train" if "train" in videos else "test"
    # Indexes are kept in the folder once it is the run's.
    decoding = build_decoding(cfg, cfg.TEST.SHORT_SIDE, in_run=Path(cfg.OUTPUT_DIR, "config.yaml").exists())
    own, spread = on_main(world, lambda: count_short(videos[split], split, samplers, decoding))
    sampling = known or ("uniform" if 2 * own.short > own.looked_at else cfg.DATA.SAMPLING)
    if sampling == cfg.DATA.SAMPLING:
        return cfg, own.line
    lines = [f"DATA.SAMPLING is {sampling} (DATA.SHORT_VIDEOS): {reason or own.line.partition(';')[0]}", spread.line]
    return override(cfg, [("DATA.SAMPLING", sampling)], "DATA.SHORT_VIDEOS"), "\n".join(filter(None, lines))


def build_weights(
    cfg: CfgNode, model: nn.Module, checkpoint: Checkpoint, classes: list[str], multi_label: bool = False
) -> LoadReport:
    """Load a checkpoint into the model as MODE asks. Raises UsageError where it is not of this model or its classes."""
    known, antialias = checkpoint.classes, cfg.MODEL.INIT_ANTIALIAS
    if cfg.MODE == "test":
        remedy = "Test on data of its classes, or correct the names of one of them."
        by_place = bool(cfg.DATA.CLASSES) or are_numbers(classes)  # else names are sorted, which tells nothing
        note = check_classes(checkpoint.path, known, classes, remedy, by_place=by_place)
        trained = checkpoint.metadata.get("multi_label", multi_label)
        if trained != multi_label:
            raise UsageError(
                f"{checkpoint.path} was trained on videos of {LABELS[trained]} each, and those of DATA.TEST_LIST "
                f"{cfg.DATA.TEST_LIST} have {LABELS[multi_label]}; give a list of that kind and DATA.MULTI_LABEL "
                f"{trained}, or other weights."
            )
        kind = (checkpoint.metadata.get("weights") or {}).get("weights", cfg.TEST.WEIGHTS)
        if cfg.TEST.WEIGHTS not in ("last", kind):
            raise UsageError(
                f"TEST.WEIGHTS {cfg.TEST.WEIGHTS} is chosen when training ends, and {checkpoint.path} holds the {kind} "
                f"weights; give MODEL.INIT RUN/checkpoints/best.safetensors for the best, or TEST.WEIGHTS last."
            )
        report = load_pretrained(model, checkpoint, min_coverage=0.9, antialias=antialias)
        check_all_loaded(report, model)
        report.notes += filter(None, [note])
        return report
    least = cfg.MODEL.INIT_MIN_COVERAGE
    if cfg.MODE == "transfer":  # its classifier is not used
        return load_pretrained(model, checkpoint, min_coverage=least, new_head=True, antialias=antialias)
    note = ""
    keeps_head = not cfg.MODEL.NEW_HEAD and cfg.MODEL.INIT_DEPTH is None
    # A published classifier of another size starts anew, and the report says so.
    if keeps_head and (checkpoint.metadata or known is None or len(known) == len(classes)):
        remedy = "Set MODEL.NEW_HEAD True to train a new one, or correct the names of one of them."
        note = check_classes(checkpoint.path, known, classes, remedy)
    options = {"new_head": cfg.MODEL.NEW_HEAD, "motion": cfg.MODEL.INIT_MOTION, "depth": cfg.MODEL.INIT_DEPTH}
    report = load_pretrained(model, checkpoint, min_coverage=least, antialias=antialias, **options)
    report.notes += [note] if note and "head.proj.weight" in report.keys["loaded"] else []
    return report


def build_cost_report(cfg: CfgNode) -> str:
    """Return what the configured model costs to run and to train; without data, for Kinetics' 400 classes."""
    found = build_class_count(cfg)
    classes = found or KINETICS_CLASSES
    note = [] if found else [f"no data found in {cfg.DATA.ROOT}: {classes} classes assumed"]
    model = build_model(cfg, classes)
    cost = measure_cost(model, (cfg.DATA.FRAMES, cfg.DATA.SIZE, cfg.DATA.SIZE))
    return "\n".join([*note, _build_model_line(cfg, cost, classes), build_memory_line(cfg, model, cost)])


def build_memory_line(cfg: CfgNode, model: nn.Module, cost: Cost) -> str:
    """Return a line on the tokens of a clip, and on the memory that training takes."""
    image_tokens, reduced = model.token_counts()  # type: ignore[operator]
    tokens = f"{image_tokens:,} tokens a clip{f', then {reduced:,}' if reduced else ''}"
    clip = count_training_memory(model, cost.input_size, cfg.PRECISION)
    step = three_digits(clip * cfg.TRAIN.BATCH_SIZE / cfg.TRAIN.ACCUMULATE)
    return (
        f"{tokens}; training keeps {three_digits(clip)} GB a clip for the backward pass in {cfg.PRECISION}, beside "
        f"{16 * cost.parameters / 1e9:.2f} GB for weights, gradients and optimiser; a step of {cfg.TRAIN.BATCH_SIZE} "
        f"clips in {cfg.TRAIN.ACCUMULATE} batch(es) on N processes: {step} / N GB"
    )


def _build_summary(cfg: CfgNode, world: World, cost: Cost, num_classes: int, account: list[str]) -> str:
    """Return lines on the model, where it runs, and on the lists; empty but on rank 0."""
    if not world.is_main:
        return ""
    sharded = ", weights sharded (fsdp)" if world.size > 1 and cfg.PARALLEL.STRATEGY == "fsdp" else ""
    compiled = f", compiled ({cfg.COMPILE})" if cfg.COMPILE != "none" else ""
    place = f"{world.size} process(es) on {world.device.type}, {cfg.PRECISION}{sharded}{compiled}"
    lines = [_build_model_line(cfg, cost, num_classes), f"{place}, output in {cfg.OUTPUT_DIR}"]
    if (cores := usable_cores()) < cfg.DATA.WORKERS:
        lines.append(f"note: DATA.WORKERS {cfg.DATA.WORKERS} for {cores} core(s): that takes memory and is no faster")
    return "\n".join(lines + account)


def _build_model_line(cfg: CfgNode, cost: Cost, num_classes: int) -> str:
    """Return a line on the model's size and its cost, per clip and per test video."""
    (frames, height, width), views = cost.input_size, cfg.TEST.CLIPS * cfg.TEST.CROPS
    return (
        f"{cfg.MODEL.NAME}: {cost.parameters / 1e6:.2f} M parameters, {num_classes} classes, "
        f"{frames} frames of {height}x{width}, {three_digits(cost.gflops, 3)} GFLOPs a clip, "
        f"{three_digits(cost.gflops * views, 3)} a video "
        f"({cfg.TEST.CLIPS} x {cfg.TEST.CROPS} views)"
    )
