"""Opening a run: what it needs is read once, checked before anything is written, and handed on as plain values."""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from fvcore.common.config import CfgNode
from torch import nn

from stvit_video.common.errors import RunFailure, UsageError
from stvit_video.common.files import write_atomically
from stvit_video.config.clip_settings import view_settings
from stvit_video.config.load import override
from stvit_video.data import sample
from stvit_video.data.lists.annotations import Video, summarise_videos
from stvit_video.data.lists.videos import build_lists
from stvit_video.models import LoadReport, load_pretrained
from stvit_video.models.cost import Cost, count_training_memory, measure_cost
from stvit_video.models.weights.files import Checkpoint, read_checkpoint
from stvit_video.models.zoo import build_model
from stvit_video.runs.checkpoint import check_all_loaded, load_newest
from stvit_video.runs.folder import RunFolder, build_run_folder
from stvit_video.runs.log import describe_results
from stvit_video.runtime.world import World, gather_objects, on_main

KINETICS_CLASSES = 400  # assumed where there are no data to count; the classifier's share of the cost is small
SOME_CLASSES = 2  # to see whether a network can be built, before its data are there to count
WEIGHTS_ADVICE = "MODEL.INIT is a .pth or .safetensors file, such as a finished run leaves in its OUTPUT_DIR"
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
    views: dict[str, Any]  # how videos become clips, to be saved beside weights
    model: nn.Module  # on the CPU, with its weights
    cost: Cost
    summary: str  # lines for the user: the model, where it runs, the lists
    checkpoint: Checkpoint | None = None  # MODEL.INIT, in MODE transfer, which loads it more than once
    report: LoadReport | None = None  # which of the checkpoint's weights were loaded
    state: dict[str, Any] | None = None  # the training state to continue from

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
    folder = build_run_folder(cfg)
    state = None
    if purpose != "measure":
        on_main(world, folder.check)
        if cfg.LOG.WANDB and importlib.util.find_spec("wandb") is None:
            raise UsageError(f"LOG.WANDB {cfg.LOG.WANDB}: wandb is not installed; pip install wandb, or LOG.WANDB ''.")
    if purpose == "run" and cfg.MODE == "train":
        if on_main(world, folder.is_finished) and not cfg.OVERWRITE:
            if world.is_main:
                results = describe_results(json.loads(folder.results.read_text()))
                print(f"{cfg.OUTPUT_DIR} is finished (OVERWRITE True runs it again):\n{results}", flush=True)
            return None
        on_main(world, folder.lock)
        state = None if cfg.OVERWRITE else load_newest(folder.checkpoints)
        steps = gather_objects(world, None if state is None else int(state["step"]))
        if len(set(steps)) > 1:
            seen = [f"rank {rank} {'none' if step is None else f'step {step}'}" for rank, step in enumerate(steps)]
            raise RunFailure(
                f"the processes find different newest checkpoints in {folder.checkpoints}: {', '.join(seen[:8])}; "
                f"OUTPUT_DIR has to be one folder that all machines share. If it is, start again: one saw it late."
            )
    needs_weights = purpose != "measure" and state is None
    source = cfg.MODEL.INIT if needs_weights else ""  # where it is missing, that is reported with all missing files
    if needs_weights and cfg.MODE == "test" and not source:
        source = str(folder.weights)
        if not folder.weights.is_file():
            raise UsageError(f"MODE test: {source} is missing; give MODEL.INIT FILE or a finished run's OUTPUT_DIR.")
    classes, videos = (opened.classes, opened.videos) if opened else open_lists(cfg, world, needs_weights=needs_weights)
    asked = cfg.TRAIN.BATCH_SIZE
    if purpose != "measure" and cfg.MODE == "train":
        kept = None if state is None else state["setup"].get("batch")  # its steps go on with the same videos
        cfg = build_filled_batch(cfg, world, len(videos.get("train", ())), kept)
    torch.manual_seed(cfg.SEED)  # for weights that no file holds
    model = build_model(cfg, len(classes))
    checkpoint = opened.checkpoint if opened else read_checkpoint(source) if source else None
    report = build_weights(cfg, model, checkpoint, classes) if source and checkpoint else None
    cost = measure_cost(model, (cfg.DATA.FRAMES, cfg.DATA.SIZE, cfg.DATA.SIZE))
    summary = _build_summary(cfg, world, cost, len(classes), videos)
    if world.is_main and asked > cfg.TRAIN.BATCH_SIZE:
        reason = "as the run began" if state is not None else "there are no more training videos"
        summary += f"\nTRAIN.BATCH_SIZE {asked} is lowered to {cfg.TRAIN.BATCH_SIZE}: {reason}"
    checkpoint = checkpoint if cfg.MODE == "transfer" else None
    return OpenRun(
        cfg, world, folder, classes, videos, view_settings(cfg), model, cost, summary, checkpoint, report, state
    )


