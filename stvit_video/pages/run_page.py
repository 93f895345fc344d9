"""The page of one or several runs: what ``stvit_video.report`` writes."""

import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from stvit_video import __version__
from stvit_video.common.charts import draw_curves, draw_matrix, draw_trade, line_style
from stvit_video.data.clips.sampling import ClipSampler, EvenClips
from stvit_video.data.decode.frames import find_decoders
from stvit_video.data.decode.process import Decoding
from stvit_video.data.decode.types import DecodeError
from stvit_video.pages.page import data_uri, picture_uri, printable, render
from stvit_video.runs.folder import FREE_KEYS
from stvit_video.runs.record import Prediction, RunRecord

MISTAKES = 12
TABLE_CLASSES = 24  # more are drawn as a picture
CONFUSIONS = 10
THUMBNAIL = 112  # pixels of a frame's shorter side
DEADLINE_S = 20.0
NONE = "–"
# Figures that one run can lead in: their name in results.json, and which is the best.
BEST: dict[str, tuple[str, Callable[[Iterable[Any]], Any]]] = {
    "top-1 (%)": ("top1", max),
    "top-5 (%)": ("top5", max),
    "GFLOPs a clip": ("gflops", min),
    "GFLOPs a video": ("gflops_per_video", min),
    "parameters (M)": ("parameters", min),
}


