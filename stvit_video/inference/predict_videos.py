"""The work of ``stvit_video.predict``: score videos or a stream, print each result, and write JSON or CSV."""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from stvit_video.common.errors import UsageError
from stvit_video.common.files import prepare_folder, write_atomically, write_json
from stvit_video.common.progress import Progress, clock
from stvit_video.common.tables import to_csv
from stvit_video.common.text import printable
from stvit_video.data.streams import STDIN, find_sources, spooled_stdin, stdin_is_file
from stvit_video.inference.annotate import Copies
from stvit_video.inference.load import Trained, open_checkpoint
from stvit_video.inference.prediction import Prediction, Window
from stvit_video.inference.predictor import Predictor
from stvit_video.inference.segments import Segment, find_segments, smooth
from stvit_video.inference.watch import Watched, watch


def predict_videos(options: argparse.Namespace) -> int:
    """Score the videos that the ``options`` of the command name; return the exit code. Raises UsageError."""
    is_piped = STDIN in options.videos and not stdin_is_file()
    trained = open_checkpoint(options.checkpoint, options.overrides)
    one_frame = trained.input.views.frames == 1
    paths, live, unused = find_sources(options.videos, one_frame, is_piped and options.window is not None)
    if live is None and options.seconds is not None:
        remedy = f"give --window too, to watch {STDIN} as one" if is_piped else "leave it out"
        raise UsageError(f"--seconds {options.seconds:g} ends a camera or stream, which no file is; {remedy}.")
    if options.reconnect and (live is None or ("://" not in live and not live.isdecimal())):
        raise UsageError(f"--reconnect {options.reconnect} opens a camera or address again; leave it out for others.")
    if options.annotate is not None and (live is not None or paths == [STDIN]):
        raise UsageError(f"--annotate copies files, which {live or STDIN} is not; leave it out.")
    for folder in filter(None, (options.annotate, options.output and options.output.parent)):
        prepare_folder(folder)
    predictor = Predictor(trained, device=options.device, precision=options.precision, workers=options.workers)
    print(describe_predictor(trained, predictor) + (f"\nnote: {printable(unused)}" if unused else ""), flush=True)
    results: list[Prediction] = []
    copies = Copies(options.annotate)
    started = time.perf_counter()
    try:
        if live is not None:
            results.append(result := Watched(live, predictor.classes))
            watch(predictor, result, options, partial(describe_windows, result, top=options.top))
            if result.error is not None:
                print(describe_result(result, options.top), flush=True)
        else:
            with spooled_stdin() if paths == [STDIN] else nullcontext() as spooled:
                found = predictor.predict([spooled or path for path in paths], window=options.window, step=options.step)
                if spooled is not None:  # a copy, which is gone afterwards
                    found = (
                        replace(result, path=STDIN, error=result.error and result.error.replace(spooled, STDIN))
                        for result in found
                    )
                smoothed = (replace(result, windows=list(smooth(result.windows, options.smooth))) for result in found)
                score(smoothed, len(paths), options, results, copies)
    finally:  # also after Ctrl-C: the results so far are kept
        if options.output is not None and results:
            find = partial(find_segments, threshold=options.threshold, multi_label=trained.multi_label)
            write_results(results, options.output, options.top, find)
            print(f"results in {printable(options.output)}", flush=True)
    cut = [window.is_streamed for result in results for window in result.windows if window.span is not None]
    short, count = (sum(getattr(result, name) for result in results) for name in ("short", "count"))
    print(describe_short(short, count, "windows" if cut or live else "videos", predictor), end="")
    if live is None:
        print(describe_streamed(sum(cut), len(cut), predictor), end="")
    print("".join(f"{result.describe()}\n" for result in results if isinstance(result, Watched)), end="")
    print(summarise(results, time.perf_counter() - started, copies.seconds), flush=True)
    return int(copies.missing > 0 or any(result.error is not None for result in results))


def describe_predictor(trained: Trained, predictor: Predictor) -> str:
    """Return lines on the model, how it takes videos, and what is assumed."""
    settings, views = trained.input.settings, predictor.views
    size, crops = views.size, views.crops
    rate = f" at {settings['DATA.FPS']:g} frames per second" if settings["DATA.FPS"] else ""
    step = {
        "dense": f"stride {settings['DATA.STRIDE']}{rate}",
        "seconds": f"over {settings['DATA.CLIP_SECONDS']:g} s",
        "uniform": "spread over the video",
    }[settings["DATA.SAMPLING"]]
    note = f"\nnote: {printable(trained.note)}" if trained.note else ""
    each = ", each with a probability of its own" if trained.multi_label else ""
    return (
        f"{trained.model.name}, {len(trained.classes)} classes{each}, from {printable(trained.weights)}\n"
        f"{views.frames} frames of {size}x{size} ({step}), {views.clips} x {crops} views per video, "
        f"on {predictor.device.type}, {predictor.precision}{note}"
    )


def score(
    found: Iterable[Prediction],
    count: int,
    options: argparse.Namespace,
    results: list[Prediction],
    copies: Copies,
) -> None:
    """Print each result of ``count`` files, append it to ``results`` and annotate a copy where asked to."""
    on_terminal = sys.stderr.isatty() and count > 1  # elsewhere the results themselves show the progress
    with Progress("predict", count, enabled=on_terminal) as progress:
        say = progress.note if on_terminal else partial(print, flush=True)
        for result in found:
            results.append(result)
            text = describe_result(result, options.top)
            if options.annotate is not None and result.error is None:
                text += f"\n  {printable(copies.add(result))}"
            say(text)
            progress.advance()


