"""Whether the difference of two runs is real: both are compared on the same test videos, one by one."""

import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest

from stvit_video.common.accuracy import ACCURACIES
from stvit_video.common.tables import format_table
from stvit_video.evaluation.predictions import average_precision
from stvit_video.runs.record import RunRecord, ScoredVideo, describe_cost, find_warnings, settings_that_differ

LEVEL = 0.05  # differences that chance makes more seldom than this count as real
Z = 1.96  # of a 95 % interval
RESAMPLES = 1000
ROUNDING = 0.01  # percent, between results.json and what the other files of a test give
WIDTH = 100  # columns of a table


class NotComparable(Exception):
    """Why two runs cannot be compared."""


@dataclass(frozen=True)
class Difference:
    """By how many points of accuracy ``better`` is above ``worse``."""

    better: str
    worse: str
    points: float
    interval: tuple[float, float]  # 95 %, in points
    p: float | None  # None where the interval alone decides
    basis: str  # what it was measured on
    level: float = LEVEL

    @property
    def real(self) -> bool:
        return self.interval[0] > 0 if self.p is None else self.p < self.level

    @property
    def evidence(self) -> str:
        """Return the interval, p and the number of videos, as a sentence shows them."""
        test = "" if self.p is None else ", p < 0.001" if self.p < 0.001 else f", p = {self.p:.3f}"
        low, high = (round(end, 1) + 0.0 for end in self.interval)  # no -0.0
        return f"95 %: {low:.1f} to {high:.1f}{test}, {self.basis}"

    def __str__(self) -> str:
        points = f"{self.points:.1f}"
        points += " point" if points == "1.0" else " points"
        if self.real:
            return f"{self.better} is better than {self.worse} by {points} ({self.evidence})."
        between = f"between {self.better} and {self.worse}"
        edge = ", if barely" if self.interval[0] > 0 else ""  # the exact test is more careful than the interval
        return f"The difference of {points} {between} is within chance{edge} ({self.evidence})."


def compare_runs(one: RunRecord, two: RunRecord, comparisons: int = 1) -> Difference:
    """Return which of two runs is better on the videos that both scored. Raises NotComparable.

    Of top-1 by McNemar's exact test, of mAP by a paired bootstrap. ``comparisons`` is the number of differences that
    are looked at together: the more there are, the smaller a p counts as real (Bonferroni).
    """
    if one.accuracy_key != two.accuracy_key:
        given = " and ".join(f"the {ACCURACIES[run.accuracy_key]} of {run.name}" for run in (one, two))
        raise NotComparable(f"{given} are different measures")
    if not (one.predictions and two.predictions):
        points, interval, p, basis = _unpaired(one, two)
    else:
        pairs = pair_videos(one, two)
        basis = f"{len(pairs):,} videos"
        if one.multi_label:
            points, interval, p = _paired_map(one, two, pairs)
        else:
            only_one, only_two = (len(videos) for videos in disagreements(one, two))
            points, interval, p = paired_difference(only_one, only_two, len(pairs))
    names = one.name, two.name
    if points < 0:
        points, interval, names = -points, (-interval[1], -interval[0]), names[::-1]
    return Difference(*names, points, interval, p, basis, LEVEL / comparisons)


def describe_comparison(runs: Sequence[RunRecord], videos: int) -> list[str]:
    """Return the answer, a table of the runs' figures, notes, and up to ``videos`` videos that one of two has right."""
    best, *others = sorted(runs, key=lambda run: -run.accuracy)
    answers = []
    listed = ""
    for other in others:
        try:
            answers.append(str(compare_runs(best, other, len(others))))
            if len(runs) == 2 and not best.multi_label and best.predictions and other.predictions:
                listed = _list_disagreements(best, other, videos)
        except NotComparable as error:
            answers.append(f"{best.name} and {other.name} are not compared: {error}.")
    if len(others) > 1:
        answers.append(f"Of {len(others)} differences, those count as real whose p is below {LEVEL / len(others):.2g}.")
    parts = ["\n".join(answers), _figure_table(runs), "\n".join(find_warnings(runs) + _group_seeds(runs)), listed]
    return [part for part in parts if part]


