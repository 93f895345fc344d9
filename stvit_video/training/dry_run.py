"""A rehearsal: everything is built as for a real run, one batch goes through it, and no run is begun."""

import time

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from stvit_video.data.lists.videos import build_classes
from stvit_video.data.loader import build_test_loader
from stvit_video.models.zoo import build_model
from stvit_video.runs.folder import RunFolder
from stvit_video.runs.log import check_log
from stvit_video.runs.preflight import build_cost, build_data, check_inputs, check_model, report_lists, report_model
from stvit_video.runs.weights import build_weights, load_tested
from stvit_video.runtime.clock import PARTS, peak_memory
from stvit_video.runtime.precision import autocast, set_precision
from stvit_video.runtime.world import World, on_main
from stvit_video.training.trainer import Trainer, build_trainer


def dry_run(cfg: CfgNode, world: World) -> None:
    """Print the configuration, shapes, cost, times and memory of one training step and one test batch.

    The data that DATA.GENERATE names are made, if they are not there: without them there is no batch.

    Raises UsageError where the real run would.
    """
    check_model(cfg)
    build_data(cfg, world)
    folder = RunFolder(cfg.OUTPUT_DIR)
    on_main(world, lambda: folder.check(cfg))
    check_inputs(cfg)
    check_log(cfg)
    classes = build_classes(cfg)
    torch.manual_seed(cfg.SEED)
    model = build_model(cfg, len(classes))
    if cfg.MODE == "test":
        load_tested(cfg, folder, model)
    elif cfg.MODEL.INIT:
        build_weights(cfg, model, classes)
    cost = build_cost(cfg, model)
    if world.is_main:
        print(f"configuration, resolved:\n{cfg.dump()}")
        report_model(cfg, cost, world, len(classes))
    trainer = build_trainer(cfg, world, model, len(classes), cost.gflops) if cfg.MODE == "train" else None
    views = {"clips": cfg.TEST.CLIPS, "crops": cfg.TEST.CROPS}
    loader = build_test_loader(cfg, world, "test", len(classes), **views)
    if world.is_main:
        report_lists({"train": trainer.loader if trainer else None, "test": loader})
    lines = []
    if trainer is not None:
        lines.append(rehearse_step(trainer))
        model = trainer.model_to_test()
    else:
        set_precision(world.device, cfg.PRECISION)
        model.to(world.device)
    started = time.monotonic()
    batch = next(iter(loader), None)
    waited = time.monotonic() - started
    text = "none for this process" if batch is None else "no video of the first could be read"
    if batch is not None and len(batch.labels):
        with torch.no_grad(), autocast(world.device, cfg.PRECISION):
            text = describe_shapes(model.eval(), batch.to(world.device).clips)
    lines.append(f"test batch: {text}; {waited:.2f} s to load")
    if world.is_main:
        print("\n".join(lines))
        print(f"peak memory {peak_memory(world.device):.2f} GB. Nothing was written to {cfg.OUTPUT_DIR}.", flush=True)


def describe_shapes(model: nn.Module, clips: Tensor) -> str:
    """Return the shapes of clips and of the logits that they become."""
    return f"clips {tuple(clips.shape)} -> logits {tuple(model(clips).shape)}"


def rehearse_step(trainer: Trainer) -> str:
    """Take one training step, the first and therefore a slow one, and return a line on it."""
    seen: list[str] = []

    def note(module: nn.Module, clips: tuple[Tensor, ...], logits: Tensor) -> None:
        seen.append(f"clips {tuple(clips[0].shape)} -> logits {tuple(logits.shape)}")

    hook = trainer.model.register_forward_hook(note)
    trainer.model.train()
    trainer.clock.lap()
    loss, _, count = trainer.take_step(iter(trainer.loader)).tolist()
    hook.remove()
    lap = trainer.clock.lap()
    parts = ", ".join(f"{part} {lap[part]:.2f} s" for part in PARTS)
    batches = f"{trainer.accumulate} x " if trainer.accumulate > 1 else ""
    outcome = f"loss {loss / count:.3f}" if count else "skipped: its loss or gradients are not finite"
    return f"first training step: {batches}{seen[0]}, {outcome}; {parts}"
