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
from stvit_video.common.files import check_file, write_json

WHAT = (
    "model: inference side by side; train: the same for training steps; e2e: from files to logits and to weights; "
    "loader: from files to batches, step by step; engine: training steps beside a bare loop"
)
PEER = (
    "pytorchvideo (loader), or LIBRARY:MODEL (model, train): torchvision:swin3d_t, pytorchvideo:mvit_base_16x4, "
    "timm:vit_small_patch16_224, stvit_video:stvit_swin_tiny:fast"
)


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog="python -m stvit_video.benchmark",
        form="model|train|e2e|loader|engine --cfg FILE [KEY VALUE ...]",
        description="Measure speed on this machine. DEVICE, PRECISION and COMPILE are keys, as for stvit_video.run.",
    )
    add = parser.add_argument
    add("what", choices=("model", "train", "e2e", "loader", "engine"), help=WHAT)
    # One list for both keeps their order on the command line: ratios refer to the first one.
    both: dict[str, Any] = {"action": "append", "dest": "named", "metavar": "NAME"}
    add("--cfg", required=True, help="file; model and train take several", type=lambda word: ("cfg", word), **both)
    add("--peer", help=PEER, type=lambda word: ("peer", word), **both)
    add("--steps", type=int, default=32, help="per round of engine (default: %(default)s)")
    add("--clips", type=int, default=64, help="per round of loader and e2e; at least 8 batches (default: %(default)s)")
    add("--rounds", type=int, default=5, help="rounds, after one to warm up (default: %(default)s)")
    add("--largest-batch", type=int, default=64, help="largest batch of model and train (default: %(default)s)")
    results = "results.json of a run for each --cfg"
    add("--results", type=Path, action="append", default=[], metavar="FILE", help=results)
    add("--plot", type=Path, metavar="FILE.png", help="draw top-1, or GFLOPs, over clips per second")
    add("--output", type=Path, metavar="FILE.json", help="write the figures there")
    add("overrides", nargs="*", metavar="KEY VALUE", help="as for stvit_video.run")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Raise UsageError for numbers, files and combinations that cannot be used."""
    for name in ("clips", "rounds", "steps", "largest_batch"):
        if (number := getattr(options, name)) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {number}: give whole numbers from 1 on.")
    check_file("--output", options.output)
    check_file("--plot", options.plot, suffix=".png")
    options.cfgs, options.peers = ([word for kind, word in options.named if kind == which] for which in ("cfg", "peer"))
    single = options.what not in ("model", "train")
    if single and (len(options.cfgs) > 1 or options.plot or options.results):
        raise UsageError(f"{options.what} takes one --cfg, and no --plot or --results; model and train do.")
    if single and any(options.what != "loader" or peer != "pytorchvideo" for peer in options.peers):
        raise UsageError(
            f"--peer {options.peers[0]} of {options.what}; loader takes pytorchvideo, model and train LIBRARY:MODEL."
        )


def benchmark(arguments: Sequence[str] | None) -> int:
    """Parse the arguments, run what they name and write the figures where they say."""
    options = build_parser().parse_intermixed_args(arguments)
    check_options(options)
    from stvit_video.benchmarks.end_to_end import build_end_to_end_figures
    from stvit_video.benchmarks.engine import build_engine_figures
    from stvit_video.benchmarks.loader import build_loader_figures
    from stvit_video.benchmarks.models import build_model_figures
    from stvit_video.config.load import load_config
    from stvit_video.runs.folder import environment

    if options.what in ("model", "train"):
        how = {name: getattr(options, name) for name in ("rounds", "largest_batch", "results", "plot")}
        figures = build_model_figures(options.named, options.overrides, training=options.what == "train", **how)
    else:
        cfg = load_config(options.cfgs[0], options.overrides)
        if options.what == "loader":
            figures = build_loader_figures(cfg, options.clips, options.rounds, options.peers)
        elif options.what == "engine":
            figures = build_engine_figures(cfg, options.steps, options.rounds)
        else:
            figures = build_end_to_end_figures(cfg, options.clips, options.rounds)
    if options.output:
        started = time.strftime("%Y-%m-%dT%H:%M:%S")
        write_json(options.output, {"started": started, **figures, "environment": environment()})
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark from the command line; return the exit code."""
    return run_command(benchmark, arguments)


if __name__ == "__main__":
    sys.exit(main())
