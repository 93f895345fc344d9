"""Read a run's folder for a report. Only ``results.json`` is required."""

import csv
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from stvit_video.common.errors import UsageError, first_line
from stvit_video.data.failures import Failure, read_ledger
from stvit_video.models import create_model
from stvit_video.models.weights.files import read_metadata
from stvit_video.runs.folder import RunFolder
from stvit_video.runs.log import read_metrics


@dataclass(frozen=True)
class ScoredVideo:
    """A row of ``predictions.csv``, with the names of the classes."""

    path: str
    label: str
    predicted: str
    probability: float  # of the predicted class
    label_probability: float


@dataclass(frozen=True)
class ClassScore:
    """The number of scored videos of a class, and of correct ones."""

    name: str
    videos: int
    correct: int

    @property
    def top1(self) -> float:
        """Accuracy in percent; NaN where the class has no video."""
        return 100 * self.correct / self.videos if self.videos else math.nan


@dataclass
class RunRecord:
    """A run. What its folder does not have is empty or None, and ``absent`` says so."""

    path: Path
    name: str
    results: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    predictions: list[ScoredVideo] = field(default_factory=list)
    classes: list[ClassScore] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    tokens: tuple[int, int | None] | None = None  # as ``count_tokens`` returns them
    absent: list[str] = field(default_factory=list)

    @property
    def top1(self) -> float:
        """Top-1 in percent."""
        return float(self.results["top1"])

    @property
    def cost(self) -> float | None:
        """GFLOPs per video, all views; None where they were not counted."""
        return self.results.get("gflops_per_video")

    @property
    def test_list(self) -> str | None:
        return (self.config.get("DATA") or {}).get("TEST_LIST")

    @property
    def views(self) -> int:
        """Views per test video."""
        views = self.results.get("views") or {}
        return int(views.get("clips", 1)) * int(views.get("crops", 1))

    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % confidence interval of top-1 in percent (Wilson)."""
        n = self.results.get("scored")
        if not n:
            return None
        p, z = self.top1 / 100, 1.96
        middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return tuple(100 * (middle + sign * spread) / (1 + z * z / n) for sign in (-1, 1))

    def confusion(self) -> Counter[tuple[str, str]]:
        """Return the number of videos of each (label, predicted class)."""
        return Counter((row.label, row.predicted) for row in self.predictions)

    def mistakes(self) -> list[ScoredVideo]:
        """Return the wrong predictions, the most confident first."""
        return sorted((row for row in self.predictions if row.label != row.predicted), key=lambda row: -row.probability)

    def find_video(self, path: str) -> Path | None:
        """Return the path of a tested video: as it was given, below DATA.ROOT, or relative to a parent of the run."""
        root = str((self.config.get("DATA") or {}).get("ROOT") or ".")
        bases = [Path(), *self.path.resolve().parents]
        candidates = (base / inner for base in bases for inner in (path, Path(root) / path))
        return next((file for file in candidates if file.exists()), None)


def read_run(path: Path, name: str | None = None) -> RunRecord:
    """Read a run's folder. Raises UsageError where it is not one, has no results yet, or files are damaged."""
    folder = RunFolder(path)
    if not path.is_dir():
        raise UsageError(f"RUN {path} is not a folder; give the OUTPUT_DIR of a run.")
    if not folder.results.is_file():
        raise UsageError(f"RUN {path} has no results.json; give the OUTPUT_DIR of a run that was tested.")
    run = RunRecord(path, name or path.resolve().name, _read_mapping(folder.results, json.loads))
    if not isinstance(run.results.get("top1"), int | float):
        raise UsageError(f"{folder.results} holds no top1; give the OUTPUT_DIR of a run that was tested.")
    run.config = _read_mapping(path / "config.yaml", yaml.safe_load)
    run.environment = _read_mapping(path / "environment.json", json.loads)
    run.metrics = [row for row in read_metrics(path / "metrics.jsonl") if {"split", "epoch", "step"} <= row.keys()]
    run.failures = read_ledger(path / "failures.csv")
    metadata = read_metadata(folder.weights) if folder.weights.is_file() else {}  # there are none after MODE test
    run.predictions = _read_predictions(path / "predictions.csv", metadata.get("classes") or [])
    run.classes = _read_classes(path / "per_class.csv", run.predictions)
    run.tokens = count_tokens(metadata)
    if not run.metrics:
        run.absent.append(f"{run.name} has no metrics.jsonl, so no curves: it was only tested.")
    files = [] if run.predictions else ["predictions.csv (mistakes)"]
    files += [] if run.classes else ["per_class.csv (accuracy by class)"]
    if files:
        run.absent.append(f"{run.name} has no {' and no '.join(files)}: a new test would write them.")
    return run


