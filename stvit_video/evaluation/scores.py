"""Caches of the scores of an interrupted test and of the features of a list, and what they depend on."""

import hashlib
import json
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from stvit_video import __version__
from stvit_video.common.errors import first_line
from stvit_video.common.files import write_atomically
from stvit_video.data.dataset import VideoDataset
from stvit_video.data.failures import Failure
from stvit_video.data.lists.annotations import parse_name
from stvit_video.evaluation.predictions import Predictions, predictions_for
from stvit_video.runs.checkpoint import DAMAGED, pack, read_checked

# Of a batch: list positions (videos,), labels (videos,) or (videos, classes), scores (videos, columns),
# and (videos, 2): how many views were computed, equal ones once, and 1 where the video is shorter than a clip.
ScoredBatch = tuple[Tensor, Tensor, Tensor, Tensor]


class PartialScores:
    """A folder with the scored batches of an interrupted test; each process writes files of its own.

    ``key`` is the fingerprint of all that the scores depend on; files of another key are ignored. Batches in which a
    video failed are not kept: the video may be repaired before the next start.
    """

    def __init__(self, folder: Path, key: str, rank: int, every_s: float = 30.0) -> None:
        self.folder, self.key, self.rank, self.every_s = folder, key, rank, every_s
        self.waiting: list[ScoredBatch] = []
        self.written = time.monotonic()

    def read(self) -> list[ScoredBatch]:
        """Return the kept batches, each once; damaged files and files of another key are ignored."""
        rows: dict[int, ScoredBatch] = {}
        for path in sorted(self.folder.glob("*.pt")):
            try:
                content = read_checked(path)
                if content["key"] == self.key:
                    rows.update({int(row[0][0]): row for row in content["rows"]})
            except DAMAGED:
                said = f"{path} is damaged; its videos are scored again"
                warnings.warn_explicit(said, UserWarning, f"<{path.name}>", 0)  # in one line, without one of code
        return list(rows.values())

    def add(self, row: ScoredBatch) -> None:
        """Add a batch, and write those that wait every ``every_s`` seconds."""
        self.waiting.append(row)
        if time.monotonic() - self.written >= self.every_s:
            self.flush()

    def flush(self) -> None:
        """Write the batches that wait."""
        if self.waiting:
            self.folder.mkdir(exist_ok=True)
            packed = pack({"key": self.key, "rows": self.waiting})
            write_atomically(self.folder / f"{time.time_ns()}_{self.rank}.pt", packed)
        self.waiting = []
        self.written = time.monotonic()


def write_features(path: Path, key: str, described: Predictions) -> None:
    """Write features with the failures of their list, completely or not at all."""
    failures = [dict(asdict(failure), state=_file_state(failure.path)) for failure in described.failures]
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, pack({"key": key, **vars(described), "failures": failures}))


def read_features(path: Path, key: str) -> tuple[Predictions | None, str]:
    """Return the features that ``path`` holds for ``key``, or None, and a line about a file that is there.

    A file that is damaged, of another key, or older than a change to a video that had failed is not used.
    """
    if not path.exists():
        return None, ""
    try:
        content = read_checked(path)
    except (*DAMAGED, OSError) as error:
        return None, f"{path} is damaged ({first_line(error)}); computing it again"
    if content.pop("key") != key:
        return None, f"{path} is of another checkpoint, list or setting; computing it again"
    if any(_file_state(row["path"]) != row.pop("state") for row in content["failures"]):
        return None, f"{path}: videos that could not be read have changed since; computing it again"
    failures = [Failure(**row) for row in content.pop("failures")]
    return predictions_for(content["labels"])(**content, failures=failures), f"{path} is used again"


def _file_state(path: str) -> list[int] | None:
    """Return size and time of change (ns) of a file, None where there is none."""
    try:
        state = Path(parse_name(path)[0]).stat()
    except OSError:
        return None
    return [state.st_size, state.st_mtime_ns]


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 of weights and their names."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)  # bfloat16 too
    return digest.hexdigest()


def fingerprint(model: nn.Module, weights: str, dataset: VideoDataset, precision: str, seed: int) -> str:
    """Return a hash of what features depend on: network, ``weights``, list, views, clips and arithmetic.

    Of the video files themselves, only names and labels count.
    """
    content = {
        "version": __version__,
        "model": [str(model.name), model.arguments],
        "weights": weights,
        "videos": [[video.name, video.label] for video in dataset.videos],
        "decoders": [dataset.decoding.decoder],
        "views": [repr(dataset.sampler), repr(dataset.views), dataset.decoding.short_side],
        "precision": precision,
        "seed": seed,  # of the random weights, and of those that a checkpoint does not hold
    }
    if dataset.label_columns is not None:  # of a multi-label set, whose scores are not those of one choice
        content |= {"labels": [video.labels for video in dataset.videos], "label_columns": dataset.label_columns}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
