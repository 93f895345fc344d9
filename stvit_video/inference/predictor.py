"""A trained model's class scores for video files, arrays of frames and running streams."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from stvit_video.data.clips.sampling import EvenClips, Sampling
from stvit_video.data.dataset import Collate, Sample, TestViews
from stvit_video.data.decode.process import Decoding
from stvit_video.data.decode.types import DecodeError, Frames, Indices
from stvit_video.data.loader import build_decoding, build_sampler, build_test_views
from stvit_video.data.streams.live import read_windows
from stvit_video.data.streams.prefetch import read_ahead
from stvit_video.data.streams.windows import ClipsOfSpans, KnownTimes, Span, check_seconds, spans_of
from stvit_video.inference.load import Trained, open_checkpoint
from stvit_video.runtime.join import pick_device
from stvit_video.runtime.precision import autocast, set_precision

PIECE_FRAMES = 256  # of a long video that are read at once


@dataclass(frozen=True)
class Window:
    """The scores (classes,) of a whole video, or of what it shows in ``span``, and what they took in seconds.

    ``repeats`` says that the window is shorter than a clip, which therefore repeats frames.
    """

    scores: Tensor
    span: Span | None
    decode_s: float
    model_s: float
    repeats: bool = False


@dataclass
class Prediction:
    """What a model says about one video.

    ``windows`` has one entry, or one for each window of time that was asked for. ``error`` says why a video could not
    be read, or not to its end: then there are no ``scores``, but windows as far as it could.
    """

    path: str
    classes: Sequence[str] = field(repr=False)
    windows: list[Window] = field(default_factory=list, repr=False)
    error: str | None = None

    @property
    def scores(self) -> Tensor | None:
        """The class probabilities (classes,): the mean over the windows."""
        return None if self.error is not None else torch.stack([window.scores for window in self.windows]).mean(dim=0)

    @property
    def decode_s(self) -> float:
        """Seconds that decoding and resizing took, in its own process and thread."""
        return sum(window.decode_s for window in self.windows)

    @property
    def model_s(self) -> float:
        """Seconds that the network took, crops and normalisation included: this video's share of its batches."""
        return sum(window.model_s for window in self.windows)

    def top(self, k: int = 5, window: Window | None = None) -> list[tuple[str, float]]:
        """Return the ``k`` likeliest classes with their probabilities, of the video or one window; empty on failure."""
        scores = self.scores if window is None else window.scores
        if scores is None:
            return []
        values, places = scores.topk(min(k, len(self.classes)))
        return [(self.classes[i], value) for i, value in zip(places.tolist(), values.tolist(), strict=True)]


@dataclass(frozen=True)
class _Piece:
    """Pixels (n, h, w, 3) of one video's or window's clips, and the seconds it took to read them."""

    pixels: Tensor
    span: Span | None
    seconds: float
    repeats: bool


