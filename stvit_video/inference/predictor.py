"""Class scores, or other outputs, of a trained model for video files, frames in memory and live streams."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import inf
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stvit_video.common.errors import UsageError
from stvit_video.data.clips.sampling import ClipSampler
from stvit_video.data.clips.timeline import KnownTimes
from stvit_video.data.decode.frames import Decoding
from stvit_video.data.decode.memory import MemoryReader, is_several
from stvit_video.data.decode.types import Choice, DecodeError, Frames, Reader, Times
from stvit_video.data.live import LiveWindow, read_samples, read_windows
from stvit_video.data.streams import read_ahead
from stvit_video.data.windows import Span, check_seconds, frame_rate, plan_reading, take, windows_of
from stvit_video.inference.load import Trained, open_checkpoint
from stvit_video.inference.outputs import ClassScores, Output
from stvit_video.inference.prediction import Prediction, Window
from stvit_video.inference.scoring import Scorer, make_batch
from stvit_video.models.stream import TokenStream
from stvit_video.runtime.precision import autocast, set_precision
from stvit_video.runtime.world import pick_device

PIECE_FRAMES = 256  # frames of a long video that are read in one request


class Piece(NamedTuple):
    """The prepared pixels (n, h, w, 3) of a video or window, which still lacks its scores and time."""

    pixels: Tensor
    window: Window


End = DecodeError | None  # of a video: why it could not be read to its end, or None
Source = str | MemoryReader
Judge = Callable[[Reader], object] | None  # see ``FrameRequest``
Cut = Callable[[float], tuple[float, float]]  # seconds of a window, and between windows, for frames per second
T = TypeVar("T")


class Predictor:
    """Scores videos as MODE test does: the same views, and the mean of their probabilities.

    predictor = Predictor.load("runs/sample_stvit")
    print(predictor("clip.mp4").top(3))
    for prediction in predictor.predict(paths): ...

    Decoding processes stay for later calls until ``close``, the end of a ``with`` block or of the program. A predictor
    may be used by several threads, and after a fork.
    """

    def __init__(
        self,
        trained: Trained,
        *,
        device: str | torch.device = "auto",
        precision: str | None = None,  # by default that of the run's test
        workers: int = 1,  # threads that read ahead while the network runs
        output: Output | None = None,  # by default class scores
    ) -> None:
        self.device = pick_device(device, 0, 1) if isinstance(device, str) else device
        self.model = trained.model.to(self.device).eval()
        self.classes, self.multi_label = trained.classes, trained.multi_label
        self.output = output or ClassScores(self.multi_label)
        self.input, self.views, self.workers = trained.input, trained.input.views, workers
        self.precision = precision or self.input.precision
        if precision is None and self.precision == "tf32" and self.device.type == "cpu":  # which has no TF32
            self.precision = "fp32"
        self.streams = getattr(self.model, "streaming", False)  # the model has the form in which windows share frames
        # Frames that a stream takes at a time; None: windows are scored by themselves.
        self.group = TokenStream(self.model).group if self.streams and self.views.clips == 1 else None
        self._idle: list[Decoding] = []  # which no thread uses now
        self._process = os.getpid()
        set_precision(self.device, self.precision)

    @classmethod
    def load(cls, checkpoint: str | Path, *, overrides: Sequence[str] = (), **settings: Any) -> "Predictor":
        """Return the predictor of a checkpoint, named as for ``open_checkpoint``; ``settings`` as above."""
        return cls(open_checkpoint(checkpoint, overrides), **settings)

    def close(self) -> None:
        """End the decoding processes, which a next call would start again."""
        while self._idle:
            self._idle.pop().close()

    def __enter__(self) -> "Predictor":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @overload
    def __call__(self, source: str | Path | NDArray[Any] | Tensor, fps: float | None = None) -> Prediction: ...
    @overload
    def __call__(self, source: Sequence[Any], fps: float | None = None) -> Any: ...
    def __call__(self, source: Any, fps: float | None = None) -> Any:
        """Score one video, or frames in memory: uint8 (T, H, W, 3) in RGB, or a list of images of one size.

        A list of paths or clips, or an array of clips, gives a list of predictions. ``fps`` is the rate of frames in
        memory, where sampling needs it. Raises DecodeError where a video cannot be read, UsageError for wrong frames.
        """
        several = is_several(source)
        predictions = list(self.predict(source if several else [source], fps=fps))
        for prediction in predictions:
            if prediction.error is not None:
                raise DecodeError(prediction.path, prediction.error)
        return predictions if several else predictions[0]

    def predict(
        self,
        sources: Sequence[Any],
        *,
        window: float | None = None,
        step: float | None = None,
        fps: float | None = None,
    ) -> Iterator[Prediction]:
        """Score videos, images, folders of frames and frames in memory, and yield predictions in their order.

        A video that cannot be read yields a prediction with an error. With ``window``, each window of that many seconds
        is scored like a separate video; a window starts every ``step`` seconds (default: ``window``).
        """
        check_seconds(window, step)
        readers = self._find(sources, fps)
        windows: list[Window] = []
        cut = None if window is None else lambda fps: (window, step or window)
        for i, item in self._score_all(readers, partial(self._read, cut), self.input.batch_size):
            if isinstance(item, Window):
                windows.append(item)
            else:
                source = readers[i]
                path = source.path if isinstance(source, MemoryReader) else source
                yield Prediction(path, self.classes, windows, None if item is None else item.message)
                windows = []

    def windows(self, paths: Sequence[str], cut: Cut) -> Iterator[tuple[int, Window | End]]:
        """Score files window by window: yield (index, window), and at the end of each (index, error or None).

        Batches are of one video, so that its scores do not depend, to the last bit, on what else is read.
        """
        yield from self._score_all(paths, partial(self._read, cut), self.input.batch_size, apart=True)

    def watch(
        self,
        address: str,
        *,
        window: float,
        step: float | None = None,
        seconds: float | None = None,
        reconnect: int = 0,
    ) -> Iterator[Window]:
        """Score a camera, stream or pipe ("-": standard input), and yield each window of ``window`` seconds once over.

        A model that streams decides on its last samples instead, by default at each new group of them. Where the
        network is slower than a source that does not wait, windows are dropped. Ends with the stream, once it was
        opened again ``reconnect`` times, with the first frame after ``seconds`` of it or of waiting, or when the caller
        closes the iterator. Raises DecodeError.
        """
        check_seconds(window, step)
        self._mind_fork()
        scorer = Scorer(self.model, self.views, self.device, self.output)
        before: int | None = None
        limits = {"short_side": self.views.short_side, "seconds": seconds, "reconnect": reconnect}
        read = partial(self._read_live, window, step, limits)
        for _, item in read_ahead([address], read, 1, lambda numbered: not numbered[1].waits):
            if isinstance(item, DecodeError):
                raise item
            if item is None:
                return
            number, found = item
            started, new = time.perf_counter(), len(found.frames)
            if found.first is not None:
                new = new if before is None else min(new, found.first - before)
                before = found.first
            pixels = self.views.prepare(np.stack(found.frames[-new:]))
            read_s, started = time.perf_counter() - started, time.perf_counter()
            is_streamed = found.first is not None
            with torch.no_grad(), autocast(self.device, self.precision):
                (scores,) = scorer([pixels], [is_streamed])
            is_short = not self.input.sampler.places(found.times)
            model_s = time.perf_counter() - started
            about = (found.segment, found.arrived, number, is_streamed)
            yield Window(scores, found.span, read_s, model_s, is_short, *about)

    def _find(self, sources: Any, fps: float | None) -> list[Source]:
        """Return the paths, and readers of frames in memory, also of a single path or array. Raises UsageError."""
        if fps is not None and not (isinstance(fps, Real) and 0 < fps < inf):
            raise UsageError(f"fps={fps!r}; give the frames per second as a number above 0.")
        is_one = isinstance(sources, str | os.PathLike) or getattr(sources, "ndim", 5) < 5
        sources = [sources] if is_one else list(sources)
        found: list[Source] = []
        for i, source in enumerate(sources):
            if isinstance(source, str | os.PathLike):
                found.append(os.fspath(source))
            else:
                name = "frames in memory" + (f" [{i}]" if len(sources) > 1 else "")
                found.append(MemoryReader(source, fps and float(fps), self.views.short_side, name))
        path = next((source for source in found if isinstance(source, str)), None)
        if fps is not None and path is not None:
            raise UsageError(f"fps={fps}: {path} has times of its own; give fps= with frames in memory only.")
        return found

    @property
    def streams_live(self) -> bool:
        """Whether decisions on live sources are those of a stream, on the last samples of a dense grid."""
        sampler = self.input.sampler
        return self.group is not None and isinstance(sampler, ClipSampler) and sampler.kind == "dense"

    @contextmanager
    def _decoding(self) -> Iterator[Decoding]:
        """Provide what reads files, to this thread alone; its process stays for others, unless it is in disorder."""
        try:
            decoding = self._idle.pop()
        except IndexError:
            decoding = self.input.start_decoding()
        decoding.forget()
        try:
            yield decoding
        except DecodeError:
            self._idle.append(decoding)
            raise
        except BaseException:  # a caller that reads no further: a file may be open
            decoding.close()
            raise
        self._idle.append(decoding)

    def _read(self, cut: Cut | None, source: Source) -> Iterator[Piece]:
        """Read a video whole, or window by window."""
        if isinstance(source, MemoryReader):
            yield from self._cut(cut, source.times, source.answer)
            return
        with self._decoding() as decoding:

            def ask(choice: Choice, judge: Judge = None, keep_open: bool = False) -> tuple[Frames, object]:
                frames = decoding.read(replace(decoding.request(source, choice, keep_open), judge=judge))
                return frames, decoding.judgement

            yield from self._cut(cut, partial(decoding.read_times, source), ask)

    def _cut(
        self,
        cut: Cut | None,
        read_times: Callable[[], Times],
        ask: Callable[..., tuple[Frames, object]],
    ) -> Iterator[Piece]:
        started = time.perf_counter()
        clips, sampler = self.views.clips, self.input.sampler
        if cut is None:
            frames, is_short = ask(partial(sampler, clips=clips), sampler.is_short)
            yield self._prepare(frames, started, is_short=bool(is_short))
            return
        times = read_times()
        fps = frame_rate(times)
        windows = windows_of(times, *cut(fps))
        done = 0
        for part in plan_reading(times, windows, sampler, clips, self.group, PIECE_FRAMES):
            done += len(part.windows)
            chosen = np.concatenate(part.indices)
            frames, _ = ask(partial(take, indices=chosen), keep_open=done < len(windows))
            ends = np.cumsum([len(indices) for indices in part.indices])
            for found, shown in zip(part.windows, np.split(frames, ends[:-1]), strict=True):
                is_short = not sampler.places(KnownTimes(times[found.start : found.stop]))
                yield self._prepare(shown, started, found.span, found.segment, is_short, part.is_streamed, fps)
                started = time.perf_counter()

    def _read_live(
        self, window: float, step: float | None, limits: dict[str, Any], address: str
    ) -> Iterator[tuple[int, LiveWindow]]:
        """Yield windows with their numbers, of each the frames of its clips, or for a stream the last samples."""
        sampler, clips = self.input.sampler, self.views.clips
        if self.streams_live:
            assert isinstance(sampler, ClipSampler)
            assert self.group is not None
            yield from enumerate(read_samples(address, sampler, self.group, step or 0.0, **limits))
            return
        for number, found in enumerate(read_windows(address, window, step or window, **limits)):
            frames = [found.frames[i] for i in sampler.choose(found.times, clips, None)]
            yield number, found._replace(frames=frames)

    def _prepare(
        self,
        frames: Frames,
        started: float,
        span: Span | None = None,
        segment: int = 0,
        is_short: bool = False,
        is_streamed: bool = False,
        fps: float = 0.0,
    ) -> Piece:
        pixels = self.views.prepare(frames)
        decode_s = time.perf_counter() - started
        window = Window(torch.empty(0), span, decode_s, 0.0, is_short, segment, is_streamed=is_streamed, fps=fps)
        return Piece(pixels, window)

    def _score_all(
        self,
        sources: Sequence[T],
        read: Callable[[T], Iterator[Piece]],
        batch_size: int,
        apart: bool = False,
    ) -> Iterator[tuple[int, Window | End]]:
        """Read and score sources in order: yield (index, window), and at the end of each (index, error or None).

        With ``apart``, no batch has windows of several sources.
        """
        self._mind_fork()
        scorer = Scorer(self.model, self.views, self.device, self.output)
        waiting: list[tuple[int, Piece | End]] = []
        for i, item in read_ahead(sources, read, self.workers):
            waiting.append((i, item))
            ended = apart and not isinstance(item, Piece)
            if ended or sum(isinstance(entry, Piece) for _, entry in waiting) in (0, batch_size):
                yield from self._score(scorer, waiting)
                waiting = []
        yield from self._score(scorer, waiting)

    def _mind_fork(self) -> None:
        if self._process != os.getpid():  # after a fork, GNU's OpenMP waits for ever for threads that are not there
            torch.set_num_threads(1)
            self._process = os.getpid()

    def _score(self, scorer: Scorer, waiting: Sequence[tuple[int, Piece | End]]) -> Iterator[tuple[int, Window | End]]:
        started = time.perf_counter()
        pieces = [item for _, item in waiting if isinstance(item, Piece)]
        if pieces:
            with torch.no_grad(), autocast(self.device, self.precision):
                rows = scorer([piece.pixels for piece in pieces], [piece.window.is_streamed for piece in pieces])
            scores = iter(rows)
            seconds = (time.perf_counter() - started) / len(pieces)
        for i, item in waiting:
            if isinstance(item, Piece):
                yield i, replace(item.window, scores=next(scores), model_s=seconds)
            else:
                yield i, item

    def clips(self, source: Any, fps: float | None = None) -> Tensor:
        """Return the network's input for one video or clip: its different views (V, 3, T, S, S). Raises DecodeError."""
        (piece,) = self._read(None, *self._find([source], fps))
        return make_batch([piece.pixels], self.views).to(self.device).make_clips()
