"""Read a run's folder for a report. Only ``results.json`` is required."""

import csv
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from stvit_video.common.accuracy import accuracy_key
from stvit_video.common.errors import UsageError, first_line
from stvit_video.common.files import has_record
from stvit_video.common.tables import format_table, read_csv
from stvit_video.config.schema import flatten
from stvit_video.config.yaml_text import parse_yaml
from stvit_video.data.failures import read_ledger
from stvit_video.models import create_model
from stvit_video.models.weights.files import read_metadata
from stvit_video.runs.folder import FREE_KEYS, RunFolder
from stvit_video.runs.log import read_metrics


class ScoredVideo(NamedTuple):
    """A row of ``predictions.csv``, with the names of the classes."""

    path: str
    labels: tuple[str, ...]  # one, but in a multi-label set
    predicted: str
    probability: float  # of the predicted class
    label_probability: float | None  # of the least likely label; None where there is none

    @property
    def is_right(self) -> bool:
        return self.predicted in self.labels


class ClassScore(NamedTuple):
    """The number of scored videos of a class, of correct ones (None in a multi-label set), and its accuracy."""

    name: str
    videos: int
    correct: int | None
    accuracy: float  # top-1 or average precision in percent; NaN where the class has no video


@contextmanager
def readable(paths: Sequence[Path]) -> Iterator[None]:
    """Turn an error over values of the wrong kind in the files of runs, which others may have written, to UsageError.

    The files are JSON and CSV of many shapes, and each value is used in one place only, so that is where it shows.
    """
    try:
        yield
    except UsageError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, csv.Error) as error:
        which = f"RUN {paths[0]} holds" if len(paths) == 1 else "One of the RUNs holds"
        what = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"{which} files that no run has written ({what}); test the run again.") from error


