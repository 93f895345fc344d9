"""The page of one or several runs, which ``stvit_video.report`` writes."""

import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from PIL import Image
from torchvision.transforms.functional import resize

from stvit_video.common.accuracy import ACCURACIES
from stvit_video.common.charts import Point, image_of_points, png_of_confusion, run_style, svg_of_curves
from stvit_video.common.tables import three_digits
from stvit_video.data.clips.sampling import ClipSampler
from stvit_video.data.clips.sections import within
from stvit_video.data.decode.frames import Decoding
from stvit_video.data.decode.types import DecodeError
from stvit_video.data.lists.annotations import parse_name
from stvit_video.evaluation.significance import answer
from stvit_video.pages.html import data_uri, picture_uri, printable, render
from stvit_video.runs.record import RunRecord, ScoredVideo, find_warnings, settings_that_differ

MAX_MISTAKES = 12
MAX_TABLE_CLASSES = 24  # confusions of more classes are drawn as a picture
MAX_CONFUSIONS = 10
MAX_FAILURES = 20
THUMBNAIL = 112  # pixels of a frame's shorter side
DEADLINE_S = 20.0
NONE = "–"


def run_page(runs: Sequence[RunRecord], command: str) -> str:
    """Return the page as HTML."""
    metrics = {run.name: run.metrics for run in runs if run.metrics}
    pictures = [
        (f"{label} by epoch", picture)
        for value, label in (("top1", "Top-1 (%)"), ("map", "mAP (%)"), ("loss", "Loss"))
        if (picture := svg_of_curves(metrics, value, label)) is not None
    ]
    colours = [run_style(i)["color"] for i in range(len(runs))]
    points = [
        Point(run.name, run.cost, run.accuracy, size=10, colour=colour)
        for run, colour in zip(runs, colours, strict=True)
        if run.cost
    ]
    if len(points) == len(runs) > 1 and len({run.accuracy_key for run in runs}) == 1:
        name = ACCURACIES[runs[0].accuracy_key]
        picture = image_of_points(points, "GFLOPs per video, all views", f"{name} (%)", "Accuracy by cost")
        pictures.insert(1, ("Accuracy by cost", picture))
    return render(
        "report.html",
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        headline=headline(runs),
        warnings=list_notes(runs),
        rows=_figure_rows(runs),
        colours=colours,
        pictures=[(title, data_uri(picture, "image/svg+xml")) for title, picture in pictures],
        differences=settings_that_differ(runs),
        sections=[
            {
                "run": run,
                "classes": sorted(run.classes, key=lambda one: (math.isnan(one.accuracy), one.accuracy, one.name)),
                "confusion": _confusion(run),
                "mistakes": _mistake_rows(run, run.mistakes()[:MAX_MISTAKES]),
                "command": shlex.join(map(str, run.environment.get("command") or [])),
            }
            for run in runs
        ],
        names=[run.name for run in runs],
        intervals=any(not run.multi_label for run in runs),
        precisions=any(run.multi_label for run in runs),
        max_failures=MAX_FAILURES,
        command=command,
    )


def headline(runs: Sequence[RunRecord]) -> str:
    """Return the main result: the best run, by how much it leads, and what it costs."""
    best, *others = sorted(runs, key=lambda run: -run.accuracy)
    videos = f"{best.results.get('scored') or 'the'} test videos"
    right = f"mAP {best.accuracy:.1f} % on {videos}" if best.multi_label else f"{best.accuracy:.1f} % of {videos} right"
    if not others:
        return right + (f", at {three_digits(best.cost)} GFLOPs per video." if best.cost else ".")
    if len({(run.results.get("videos"), run.test_list) for run in runs}) > 1:
        each = (f"{run.name} {run.accuracy:.1f} %" for run in runs)
        return f"Tested on different videos, so not to be ranked: {', '.join(each)}."
    if len({run.accuracy_key for run in runs}) > 1:
        each = (f"{run.name} {ACCURACIES[run.accuracy_key]} {run.accuracy:.1f} %" for run in runs)
        return f"Measured differently, so not to be ranked: {', '.join(each)}."
    lead = "Highest is " if best.accuracy > others[0].accuracy else ""
    sentences = [f"{lead}{best.name}: {right}.", answer(best, others[0], len(runs))]
    costs = {run.name: run.cost for run in runs if run.cost}
    if len({three_digits(cost) for cost in costs.values()}) > 1 and len(costs) == len(runs):
        cheapest = min(runs, key=lambda run: costs[run.name])
        also = "also " if cheapest is best else ""
        cost = f"{three_digits(costs[cheapest.name])} GFLOPs per video, {cheapest.accuracy:.1f} %"
        sentences.append(f"Cheapest is {also}{cheapest.name}: {cost}.")
    return " ".join(sentences)


def list_notes(runs: Sequence[RunRecord]) -> list[str]:
    """Return what a reader of the table must know: unequal tests, videos that were not read, missing figures."""
    withheld = [
        f"{run.name} shows no frames: its folder is not yours, or its DATA.ROOT {run.root} is a whole disk or home; "
        f"--videos FOLDER allows those below a folder."
        for run in runs
        if not run.roots and run.mistakes()
    ]
    return [*find_warnings(runs), *(line for run in runs for line in run.absent), *withheld]


