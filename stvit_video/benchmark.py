"""Speed on this machine: ``python -m stvit_video.benchmark WHAT --cfg FILE [KEY VALUE ...]``.

Every figure is the median of interleaved rounds beside a reference in the same run: ratios can be compared between
machines, times cannot. DEVICE, PRECISION and COMPILE are keys, as for ``stvit_video.run``.
"""

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stvit_video.common.cli import Parser, number, run_command
from stvit_video.common.errors import UsageError
from stvit_video.common.files import check_file, write_json

WHAT = (
    "model: inference side by side; train: the same for training steps; e2e: from files to logits and to weights; "
    "loader: from files to batches, step by step; engine: training steps beside a bare loop; stream: decisions over a "
    "moving window"
)
PEER = (
    "pytorchvideo (loader), or LIBRARY:MODEL (model, train): torchvision:swin3d_t, pytorchvideo:mvit_base_16x4, "
    "timm:vit_small_patch16_224, stvit_video:stvit_swin_tiny:fast"
)


def build_parser() -> Parser:
    """Return the parser of the command line."""
    from stvit_video.config.schema import BY_NAME

    parser = Parser(__doc__, BY_NAME)
    add = parser.add_argument
    count = number(int, 1)
    add("what", choices=("model", "train", "e2e", "loader", "engine", "stream"), help=WHAT)
    # One list for both keeps their order on the command line: ratios refer to the first one.
    both: dict[str, Any] = {"action": "append", "dest": "named", "metavar": "NAME"}
    add("--cfg", required=True, help="file; model and train take several", type=Path, **both)
    add("--peer", help=PEER, **both)
    add("--steps", type=count, default=32, help="per round of engine (default: %(default)s)")
    add("--clips", type=count, default=64, help="per round of loader and e2e, 8 batches or more (default: %(default)s)")
    add("--rounds", type=count, default=5, help="rounds, after one to warm up (default: %(default)s)")
    add("--largest-batch", type=count, default=64, help="largest batch of model and train (default: %(default)s)")
    add("--video", type=Path, metavar="FILE", help="from which stream takes frames too, beside those in memory")
    results = "results.json of a run for each --cfg"
    add("--results", type=Path, action="append", default=[], metavar="FILE", help=results)
    add("--plot", type=Path, metavar="FILE.png", help="draw top-1, or GFLOPs, over clips per second")
    add("--output", type=Path, metavar="FILE.json", help="write the figures there")
    add("overrides", nargs="*", metavar="KEY VALUE", help="as for stvit_video.run")
    return parser


def benchmark(arguments: Sequence[str] | None) -> int:
    """Parse the arguments, run what they name and write the figures where they say. Raises UsageError."""
    options = build_parser().parse_intermixed_args(arguments)
    check_file("--output", options.output)
    check_file("--plot", options.plot, suffix=".png")
    cfgs = [path for path in options.named if isinstance(path, Path)]
    peers = [name for name in options.named if not isinstance(name, Path)]
    what, rounds, side_by_side = options.what, options.rounds, options.what in ("model", "train")
    if not side_by_side and (len(cfgs) > 1 or options.plot or options.results):
        raise UsageError(f"{what} takes one --cfg, and no --plot or --results; model and train do.")
    if not side_by_side and any(what != "loader" or peer != "pytorchvideo" for peer in peers):
        raise UsageError(f"--peer {peers[0]} of {what}; loader takes pytorchvideo, model and train LIBRARY:MODEL.")
    if options.video and (what != "stream" or not options.video.is_file()):
        raise UsageError(f"--video {options.video} of {what}; stream takes it, and it has to be a file.")
    from stvit_video.benchmarks.models import build_model_figures
    from stvit_video.benchmarks.pipeline import build_end_to_end_figures, build_engine_figures, build_loader_figures
    from stvit_video.benchmarks.stream import build_stream_figures
    from stvit_video.config.load import load_config
    from stvit_video.runs.folder import environment

    if side_by_side:
        how = {"training": what == "train", "rounds": rounds, "largest_batch": options.largest_batch}
        figures = build_model_figures(options.named, options.overrides, options.results, options.plot, **how)
    else:
        cfg = load_config(cfgs[0], options.overrides)
        if what == "loader":
            figures = build_loader_figures(cfg, options.clips, rounds, peers)
        elif what == "engine":
            figures = build_engine_figures(cfg, options.steps, rounds)
        elif what == "stream":
            figures = build_stream_figures(cfg, options.video, rounds)
        else:
            figures = build_end_to_end_figures(cfg, options.clips, rounds)
    if options.output:
        started = time.strftime("%Y-%m-%dT%H:%M:%S")
        write_json(options.output, {"started": started, **figures, "environment": environment()})
    return 0


main = partial(run_command, benchmark)


if __name__ == "__main__":
    sys.exit(main())
