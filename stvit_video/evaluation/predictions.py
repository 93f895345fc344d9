"""Predictions for the videos of a list, with one label each or several: the accuracy that follows, and its tables."""

import json
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from stvit_video.common.errors import RunFailure
from stvit_video.data.failures import Failure


def probabilities(logits: Tensor, multi_label: bool) -> Tensor:
    """Return class probabilities of logits (..., classes): those of one choice, or of each class by itself."""
    return logits.float().sigmoid() if multi_label else logits.float().softmax(dim=-1)


def average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the average precision of each class (classes,) of scores and labels 0 or 1, both (N, classes).

    Equal scores share one threshold, and nothing is interpolated; NaN where a class has no positive.
    """
    scores, order = scores.sort(dim=0, descending=True)
    hits = labels.gather(0, order).double()
    ranks = torch.arange(1, len(scores) + 1)[:, None].expand_as(hits)
    last = torch.cat([scores[1:] != scores[:-1], torch.ones(1, scores.shape[1], dtype=torch.bool)])
    ends = ranks.where(last, len(scores)).flip(0).cummin(dim=0).values.flip(0)  # the last rank of an equal score
    precision = hits.cumsum(dim=0).gather(0, ends - 1) / ends
    return (precision * hits).sum(dim=0) / hits.sum(dim=0)


@dataclass
class Predictions:
    """Scores (N, classes), averaged over each video's views, and labels (N,), in list order.

    The scores are class probabilities, or, where a backbone is described, features (N, C).
    """

    scores: Tensor
    labels: Tensor
    indices: Tensor
    total: int  # videos in the list
    failures: list[Failure] = field(default_factory=list)
    computed: Tensor = field(default_factory=lambda: torch.zeros(1, 2))  # (N, 2): see ScoredBatch
    kept: int = 0  # videos whose scores are from an earlier, interrupted test
    kept_views: int = 0  # that were computed for them

    def figures(self) -> dict[str, float]:
        """Return top-1 and top-5 accuracy in percent, and the means over the classes of top-1 and F1.

        Classes without a scored video are left out of the means, and counted.
        """
        recall, _, f1 = self.class_scores()
        means = {"macro_top1": float(recall.nanmean()), "macro_f1": float(f1.nanmean())}
        return {"top1": self.top(1), "top5": self.top(5), **means, "classes_without_videos": int(recall.isnan().sum())}

    def class_scores(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return recall, which is top-1, precision and F1 of each class (classes,) in percent; NaN for 0 out of 0."""
        counts = self.confusion().double()
        videos, predicted, correct = counts.sum(dim=1), counts.sum(dim=0), counts.diag()
        # A class that is predicted and never there has an F1 of 0, but is left out of the mean.
        f1 = (200 * correct / (videos + predicted)).where(videos > 0, torch.nan)
        return 100 * correct / videos, 100 * correct / predicted, f1

    def top(self, k: int) -> float:
        """Return top-k accuracy over the scored videos, in percent; k may exceed the class count."""
        best = self.scores.argsort(dim=1, descending=True, stable=True)[:, :k]  # of equal ones the first, as in rows()
        return 100 * int((best == self.labels[:, None]).any(dim=1).sum()) / max(1, len(self.labels))

    @property
    def coverage(self) -> float:
        """Return the share of the list's videos that were scored."""
        return len(self.labels) / self.total

    @property
    def loss(self) -> float:
        """Return the mean negative log-likelihood of the labels."""
        return float(-self.scores.gather(1, self.labels[:, None]).double().clamp_min(1e-12).log().mean())

    def per_class(self, classes: list[str]) -> list[dict[str, object]]:
        """Return a row per class: its scored videos, how many are correct, and top-1, precision and F1 in percent."""
        counts, (recall, precision, f1) = self.confusion(), self.class_scores()
        names = ("class", "videos", "correct", "top1", "precision", "recall", "f1")
        figures = torch.stack([recall, precision, recall, f1], dim=1).tolist()
        rows = zip(classes, counts.sum(dim=1).tolist(), counts.diag().tolist(), figures, strict=True)
        known = [(*row, *(None if math.isnan(value) else value for value in own)) for *row, own in rows]
        return [dict(zip(names, row, strict=True)) for row in known]

    def rows(self, paths: list[str], classes: list[str]) -> list[dict[str, object]]:
        """Return a row per scored video, in list order: its class, the predicted class, and both probabilities."""
        best, predicted = self.scores.max(dim=1)
        own = self.scores.gather(1, self.labels[:, None])[:, 0]
        columns = zip(*(x.tolist() for x in (self.indices, self.labels, predicted, best, own)), strict=True)
        names = ("path", "label", "predicted", "probability", "label_probability")
        rows = [(paths[i], classes[j], classes[k], round(p, 6), round(q, 6)) for i, j, k, p, q in columns]
        return [dict(zip(names, row, strict=True)) for row in rows]

    def confusion(self) -> Tensor:
        """Return counts (classes, classes): rows are labels, columns predictions."""
        classes = self.scores.shape[1]
        cells = self.labels * classes + self.scores.argmax(dim=1)
        return torch.bincount(cells, minlength=classes**2).reshape(classes, classes)

    def picture(self, classes: list[str], run: str) -> tuple[str, bytes]:
        """Return the name and the content of a PNG of the test by class; ``run`` is named in its title."""
        from stvit_video.common import charts  # slow to start, and prediction needs none

        return "confusion.png", charts.png_of_confusion(self.confusion(), classes, run)