def _figure_table(runs: Sequence[RunRecord]) -> str:
    names = "accuracy in %"
    columns: dict[str, list[str]] = {names: [run.name for run in runs]}
    keys = {**ACCURACIES, "top5": "top-5", "macro_top1": "macro", "macro_f1": "F1"}
    for key, name in keys.items():
        columns[name] = ["-" if (value := run.results.get(key)) is None else f"{value:.1f}" for run in runs]
        if key == "top1":
            intervals = [run.interval() for run in runs]
            columns["95 %"] = ["{:.1f} to {:.1f}".format(*found) if found else "-" for found in intervals]
    columns["GFLOPs"] = [describe_cost(run.cost) if run.cost else "-" for run in runs]
    speeds = [run.results.get("clips_per_second") for run in runs]
    columns["clips/s"] = [f"{speed:.1f}" if speed else "-" for speed in speeds]
    counts = [[run.results.get(key) for key in ("scored", "videos")] for run in runs]
    columns["videos"] = ["-" if None in (n, of) else f"{n:,}" if n == of else f"{n:,} of {of:,}" for n, of in counts]
    if len({run.describe_views() for run in runs}) > 1:
        columns["views"] = [run.describe_views() for run in runs]
    shown = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
    widths = [max(len(name) + 2, *map(len, cells)) for name, cells in shown.items() if name != names]
    width = max(len(names), WIDTH - sum(widths) - 2 * len(widths))
    shown[names] = ["\n".join(textwrap.wrap(name, width)) for name in shown[names]]
    return format_table(list(shown), zip(*shown.values(), strict=True))


def _list_disagreements(one: RunRecord, two: RunRecord, most: int) -> str:
    lines = []
    for right, wrong, pairs in zip((one, two), (two, one), disagreements(one, two), strict=True):
        count = f"{len(pairs)} video{'' if len(pairs) == 1 else 's'}"
        lines.append(f"only {right.name} is right on {count}" + (":" if pairs and most else ""))
        for first, second in pairs[:most]:
            said = second.predicted if right is one else first.predicted
            lines.append(f"  {first.path}: {', '.join(first.labels)} ({wrong.name}: {said})")
    return "\n".join(lines)


def _group_seeds(runs: Sequence[RunRecord]) -> list[str]:
    """Return a line on each configuration of which several seeds are among the runs."""
    groups: list[list[RunRecord]] = []
    for run in runs:
        alike = (group for group in groups if set(settings_that_differ([group[0], run])) == {"SEED"})
        found = next(alike, None)
        if found is None:
            groups.append([run])
        else:
            found.append(run)
    lines = []
    for group in groups:
        values = [run.accuracy for run in group]
        if len(group) > 1:
            names, mean = ", ".join(run.name for run in group), sum(values) / len(values)
            spread = f"mean {mean:.1f} %, from {min(values):.1f} to {max(values):.1f} %"
            lines.append(f"Seeds of one configuration: {names}: {spread}.")
    return lines


def pair_videos(one: RunRecord, two: RunRecord) -> list[tuple[int, int]]:
    """Return the rows in both ``predictions.csv`` of each video that both runs scored. Raises NotComparable."""
    for run in (one, two):
        _check_predictions(run)
    places = [_places(run.predictions) for run in (one, two)]
    pairs = [(place, places[1][key]) for key, place in places[0].items() if key in places[1]]
    if not pairs:
        names = " and ".join(f"{run.name} (first: {run.predictions[0].path})" for run in (one, two))
        raise NotComparable(f"no video was scored by both {names}; test them on one list")
    for i, j in pairs:
        first, second = one.predictions[i], two.predictions[j]
        if set(first.labels) != set(second.labels):
            labels = f"{first.labels} in {one.name}, {second.labels} in {two.name}"
            raise NotComparable(f"their lists label {first.path} differently: {labels}; test them on one list")
    return pairs


def disagreements(one: RunRecord, two: RunRecord) -> list[list[tuple[ScoredVideo, ScoredVideo]]]:
    """Return the videos that only the first run has right, and those that only the second has, surest errors first."""
    pairs = [(one.predictions[i], two.predictions[j]) for i, j in pair_videos(one, two)]
    found = []
    for place in (0, 1):
        only = [pair for pair in pairs if pair[place].is_right and not pair[1 - place].is_right]
        found.append(sorted(only, key=lambda pair: -pair[1 - place].probability))
    return found


def paired_difference(only_one: int, only_two: int, videos: int) -> tuple[float, tuple[float, float], float]:
    """Return the difference in points, its 95 % interval (Bonett and Price) and the p of McNemar's exact test."""
    first, second = (only_one + 1) / (videos + 2), (only_two + 1) / (videos + 2)
    spread = Z * math.sqrt((first + second - (first - second) ** 2) / (videos + 2))
    low, high = max(-1.0, first - second - spread), min(1.0, first - second + spread)
    unequal = only_one + only_two
    p = float(binomtest(only_one, unequal).pvalue) if unequal else 1.0
    return 100 * (only_one - only_two) / videos, (100 * low, 100 * high), p