class RunRecord:
    """A run, read from its folder. What the folder does not have is empty or None, and ``absent`` says so.

    Frames are shown of videos below ``videos``, by default below DATA.ROOT where the folder is the user's own.
    Raises UsageError where the folder is not a run's, has no results yet, or files are damaged.
    """

    def __init__(self, path: Path, name: str | None = None, videos: Path | None = None) -> None:
        folder = RunFolder(path)
        if not folder.results.is_file():
            problem = "has no results.json" if path.is_dir() else "is not a folder"
            raise UsageError(f"RUN {path} {problem}; give the OUTPUT_DIR of a run that was tested.")
        self.path = path
        self.name = name or path.resolve().name
        self.results = _read_mapping(folder.results, json.loads)
        self.accuracy_key = accuracy_key(self.results)
        if not isinstance(self.results.get(self.accuracy_key), int | float):
            raise UsageError(f"{folder.results} holds no top1; give the OUTPUT_DIR of a run that was tested.")
        self.accuracy = float(self.results[self.accuracy_key])  # percent
        self.cost: float | None = self.results.get("gflops_per_video")  # all views; None where it was not counted
        views = self.results.get("views") or {}
        self.clips, self.crops = int(views.get("clips", 1)), int(views.get("crops", 1))
        self.config = _read_mapping(path / "config.yaml", parse_yaml)
        data = self.config.get("DATA") or {}
        self.test_list = data.get("TEST_LIST")
        self.root = videos or Path(data.get("ROOT") or ".")
        self.is_trusted = videos is not None
        self.environment = _read_mapping(path / "environment.json", json.loads)
        rows = read_metrics(path / "metrics.jsonl")
        self.metrics = [row for row in rows if {"split", "epoch", "step"} <= row.keys()]
        self.failures = read_ledger(path / "failures.csv")
        metadata = read_metadata(folder.weights) if folder.weights.is_file() else {}  # there are none after MODE test
        self._metadata = metadata
        names = metadata.get("classes") or []

        def named(word: str) -> str:
            known = word.isdecimal() and word not in names and int(word) < len(names)
            return names[int(word)] if known else word

        labels: dict[str, Any] = {"label": lambda word: (named(word),)}
        if self.multi_label:
            labels = {"labels": lambda words: tuple(json.loads(words))}
        columns = {"path": str, **labels, "predicted": named, "probability": float, "label_probability": _number}
        self.predictions = [ScoredVideo(*row) for row in _read_rows(path / "predictions.csv", columns)]
        self.classes = _read_classes(path / "per_class.csv", self.predictions, self.multi_label)
        files = {"predictions.csv (mistakes)": self.predictions, "per_class.csv (accuracy by class)": self.classes}
        missing = " and no ".join(file for file, rows in files.items() if not rows)
        self.absent = [] if self.metrics else [f"{self.name} has no metrics.jsonl, so no curves: it was only tested."]
        if missing:
            self.absent.append(f"{self.name} has no {missing}: a new test would write them.")

    @property
    def multi_label(self) -> bool:
        return self.accuracy_key == "map"

    def describe_views(self) -> str:
        return f"{self.clips} x {self.crops}"

    @cached_property
    def tokens(self) -> tuple[int, int | None] | None:
        return count_tokens(self._metadata)

    def scores(self) -> NDArray[np.float32] | None:
        """Return the scores (videos, classes) of a multi-label test, in the order of both tables; None without any."""
        path = self.path / "scores.npy"
        try:
            return np.load(path, allow_pickle=False) if has_record(path) else None
        except (ValueError, EOFError) as error:
            raise UsageError(f"{path} is not complete ({first_line(error)}); test the run again.") from error

    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % confidence interval of top-1 in percent (Wilson); None of mAP, no share of videos."""
        n = self.results.get("scored")
        if not n or self.multi_label:
            return None
        p, z = self.results["top1"] / 100, 1.96
        middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return tuple(100 * (middle + sign * spread) / (1 + z * z / n) for sign in (-1, 1))

    def confusion(self) -> Counter[tuple[str, str]]:
        """Return the number of videos of each (label, predicted class)."""
        return Counter((label, row.predicted) for row in self.predictions for label in row.labels)

    def mistakes(self) -> list[ScoredVideo]:
        """Return the wrong predictions, the most confident first."""
        wrong = (row for row in self.predictions if not row.is_right)
        return sorted(wrong, key=lambda row: -row.probability)

    @cached_property
    def roots(self) -> list[Path]:
        """The folders below which videos may be shown; none where the run's own word for them is not enough.

        The run may be another's, with any path in its files: its DATA.ROOT counts where its folder belongs to the user,
        and as long as it is not the whole disk or the home folder.
        """
        if self.is_trusted:
            return [self.root.resolve()]
        if self.path.stat().st_uid != os.geteuid():
            return []
        home = os.path.expanduser("~")  # stays so for a user whom the system does not know
        place = Path(home if os.path.isabs(home) else "/").resolve()
        wide = [place, *place.parents]
        return [root for base in self._bases() if (root := (base / self.root).resolve()) not in wide]

    def _bases(self) -> list[Path]:
        return [Path(), *self.path.resolve().parents]

    def find_video(self, path: str) -> Path | None:
        """Return the path of a tested video, as it was given or below DATA.ROOT, relative to a parent of the run too.

        None where it is gone, or leads, also by links, out of ``roots``.
        """
        candidates = ((base / place).resolve() for base in self._bases() for place in (path, self.root / path))
        allowed = (file for file in candidates if any(map(file.is_relative_to, self.roots)))
        return next((file for file in allowed if file.exists()), None) if "\0" not in path else None


def _read_mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Return what a JSON or YAML file holds; empty where there is no file."""
    try:
        content = parse(path.read_text(encoding="utf-8")) if has_record(path) else {}
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"{path} is not complete ({first_line(error)}); restore it, or leave the run out.") from error
    return content if isinstance(content, dict) else {}


def _read_rows(path: Path, read: dict[str, Any]) -> list[list[Any]]:
    """Return the columns that ``read`` names, converted by its functions. Raises UsageError where they are wrong."""
    if not has_record(path):
        return []
    rows = read_csv(path)
    try:
        return [[convert(row[column]) for column, convert in read.items()] for row in rows]
    except (KeyError, ValueError) as error:  # no such column; no number
        raise UsageError(f"{path} lacks or holds {error}; test the run again, or delete the file.") from error


def _number(text: str) -> float | None:
    return float(text) if text else None


def _read_classes(path: Path, predictions: list[ScoredVideo], multi_label: bool) -> list[ClassScore]:
    """Return the score of each class from the file, or else, of a set with one label each, from the predictions."""
    if multi_label:
        rows = _read_rows(path, {"class": str, "videos": int, "average_precision": _number})
        return [ClassScore(name, videos, None, math.nan if ap is None else ap) for name, videos, ap in rows]
    found = _read_rows(path, {"class": str, "videos": int, "correct": int})
    if not found:
        videos = Counter(row.labels[0] for row in predictions)
        correct = Counter(row.predicted for row in predictions if row.is_right)
        found = [[name, count, correct[name]] for name, count in sorted(videos.items())]
    return [ClassScore(name, n, right, 100 * right / n if n else math.nan) for name, n, right in found]


