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
import csv
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stvit_video.data.frames import DecodeError
from stvit_video.data.timeline import check_seconds
from stvit_video.errors import Parser, UsageError, prepare_folder, run_command
from stvit_video.hub import check_exists
from stvit_video.progress import Progress, clock

if TYPE_CHECKING:  # a wrong option is answered before torch is imported
    from stvit_video.engine.predictor import Prediction, Predictor, Window
    from stvit_video.engine.trained import Trained

__all__ = ["Prediction", "Predictor", "Window", "main"]

FORMATS = (".json", ".csv")
LIVE_WINDOW_S = 2.0


def __getattr__(name: str) -> Any:
    """Import what Python users take from here when they do."""
    if name not in ("Prediction", "Predictor", "Window"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from stvit_video.engine import predictor

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
    from stvit_video.data.sources import find_sources
    from stvit_video.engine.predictor import build_predictor
    from stvit_video.engine.trained import open_checkpoint

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


def describe(trained: Trained, predictor: Predictor) -> str:
    """Return lines on the model, how it looks at videos, and what had to be assumed."""
    data, test, model = trained.cfg.DATA, trained.cfg.TEST, trained.model
    rate = f" at {data.FPS:g} frames a second" if data.FPS else ""
    step = {
        "dense": f"stride {data.STRIDE}{rate}",
        "seconds": f"over {data.CLIP_SECONDS:g} s",
        "uniform": "spread over the video",
    }[data.SAMPLING]
    lines = [
        f"{model.name}, {len(trained.classes)} classes, from {trained.weights}",
        f"{data.FRAMES} frames of {data.SIZE}x{data.SIZE} ({step}), {test.CLIPS} x {test.CROPS} views a video, on "
        f"{predictor.device.type}, {predictor.precision}",
    ]
    return "\n".join(lines + ([f"note: {trained.note}"] if trained.note else []))


@dataclass
class Copies:
    """The annotated copies of a command: their names, how many could not be made, and the seconds all took."""

    names: set[str] = field(default_factory=set)
    missing: int = 0
    seconds: float = 0.0


def score(
    predictor: Predictor,
    paths: Sequence[str],
    options: argparse.Namespace,
    results: list[Prediction],
    copies: Copies,
) -> None:
    """Score files one after the other, adding to ``results``, and print each; make ``copies`` where asked to."""
    on_terminal = sys.stderr.isatty() and len(paths) > 1  # elsewhere the results themselves say how far it is
    with Progress("predict", len(paths), enabled=on_terminal) as progress:
        for result in predictor.predict(paths, window=options.window, step=options.step):
            results.append(result)
            text = describe_result(result, options.top)
            if options.annotate is not None and result.error is None:
                text += f"\n  {_annotate(result, options.annotate, copies)}"
            if on_terminal:
                progress.note(text)
            else:
                print(text, flush=True)
            progress.advance()


def _annotate(result: Prediction, folder: Path, copies: Copies) -> str:
    """Write the annotated copy of a video under a name that no other copy has; return what became of it."""
    from stvit_video.engine.annotate import annotate

    stem, number, began = Path(result.path).stem, 1, time.perf_counter()
    while (name := stem if number == 1 else f"{stem}-{number}") in copies.names:
        number += 1
    copies.names.add(name)
    output = folder / f"{name}.mp4"
    if output.exists() and os.path.samefile(output, result.path):
        raise UsageError(f"--annotate {folder} would replace {result.path} itself; give another folder.")
    try:
        annotate(result, output)
    except DecodeError as error:
        copies.missing += 1
        return f"no annotated copy: {error.message}"
    finally:
        copies.seconds += time.perf_counter() - began
    return f"annotated copy: {output}"


def watch(predictor: Predictor, address: str, options: argparse.Namespace, results: list[Prediction]) -> None:
    """Score a stream window by window until it ends, --seconds have passed or Ctrl-C comes."""
    from stvit_video.engine.predictor import Prediction

    result = Prediction(address, predictor.classes)
    results.append(result)
    print("watching; Ctrl-C ends", flush=True)
    try:
        for window in predictor.watch(address, window=options.window or LIVE_WINDOW_S, step=options.step):
            result.windows.append(window)
            print(describe_window(result, [window], options.top), flush=True)
            if options.seconds is not None and window.span is not None and window.span.end >= options.seconds:
                return
    except DecodeError as error:
        result.error = error.message
        print(describe_result(result, options.top), flush=True)
    except KeyboardInterrupt:
        print()
        if not result.windows:
            raise


def describe_result(result: Prediction, top: int) -> str:
    """Return a video's line, and one for each stretch of windows that have the same likeliest class."""
    if result.error is not None:
        head = f"{result.path}: error: {result.error}"
    else:
        head = f"{result.path}: {describe_top(result.top(top))}"
    timeline = [window for window in result.windows if window.span is not None]
    stretches = [list(same) for _, same in groupby(timeline, key=lambda window: int(window.scores.argmax()))]
    return "\n".join([head, *(describe_window(result, stretch, min(top, 2)) for stretch in stretches)])


def describe_window(result: Prediction, windows: Sequence[Window], top: int) -> str:
    """Return a line on windows that follow one another: from when to when, and their mean."""
    first, last = windows[0].span, windows[-1].span
    assert first is not None
    assert last is not None
    together = replace(result, windows=list(windows), error=None)
    return f"  {moment(first.start):>9} to {moment(last.end):>9}  {describe_top(together.top(top))}"


def moment(seconds: float) -> str:
    """Return a time in a video as m:ss.s, with hours where there are some."""
    tenths = round(10 * seconds)
    return f"{clock(tenths // 10)}.{tenths % 10}"


def describe_top(top: Sequence[tuple[str, float]]) -> str:
    """Return classes with their probabilities in percent."""
    return ", ".join(f"{name} {100 * score:.1f} %" for name, score in top)


def summarise(results: Sequence[Prediction], seconds: float, annotating: float) -> str:
    """Return a line on how many videos were scored and where the time went.

    Decoding goes on while the model runs, and in several threads, so the parts do not add up to the whole.
    """
    failed = sum(result.error is not None for result in results)
    decoding, model = (sum(getattr(result, name) for result in results) for name in ("decode_s", "model_s"))
    windows = sum(len(result.windows) for result in results)
    what = f"{len(results):,} video{'' if len(results) == 1 else 's'}"
    what += f", {windows:,} windows," if windows > len(results) else ""
    return (
        f"{what} in {seconds:.1f} s (decoding {decoding:.1f} s, alongside the model's {model:.1f} s"
        + (f"; annotated copies {annotating:.1f} s" if annotating else "")
        + (f"); {failed:,} could not be read" if failed else ")")
    )


def write_results(results: Sequence[Prediction], path: Path, top: int) -> None:
    """Write all results: JSON has one object a video; CSV one row a video, or a window where there are windows."""
    from stvit_video.engine.checkpoint import write_atomically

    if path.suffix == ".json":
        content = json.dumps([to_json(result, top) for result in results], indent=2)
        write_atomically(path, content.encode())
        return
    text = io.StringIO()
    count = min(top, max(len(result.classes) for result in results))
    header = [f"{name}{i}" for i in range(1, count + 1) for name in ("class", "score")]
    writer = csv.writer(text)
    writer.writerow(["path", "start", "end", *header, "seconds", "error"])
    for result in results:
        writer.writerows(to_rows(result, top, count))
    write_atomically(path, text.getvalue().encode("utf-8", "surrogateescape"))  # names of files need not be UTF-8


def to_json(result: Prediction, top: int) -> dict[str, Any]:
    """Return a video's object: path, top classes with scores, seconds that it took, error or null, and its timeline."""
    found: dict[str, Any] = {
        "path": result.path,
        "top": _named(result.top(top)),
        "seconds": round(result.decode_s + result.model_s, 6),
        "decode_seconds": round(result.decode_s, 6),
        "model_seconds": round(result.model_s, 6),
        "error": result.error,
    }
    timeline = [
        {"start": window.span.start, "end": window.span.end, "top": _named(result.top(top, window))}
        for window in result.windows
        if window.span is not None
    ]
    return {**found, "timeline": timeline} if timeline else found


def _named(top: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{"class": name, "score": score} for name, score in top]


def to_rows(result: Prediction, top: int, count: int) -> Iterator[list[Any]]:
    """Yield a video's rows: one for each window, and one without figures where it could not be read (on)."""
    for window in result.windows:
        span = ["", ""] if window.span is None else [f"{window.span.start:.3f}", f"{window.span.end:.3f}"]
        named = [item for pair in result.top(top, window) for item in pair]
        yield [result.path, *span, *named, f"{window.decode_s + window.model_s:.6f}", ""]
    if result.error is not None:
        yield [result.path, "", "", *[""] * (2 * count), "", result.error]


def main(arguments: Sequence[str] | None = None) -> int:
    """Predict from the command line; return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show is still a result
            stream.reconfigure(errors="backslashreplace")
    return run_command(predict, arguments)


if __name__ == "__main__":
    sys.exit(main())