def list_sources(runs: Sequence[RunRecord]) -> list[str]:
    """Return where the page's frames are from, unless the user named the folder: a run may name any."""
    shown = {run.roots[0]: run.name for run in reversed(runs) if run.mistakes() and run.roots and not run.is_trusted}
    return [f"frames of {name} are of videos below {root}, its DATA.ROOT" for root, name in shown.items()]


def _figure_rows(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return a table row for each figure: its name, and each run's (value, whether it is the best)."""
    columns = [_figures(run) for run in runs]
    rows = []
    for name, (_, form, choose) in columns[0].items():
        values = [column[name][0] for column in columns]
        cells = [NONE if value is None else _shown(value, form) for value in values]
        best = None
        if choose is not None and None not in values and len(set(cells)) > 1:  # as they are shown: rounded
            best = cells[values.index(choose(values))]
        if set(cells) != {NONE}:
            rows.append({"name": name, "cells": [(cell, cell == best) for cell in cells]})
    return rows


def _shown(value: Any, form: str) -> str:
    return three_digits(value) if form == ".3g" else format(value, form)


def _figures(run: RunRecord) -> dict[str, tuple[Any, str, Callable[[Iterable[Any]], Any] | None]]:
    """Return a run's figures by name: the value or None, its format, and how the best value of all runs is found."""
    results, interval = run.results, run.interval()
    tokens = [f"{count:,}" for count in run.tokens or () if count is not None]
    training = [row for row in run.metrics if row["split"] == "train"]
    speeds = [row["clips_per_second"] for row in training if "clips_per_second" in row]
    waits = [row["data_share"] for row in training if "data_share" in row]
    return {
        "network": (results.get("model"), "", None),
        "top-1 (%)": (results.get("top1"), ".1f", max),
        "95 % interval of top-1": (interval and "{:.1f} to {:.1f}".format(*interval), "", None),
        "top-5 (%)": (results.get("top5"), ".1f", max),
        "macro accuracy (%)": (results.get("macro_top1"), ".1f", max),
        "macro F1 (%)": (results.get("macro_f1"), ".1f", max),
        "mAP (%)": (results.get("map"), ".1f", max),
        "tested weights": (results.get("weights"), "", None),
        "videos scored": (f"{results.get('scored', NONE)} of {results.get('videos', NONE)}", "", None),
        "GFLOPs per clip": (results.get("gflops"), ".3g", min),
        "views per video": (run.describe_views(), "", None),
        "GFLOPs per video": (run.cost, ".3g", min),
        "parameters (M)": (results.get("parameters") and results["parameters"] / 1e6, ".2f", min),
        "tokens per clip": (" → ".join(tokens) or None, "", None),
        "clips per second, testing": (results.get("clips_per_second"), ".1f", None),
        "clips per second, training": (median(speeds) if speeds else None, ".1f", None),
        "waiting for data (%)": (100 * median(waits) if waits else None, ".1f", None),
    }


def _confusion(run: RunRecord) -> dict[str, Any] | None:
    """Return the most frequent confusions, and the confusion matrix as a table or, of many classes, as a picture."""
    if run.multi_label:  # a video's other labels are no confusions
        return None
    counts = run.confusion()
    if not counts:
        file = run.path / "confusion.png"
        if not file.is_file():
            return None
        try:  # decoded, so that a link to a file that is no picture puts nothing on the page
            decoding = Decoding("pyav", DEADLINE_S)
            (picture,) = decoding.read(decoding.request(str(file), partial(ClipSampler("uniform", 1), clips=1)))
        except DecodeError:
            return None
        return {"picture": picture_uri(picture, sharp=True), "names": None, "pairs": []}
    names = [one.name for one in run.classes]
    names += sorted({name for pair in counts for name in pair} - set(names))
    matrix = np.array([[counts[label, predicted] for predicted in names] for label in names])
    wrong = [(count, *pair) for pair, count in counts.items() if pair[0] != pair[1]]
    pairs = sorted(wrong, key=lambda row: (-row[0], row[1:]))[:MAX_CONFUSIONS]
    if len(names) > MAX_TABLE_CLASSES:
        picture = png_of_confusion(matrix, list(map(printable, names)), printable(run.name))
        return {"pairs": pairs, "picture": data_uri(picture, "image/png"), "names": None}
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    rows = list(zip(names, matrix.tolist(), shares.round(3).tolist(), strict=True))
    return {"pairs": pairs, "names": names, "rows": rows}


def _mistake_rows(run: RunRecord, mistakes: Sequence[ScoredVideo]) -> list[dict[str, Any]]:
    """Return each mistake with three frames of its video, or the reason why there are none."""
    decoding = Decoding("pyav", DEADLINE_S, THUMBNAIL)
    choice = partial(ClipSampler("uniform", 3), clips=1)
    places = " or ".join(map(str, dict.fromkeys(run.roots[:1]))) or "a folder that --videos names"
    rows = []
    for mistake in mistakes:
        path, section = parse_name(mistake.path)
        video = run.find_video(path)
        frames = []
        reason = f"The video is not where it was when it was tested, or not below {places}."
        if video is not None:
            try:
                found = decoding.read(decoding.request(str(video), within(choice, section, path)))
                frames = [picture_uri(np.asarray(resize(Image.fromarray(frame), THUMBNAIL))) for frame in found]
            except DecodeError as error:
                reason = f"It cannot be read now: {error.message}."
        rows.append({"video": mistake, "frames": frames, "reason": reason})
    return rows
