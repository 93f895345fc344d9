"""What a trained model sees in videos: ``python -m stvit_video.predict VIDEO... --checkpoint RUN|FILE``.

VIDEO is a file, a folder (searched to the bottom), a pattern in quotes, a camera's number, or a stream's address. Each
video is scored as MODE test scores it: the same views, the same mean. From Python:

    predictor = stvit_video.predict.Predictor.load("runs/sample_stvit")
    predictor("clip.mp4").top(3)  # [(class, probability), ...]

Exit codes: 0 all videos were scored; 1 some could not be read, or copied where --annotate asks for it, each said in its
place; 2 wrong use; 130 Ctrl-C, after the results so far are written (for a camera or stream, where Ctrl-C is the way to
end, 0).
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stvit_video.common.cli import Parser, run_command
from stvit_video.common.errors import UsageError
from stvit_video.common.files import prepare_folder
from stvit_video.common.hub import check_exists
from stvit_video.data.streams.windows import check_seconds
from stvit_video.inference.results import FORMATS, Copies, describe, score, summarise, watch, write_results

if TYPE_CHECKING:
    from stvit_video.inference.predictor import Prediction, Predictor, Window


__all__ = ["Prediction", "Predictor", "Window", "main"]


def __getattr__(name: str) -> Any:
    """Import what Python users take from here when they do."""
    if name not in ("Prediction", "Predictor", "Window"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from stvit_video.inference import predictor

    return getattr(predictor, name)


def build_parser() -> Parser:
    """Return the parser of this command's options."""
    parser = Parser(
        prog="python -m stvit_video.predict",
        form="VIDEO... --checkpoint RUN",
        description="Say what a trained model sees in videos. Exit codes: 0 all were scored, 1 some cannot be read, "
        "2 wrong use.",
    )
    parser.add_argument(
        "videos",
        nargs="+",
        metavar="VIDEO",
        help="file, folder (with all below it), pattern ('clips/*.mp4'), camera number, stream address or pipe",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="RUN", help="folder of a trained run, or a .safetensors file of one"
    )
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes to name (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results: .json or .csv, all videos")
    parser.add_argument(
        "--annotate", type=Path, metavar="FOLDER", help="write MP4 copies with the classes drawn on them"
    )
    long = parser.add_argument_group("long videos")
    long.add_argument(
        "--window", type=float, metavar="SECONDS", help="score each window of this length as a video of its own"
    )
    long.add_argument("--step", type=float, metavar="SECONDS", help="from one window to the next (default: --window)")
    long.add_argument("--seconds", type=float, metavar="SECONDS", help="stop watching a camera or stream after so many")
    how = parser.add_argument_group("how it is done")
    how.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto (default): a GPU if any")
    how.add_argument("--precision", choices=("fp32", "tf32", "bf16", "fp16"), help="default: that of the run")
    how.add_argument("--workers", type=int, default=1, metavar="N", help="files decoded at once (default: %(default)s)")
    how.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="view videos otherwise than the run's test did, for example TEST.CLIPS=1 (run --keys lists keys)",
    )
    return parser


def predict(arguments: Sequence[str] | None) -> int:
    """Parse the arguments, score the videos, print and write results; return the exit code. Raises UsageError."""
    options = build_parser().parse_args(arguments)
    _check(options)
    check_exists(options.checkpoint)
    from stvit_video.data.streams.sources import find_sources
    from stvit_video.inference.load import open_checkpoint
    from stvit_video.inference.predictor import build_predictor

    trained = open_checkpoint(options.checkpoint, options.overrides)
    paths, live = find_sources(options.videos, images=trained.cfg.DATA.FRAMES == 1)
    _check_live(options, live)
    for folder in filter(None, (options.annotate, options.output and options.output.parent)):
        prepare_folder(folder)
    predictor = build_predictor(trained, options.device, options.precision, options.workers)
    print(describe(trained, predictor), flush=True)
    results: list[Prediction] = []
    started = time.perf_counter()
    copies = Copies()
    try:
        if live is not None:
            watch(predictor, live, options, results)
        else:
            score(predictor, paths, options, results, copies)
    finally:  # also after Ctrl-C: what was found is kept
        if options.output is not None and results:
            write_results(results, options.output, options.top)
            print(f"results in {options.output}", flush=True)
    if any(window.repeats for result in results for window in result.windows if len(result.windows) > 1):
        print("note: windows are shorter than a clip, so clips repeat frames; a longer --window may score better")
    print(summarise(results, time.perf_counter() - started, copies.seconds), flush=True)
    return int(copies.missing > 0 or any(result.error is not None for result in results))


def _check(options: argparse.Namespace) -> None:
    """Raise UsageError for options that cannot work, before anything is loaded."""
    for name, least, most in (("top", 1, 1_000_000), ("workers", 1, 1_000), ("seconds", 0.01, 1e9)):
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise UsageError(f"--{name} {value} is out of range; give {least} to {most:,}.")
    try:
        check_seconds(options.window, options.step)
    except ValueError as error:
        raise UsageError(f"--{error}") from error
    if options.output is not None and (options.output.suffix not in FORMATS or options.output.is_dir()):
        raise UsageError(f"--output {options.output}: give a file ending in {' or '.join(FORMATS)}.")
    if options.annotate is not None and options.annotate.exists() and not options.annotate.is_dir():
        raise UsageError(f"--annotate {options.annotate} is a file; give a folder for the MP4 copies.")


def _check_live(options: argparse.Namespace, live: str | None) -> None:
    if live is None and options.seconds is not None:
        raise UsageError(
            f"--seconds {options.seconds:g} ends a camera or stream; files end by themselves: leave it out."
        )
    if live is not None and options.annotate is not None:
        raise UsageError(f"--annotate copies files, and {live} is a camera or stream; leave it out.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Predict from the command line; return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show is still a result
            stream.reconfigure(errors="backslashreplace")
    return run_command(predict, arguments)


if __name__ == "__main__":
    sys.exit(main())
