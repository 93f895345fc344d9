"""Speed on this machine: ``python -m stvit_video.benchmark model|train|e2e|loader|engine --cfg FILE [KEY VALUE ...]``.

Every figure is the median of interleaved rounds beside a reference in the same run: ratios can be compared between
machines, times cannot.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from fvcore.common.config import CfgNode

from stvit_video.errors import Parser, UsageError, prepare_folder, run_command

if TYPE_CHECKING:  # a wrong option is answered before torch, which this brings, is imported
    from stvit_video.engine.timing import Timer


@dataclass(frozen=True)
class Row:
    """One measured step: the milliseconds of each round, per clip or per video, and the share of the first row's."""

    name: str
    milliseconds: list[float]
    ratio: float

    @property
    def median(self) -> float:
        return median(self.milliseconds)


def interleave(timers: "dict[str, Timer]", rounds: int) -> list[Row]:
    """Run each timer once a round, after a round that is not counted; ratios are to the first one's median."""
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for number in range(rounds + 1):
        for name, timer in timers.items():
            taken = timer()
            if number:
                seconds[name].append(1000 * taken)
    reference = median(next(iter(seconds.values())))
    return [Row(name, taken, median(taken) / reference) for name, taken in seconds.items()]


def describe(title: str, item: str, rows: list[Row]) -> str:
    """Return a table of medians and spreads."""
    width = max(len(row.name) for row in rows)
    lines = [f"{title}\n{'':{width}}  {'ms a ' + item:>11}  {'least to most':>17}  {item + 's/s':>9}  {'ratio':>5}"]
    for row in rows:
        spread = f"{min(row.milliseconds):.1f} to {max(row.milliseconds):.1f}"
        rate = 1000 / row.median
        lines.append(f"{row.name:{width}}  {row.median:11.1f}  {spread:>17}  {rate:9.1f}  {row.ratio:5.2f}")
    return "\n".join(lines)


def advise(cfg: CfgNode, train: list[Row], cores: int) -> str:
    """Return what bounds the training loader here, and what to change."""
    times = {row.name: row.median for row in train}
    decode, transform, floats = times["decode"], times["crop and augment"], times["bytes to floats"]
    handing_over = max(0.0, times["decode in its process"] - decode)
    workers = cfg.DATA.WORKERS
    full = times[f"loader, {workers} worker(s)"]
    parts = (decode, handing_over, transform, floats)
    work = sum(parts)
    lines = [
        "a clip costs {:.0f} ms of one core: {:.0f} % decoding, {:.0f} % handing frames over, {:.0f} % crop and "
        "augmentation, {:.0f} % floats, which are made where the model is".format(
            work, *(100 * p / work for p in parts)
        )
    ]
    busy = work / full
    if busy > 0.75 * cores:
        lines.append(
            f"bound by the {cores} cores ({busy:.1f} busy): more cores, or smaller files (short side near "
            f"{cfg.DATA.SHORT_SIDE[0]}, key frames every second or so) and DATA.REPEATS 2"
        )
    elif transform > decode:
        lines.append("bound by the transforms: DATA.TRANSFORM_ON device, or fewer DATA.RAND_AUGMENT_LAYERS")
    else:
        lines.append(f"bound by {workers} worker(s) ({busy:.1f} of {cores} cores busy): raise DATA.WORKERS")
    return "\n".join(lines)


