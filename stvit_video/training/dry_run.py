"""A rehearsal: everything is built as for a real run, one batch goes through it, and no run is begun."""

import time

import torch
from torch import Tensor, nn

from stvit_video.evaluation.evaluate import build_tested_model, build_tester
from stvit_video.runs.preflight import OpenRun
from stvit_video.runtime.clock import PARTS, peak_memory
from stvit_video.runtime.precision import autocast
from stvit_video.training.trainer import Trainer, build_trainer


def dry_run(run: OpenRun) -> None:
    """Print the configuration, shapes, cost, times and memory of one training step and one test batch.

    The data that DATA.GENERATE names are generated if they are not there. Raises UsageError where the real run would.
    """
    world = run.world
    if world.is_main:
        print(f"configuration, resolved:\n{run.folder.config_text}{run.summary}")
    if run.folder.settings["MODE"] == "train":
        trainer = build_trainer(run)
        lines, model = [rehearse_step(trainer)], trainer.model_to_test()
    else:
        lines, model = [], build_tested_model(run)
    tester, started = build_tester(run), time.monotonic()
    batch = next(iter(tester.loader), None)
    waited = time.monotonic() - started
    text = "none for this process" if batch is None else "no video of the first could be read"
    if batch is not None and len(batch.labels):
        clips = batch.to(world.device).make_clips()
        with torch.no_grad(), autocast(world.device, tester.precision):
            text = describe_shapes(clips, model.eval()(clips))
    lines.append(f"test batch: {text}; {waited:.2f} s to load")
    if world.is_main:
        print("\n".join(lines))
        print(f"peak memory {peak_memory(world.device):.2f} GB. Nothing was written to {run.folder.path}.", flush=True)


def rehearse_step(trainer: Trainer) -> str:
    """Take one training step, the first and therefore a slow one, and return a line on it."""
    seen: list[str] = []

    def note(module: nn.Module, clips: tuple[Tensor, ...], logits: Tensor) -> None:
        seen.append(describe_shapes(clips[0], logits))

    hook = trainer.wrapped.register_forward_hook(note)
    trainer.wrapped.train()
    trainer.clock.lap()
    loss, _, count = trainer.take_step(iter(trainer.loader)).tolist()
    hook.remove()
    lap = trainer.clock.lap()
    parts = ", ".join(f"{part} {lap[part]:.2f} s" for part in PARTS)
    batches = f"{trainer.settings.accumulate} x " if trainer.settings.accumulate > 1 else ""
    outcome = f"loss {loss / count:.3f}" if count else "skipped: its loss or gradients are not finite"
    return f"first training step: {batches}{seen[0]}, {outcome}; {parts}"


def describe_shapes(clips: Tensor, logits: Tensor) -> str:
    """Return the shapes of clips and of the logits that they become."""
    return f"clips {tuple(clips.shape)} -> logits {tuple(logits.shape)}"