class MultiLabelPredictions(Predictions):
    """The same of a multi-label set: the labels (N, classes) are 0 or 1, scores are of each class by itself."""

    def figures(self) -> dict[str, float]:
        """Return the mean average precision in percent, and how many classes have no positive.

        They count as 0, as in torchmetrics and scikit-learn; ``map_with_positives`` is the mean over the others.
        """
        found = average_precision(self.scores, self.labels)
        without = int(found.isnan().sum())
        if without == len(found):
            raise RunFailure(f"None of the {len(found)} classes has a video among the {len(self.labels)} scored.")
        means = {"map": found.nan_to_num(0).mean(), "map_with_positives": found.nanmean()}
        return {**{key: 100 * float(value) for key, value in means.items()}, "classes_without_positives": without}

    @property
    def loss(self) -> float:
        """Return the mean binary cross-entropy of videos and classes."""
        return float(F.binary_cross_entropy(self.scores.double(), self.labels.double()))

    def per_class(self, classes: list[str]) -> list[dict[str, object]]:
        """Return a row per class: the scored videos that have it, and its average precision in percent."""
        found = average_precision(self.scores, self.labels).tolist()
        rows = zip(classes, self.labels.sum(dim=0).int().tolist(), found, strict=True)
        return [
            {"class": name, "videos": videos, "average_precision": 100 * value if videos else None}
            for name, videos, value in rows
        ]

    def rows(self, paths: list[str], classes: list[str]) -> list[dict[str, object]]:
        """Return a row per scored video, in list order: its classes, the most likely one, and probabilities.

        The names of its classes are a JSON list; ``label_probability`` is that of the least likely of them.
        """
        best, predicted = self.scores.max(dim=1)
        own = self.scores.where(self.labels > 0, 2).amin(dim=1)
        columns = zip(*(x.tolist() for x in (self.indices, predicted, best, own)), self.labels, strict=True)
        rows: list[dict[str, object]] = []
        for i, j, p, q, labels in columns:
            names = [classes[k] for k in labels.nonzero().flatten().tolist()]
            row = {"path": paths[i], "labels": json.dumps(names, ensure_ascii=False), "predicted": classes[j]}
            rows.append({**row, "probability": round(p, 6), "label_probability": round(q, 6) if names else None})
        return rows

    def picture(self, classes: list[str], run: str) -> tuple[str, bytes]:
        """Return the name and the content of a PNG of the average precision of each class."""
        from stvit_video.common import charts

        values = (100 * average_precision(self.scores, self.labels)).tolist()
        return "average_precision.png", charts.png_of_precision(values, classes, f"{run}, {len(self.labels):,} videos")


def predictions_for(labels: Tensor) -> type[Predictions]:
    """Return the kind of predictions that labels (N,) or (N, classes) are of."""
    return MultiLabelPredictions if labels.ndim == 2 else Predictions
