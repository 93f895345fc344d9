"""Accuracy from scores, counted once a video."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from stvit_video.data.failures import Failure


def correct_at(scores: Tensor, labels: Tensor, k: int) -> int:
    """Return how many labels (N,) are among the ``k`` best scores (N, classes); k is cut to the class count."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return int((best == labels[:, None]).any(dim=1).sum())


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
    kept: int = 0  # videos whose scores are from an earlier, interrupted test

    def top(self, k: int) -> float:
        """Return top-k accuracy over the scored videos, in percent."""
        return 100 * correct_at(self.scores, self.labels, k) / max(1, len(self.labels))

    @property
    def coverage(self) -> float:
        """Return the share of the list's videos that were scored."""
        return len(self.labels) / self.total

    @property
    def loss(self) -> float:
        """Return the mean negative log-likelihood of the labels."""
        chosen = self.scores.double().gather(1, self.labels[:, None]).clamp_min(1e-12)
        return float(-chosen.log().mean()) if len(self.labels) else float("nan")

    def per_class(self, classes: list[str]) -> list[dict[str, object]]:
        """Return a row per class: its scored videos, how many of them are correct, and top-1 in percent."""
        counts = self.confusion()
        return [
            {"class": name, "videos": videos, "correct": right, "top1": 100 * right / videos if videos else None}
            for name, videos, right in zip(classes, counts.sum(dim=1).tolist(), counts.diag().tolist(), strict=True)
        ]

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