def run_page(runs: Sequence[RunRecord], command: str) -> str:
    """Return the page as text."""
    metrics = {run.name: run.metrics for run in runs if run.metrics}
    curves = [
        {"picture": data_uri(picture, "svg"), "alt": label}
        for value, label in (("top1", "Top-1 (%)"), ("loss", "Loss"))
        if (picture := draw_curves(metrics, value, label)) is not None
    ]
    costs = [(run.name, run.results.get("gflops_per_video"), float(run.results["top1"])) for run in runs]
    trade = None
    if len(runs) > 1 and all(cost for _, cost, _ in costs):
        trade = data_uri(draw_trade([(n, float(c), t) for n, c, t in costs if c], "GFLOPs a video, all views"), "svg")
    return render(
        "report.html",
        title=printable(runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"),
        headline=headline(runs),
        warnings=[printable(line) for line in find_warnings(runs)],
        rows=_table(runs),
        colours=[line_style(number)["color"] for number in range(len(runs))],
        curves=curves,
        trade=trade,
        differences=_differences(runs),
        runs=[_run(run) for run in runs],
        several=len(runs) > 1,
        names=[printable(run.name) for run in runs],
        command=printable(command),
        version=__version__,
    )


def headline(runs: Sequence[RunRecord]) -> str:
    """Return the answer in a sentence."""
    best = max(runs, key=lambda run: float(run.results["top1"]))
    top1, scored = float(best.results["top1"]), best.results.get("scored")
    cost = best.results.get("gflops_per_video")
    right = f"{top1:.1f} % of {scored or 'the'} test videos right"
    if len(runs) == 1:
        return right + (f", at {cost:.3g} GFLOPs a video." if cost else ".")
    if _unequal_tests(runs):
        each = (f"{printable(run.name)} {float(run.results['top1']):.1f} %" for run in runs)
        return f"Tested on different videos, so not to be ranked: {', '.join(each)}."
    others = [run for run in runs if run is not best]
    second = max(others, key=lambda run: float(run.results["top1"]))
    behind = top1 - float(second.results["top1"])
    words = f"Best is {printable(best.name)}: {right}, {behind:.1f} points more than {printable(second.name)}"
    level = f"{behind:.1f}" == "0.0"
    if level:
        words = f"{printable(best.name)} and {printable(second.name)} are level: {right}"
    low, high = best.interval(), second.interval()
    if low and high and low[0] < high[1] and not level:
        words += " (the 95 % intervals overlap)"
    cheapest = min(runs, key=lambda run: run.results.get("gflops_per_video") or math.inf)
    if cheapest.results.get("gflops_per_video") and cheapest is not best:
        words += (
            f"; cheapest is {printable(cheapest.name)}: {cheapest.results['gflops_per_video']:.3g} GFLOPs a video, "
            f"{float(cheapest.results['top1']):.1f} %"
        )
    elif cost and len({f"{run.results.get('gflops_per_video') or 0:.3g}" for run in runs}) > 1:
        words += f"; at {cost:.3g} GFLOPs a video it is also the cheapest"
    return words + "."


def _unequal_tests(runs: Sequence[RunRecord]) -> bool:
    return len({(run.results.get("videos"), _setting(run, "DATA.TEST_LIST")) for run in runs}) > 1


def find_warnings(runs: Sequence[RunRecord]) -> list[str]:
    """Return what a reader of the table must know: unequal tests, unread videos, figures that are absent."""
    lines = []
    if len({tuple(one.name for one in run.classes) for run in runs if run.classes}) > 1:
        lines.append("The runs do not have the same classes: compare with care.")
    if len({run.results.get("videos") for run in runs}) > 1:
        counts = ", ".join(f"{run.name} {run.results.get('videos', '?')}" for run in runs)
        lines.append(f"The runs were not tested on the same number of videos ({counts}): compare with care.")
    if len({_setting(run, "DATA.TEST_LIST") for run in runs}) > 1:
        lines.append("The runs were not tested on the same list (DATA.TEST_LIST): compare with care.")
    lines += [
        f"{run.name}: {run.results['failed']} of {run.results.get('videos')} test videos could not be read and are not "
        f"in its figures."
        for run in runs
        if run.results.get("failed")
    ]
    return lines + [line for run in runs for line in run.absent]


def _table(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return a row for each figure: what it is, and each run's value; ``best`` says which values are the best."""
    columns = [_figures(run) for run in runs]
    rows = []
    for name in columns[0]:
        values = [column[name] for column in columns]
        best = [False] * len(runs)
        if name in BEST and len(runs) > 1:
            figures = [run.results.get(BEST[name][0]) for run in runs]
            if all(figure is not None for figure in figures) and len(set(values)) > 1:  # as they are shown
                best = [value == values[figures.index(BEST[name][1](figures))] for value in values]
        if any(value != NONE for value in values):
            rows.append({"name": name, "cells": list(zip(values, best, strict=True))})
    return rows


def _figures(run: RunRecord) -> dict[str, str]:
    """Return a run's figures by name, as text."""
    results, interval = run.results, run.interval()
    speeds = [row["clips_per_second"] for row in run.metrics if row["split"] == "train" and "clips_per_second" in row]
    waits = [row["data_share"] for row in run.metrics if row["split"] == "train" and "data_share" in row]
    return {
        "network": str(results.get("model", NONE)),
        "top-1 (%)": _figure(results.get("top1"), ".1f"),
        "95 % interval of top-1": f"{interval[0]:.1f} to {interval[1]:.1f}" if interval else NONE,
        "top-5 (%)": _figure(results.get("top5"), ".1f"),
        "videos scored": f"{results.get('scored', NONE)} of {results.get('videos', NONE)}",
        "GFLOPs a clip": _figure(results.get("gflops"), ".3g"),
        "views a video": str(run.views),
        "GFLOPs a video": _figure(results.get("gflops_per_video"), ".3g"),
        "parameters (M)": _figure(results.get("parameters") and results["parameters"] / 1e6, ".2f"),
        "tokens a clip": _tokens(run),
        "clips a second, testing": _figure(results.get("clips_per_second"), ".1f"),
        "clips a second, training": _figure(median(speeds) if speeds else None, ".1f"),
        "waiting for data (%)": _figure(100 * median(waits) if waits else None, ".1f"),
    }


def _figure(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def _tokens(run: RunRecord) -> str:
    if run.tokens is None:
        return NONE
    image, semantic = run.tokens
    return f"{image:,} → {semantic:,}" if semantic is not None else f"{image:,}"


def _setting(run: RunRecord, name: str) -> Any:
    content: Any = run.config
    for part in name.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return content


def _differences(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return the configuration keys in which runs differ, with each run's value.

    A key that not all of them know came later than some: it is left out.
    """
    flat = [_flatten(run.config) for run in runs]
    names = sorted(set.intersection(*map(set, flat)) - set(FREE_KEYS))
    rows = [{"key": name, "values": [str(one[name]) for one in flat]} for name in names]
    return [row for row in rows if len(set(row["values"])) > 1]


def _flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat.update(_flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat


def _run(run: RunRecord) -> dict[str, Any]:
    """Return what the page shows of one run beside the table."""
    classes = sorted(run.classes, key=lambda one: (math.isnan(one.top1), one.top1, one.name))
    mistakes = run.mistakes()
    git = run.environment.get("git") or {}
    return {
        "name": printable(run.name),
        "folder": printable(str(run.path)),
        "classes": [
            {
                "name": printable(one.name),
                "percent": NONE if math.isnan(one.top1) else f"{one.top1:.1f}",
                "width": 0 if math.isnan(one.top1) else one.top1,
                "count": f"{one.correct} of {one.videos}",
            }
            for one in classes
        ],
        "confusion": _confusion(run),
        "mistake_count": len(mistakes),
        "prediction_count": len(run.predictions),
        "mistakes": _mistakes(run, mistakes[:MISTAKES]),
        "failures": [{"path": printable(f.path), "stage": f.stage, "message": f.message} for f in run.failures[:20]],
        "failure_count": len(run.failures),
        "command": printable(shlex.join(map(str, run.environment.get("command") or []))),
        "commit": (git.get("commit") or "")[:12],
        "changed": git.get("changed_files"),
        "machine": ", ".join(run.environment.get("gpus") or []) or f"{run.environment.get('cpus', '?')} CPU cores",
        "torch": (run.environment.get("packages") or {}).get("torch", ""),
        "precision": run.results.get("precision", NONE),
    }


def _confusion(run: RunRecord) -> dict[str, Any] | None:
    """Return the confusion matrix as a table, or with many classes a picture, and the most frequent confusions."""
    counts = run.confusion()
    if not counts:
        file = run.path / "confusion.png"
        picture = data_uri(file.read_bytes(), "png") if file.is_file() else None
        return picture and {"picture": picture, "names": None, "pairs": []}  # type: ignore[return-value]
    names = [one.name for one in run.classes]
    names += sorted({name for pair in counts for name in pair} - set(names))
    matrix = np.array([[counts[label, predicted] for predicted in names] for label in names])
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    wrong = [(count, *pair) for pair, count in counts.items() if pair[0] != pair[1]]
    content: dict[str, Any] = {
        "pairs": [
            {"count": count, "label": printable(label), "predicted": printable(predicted)}
            for count, label, predicted in sorted(wrong, key=lambda row: (-row[0], row[1:]))[:CONFUSIONS]
        ]
    }
    if len(names) > TABLE_CLASSES:
        return {**content, "picture": data_uri(draw_matrix(shares), "png"), "names": None}
    rows = [
        {
            "name": printable(label),
            "cells": [
                {"count": int(n), "share": round(float(s), 3), "right": i == j, "dark": s > 0.5}
                for j, (n, s) in enumerate(zip(matrix[i], shares[i], strict=True))
            ],
        }
        for i, label in enumerate(names)
    ]
    return {**content, "names": [printable(name) for name in names], "rows": rows}


def _mistakes(run: RunRecord, mistakes: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Return the mistakes with three frames of each video, or why there are none."""
    decoding = Decoding(find_decoders("auto"), DEADLINE_S, THUMBNAIL)
    choice = EvenClips(ClipSampler("uniform", 3), 1)
    rows = []
    for mistake in mistakes:
        row: dict[str, Any] = {
            "path": printable(mistake.path),
            "label": printable(mistake.label),
            "predicted": printable(mistake.predicted),
            "probability": f"{100 * mistake.probability:.0f}",
            "label_probability": f"{100 * mistake.label_probability:.0f}",
            "frames": [],
            "reason": "",
        }
        place = run.find_video(mistake.path)
        if place is None:
            row["reason"] = "The video is not where it was when it was tested."
        else:
            try:
                row["frames"] = [picture_uri(frame) for frame in _thumbnails(decoding, place, choice)]
            except DecodeError as error:
                row["reason"] = f"It cannot be read now: {error.message}."
        rows.append(row)
    return rows


def _thumbnails(decoding: Decoding, place: Path, choice: EvenClips) -> list[Any]:
    from PIL import Image

    frames = decoding.read(decoding.request(str(place), choice))
    scale = THUMBNAIL / min(frames.shape[1:3])
    size = (max(1, round(frames.shape[2] * scale)), max(1, round(frames.shape[1] * scale)))
    return [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in frames]