def count_tokens(metadata: dict[str, Any]) -> tuple[int, int | None] | None:
    """Return the image tokens before and after reduction (None: not reduced) of the network of a weights file."""
    return create_model(metadata["name"], **metadata["arguments"]).token_counts() if metadata else None  # type: ignore[operator]


Points = list[tuple[int, float]]  # step, accuracy in percent


def read_curves(folder: Path, window: int) -> tuple[str, dict[str, Points]]:
    """Return the key of a run's accuracy, its smoothed training curve and the validation points.

    Of a multi-label set, accuracy is known in validation only. Raises UsageError where there are no training rows.
    """
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if {"split", "step"} <= set(row)]
    key = accuracy_key(set().union(*rows))
    points = [(row["step"], row[key]) for row in rows if row["split"] == "train" and key in row]
    if not any(row["split"] == "train" for row in rows):
        raise UsageError(f"{folder} has no metrics.jsonl with training rows, nor results.json; give one with either.")
    if not any(key in row for row in rows):
        raise UsageError(f"{folder} logged no accuracy: of a multi-label set, only validation (DATA.VAL_LIST) has one.")
    smoothed = []  # over the last ``window`` steps, from step ``window`` on
    for i, (step, _) in enumerate(points):
        if step >= window:
            recent = [accuracy for earlier, accuracy in points[: i + 1] if earlier > step - window]
            smoothed.append((step, sum(recent) / len(recent)))
    return key, {"train": smoothed, "val": [(row["step"], row[key]) for row in rows if row["split"] == "val"]}


def first_step(points: Points, target: float) -> int | None:
    """Return the first step at which the target is reached; None if it never is."""
    return next((step for step, accuracy in points if accuracy >= target), None)


def describe_steps(curves: Mapping[str, Mapping[str, Points]], target: float) -> str:
    """Return a table of the first steps at which runs reach the target, in training and in validation."""
    rows = []
    for name, splits in curves.items():
        cells = [first_step(splits[split], target) if splits[split] else "-" for split in ("train", "val")]
        rows.append([name, *("never" if cell is None else cell for cell in cells)])
    return format_table([f"steps to {target:g} %", "training", "validation"], rows)


def name_runs(paths: Sequence[Path]) -> list[str]:
    """Return a unique name for each folder, with parents where needed. Raises UsageError where one is given twice."""
    parts = [path.resolve().parts for path in paths]
    names = []
    for path, own in zip(paths, parts, strict=True):
        if parts.count(own) > 1:
            raise UsageError(f"RUN {path} is given twice; give each run once.")
        depth = next(n for n in itertools.count(1) if sum(other[-n:] == own[-n:] for other in parts) == 1)
        names.append("/".join(own[-depth:]))
    return names


def find_warnings(runs: Sequence[RunRecord]) -> list[str]:
    """Return what a reader of the runs' figures must know: unequal tests, videos that were not read."""
    counts = ", ".join(f"{run.name} {run.results.get('videos', '?')}" for run in runs)
    views = ", ".join(f"{run.name} {run.describe_views()}" for run in runs)
    differences = (
        ("do not have the same classes", {tuple(one.name for one in run.classes) for run in runs if run.classes}),
        (f"were not tested on the same number of videos ({counts})", {run.results.get("videos") for run in runs}),
        ("were not tested on the same list (DATA.TEST_LIST)", {run.test_list for run in runs}),
        (f"were not tested with the same views ({views})", {run.describe_views() for run in runs}),
    )
    lines = [f"The runs {what}: compare with care." for what, values in differences if len(values) > 1]
    lines += [
        f"{run.name}: {run.results['failed']} of {run.results.get('videos')} test videos could not be read and are not "
        f"in its figures."
        for run in runs
        if run.results.get("failed")
    ]
    lines += [
        f"{run.name}: classes without a positive test video, which count as 0 in its mAP: {without}; "
        f"{run.results['map_with_positives']:.1f} % over the others."
        for run in runs
        if (without := run.results.get("classes_without_positives"))
    ]
    return lines


def settings_that_differ(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Return the value of each run of every key that changes what a run does, and that all have but not alike."""
    settings = [flatten(run.config) for run in runs]
    # Keys that some of the runs do not have are newer than those runs, and are left out.
    keys = sorted(set.intersection(*map(set, settings)) - set(FREE_KEYS))
    values = {key: [str(one[key]) for one in settings] for key in keys}
    return {key: row for key, row in values.items() if len(set(row)) > 1}