def _read_mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Return what a JSON or YAML file holds; empty where there is no file."""
    try:
        content = parse(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path} is not complete ({first_line(error)}); restore it, or leave the run out.") from error
    return content if isinstance(content, dict) else {}


def _read_rows(path: Path, read: dict[str, Any]) -> list[list[Any]]:
    """Return the columns that ``read`` names, each value converted by its function; no rows where there is no file.

    Raises UsageError where columns or values are missing or wrong.
    """
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file, restval=""))
    try:
        return [[convert(row[column]) for column, convert in read.items()] for row in rows]
    except (KeyError, ValueError) as error:  # no such column; no number
        raise UsageError(f"{path} lacks or holds {error}; test the run again, or delete the file.") from error


def _read_predictions(path: Path, names: list[str]) -> list[ScoredVideo]:
    def named(word: str) -> str:
        known = word.isdecimal() and word not in names and int(word) < len(names)
        return names[int(word)] if known else word

    columns = {"path": str, "label": named, "predicted": named, "probability": float, "label_probability": float}
    return [ScoredVideo(*row) for row in _read_rows(path, columns)]


def _read_classes(path: Path, predictions: list[ScoredVideo]) -> list[ClassScore]:
    """Return the score of each class from the file, or else counted from the predictions."""
    if rows := _read_rows(path, {"class": str, "videos": int, "correct": int}):
        return [ClassScore(*row) for row in rows]
    videos = Counter(row.label for row in predictions)
    correct = Counter(row.label for row in predictions if row.label == row.predicted)
    return [ClassScore(name, count, correct[name]) for name, count in sorted(videos.items())]


def count_tokens(metadata: dict[str, Any]) -> tuple[int, int | None] | None:
    """Return the image tokens before they are reduced, and the tokens left after it (None: they are not reduced).

    Builds the network that the ``metadata`` of weights names; returns None where there is no metadata.
    """
    return create_model(metadata["name"], **metadata["arguments"]).token_counts() if metadata else None  # type: ignore[operator]


Points = list[tuple[int, float]]  # step, top-1 in percent


def read_curves(folder: Path, window: int) -> dict[str, Points]:
    """Return the smoothed training curve and the validation points of a run. Raises UsageError where it has none."""
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if {"split", "step"} <= set(row)]
    points = [(row["step"], row["top1"]) for row in rows if row["split"] == "train" and "top1" in row]
    if not any(row["split"] == "train" for row in rows):
        raise UsageError(f"{folder} has no metrics.jsonl with training rows; give the OUTPUT_DIR of a training run.")
    smoothed = []  # over the last ``window`` steps, from step ``window`` on
    for i, (step, _) in enumerate(points):
        recent = [top1 for earlier, top1 in points[: i + 1] if earlier > step - window]
        if step >= window:
            smoothed.append((step, sum(recent) / len(recent)))
    return {"train": smoothed, "val": [(row["step"], row["top1"]) for row in rows if row["split"] == "val"]}


def first_step(points: Points, target: float) -> int | None:
    """Return the first step at which the target is reached; None if it never is."""
    return next((step for step, top1 in points if top1 >= target), None)


def name_runs(paths: Sequence[Path]) -> list[str]:
    """Return a unique name for each folder: its own, with as many of its parents as needed.

    Raises UsageError where one is given twice.
    """
    parts = [path.resolve().parts for path in paths]
    for i, one in enumerate(parts):
        if one in parts[:i]:
            raise UsageError(f"RUN {paths[i]} is given twice; give each run once.")
    names = []
    for one in parts:
        depth = next(n for n in itertools.count(1) if sum(other[-n:] == one[-n:] for other in parts) == 1)
        names.append("/".join(one[-depth:]))
    return names