class Predictor:
    """Scores videos as MODE test does, the same views and the same mean over them.

    ``views`` and ``sampler`` say which frames are seen; ``start_decoding`` makes a process that reads them, one for
    each of ``workers`` threads, which read ahead while the network runs. ``batch_size`` counts videos or windows.

        predictor = Predictor.load("runs/sample_stvit")
        print(predictor("clip.mp4").top(3))
        for prediction in predictor.predict(paths): ...
    """

    def __init__(
        self,
        model: nn.Module,
        classes: Sequence[str],
        *,
        sampler: Sampling,
        views: TestViews,
        start_decoding: Callable[[], Decoding],
        device: torch.device,
        precision: str = "fp32",
        batch_size: int = 1,
        workers: int = 1,
    ) -> None:
        self.model, self.classes = model.to(device).eval(), list(classes)
        self.sampler, self.views, self.start_decoding = sampler, views, start_decoding
        self.device, self.precision = device, precision
        set_precision(device, precision)
        self.batch_size, self.workers = batch_size, workers

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        overrides: Sequence[str] = (),
        device: str = "auto",
        precision: str | None = None,
        workers: int = 1,
    ) -> "Predictor":
        """Return the predictor of a run's folder or a ``.safetensors``; see ``open_checkpoint``."""
        return build_predictor(open_checkpoint(checkpoint, overrides), device, precision, workers)

    def __call__(self, path: str | Path) -> Prediction:
        """Score one video. Raises DecodeError where it cannot be read."""
        (prediction,) = self.predict([path])
        if prediction.error is not None:
            raise DecodeError(str(path), prediction.error)
        return prediction

    def predict(
        self, paths: Sequence[str | Path], *, window: float | None = None, step: float | None = None
    ) -> Iterator[Prediction]:
        """Score videos, images and folders of frames; yield them in order, those that cannot be read with an error.

        With ``window``, each window of so many seconds is scored as if it were a video of its own, one every ``step``
        seconds (default: ``window``).
        """
        check_seconds(window, step)
        names = [str(path) for path in paths]
        results = [Prediction(name, self.classes) for name in names]
        waiting: deque[tuple[int, _Piece]] = deque()
        given = read = 0  # videos that were yielded, and those that are read to their end
        for i, item in read_ahead(names, lambda: self._reader(window, step), self.workers):
            if isinstance(item, _Piece):
                waiting.append((i, item))
                if len(waiting) < self.batch_size:
                    continue
                self._score_all(waiting, results)
            else:
                read = i + 1
                if item is not None:
                    results[i].error = item.message
            while given < read and all(place != given for place, _ in waiting):
                yield results[given]
                given += 1
        self._score_all(waiting, results)
        yield from results[given:]

    def watch(self, address: str, *, window: float, step: float | None = None) -> Iterator[Window]:
        """Score a camera, stream or pipe, each window of ``window`` seconds as soon as it has been shown.

        It ends with the stream, or when the caller stops asking. Raises DecodeError.
        """
        check_seconds(window, step)
        result = Prediction(address, self.classes)
        for _, item in read_ahead([address], lambda: self._live_reader(window, step or window), 1):
            if isinstance(item, DecodeError):
                raise item
            if item is not None:
                self._score_all(deque([(0, item)]), [result])
                yield result.windows.pop()

    def _reader(self, window: float | None, step: float | None) -> Callable[[str], Iterator[_Piece]]:
        """Return what reads one file after another in a thread of its own."""
        decoding = self.start_decoding()
        if window is None:
            return lambda path: self._read_whole(decoding, path)
        return lambda path: self._read_spans(decoding, path, window, step or window)

    def _read_whole(self, decoding: Decoding, path: str) -> Iterator[_Piece]:
        started = time.perf_counter()
        frames = decoding.read(decoding.request(path, EvenClips(self.sampler, self.views.clips)))
        yield self._prepare(frames, None, started)

    def _read_spans(self, decoding: Decoding, path: str, window: float, step: float) -> Iterator[_Piece]:
        started = time.perf_counter()
        times = decoding.read_times(path)
        spans = spans_of(times, window, step)
        together = max(1, PIECE_FRAMES // (self.views.clips * self.views.frames))
        for first in range(0, len(spans), together):
            part = tuple(spans[first : first + together])
            choice = ClipsOfSpans(self.sampler, self.views.clips, part)
            frames = decoding.read(decoding.request(path, choice, keep_open=first + together < len(spans)))
            chosen = np.split(choice(KnownTimes(times)), len(part))
            for span, clips, indices in zip(part, np.split(frames, len(part)), chosen, strict=True):
                yield self._prepare(clips, span, started, self._repeats(indices))
                started = time.perf_counter()

    def _live_reader(self, window: float, step: float) -> Callable[[str], Iterator[_Piece]]:
        choice = EvenClips(self.sampler, self.views.clips)

        def read(address: str) -> Iterator[_Piece]:
            for span, shown in read_windows(address, window, step, self.views.transform.short_side):
                started, indices = time.perf_counter(), choice(shown)
                yield self._prepare(shown.frames(indices), span, started, self._repeats(indices))

        return read

    def _prepare(self, frames: Frames, span: Span | None, started: float, repeats: bool = False) -> _Piece:
        pixels = self.views.prepare(frames, ())
        return _Piece(pixels, span, time.perf_counter() - started, repeats)

    def _repeats(self, indices: Indices) -> bool:
        """Say whether a clip among those at ``indices`` (clips * frames,) shows a frame twice."""
        return bool((np.diff(indices.reshape(-1, self.views.frames)) == 0).any())

    def _score_all(self, waiting: deque[tuple[int, _Piece]], results: list[Prediction]) -> None:
        """Score one batch of what waits, and add it to the videos that it is of."""
        if not waiting:
            return
        started = time.perf_counter()
        rows = self.score([piece.pixels for _, piece in waiting])
        seconds = (time.perf_counter() - started) / len(waiting)
        for scores in rows:
            i, piece = waiting.popleft()
            results[i].windows.append(Window(scores, piece.span, piece.seconds, seconds, piece.repeats))

    def clips(self, path: str | Path) -> Tensor:
        """Return what the network is given of one video: its views (V, 3, T, S, S). Raises DecodeError."""
        (piece,) = self._read_whole(self.start_decoding(), str(path))
        return self._batch([piece.pixels])

    @torch.no_grad()
    def score(self, videos: Sequence[Tensor]) -> Tensor:
        """Map each video's prepared pixels (n, h, w, 3) to class probabilities (videos, classes), on the CPU."""
        clips = self._batch(videos)
        with autocast(self.device, self.precision):
            scores = self.model(clips).float().softmax(dim=1)
        return scores.unflatten(0, (-1, self.views.count)).mean(dim=1).cpu()

    def _batch(self, videos: Sequence[Tensor]) -> Tensor:
        samples = [Sample(pixels, -1, i, (), []) for i, pixels in enumerate(videos)]
        return Collate(self.views)(samples).to(self.device).make_clips()


def build_predictor(
    trained: Trained, device: str = "auto", precision: str | None = None, workers: int = 1
) -> Predictor:
    """Return the predictor of a trained model, with the views, the batch and the precision of its own test."""
    cfg, place = trained.cfg, pick_device(device, 0, 1)
    if precision is None:  # a CPU has no TF32: what a run rounded to that is not rounded there
        precision = "fp32" if cfg.PRECISION == "tf32" and place.type == "cpu" else cfg.PRECISION
    return Predictor(
        trained.model,
        trained.classes,
        sampler=build_sampler(cfg),
        views=build_test_views(cfg, cfg.TEST.CLIPS, cfg.TEST.CROPS),
        start_decoding=lambda: build_decoding(cfg, cfg.TEST.SHORT_SIDE),
        device=place,
        precision=precision,
        batch_size=cfg.TEST.BATCH_SIZE,
        workers=workers,
    )