def describe_result(result: Prediction, top: int) -> str:
    """Return a line for a video, and one for each run of consecutive windows with the same most likely class.

    A run ends where time is interrupted.
    """
    found = describe_top(result.top(top)) if result.error is None else f"error: {printable(result.error)}"
    timeline = [window for window in result.windows if window.span is not None]
    stretches = [list(same) for _, same in groupby(timeline, key=lambda w: (w.segment, int(w.scores.argmax())))]
    return "\n".join(
        [f"{printable(result.path)}: {found}", *(describe_windows(result, part, min(top, 2)) for part in stretches)]
    )


def describe_windows(result: Prediction, windows: Sequence[Window], top: int) -> str:
    """Return a line for consecutive windows: start, end (m:ss.s, or h:mm:ss.s), and the classes of their mean."""
    spans = [window.span for window in windows if window.span is not None]
    tenths = round(10 * spans[0].start), round(10 * spans[-1].end)
    start, end = (f"{clock(t // 10)}.{t % 10}" for t in tenths)
    together = replace(result, windows=list(windows), error=None)
    return f"  {start:>9} to {end:>9}  {describe_top(together.top(top))}"


def describe_short(short: int, count: int, what: str, predictor: Predictor) -> str:
    """Return a line on the ``what``, videos or windows, that are shorter than a clip; empty where there are none."""
    length, effect = predictor.input.sampler.describe()
    remedy = effect if what == "videos" else f"{effect}, or give a longer --window"
    return f"note: {short} of {count} {what} are shorter than a clip of {length}; {remedy}\n" if short else ""


def describe_streamed(streamed: int, count: int, predictor: Predictor) -> str:
    """Return a line on how a model of the streaming form scored the windows of files; empty for other models."""
    if not predictor.streams or not count:
        return ""
    if streamed:
        return f"streamed: {streamed:,} of {count:,} windows; each of their frames was computed once\n"
    if predictor.group is None:
        return f"note: windows of {predictor.views.clips} clips are not streamed; --set TEST.CLIPS=1 is\n"
    return (
        "note: no windows were streamed, as none shares frames with the one before on one grid of samples; this takes "
        f"dense sampling and a --step of a multiple of {predictor.group} sampled frames\n"
    )


def describe_top(top: Sequence[tuple[str, float]]) -> str:
    """Return classes with their probabilities in percent."""
    return ", ".join(f"{printable(name)} {100 * score:.1f} %" for name, score in top)


def summarise(results: Sequence[Prediction], seconds: float, annotating: float) -> str:
    """Return a line with the number of videos and the time of each part, in seconds.

    Decoding runs in parallel with the model, in several threads, so the parts do not add up to the total.
    """
    failed = sum(result.error is not None for result in results)
    decoding, model = (sum(getattr(result, name) for result in results) for name in ("decode_s", "model_s"))
    windows = sum(result.count for result in results)
    counts = f"{len(results):,} video{'' if len(results) == 1 else 's'}"
    counts += f", {windows:,} windows," if windows > len(results) else ""
    parts = f"decoding {decoding:.1f} s, alongside the model's {model:.1f} s"
    parts += f"; annotated copies {annotating:.1f} s" if annotating else ""
    return f"{counts} in {seconds:.1f} s ({parts})" + (f"; {failed:,} could not be read" if failed else "")


def write_results(
    results: Sequence[Prediction], path: Path, top: int, find: Callable[[Sequence[Window]], list[Segment]]
) -> None:
    """Write all results: a JSON object for each video, or a CSV row for each video or window, and for each error.

    ``find`` finds the segments of a timeline.
    """
    if path.suffix == ".json":
        write_json(path, [to_json(result, top, find) for result in results])
        return
    rows: list[dict[str, object]] = []
    for result in results:
        for window in result.windows:
            row: dict[str, object] = {"path": result.path, "seconds": f"{window.decode_s + window.model_s:.6f}"}
            if window.span is not None:
                row |= {"start": f"{window.span.start:.3f}", "end": f"{window.span.end:.3f}"}
            for i, (name, score) in enumerate(result.top(top, window), start=1):
                row |= {f"class{i}": name, f"score{i}": score}
            rows.append(row)
        if result.error is not None:
            rows.append({"path": result.path, "error": result.error})
    count = min(top, len(results[0].classes))
    classes = [f"{name}{i}" for i in range(1, count + 1) for name in ("class", "score")]
    write_atomically(path, to_csv(rows, ["path", "start", "end", *classes, "seconds", "error"]))


def to_json(result: Prediction, top: int, find: Callable[[Sequence[Window]], list[Segment]]) -> dict[str, Any]:
    """Return a video's object: path, most likely classes, seconds, error or None, and its timeline if it has one."""

    def named(window: Window | None = None) -> list[dict[str, Any]]:
        return [{"class": name, "score": score} for name, score in result.top(top, window)]

    found = {
        "path": result.path,
        "top": named(),
        "seconds": round(result.decode_s + result.model_s, 6),
        "decode_seconds": round(result.decode_s, 6),
        "model_seconds": round(result.model_s, 6),
        "error": result.error,
    }
    windows = [window for window in result.windows if window.span is not None]
    found |= result.figures() if isinstance(result, Watched) else {}
    if not windows:
        return found
    timeline = [{**window.span._asdict(), "top": named(window)} for window in windows]  # type: ignore[union-attr]
    segments = [
        {"start": start, "end": end, "class": result.classes[label], "score": score}
        for start, end, label, score in find(windows)
    ]
    return {**found, "timeline": timeline, "segments": segments}
