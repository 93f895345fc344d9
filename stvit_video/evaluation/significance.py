"""Whether the difference of two runs is real: both are compared on the same test videos, one by one."""

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest

from stvit_video.common.accuracy import ACCURACIES
from stvit_video.common.tables import format_table, three_digits
from stvit_video.common.text import printable
from stvit_video.evaluation.predictions import average_precision
from stvit_video.runs.record import RunRecord, ScoredVideo, find_warnings, settings_that_differ

LEVEL = 0.05  # differences that chance makes more seldom than this count as real
Z = 1.96  # of a 95 % interval
RESAMPLES = 1000
ROUNDING = 0.01  # percent, between results.json and what the other files of a test give
FEWEST = 30  # videos for a bootstrap, whose resamples of fewer are too much alike


class NotComparable(Exception):
    """Why two runs cannot be compared."""


@dataclass(frozen=True)
class Difference:
    """By how many points of accuracy ``better`` is above ``worse``."""

    better: str
    worse: str
    points: float
    interval: tuple[float, float]  # 95 %, in points
    p: float
    videos: int
    level: float  # of p

    @property
    def real(self) -> bool:
        return self.p < self.level

    def __str__(self) -> str:
        points = f"{self.points:.1f}"
        points += " point" if points == "1.0" else " points"
        p = "p < 0.001" if self.p < 0.001 else f"p = {self.p:.3f}"
        low, high = (round(end, 1) + 0.0 for end in self.interval)  # no -0.0
        evidence = f"95 %: {low:.1f} to {high:.1f}, {p}, {self.videos:,} video{'' if self.videos == 1 else 's'}"
        if self.real:
            return f"{self.better} is better than {self.worse} by {points} ({evidence})."
        between = f"between {self.better} and {self.worse}"
        edge = ", if barely" if self.interval[0] > 0 else ""  # p asks for more than the interval
        return f"The difference of {points} {between} is within chance{edge} ({evidence})."


def compare_runs(one: RunRecord, two: RunRecord, level: float = LEVEL) -> Difference:
    """Return which of two runs is better on the videos that both scored. Raises NotComparable.

    Of top-1 by McNemar's exact test, of mAP by a paired bootstrap. Differences whose p is below ``level`` are real.
    """
    if one.accuracy_key != two.accuracy_key:
        given = " and ".join(f"the {ACCURACIES[run.accuracy_key]} of {run.name}" for run in (one, two))
        raise NotComparable(f"{given} are different measures")
    pairs = pair_videos(one, two)
    if one.multi_label:
        points, interval, p = _paired_map(one, two, pairs)
    else:
        only_one, only_two = map(len, disagreements(one, two, pairs))
        points, interval, p = paired_difference(only_one, only_two, len(pairs))
    names = one.name, two.name
    if points < 0:
        points, interval, names = -points, (-interval[1], -interval[0]), names[::-1]
    return Difference(*names, points, interval, p, len(pairs), level)


def answer(one: RunRecord, two: RunRecord, runs: int = 2) -> str:
    """Return which of two among so many runs is better, or why that is not known, as a sentence.

    As the two are chosen by their accuracy, p is held against LEVEL over the number of all pairs (Bonferroni).
    """
    try:
        return printable(compare_runs(one, two, LEVEL / math.comb(runs, 2)))
    except NotComparable as error:
        return printable(f"{one.name} and {two.name} are not compared: {error}.")


def describe_comparison(runs: Sequence[RunRecord], videos: int) -> list[str]:
    """Return the answer, a table of the runs' figures, notes, and up to ``videos`` videos that one of two has right."""
    best, *others = sorted(runs, key=lambda run: -run.accuracy)
    answers = [answer(best, other, len(runs)) for other in others]
    listed = ""
    if len(runs) == 2 and not best.multi_label:
        with suppress(NotComparable):
            listed = _list_disagreements(best, others[0], videos)
    if len(others) > 1:
        pairs = math.comb(len(runs), 2)
        answers.append(f"{len(runs)} runs make {pairs} pairs: differences with p below {LEVEL / pairs:.2g} are real.")
    notes = "\n".join(map(printable, find_warnings(runs) + _group_seeds(runs)))
    parts = ["\n".join(answers), _figure_table(runs), notes, listed]
    return [part for part in parts if part]


def _figure_table(runs: Sequence[RunRecord]) -> str:
    columns: dict[str, list[str]] = {"accuracy in %": [run.name for run in runs]}
    keys = {**ACCURACIES, "top5": "top-5", "macro_top1": "macro", "macro_f1": "F1"}
    for key, name in keys.items():
        columns[name] = ["-" if (value := run.results.get(key)) is None else f"{value:.1f}" for run in runs]
        if key == "top1":
            intervals = [run.interval() for run in runs]
            columns["95 %"] = ["{:.1f} to {:.1f}".format(*found) if found else "-" for found in intervals]
    columns["GFLOPs"] = [three_digits(run.cost) if run.cost else "-" for run in runs]
    speeds = [run.results.get("clips_per_second") for run in runs]
    columns["clips/s"] = [f"{speed:.1f}" if speed else "-" for speed in speeds]
    counts = [[run.results.get(key) for key in ("scored", "videos")] for run in runs]
    columns["videos"] = ["-" if None in (n, of) else f"{n:,}" if n == of else f"{n:,} of {of:,}" for n, of in counts]
    if len({run.describe_views() for run in runs}) > 1:
        columns["views"] = [run.describe_views() for run in runs]
    shown = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
    return format_table(list(shown), zip(*shown.values(), strict=True))


def _list_disagreements(one: RunRecord, two: RunRecord, most: int) -> str:
    lines, found = [], disagreements(one, two, pair_videos(one, two))
    for right, wrong, pairs in zip((one, two), (two, one), found, strict=True):
        count = f"{len(pairs)} video{'' if len(pairs) == 1 else 's'}"
        lines.append(f"only {right.name} is right on {count}" + (":" if pairs and most else ""))
        for first, second in pairs[:most]:
            said = second.predicted if right is one else first.predicted
            lines.append(f"  {first.path}: {', '.join(first.labels)} ({wrong.name}: {said})")
    return "\n".join(map(printable, lines))


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


def disagreements(
    one: RunRecord, two: RunRecord, pairs: Sequence[tuple[int, int]]
) -> list[list[tuple[ScoredVideo, ScoredVideo]]]:
    """Return the videos that only the first run has right, and those that only the second has, surest errors first.

    ``pairs`` are those of ``pair_videos``.
    """
    videos = [(one.predictions[i], two.predictions[j]) for i, j in pairs]
    found = []
    for place in (0, 1):
        only = [pair for pair in videos if pair[place].is_right and not pair[1 - place].is_right]
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
    """Return the difference of mAP in points, its 95 % interval and p, from its standard error over resamples."""
    if len(pairs) < FEWEST:
        raise NotComparable(f"both scored {len(pairs)} videos, and mAP is compared on {FEWEST} or more")
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
    difference, spread = float(points[0]), float(points[1:].std())
    p = math.erfc(abs(difference) / spread / math.sqrt(2)) if spread else 1.0  # that of a normal distribution
    return difference, (difference - Z * spread, difference + Z * spread), p


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
    if not run.predictions:
        raise NotComparable(f"no predictions.csv of {run.name} says which videos it has right; test it again")
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
