"""What is read off a network: class scores or features, of whole clips or of the windows of a stream.

Legend: n clips, T frames; a stream has a row for each of B crops and d windows at a time; M tokens, C channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stvit_video.common.errors import UsageError, nearest
from stvit_video.evaluation.predictions import probabilities

POOLED, SEMANTIC, LOGITS = "pooled", "semantic", "logits"

# Takes new frames (B, 3, T, H, W), and after how many of them a window ends; returns the windows' rows (B, d, ...).
Streamed = Callable[[Tensor, Sequence[int]], Tensor]


class Output(ABC):
    """Something that a network says of a clip, as a float32 tensor of any shape."""

    @abstractmethod
    def of_clips(self, model: Any, clips: Tensor) -> Tensor:
        """Return the rows (n, ...) of clips (n, 3, T, H, W)."""

    @abstractmethod
    def stream(self, model: Any, crops: int) -> Streamed:
        """Return what computes the same rows by a new stream of the model."""


@dataclass(frozen=True)
class ClassScores(Output):
    """Class probabilities (classes,)."""

    multi_label: bool  # those of each class by itself

    def of_clips(self, model: Any, clips: Tensor) -> Tensor:
        return probabilities(model(clips), self.multi_label)

    def stream(self, model: Any, crops: int) -> Streamed:
        stream = model.stream(crops)
        return lambda frames, ends: probabilities(stream.push(frames, after=_groups(stream, ends)), self.multi_label)


@dataclass(frozen=True)
class Features(Output):
    """The features of a layer; see ``features_of``."""

    layer: str

    def of_clips(self, model: Any, clips: Tensor) -> Tensor:
        if self.layer == LOGITS:
            return model(clips).float()
        if self.layer == POOLED:
            return model.forward_features(clips).float().mean(dim=1)
        tokens = model(clips, return_intermediates=True)[1].tokens[self.layer].float()
        return tokens if self.layer == SEMANTIC else tokens.mean(dim=1)

    def stream(self, model: Any, crops: int) -> Streamed:
        return _FeatureStream(model, crops, self.layer)


class _FeatureStream:
    """Keeps what the windows to come share with those before."""

    def __init__(self, model: Any, crops: int, layer: str) -> None:
        self._stream, self._layer, self._groups = model.stream(crops), layer, model.regions[0]
        self._past: Tensor | None = None  # of the groups of the last window (B, groups, M/groups or 1, C)

    def __call__(self, frames: Tensor, ends: Sequence[int]) -> Tensor:
        after = _groups(self._stream, ends)
        if self._layer == LOGITS:
            return self._stream.push(frames, after=after).float()
        seen = self._stream.push(frames, True, after=after)[1].tokens
        if self._layer in (POOLED, "final"):
            return seen["final"].float().unflatten(1, (len(after), -1)).mean(dim=2)
        new = seen[self._layer].float().unflatten(1, (frames.shape[2] // self._stream.group, -1))
        if self._layer != SEMANTIC:
            new = new.mean(dim=2, keepdim=True)
        kept = new if self._past is None else torch.cat([self._past, new], dim=1)
        self._past = kept[:, -self._groups :].clone()
        stops = [kept.shape[1] - new.shape[1] + group + 1 for group in after]
        rows = torch.stack([kept[:, stop - self._groups : stop].flatten(1, 2) for stop in stops], dim=1)
        return rows if self._layer == SEMANTIC else rows.mean(dim=2)


def _groups(stream: Any, ends: Sequence[int]) -> list[int]:
    return [end // stream.group - 1 for end in ends]


@torch.no_grad()
def features_of(model: Any, layer: str) -> Features:
    """Return the features of a layer.

    These are "pooled" (C,), the normalised mean over tokens that the classifier reads; "logits" (classes,), the class
    scores before softmax; "semantic" (M, C), the semantic tokens; or, under the name that an intermediate of
    ``forward`` has, the mean over its tokens (C,). Raises UsageError where the model has no such layer.
    """
    if layer not in (POOLED, LOGITS):
        clip = torch.zeros(1, 3, *model.input_size, device=next(model.parameters()).device)
        names = [POOLED, LOGITS, *model.eval()(clip, return_intermediates=True)[1].tensors]
        if layer not in names:
            has = f"{model.name} has {', '.join(names)}"
            raise UsageError(f"--layer {layer}: {has}; give one of these.{nearest(layer, names)}")
    return Features(layer)