def resampled_precision(
    scores: NDArray[Any], labels: NDArray[np.bool_], weights: NDArray[np.int32]
) -> NDArray[np.float64]:
    """Return the average precision (R,) of one class in each resample; scores, labels (N,), counts ``weights`` (N, R).

    As ``average_precision``, of a list in which each video stands as often as its count says; 0 without a positive.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, counts = scores[order], weights[order]
    positives = np.flatnonzero(labels[order])
    ends = np.searchsorted(-ranked, -ranked[positives], side="right") - 1  # the last rank of an equal score
    hits = counts[positives]
    until = np.searchsorted(positives, ends, side="right") - 1
    precision = hits.cumsum(axis=0)[until] / np.maximum(counts.cumsum(axis=0)[ends], 1)
    return (precision * hits).sum(axis=0) / np.maximum(hits.sum(axis=0), 1)


def _paired_map(
    one: RunRecord, two: RunRecord, pairs: Sequence[tuple[int, int]]
) -> tuple[float, tuple[float, float], float]:
    """Return the difference of mAP in points, its 95 % interval over resampled videos, and the p of that bootstrap."""
    mine, other = (list(rows) for rows in zip(*pairs, strict=True))
    labels = _label_matrix(one)[mine]
    classes = [[row.name for row in run.classes] for run in (one, two)]
    if set(classes[0]) != set(classes[1]):
        differing = sorted(set(classes[0]) ^ set(classes[1]))[:3]
        raise NotComparable(f"only one of them knows the classes {', '.join(differing)}; test them on one list")
    columns = [classes[1].index(name) for name in classes[0]]
    scores = [one.scores()[mine], two.scores()[other][:, columns]]  # type: ignore[index]
    generator = np.random.default_rng(0)
    drawn = generator.multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), size=RESAMPLES)
    weights = np.concatenate([np.ones((1, len(pairs)), int), drawn]).T.astype(np.int32)  # first the videos as they are
    points = np.zeros(RESAMPLES + 1)
    for column in np.flatnonzero(labels.any(axis=0)):
        first, second = (resampled_precision(part[:, column], labels[:, column], weights) for part in scores)
        points += 100 * (first - second) / labels.shape[1]
    low, high = np.percentile(points[1:], (2.5, 97.5))
    rarer = min((points[1:] <= 0).sum(), (points[1:] >= 0).sum())
    return float(points[0]), (float(low), float(high)), min(1.0, 2 * (rarer + 1) / (RESAMPLES + 1))


def _unpaired(one: RunRecord, two: RunRecord) -> tuple[float, tuple[float, float], None, str]:
    """Return the difference of runs of which one has no predictions, with Newcombe's interval of two samples."""
    without = " and ".join(run.name for run in (one, two) if not run.predictions)
    intervals = one.interval(), two.interval()
    tests = {(run.test_list, run.results.get("videos")) for run in (one, two)}
    if len(tests) > 1 or None in next(iter(tests)) or None in intervals:
        raise NotComparable(f"no predictions.csv of {without} says which videos it was tested on; test it again")
    (low, high), (low_two, high_two) = intervals  # type: ignore[misc]
    points = one.accuracy - two.accuracy
    down = math.hypot(one.accuracy - low, high_two - two.accuracy)
    up = math.hypot(high - one.accuracy, two.accuracy - low_two)
    scored = " and ".join(sorted({f"{run.results['scored']:,}" for run in (one, two)}))
    return points, (points - down, points + up), None, f"{scored} videos, not paired: {without} has no predictions.csv"


def _places(predictions: Sequence[ScoredVideo]) -> dict[tuple[str, int], int]:
    """Return the row of each video, by its path and how often that stood in the list before."""
    seen: Counter[str] = Counter()
    found = {}
    for place, video in enumerate(predictions):
        found[video.path, seen[video.path]] = place
        seen[video.path] += 1
    return found


def _label_matrix(run: RunRecord) -> NDArray[np.bool_]:
    return np.array([[one.name in video.labels for one in run.classes] for video in run.predictions])


def _check_predictions(run: RunRecord) -> None:
    """Make sure that the rows of a test give its accuracy. Raises NotComparable."""
    if run.multi_label:
        file, scores, labels = "scores.npy", run.scores(), _label_matrix(run)
        if scores is None or scores.shape != labels.shape:
            raise NotComparable(f"no scores.npy of {run.name} holds the scores of its videos; test it again")
        found = average_precision(torch.from_numpy(scores), torch.from_numpy(labels).float())
        accuracy = 100 * float(found.nan_to_num(0).mean())
    else:
        file = "predictions.csv"
        accuracy = 100 * sum(video.is_right for video in run.predictions) / len(run.predictions)
    if abs(accuracy - run.accuracy) > ROUNDING or run.results.get("scored") not in (None, len(run.predictions)):
        given = f"{file} of {run.name} gives {accuracy:.2f} % of {len(run.predictions)} videos"
        said = f"its results.json {run.accuracy:.2f} % of {run.results.get('scored')}"
        raise NotComparable(f"{given}, {said}: they are not of one test; test it again")