def build_filled_batch(cfg: CfgNode, world: World, videos: int, kept: int | None = None) -> CfgNode:
    """Return the configuration with the largest batch that a shorter training list fills.

    ``kept`` is the batch of the run that is continued: it stays, also on another number of processes.
    """
    parts = world.size * cfg.TRAIN.ACCUMULATE
    most = kept or videos // parts * parts * cfg.DATA.REPEATS
    if not 0 < most < cfg.TRAIN.BATCH_SIZE:
        return cfg
    return override(cfg, [("TRAIN.BATCH_SIZE", most)], "the training list")


def build_weights(cfg: CfgNode, model: nn.Module, checkpoint: Checkpoint, classes: list[str]) -> LoadReport:
    """Load a checkpoint into the model as MODE asks. Raises UsageError where it is not of this model or its classes."""
    antialias = cfg.MODEL.INIT_ANTIALIAS
    if cfg.MODE == "test":
        report = load_pretrained(model, checkpoint, min_coverage=0.9, antialias=antialias)
        check_all_loaded(report, model)
        return report
    least = cfg.MODEL.INIT_MIN_COVERAGE
    if cfg.MODE == "transfer":  # its classifier is not used
        return load_pretrained(model, checkpoint, min_coverage=least, new_head=True, antialias=antialias)
    known = checkpoint.metadata.get("classes")
    if known not in (None, classes) and not cfg.MODEL.NEW_HEAD and cfg.MODEL.INIT_DEPTH is None:
        raise UsageError(
            f"{cfg.MODEL.INIT}: its classifier is for other classes ({', '.join(map(str, known[:4]))} ...) than the "
            f"data's ({', '.join(classes[:4])} ...). Set MODEL.NEW_HEAD True to train a new one."
        )
    options = {"new_head": cfg.MODEL.NEW_HEAD, "motion": cfg.MODEL.INIT_MOTION, "depth": cfg.MODEL.INIT_DEPTH}
    return load_pretrained(model, checkpoint, min_coverage=least, antialias=antialias, **options)


def open_lists(cfg: CfgNode, world: World, *, needs_weights: bool) -> tuple[list[str], dict[str, list[Video]]]:
    """Return the class names and the videos of each split that MODE uses; generate the set of DATA.GENERATE first."""
    lists = build_lists(cfg)
    weights = cfg.MODEL.INIT if needs_weights else ""
    trains = cfg.MODE == "train" or (cfg.MODE == "transfer" and cfg.TRANSFER.FINETUNE)
    splits = ["train", "val", "test"] if trains else ["test"] if cfg.MODE == "test" else ["train", "test"]

    # By rank 0, and sent to the others.
    def read() -> tuple[list[str], dict[str, list[Video]]]:
        if cfg.DATA.GENERATE:  # takes minutes: first what can be wrong before
            if not sample.is_complete(cfg.DATA.ROOT):
                build_model(cfg, cfg.MODEL.NUM_CLASSES or SOME_CLASSES)
            if weights and not Path(weights).exists():
                raise UsageError(f"MODEL.INIT {weights} is missing; {WEIGHTS_ADVICE}.")
            sample.prepare(cfg.DATA.ROOT, sample.Spec(clips=tuple(cfg.DATA.GENERATE_CLIPS), name=cfg.DATA.GENERATE))
        advice: dict[str, str] = {}  # by what is missing: all of it is named at once
        for split in splits:
            name = lists.lists[split]
            file = lists.source(split)
            if (split != "val" or name) and not (name and file.exists()):
                advice[f"DATA.{split.upper()}_LIST {file if name else repr('')}"] = (
                    f"a list holds lines `path label`, paths starting from DATA.ROOT {lists.root}, or is a Kinetics "
                    f"CSV, a Something-Something JSON, or a folder CLASS/FILE"
                )
        if lists.class_file and not (lists.root / lists.class_file).is_file():
            missing = f"DATA.CLASSES {lists.root / lists.class_file}"
            advice[missing] = "DATA.CLASSES holds one class name a line, or is '' for numbers"
        if weights and not Path(weights).exists():
            advice[f"MODEL.INIT {weights}"] = WEIGHTS_ADVICE
        if advice:
            raise UsageError(
                f"MODE {cfg.MODE} needs files that are missing: {', '.join(advice)}. Put them there or set these keys: "
                f"{'; '.join(dict.fromkeys(advice.values()))}. Without a download this runs now: "
                f"python -m stvit_video.run --cfg configs/sample_stvit.yaml"
            )
        return lists.classes, {split: lists.videos(split) for split in splits if lists.lists[split]}

    return on_main(world, read)


