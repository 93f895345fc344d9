"""Speed on this machine: ``python -m stvit_video.benchmark model|train|e2e|loader|engine --cfg FILE [KEY VALUE ...]``.

Every figure is the median of interleaved rounds beside a reference in the same run: ratios can be compared between
machines, times cannot.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stvit_video.common.cli import Parser, run_command
from stvit_video.common.errors import UsageError
from stvit_video.common.files import prepare_folder


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
    from stvit_video.config.load import load_config

    cfg_files = [word for kind, word in options.named if kind == "cfg"]
    if options.what in ("model", "train"):
        from stvit_video.benchmarks.models import benchmark_models

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
            from stvit_video.benchmarks.loader import benchmark_loader

            peers = [word for kind, word in options.named if kind == "peer"]
            figures = benchmark_loader(cfg, options.clips, options.rounds, peers)
        elif options.what == "engine":
            from stvit_video.benchmarks.engine import benchmark_engine

            figures = benchmark_engine(cfg, options.steps, options.rounds)
        else:
            from stvit_video.benchmarks.models import benchmark_end_to_end

            figures = benchmark_end_to_end(cfg, options.clips, options.rounds)
    if options.output:
        from stvit_video.common.files import write_json
        from stvit_video.runs.environment import environment

        content = {"started": time.strftime("%Y-%m-%dT%H:%M:%S"), **figures, "environment": environment()}
        write_json(options.output, content)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark from the command line; return the exit code."""
    return run_command(benchmark, arguments)


if __name__ == "__main__":
    sys.exit(main())
