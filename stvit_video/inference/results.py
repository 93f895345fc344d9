"""Predictions as text, JSON and CSV."""

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

from stvit_video.common.errors import UsageError
from stvit_video.common.progress import Progress, clock
from stvit_video.data.decode.types import DecodeError

if TYPE_CHECKING:
    from stvit_video.inference.load import Trained
    from stvit_video.inference.predictor import Prediction, Predictor, Window


FORMATS = (".json", ".csv")
LIVE_WINDOW_S = 2.0


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
    from stvit_video.inference.annotate import annotate

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
    from stvit_video.inference.predictor import Prediction

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
    from stvit_video.common.files import write_atomically

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
