"""What training and testing begin with: data in place, and a line about the model."""

from pathlib import Path

from fvcore.common.config import CfgNode
from torch import nn
from torch.utils.data import DataLoader

from stvit_video.common.errors import UsageError
from stvit_video.data import sample
from stvit_video.data.lists.annotations import summarise_videos
from stvit_video.data.lists.videos import build_classes, build_source
from stvit_video.models.cost import Cost, count_training_memory, measure_cost
from stvit_video.models.zoo import build_model
from stvit_video.runs.folder import RunFolder
from stvit_video.runtime.world import World, on_main

KINETICS_CLASSES = 400  # what --cost assumes where there is no data; the classifier's share of the cost is small
SOME_CLASSES = 2  # to see whether a network can be built, before its data are there to count
WEIGHTS_ADVICE = "MODEL.INIT is a .pth or .safetensors file, such as a finished run leaves in its OUTPUT_DIR"


def check_model(cfg: CfgNode) -> None:
    """Raise UsageError for a network that cannot be built or weights that are missing, before minutes of generating."""
    if not cfg.DATA.GENERATE:
        return
    build_model(cfg, cfg.MODEL.NUM_CLASSES or SOME_CLASSES)
    folder = RunFolder(cfg.OUTPUT_DIR)
    resumed = cfg.MODE == "train" and not cfg.OVERWRITE and folder.has_progress()
    if _lacks_weights(cfg) and not resumed:
        raise UsageError(f"MODEL.INIT {cfg.MODEL.INIT} is missing; {WEIGHTS_ADVICE}.")
    if cfg.MODE == "test" and not cfg.MODEL.INIT and not folder.weights.is_file():
        raise UsageError(f"MODE test: {folder.weights} is missing; give MODEL.INIT. {WEIGHTS_ADVICE}.")


def build_data(cfg: CfgNode, world: World) -> None:
    """Generate the data set that DATA.GENERATE names, once for all processes."""
    if cfg.DATA.GENERATE:
        spec = sample.Spec(clips=tuple(cfg.DATA.GENERATE_CLIPS), name=cfg.DATA.GENERATE)
        on_main(world, lambda: sample.prepare(cfg.DATA.ROOT, spec))


def check_inputs(cfg: CfgNode, *, resumed: bool = False) -> None:
    """Raise UsageError, naming all of them at once, where files that MODE needs are missing.

    A ``resumed`` run does not need MODEL.INIT any more.
    """
    root = Path(cfg.DATA.ROOT)
    splits = {"train": ["train", "val", "test"], "test": ["test"], "transfer": ["train", "test"]}[cfg.MODE]
    if cfg.MODE == "transfer" and cfg.TRANSFER.FINETUNE:
        splits.insert(1, "val")
    missing, advice = [], []
    for split in splits:
        name = f"{split.upper()}_LIST"
        if (split != "val" or cfg.DATA[name]) and not (cfg.DATA[name] and build_source(cfg, split).exists()):
            missing.append(f"DATA.{name} {build_source(cfg, split) if cfg.DATA[name] else repr('')}")
    if missing:
        advice.append(
            f"a list holds lines `path label`, paths starting from DATA.ROOT {root}, or is a Kinetics CSV, a "
            f"Something-Something JSON, or a folder CLASS/FILE"
        )
    if cfg.DATA.CLASSES and not (root / cfg.DATA.CLASSES).is_file():
        missing.append(f"DATA.CLASSES {root / cfg.DATA.CLASSES}")
        advice.append("DATA.CLASSES holds one class name a line, or is '' for numbers")
    if _lacks_weights(cfg) and not resumed:
        missing.append(f"MODEL.INIT {cfg.MODEL.INIT}")
        advice.append(WEIGHTS_ADVICE)
    if missing:
        raise UsageError(
            f"MODE {cfg.MODE} needs files that are missing: {', '.join(missing)}. Put them there or set these keys: "
            f"{'; '.join(advice)}. Without a download this runs now: "
            f"python -m stvit_video.run --cfg configs/sample_stvit.yaml"
        )


def _lacks_weights(cfg: CfgNode) -> bool:
    return bool(cfg.MODEL.INIT) and not Path(cfg.MODEL.INIT).is_file()


def build_cost(cfg: CfgNode, model: nn.Module) -> Cost:
    """Return what a clip of the configured size costs."""
    return measure_cost(model, (cfg.DATA.FRAMES, cfg.DATA.SIZE, cfg.DATA.SIZE))


def print_cost(cfg: CfgNode) -> None:
    """Print what the configured model costs to run and to train; without data, for Kinetics' 400 classes."""
    try:
        classes = len(build_classes(cfg))
    except UsageError:
        classes = cfg.MODEL.NUM_CLASSES or KINETICS_CLASSES
        print(f"no data found in {cfg.DATA.ROOT}: {classes} classes assumed")
    model = build_model(cfg, classes)
    cost = build_cost(cfg, model)
    print(_describe_model(cfg, cost, classes), flush=True)
    clip = count_training_memory(model, cost.input_size, cfg.PRECISION)
    print(
        f"training: {clip:.2f} GB a clip kept for the backward pass in {cfg.PRECISION}, beside "
        f"{16 * cost.parameters / 1e9:.2f} GB for weights, gradients and optimiser; a step of "
        f"{cfg.TRAIN.BATCH_SIZE} clips in {cfg.TRAIN.ACCUMULATE} batch(es) on N processes: "
        f"{clip * cfg.TRAIN.BATCH_SIZE / cfg.TRAIN.ACCUMULATE:.0f} / N GB"
    )


def report_model(cfg: CfgNode, cost: Cost, world: World, num_classes: int) -> None:
    """Print the model's size and cost, and where it runs."""
    sharded = ", weights shared out (fsdp)" if world.size > 1 and cfg.PARALLEL.STRATEGY == "fsdp" else ""
    compiled = f", compiled ({cfg.COMPILE})" if cfg.COMPILE != "none" else ""
    print(
        f"{_describe_model(cfg, cost, num_classes)}\n"
        f"{world.size} process(es) on {world.device.type}, {cfg.PRECISION}{sharded}{compiled}, output in "
        f"{cfg.OUTPUT_DIR}",
        flush=True,
    )
    if cfg.DATA.SPLIT is not None:
        print(
            f"DATA.SPLIT: {' / '.join(map(str, cfg.DATA.SPLIT))} % of each class for training / validation / test, "
            f"drawn from file names; cuts of one recording may be on both sides",
            flush=True,
        )


def report_lists(loaders: dict[str, DataLoader | None]) -> None:
    """Print how many videos each split has, and how many of them are missing."""
    for split, loader in loaders.items():
        if loader is not None:
            print(summarise_videos(loader.dataset.videos, split), flush=True)  # type: ignore[attr-defined]


def _describe_model(cfg: CfgNode, cost: Cost, num_classes: int) -> str:
    """Return a line on the model's size and its cost, per clip and per test video."""
    (frames, height, width), views = cost.input_size, cfg.TEST.CLIPS * cfg.TEST.CROPS
    return (
        f"{cfg.MODEL.NAME}: {cost.parameters / 1e6:.2f} M parameters, {num_classes} classes, "
        f"{frames} frames of {height}x{width}, {cost.gflops:.3f} GFLOPs a clip, {cost.gflops * views:.3f} a video "
        f"({cfg.TEST.CLIPS} x {cfg.TEST.CROPS} views)"
    )
