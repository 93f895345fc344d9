"""Class scores of a trained model for video files and live streams."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stvit_video.data.clips.timeline import KnownTimes
from stvit_video.data.dataset import Batch, Sample, collate
from stvit_video.data.decode.frames import Decoding
from stvit_video.data.decode.types import DecodeError, Frames
from stvit_video.data.streams import Span, check_seconds, clips_of_windows, read_ahead, read_windows, windows_of
from stvit_video.evaluation.predictions import probabilities
from stvit_video.inference.load import Trained, open_checkpoint
from stvit_video.runtime.precision import autocast, set_precision
from stvit_video.runtime.world import pick_device

PIECE_FRAMES = 256  # frames of a long video that are read in one request


@dataclass(frozen=True)
class Window:
    """The scores of a whole video, or of one window of time."""

    scores: Tensor  # (classes,)
    span: Span | None  # None: the whole video
    decode_s: float
    model_s: float
    is_short: bool = False  # shorter than a clip
    segment: int = 0  # of the video, in which the window lies: time is interrupted between two


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


# The prepared pixels (n, h, w, 3) of a video or window, and its ``Window``, which takes ``scores`` and ``model_s``.
Piece = tuple[Tensor, Callable[..., Window]]
Start = Callable[[], Callable[[str], Iterator[Piece]]]  # makes a thread's reader
End = DecodeError | None  # of a video: why it could not be read to its end, or None


class Predictor:
    """Scores videos as MODE test does: the same views, and the mean of their probabilities.

    predictor = Predictor.load("runs/sample_stvit")
    print(predictor("clip.mp4").top(3))
    for prediction in predictor.predict(paths): ...
    """

    def __init__(
        self,
        trained: Trained,
        *,
        device: str = "auto",
        precision: str | None = None,  # by default that of the run's test
        workers: int = 1,  # threads that read ahead while the network runs
    ) -> None:
        self.device = pick_device(device, 0, 1)
        self.model = trained.model.to(self.device).eval()
        self.classes, self.multi_label = trained.classes, trained.multi_label
        self.input, self.views, self.workers = trained.input, trained.input.views, workers
        self.precision = precision or self.input.precision
        if precision is None and self.precision == "tf32" and self.device.type == "cpu":  # which has no TF32
            self.precision = "fp32"
        set_precision(self.device, self.precision)

    @classmethod
    def load(cls, checkpoint: str | Path, *, overrides: Sequence[str] = (), **settings: Any) -> "Predictor":
        """Return the predictor of a checkpoint, named as for ``open_checkpoint``; ``settings`` as above."""
        return cls(open_checkpoint(checkpoint, overrides), **settings)

    def __call__(self, path: str | Path) -> Prediction:
        """Score one video. Raises DecodeError where it cannot be read."""
        (prediction,) = self.predict([path])
        if prediction.error is not None:
            raise DecodeError(str(path), prediction.error)
        return prediction

    def predict(
        self, paths: Sequence[str | Path], *, window: float | None = None, step: float | None = None
    ) -> Iterator[Prediction]:
        """Score videos, images and folders of frames, and yield predictions in the order of ``paths``.

        A video that cannot be read yields a prediction with an error. With ``window``, each window of that many seconds
        is scored like a separate video; a window starts every ``step`` seconds (default: ``window``).
        """
        check_seconds(window, step)
        names = [str(path) for path in paths]
        batch_size = self.input.batch_size
        windows: list[Window] = []
        reader = partial(self._read, window, step)
        for i, item in self._score_all(names, lambda: partial(reader, self.input.start_decoding()), batch_size):
            if isinstance(item, Window):
                windows.append(item)
            else:
                yield Prediction(names[i], self.classes, windows, None if item is None else item.message)
                windows = []

    def watch(self, address: str, *, window: float, step: float | None = None) -> Iterator[Window]:
        """Score a camera, stream or pipe, and yield each window of ``window`` seconds as soon as it is over.

        Ends with the stream, or when the caller closes the iterator. Raises DecodeError.
        """
        check_seconds(window, step)
        for _, item in self._score_all([address], lambda: partial(self._read_live, window, step or window), 1):
            if isinstance(item, DecodeError):
                raise item
            if item is not None:
                yield item

    def _read(self, window: float | None, step: float | None, decoding: Decoding, path: str) -> Iterator[Piece]:
        """Read a file whole, or window by window."""
        started = time.perf_counter()
        clips, sampler = self.views.clips, self.input.sampler
        if window is None:
            request = replace(decoding.request(path, partial(sampler, clips=clips)), judge=sampler.is_short)
            frames = decoding.read(request)
            yield self._prepare(frames, started, is_short=bool(decoding.judgement))
            return
        times = decoding.read_times(path)
        windows = windows_of(times, window, step or window)
        together = max(1, PIECE_FRAMES // (clips * self.views.frames))
        for first in range(0, len(windows), together):
            part = tuple(windows[first : first + together])
            choice = partial(clips_of_windows, sampler=sampler, clips=clips, windows=part)
            frames = decoding.read(decoding.request(path, choice, keep_open=first + together < len(windows)))
            for found, shown in zip(part, np.split(frames, len(part)), strict=True):
                is_short = not sampler.places(KnownTimes(times[found.start : found.stop]))
                yield self._prepare(shown, started, found.span, found.segment, is_short)
                started = time.perf_counter()

    def _read_live(self, window: float, step: float, address: str) -> Iterator[Piece]:
        for found in read_windows(address, window, step, self.views.short_side):
            started = time.perf_counter()
            sampler = self.input.sampler
            shown = np.stack([found.frames[i] for i in sampler.choose(found.times, self.views.clips, None)])
            yield self._prepare(shown, started, found.span, found.segment, not sampler.places(found.times))

    def _prepare(
        self, frames: Frames, started: float, span: Span | None = None, segment: int = 0, is_short: bool = False
    ) -> Piece:
        pixels = self.views.prepare(frames)
        decode_s = time.perf_counter() - started
        return pixels, partial(Window, span=span, decode_s=decode_s, is_short=is_short, segment=segment)

    def _score_all(self, names: Sequence[str], start: Start, batch_size: int) -> Iterator[tuple[int, Window | End]]:
        """Read and score videos in order: yield (index, window), and at the end of each (index, error or None)."""
        waiting: list[tuple[int, Piece | End]] = []
        for i, item in read_ahead(names, start, self.workers):
            waiting.append((i, item))
            if sum(isinstance(entry, tuple) for _, entry in waiting) in (0, batch_size):
                yield from self._score(waiting)
                waiting = []
        yield from self._score(waiting)

    def _score(self, waiting: Sequence[tuple[int, Piece | End]]) -> Iterator[tuple[int, Window | End]]:
        started = time.perf_counter()
        pixels = [item[0] for _, item in waiting if isinstance(item, tuple)]
        if pixels:
            batch = self._collate(pixels)
            with torch.no_grad(), autocast(self.device, self.precision):
                views = probabilities(self.model(batch.make_clips()), self.multi_label)
            rows = iter(batch.expand(views).mean(dim=1).cpu())
            seconds = (time.perf_counter() - started) / len(pixels)
        for i, item in waiting:
            yield i, item[1](next(rows), model_s=seconds) if isinstance(item, tuple) else item

    def clips(self, path: str | Path) -> Tensor:
        """Return the network's input for one video: its different views (V, 3, T, S, S). Raises DecodeError."""
        ((pixels, _),) = self._read(None, None, self.input.start_decoding(), str(path))
        return self._collate([pixels]).make_clips()

    def _collate(self, videos: Sequence[Tensor]) -> Batch:
        samples = [Sample(pixels, -1, i, (), []) for i, pixels in enumerate(videos)]
        return collate(samples, self.views).to(self.device)
