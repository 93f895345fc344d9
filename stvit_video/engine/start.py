"""What training and testing begin with: data in place, numeric precision, and a line about the model."""

from contextlib import AbstractContextManager

import torch
from fvcore.common.config import CfgNode
from torch import nn

from stvit_video.data import sample
from stvit_video.distributed import World, on_main
from stvit_video.models.complexity import count_gflops, count_parameters


def build_data(cfg: CfgNode, world: World) -> None:
    """Generate the data set that DATA.GENERATE names, once for all processes."""
    if cfg.DATA.GENERATE == "sample":
        spec = sample.Spec(clips=tuple(cfg.DATA.GENERATE_CLIPS))
        on_main(world, lambda: sample.prepare(cfg.DATA.ROOT, spec))


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Return the context in which the forward pass runs in ``precision``."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def report_model(cfg: CfgNode, model: nn.Module, world: World, num_classes: int) -> None:
    """Print the model's size and cost, per clip and per test video."""
    size = (cfg.DATA.FRAMES, cfg.DATA.SIZE, cfg.DATA.SIZE)
    gflops, views = count_gflops(model, size), cfg.TEST.CLIPS * cfg.TEST.CROPS
    print(
        f"{cfg.MODEL.NAME}: {count_parameters(model) / 1e6:.2f} M parameters, {num_classes} classes, "
        f"{size[0]} frames of {size[1]}x{size[2]}, {gflops:.3f} GFLOPs a clip, {gflops * views:.3f} a video "
        f"({cfg.TEST.CLIPS} x {cfg.TEST.CROPS} views)\n"
        f"{world.size} process(es) on {world.device.type}, {cfg.PRECISION}, output in {cfg.OUTPUT_DIR}",
        flush=True,
    )