def benchmark_loader(cfg: CfgNode, clips: int, rounds: int, peers: Sequence[str]) -> dict[str, Any]:
    """Time each step of loading training clips and test videos, print the tables and return the figures."""
    import torch

    from stvit_video.engine.timing import build_test_timers, build_train_timers

    torch.set_num_threads(1)  # as in a worker, and so that no step takes the core of another
    train = interleave(build_train_timers(cfg, clips, peers), rounds)
    shape = f"{cfg.DATA.FRAMES} frames of {cfg.DATA.SIZE}x{cfg.DATA.SIZE}"
    print(describe(f"training: clips of {shape}", "clip", train), flush=True)
    test = interleave(build_test_timers(cfg, max(1, clips // cfg.TEST.CLIPS)), rounds)
    print(describe(f"test: {cfg.TEST.CLIPS} x {cfg.TEST.CROPS} views of {shape}", "video", test))
    advice = advise(cfg, train, len(os.sched_getaffinity(0)))
    print(advice, flush=True)
    return {"train": [asdict(row) for row in train], "test": [asdict(row) for row in test], "advice": advice}


def benchmark_engine(cfg: CfgNode, steps: int, rounds: int) -> dict[str, Any]:
    """Time training steps with and without the engine, print the table and return the figures."""
    from stvit_video.engine.overhead import build_engine_timers

    rows = interleave(build_engine_timers(cfg, steps), rounds)
    print(describe(f"training steps of {cfg.TRAIN.BATCH_SIZE} clips held in memory", "step", rows))
    speed = 1 / rows[1].ratio
    print(f"the engine takes {speed:.3f} of the bare loop's steps a second, checkpoint and logs included", flush=True)
    return {"engine": [asdict(row) for row in rows], "speed": speed}


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog="python -m stvit_video.benchmark",
        form="model|train|e2e|loader|engine --cfg FILE [KEY VALUE ...]",
        description="Measure speed on this machine. DEVICE, PRECISION and COMPILE are keys, as for stvit_video.run.",
    )
    parser.add_argument(
        "what",
        choices=["model", "train", "e2e", "loader", "engine"],
        help="model: inference side by side; train: the same for training steps; e2e: from files to logits and to "
        "weights; loader: from files to batches, step by step; engine: training steps beside a bare loop",
    )
    # One list for both keeps the order of the command line: the first one named is what ratios refer to.
    named: dict[str, Any] = {"action": "append", "dest": "named"}
    about = "configuration of what is timed; model and train take several"
    parser.add_argument(
        "--cfg", required=True, metavar="FILE", help=about, type=lambda word: ("cfg", word), **named
    )  # fmt: skip
    about = (
        "pytorchvideo (loader), or LIBRARY:MODEL (model, train): torchvision:swin3d_t, pytorchvideo:mvit_base_16x4, "
    )
    about += "timm:vit_small_patch16_224, stvit_video:stvit_swin_tiny:fast"
    parser.add_argument("--peer", metavar="NAME", help=about, type=lambda word: ("peer", word), **named)
    parser.add_argument("--steps", type=int, default=32, help="steps a round of engine (default: %(default)s)")
    parser.add_argument(
        "--clips",
        type=int,
        default=64,
        help="a round of loader and e2e; e2e: 8 batches at least (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds, after one to warm up (default: %(default)s)")
    parser.add_argument(
        "--largest-batch", type=int, default=64, help="largest batch of model and train to try (default: %(default)s)"
    )
    parser.add_argument(
        "--results", type=Path, action="append", default=[], metavar="results.json", help="of a run, one for each --cfg"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw top-1, or GFLOPs, against clips a second")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures there")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="as for stvit_video.run")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Raise UsageError for numbers, files and combinations that cannot be used."""
    numbers = {name: getattr(options, name) for name in ("clips", "rounds", "steps", "largest_batch")}
    if min(numbers.values()) < 1:
        given = ", ".join(f"--{name.replace('_', '-')} {number}" for name, number in numbers.items())
        raise UsageError(f"{given}: give whole numbers from 1 on.")
    for option, path in (("--output", options.output), ("--plot", options.plot)):
        if path and not path.parent.is_dir():
            raise UsageError(f"{option} {path}: {path.parent} is not a folder; make it first.")
        if path and path.is_dir():
            raise UsageError(f"{option} {path} is a folder; name a file in it.")
        if path:
            prepare_folder(path.parent)
    if options.plot and options.plot.suffix != ".png":
        raise UsageError(f"--plot {options.plot} is no .png file; name one that is.")
    side_by_side = options.what in ("model", "train")
    cfgs, peers = ([word for kind, word in options.named if kind == which] for which in ("cfg", "peer"))
    if not side_by_side and (len(cfgs) > 1 or options.plot or options.results):
        raise UsageError(f"{options.what} takes one --cfg, and no --plot or --results; model and train do.")
    if not side_by_side and any(options.what != "loader" or peer != "pytorchvideo" for peer in peers):
        raise UsageError(
            f"--peer {peers[0]} of {options.what}; loader takes pytorchvideo, model and train LIBRARY:MODEL."
        )


def benchmark(arguments: Sequence[str] | None) -> int:
    """Parse the arguments, run what they name and write the figures where they say."""
    parser = build_parser()
    options = parser.parse_intermixed_args(arguments)
    check_options(options)
    from stvit_video.config import load_config

    cfg_files = [word for kind, word in options.named if kind == "cfg"]
    if options.what in ("model", "train"):
        from stvit_video.benchmarks.command import benchmark_models

        figures = benchmark_models(
            options.named,
            options.overrides,
            training=options.what == "train",
            rounds=options.rounds,
            largest_batch=options.largest_batch,
            results=options.results,
            plot=options.plot,
        )
    else:
        cfg = load_config(cfg_files[0], options.overrides)
        if options.what == "loader":
            peers = [word for kind, word in options.named if kind == "peer"]
            figures = benchmark_loader(cfg, options.clips, options.rounds, peers)
        elif options.what == "engine":
            figures = benchmark_engine(cfg, options.steps, options.rounds)
        else:
            from stvit_video.benchmarks.command import benchmark_end_to_end

            figures = benchmark_end_to_end(cfg, options.clips, options.rounds)
    if options.output:
        from stvit_video.engine.checkpoint import write_atomically
        from stvit_video.engine.run_folder import environment

        content = {"started": time.strftime("%Y-%m-%dT%H:%M:%S"), **figures, "environment": environment()}
        write_atomically(options.output, json.dumps(content, indent=2).encode())
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark from the command line; return the exit code."""
    return run_command(benchmark, arguments)


if __name__ == "__main__":
    sys.exit(main())
