"""Predictions as text, JSON and CSV."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from stvit_video.common.files import write_atomically, write_json
from stvit_video.common.progress import clock
from stvit_video.common.tables import to_csv
from stvit_video.inference.predictor import Prediction, Window


def describe_result(result: Prediction, top: int) -> str:
    """Return a line for a video, and one for each run of consecutive windows with the same most likely class."""
    found = describe_top(result.top(top)) if result.error is None else f"error: {result.error}"
    timeline = [window for window in result.windows if window.span is not None]
    stretches = [list(same) for _, same in groupby(timeline, key=lambda window: int(window.scores.argmax()))]
    return "\n".join([f"{result.path}: {found}", *(describe_windows(result, part, min(top, 2)) for part in stretches)])


def describe_windows(result: Prediction, windows: Sequence[Window], top: int) -> str:
    """Return a line for consecutive windows: start, end, and the classes of their mean."""
    first, last = windows[0].span, windows[-1].span
    assert first is not None
    assert last is not None
    together = replace(result, windows=list(windows), error=None)
    return f"  {moment(first.start):>9} to {moment(last.end):>9}  {describe_top(together.top(top))}"


def moment(seconds: float) -> str:
    """Return a time in a video as m:ss.s, or h:mm:ss.s from an hour on."""
    tenths = round(10 * seconds)
    return f"{clock(tenths // 10)}.{tenths % 10}"


def describe_top(top: Sequence[tuple[str, float]]) -> str:
    """Return classes with their probabilities in percent."""
    return ", ".join(f"{name} {100 * score:.1f} %" for name, score in top)


def summarise(results: Sequence[Prediction], seconds: float, annotating: float) -> str:
    """Return a line with the number of videos and the time of each part, in seconds.

    Decoding runs in parallel with the model, in several threads, so the parts do not add up to the total.
    """
    failed = sum(result.error is not None for result in results)
    decoding, model = (sum(getattr(result, name) for result in results) for name in ("decode_s", "model_s"))
    windows = sum(len(result.windows) for result in results)
    counts = f"{len(results):,} video{'' if len(results) == 1 else 's'}"
    counts += f", {windows:,} windows," if windows > len(results) else ""
    parts = f"decoding {decoding:.1f} s, alongside the model's {model:.1f} s"
    parts += f"; annotated copies {annotating:.1f} s" if annotating else ""
    return f"{counts} in {seconds:.1f} s ({parts})" + (f"; {failed:,} could not be read" if failed else "")


def write_results(results: Sequence[Prediction], path: Path, top: int) -> None:
    """Write all results: a JSON object for each video, or a CSV row for each video or window."""
    if path.suffix == ".json":
        write_json(path, [to_json(result, top) for result in results])
        return
    count = min(top, max(len(result.classes) for result in results))
    classes = [f"{name}{i}" for i in range(1, count + 1) for name in ("class", "score")]
    rows = (row for result in results for row in to_rows(result, top))
    write_atomically(path, to_csv(rows, ["path", "start", "end", *classes, "seconds", "error"]))


def to_json(result: Prediction, top: int) -> dict[str, Any]:
    """Return a video's object: path, most likely classes, seconds, error or None, and its timeline if it has one."""
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


def to_rows(result: Prediction, top: int) -> Iterator[dict[str, object]]:
    """Yield the CSV rows of a video: one for each window, and one for an error."""
    for window in result.windows:
        row: dict[str, object] = {"path": result.path, "seconds": f"{window.decode_s + window.model_s:.6f}"}
        if window.span is not None:
            row |= {"start": f"{window.span.start:.3f}", "end": f"{window.span.end:.3f}"}
        for i, (name, score) in enumerate(result.top(top, window), start=1):
            row |= {f"class{i}": name, f"score{i}": score}
        yield row
    if result.error is not None:
        yield {"path": result.path, "error": result.error}