def build_cost_report(cfg: CfgNode) -> str:
    """Return what the configured model costs to run and to train; without data, for Kinetics' 400 classes."""
    try:
        classes = len(build_lists(cfg).classes)
        note = []
    except UsageError:
        classes = cfg.MODEL.NUM_CLASSES or KINETICS_CLASSES
        note = [f"no data found in {cfg.DATA.ROOT}: {classes} classes assumed"]
    model = build_model(cfg, classes)
    cost = measure_cost(model, (cfg.DATA.FRAMES, cfg.DATA.SIZE, cfg.DATA.SIZE))
    clip = count_training_memory(model, cost.input_size, cfg.PRECISION)
    training = (
        f"training: {clip:.2f} GB a clip kept for the backward pass in {cfg.PRECISION}, beside "
        f"{16 * cost.parameters / 1e9:.2f} GB for weights, gradients and optimiser; a step of "
        f"{cfg.TRAIN.BATCH_SIZE} clips in {cfg.TRAIN.ACCUMULATE} batch(es) on N processes: "
        f"{clip * cfg.TRAIN.BATCH_SIZE / cfg.TRAIN.ACCUMULATE:.0f} / N GB"
    )
    return "\n".join([*note, _build_model_line(cfg, cost, classes), training])


def _build_summary(cfg: CfgNode, world: World, cost: Cost, num_classes: int, videos: dict[str, list[Video]]) -> str:
    """Return lines on the model, where it runs, and how many videos each split has and lacks; empty but on rank 0."""
    if not world.is_main:
        return ""
    sharded = ", weights sharded (fsdp)" if world.size > 1 and cfg.PARALLEL.STRATEGY == "fsdp" else ""
    compiled = f", compiled ({cfg.COMPILE})" if cfg.COMPILE != "none" else ""
    place = f"{world.size} process(es) on {world.device.type}, {cfg.PRECISION}{sharded}{compiled}"
    lines = [_build_model_line(cfg, cost, num_classes), f"{place}, output in {cfg.OUTPUT_DIR}"]
    if cfg.DATA.SPLIT is not None:
        lines.append(
            f"DATA.SPLIT: {' / '.join(map(str, cfg.DATA.SPLIT))} % of each class for training / validation / test, "
            f"drawn from file names; cuts of one recording may be on both sides"
        )
    return "\n".join(lines + [summarise_videos(found, split) for split, found in videos.items()])


def _build_model_line(cfg: CfgNode, cost: Cost, num_classes: int) -> str:
    """Return a line on the model's size and its cost, per clip and per test video."""
    (frames, height, width), views = cost.input_size, cfg.TEST.CLIPS * cfg.TEST.CROPS
    return (
        f"{cfg.MODEL.NAME}: {cost.parameters / 1e6:.2f} M parameters, {num_classes} classes, "
        f"{frames} frames of {height}x{width}, {cost.gflops:.3f} GFLOPs a clip, {cost.gflops * views:.3f} a video "
        f"({cfg.TEST.CLIPS} x {cfg.TEST.CROPS} views)"
    )
