"""The loss of a step, and the weights of the classes in it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stvit_video.data.lists.annotations import Video, labels_of
from stvit_video.runs.preflight import OpenRun


def classification_loss(
    logits: Tensor, targets: Tensor, smoothing: float, multi_label: bool, weights: Tensor | None = None
) -> Tensor:
    """Return the mean cross-entropy of logits (B, classes) and targets (B,) or (B, classes).

    Of a multi-label set, that of a sigmoid for each class; smoothing then draws each target towards a half. ``weights``
    (classes,) are those of ``balanced_weights``.
    """
    if multi_label:
        targets = targets.lerp(torch.full_like(targets, 0.5), smoothing)
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights)
    if weights is not None and targets.ndim == 1:
        # torch divides by the weights of the batch's labels, but for shares of classes by the number of clips. Only the
        # latter adds up to the same gradient however a step is divided into batches and processes.
        targets = F.one_hot(targets, len(weights)).to(logits.dtype)
    return F.cross_entropy(logits, targets, weight=weights, label_smoothing=smoothing)


def balanced_weights(videos: Sequence[Video], classes: int, multi_label: bool) -> Tensor:
    """Return a weight for each class (classes,), with which rare classes count as much as frequent ones.

    It is videos / (classes * videos of the class), 1 in the mean over the videos. Of a multi-label set it multiplies
    the positives: the videos without the class over those with it. A class without a video has weight 1.
    """
    labels = torch.tensor([label for video in videos for label in labels_of(video)])
    counts = torch.bincount(labels, minlength=classes).double()
    weights = (len(videos) - counts) / counts if multi_label else len(videos) / ((counts > 0).sum() * counts)
    return weights.where((counts > 0) & (weights > 0), 1).float()


def build_class_weights(run: OpenRun) -> Tensor | None:
    """Return the weights that OPTIM.CLASS_WEIGHTS asks for, on the process's device; None for none."""
    if run.cfg.OPTIM.CLASS_WEIGHTS == "none":
        return None
    return balanced_weights(run.videos["train"], len(run.classes), run.multi_label).to(run.world.device)
