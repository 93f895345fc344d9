"""The benchmarks of models: from what the command line names to tables, figures and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from stvit_video.benchmarks.contestants import build_contestants
from stvit_video.benchmarks.end_to_end import describe_flows, figures_of_flows, measure_flow
from stvit_video.benchmarks.report import describe_speeds, figures_of, plot_speeds, read_accuracy
from stvit_video.benchmarks.speed import Conditions, measure
from stvit_video.distributed import pick_device
from stvit_video.errors import UsageError


def build_conditions(cfg: CfgNode, training: bool, largest_batch: int) -> Conditions:
    """Return the conditions that DEVICE, PRECISION and COMPILE of the first configuration set for all.

    Raises UsageError for DEVICE cuda where there is none.
    """
    return Conditions(pick_device(cfg.DEVICE, 0, 1), cfg.PRECISION, cfg.COMPILE, training, largest_batch)


def benchmark_models(
    words: Sequence[tuple[str, str]],
    overrides: Sequence[str],
    *,
    training: bool,
    rounds: int,
    largest_batch: int,
    results: Sequence[Path] = (),
    plot: Path | None = None,
) -> dict[str, Any]:
    """Measure configurations and peers side by side, print the table, draw the picture, and return the figures."""
    first, contestants, cfgs = build_contestants(words, overrides)
    if results and len(results) != len(cfgs):
        raise UsageError(
            f"--results was given {len(results)} times and --cfg {len(cfgs)} times; give one for each --cfg."
        )
    accuracies = iter([read_accuracy(path) for path in results])
    conditions = build_conditions(first, training, largest_batch)
    whole = [one.name for one in contestants if not hasattr(one.model, "transformer_blocks")]
    if conditions.compiled == "blocks" and whole:
        raise UsageError(
            f"COMPILE blocks, but the blocks of {whole[0]} are not known here; use COMPILE model, or compare models of "
            f"this package."
        )
    speeds, product = measure(contestants, conditions, rounds, say=lambda line: print(line, flush=True))
    print(describe_speeds(speeds, product, conditions), flush=True)
    found = [next(accuracies, None) if kind == "cfg" else None for kind, _ in words]
    if plot:
        plot_speeds(speeds, found, plot)
    return {**figures_of(speeds, product, conditions), "top1": found}


def benchmark_end_to_end(cfg: CfgNode, clips: int, rounds: int) -> dict[str, Any]:
    """Time files to logits and training with 1, 2 and 4 workers, print the table and return the figures."""
    flows = measure_flow(cfg, clips, rounds)
    shape = f"{cfg.DATA.FRAMES} frames of {cfg.DATA.SIZE}x{cfg.DATA.SIZE}"
    conditions = build_conditions(cfg, False, cfg.TEST.BATCH_SIZE)
    print(f"{cfg.MODEL.NAME}, {conditions.device.type}, {conditions}: from video files, clips of {shape}")
    print("\n".join(describe_flows(flows)), flush=True)
    return {"model": cfg.MODEL.NAME, **conditions.figures, "flows": figures_of_flows(flows)}
