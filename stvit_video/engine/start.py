"""What training and testing begin with: data in place, numeric precision, and a line about the model."""

from contextlib import AbstractContextManager
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from torch import nn
from torch.utils.data import DataLoader

from stvit_video.data import sample
from stvit_video.data.annotations import summarise_videos
from stvit_video.data.videos import build_classes, build_source
from stvit_video.distributed import World, on_main
from stvit_video.errors import UsageError
from stvit_video.models.complexity import count_gflops, count_parameters, count_training_memory
from stvit_video.models.zoo import build_model

KINETICS_CLASSES = 400  # what --cost assumes where there is no data; the classifier's share of the cost is small


def build_data(cfg: CfgNode, world: World) -> None:
    """Generate the data set that DATA.GENERATE names, once for all processes."""
    if cfg.DATA.GENERATE == "sample":
        spec = sample.Spec(clips=tuple(cfg.DATA.GENERATE_CLIPS))
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
    if cfg.MODEL.INIT and not resumed and not Path(cfg.MODEL.INIT).is_file():
        missing.append(f"MODEL.INIT {cfg.MODEL.INIT}")
        advice.append("MODEL.INIT is a .pth or .safetensors file, such as a finished run leaves in its OUTPUT_DIR")
    if missing:
        raise UsageError(
            f"MODE {cfg.MODE} needs files that are missing: {', '.join(missing)}. Put them there or set these keys: "
            f"{'; '.join(advice)}. Without a download this runs now: "
            f"python -m stvit_video.run --cfg configs/sample_stvit.yaml"
        )


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Return the context in which the forward pass runs in ``precision``."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def print_cost(cfg: CfgNode) -> None:
    """Print what the configured model costs to run and to train; without data, for Kinetics' 400 classes."""
    try:
        classes = len(build_classes(cfg))
    except UsageError:
        classes = cfg.MODEL.NUM_CLASSES or KINETICS_CLASSES
        print(f"no data found in {cfg.DATA.ROOT}: {classes} classes assumed")
    model = build_model(cfg, classes)
    print(_describe_model(cfg, model, classes), flush=True)
    clip = count_training_memory(model, (cfg.DATA.FRAMES, cfg.DATA.SIZE, cfg.DATA.SIZE), cfg.PRECISION)
    print(
        f"training: {clip:.2f} GB a clip kept for the backward pass in {cfg.PRECISION}, beside "
        f"{16 * count_parameters(model) / 1e9:.2f} GB for weights, gradients and optimiser; a step of "
        f"{cfg.TRAIN.BATCH_SIZE} clips in {cfg.TRAIN.ACCUMULATE} batch(es) on N processes: "
        f"{clip * cfg.TRAIN.BATCH_SIZE / cfg.TRAIN.ACCUMULATE:.0f} / N GB"
    )


def report_model(cfg: CfgNode, model: nn.Module, world: World, num_classes: int) -> None:
    """Print the model's size and cost, and where it runs."""
    print(
        f"{_describe_model(cfg, model, num_classes)}\n"
        f"{world.size} process(es) on {world.device.type}, {cfg.PRECISION}, output in {cfg.OUTPUT_DIR}",
        flush=True,
    )


def report_lists(loaders: dict[str, DataLoader | None]) -> None:
    """Print how many videos each split has, and how many of them are missing."""
    for split, loader in loaders.items():
        if loader is not None:
            print(summarise_videos(loader.dataset.videos, split), flush=True)  # type: ignore[attr-defined]


def _describe_model(cfg: CfgNode, model: nn.Module, num_classes: int) -> str:
    """Return a line on the model's size and its cost, per clip and per test video."""
    size = (cfg.DATA.FRAMES, cfg.DATA.SIZE, cfg.DATA.SIZE)
    gflops, views = count_gflops(model, size), cfg.TEST.CLIPS * cfg.TEST.CROPS
    return (
        f"{cfg.MODEL.NAME}: {count_parameters(model) / 1e6:.2f} M parameters, {num_classes} classes, "
        f"{size[0]} frames of {size[1]}x{size[2]}, {gflops:.3f} GFLOPs a clip, {gflops * views:.3f} a video "
        f"({cfg.TEST.CLIPS} x {cfg.TEST.CROPS} views)"
    )
