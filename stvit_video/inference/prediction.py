"""What a predictor says of a video, as a whole or window by window."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stvit_video.data.windows import Span


@dataclass(frozen=True)
class Window:
    """The scores of a whole video, or of one window of time."""

    scores: Tensor  # (classes,), or what else the predictor's output is
    span: Span | None  # None: the whole video
    decode_s: float
    model_s: float
    is_short: bool = False  # shorter than a clip
    segment: int = 0  # of the video, in which the window lies: time is interrupted between two
    arrived: float = 0.0  # of a live source, when its last frame did, by the monotonic clock
    number: int = 0  # of a live source, among its windows, with those that were dropped as the network was slower
    is_streamed: bool = False  # of the frames, only those that the window before lacks were computed, if it shares any
    fps: float = 0.0  # of the video; 0: not known


@dataclass
class Prediction:
    """The classes that a model predicts for one video.

    ``windows`` has one entry for the whole video, or one for each requested window of time. ``error`` says why a video
    could not be read to its end; ``scores`` is then None, and ``windows`` holds those read before the error.
    """

    path: str
    classes: Sequence[str] = field(repr=False)
    windows: list[Window] = field(default_factory=list, repr=False)
    error: str | None = None

    @property
    def scores(self) -> Tensor | None:
        """Class probabilities (classes,), the mean over the windows; None where the video could not be read.

        Those of a multi-label model are of each class by itself, and do not add up to 1.
        """
        return None if self.error is not None else torch.stack([window.scores for window in self.windows]).mean(dim=0)

    @property
    def count(self) -> int:
        """How many windows were scored."""
        return len(self.windows)

    @property
    def short(self) -> int:
        """How many of them are shorter than a clip."""
        return sum(window.is_short for window in self.windows)

    @property
    def decode_s(self) -> float:
        """Seconds of decoding and resizing, in a process and thread of their own."""
        return sum(window.decode_s for window in self.windows)

    @property
    def model_s(self) -> float:
        """Seconds of cropping, normalisation and the network: this video's share of its batches."""
        return sum(window.model_s for window in self.windows)

    def top(self, k: int = 5, window: Window | None = None) -> list[tuple[str, float]]:
        """Return the ``k`` most likely classes and their probabilities, of the video or of one window.

        Empty where the video could not be read.
        """
        scores = self.scores if window is None else window.scores
        if scores is None:
            return []
        values, classes = scores.topk(min(k, len(self.classes)))
        return [(self.classes[i], value) for i, value in zip(classes.tolist(), values.tolist(), strict=True)]
