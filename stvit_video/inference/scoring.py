"""From prepared frames to what is read off the network: by clips of several videos at once, or by a stream."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from stvit_video.data.clips.transforms import TestViews
from stvit_video.data.dataset import Batch, Sample, collate
from stvit_video.inference.outputs import Output, Streamed


class Scorer:
    """Scores pieces of videos: the mean of an output, such as class probabilities, over the views of a clip.

    A piece is whole, or streamed: then its pixels are the frames that the streamed piece before it lacks, or a whole
    clip, with which a stream begins. Keep one scorer for the pieces of a video.
    """

    def __init__(self, model: Any, views: TestViews, device: torch.device, output: Output) -> None:
        self._model, self._views, self._device, self._output = model, views, device, output
        self._stream: Streamed | None = None

    def __call__(self, pieces: Sequence[Tensor], is_streamed: Sequence[bool]) -> Tensor:
        """Return the rows (pieces, ...) of the pixels (n, h, w, 3) of pieces, on the CPU."""
        rows: list[Tensor] = []
        for streamed, run in groupby(zip(pieces, is_streamed, strict=True), key=lambda pair: pair[1]):
            pixels = [piece for piece, _ in run]
            scores = map(self._follow, self._cut(pixels)) if streamed else [self._score(pixels)]
            rows += [part.cpu() for part in scores]
        return torch.cat(rows)

    def _score(self, videos: Sequence[Tensor]) -> Tensor:
        batch = make_batch(videos, self._views).to(self._device)
        return batch.expand(self._output.of_clips(self._model, batch.make_clips())).mean(dim=1)

    def _cut(self, pieces: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Yield streamed pieces in runs, of which each but the first begins with a whole clip."""
        starts = [i for i, piece in enumerate(pieces) if len(piece) == self._views.frames and i > 0]
        for start, stop in zip([0, *starts], [*starts, len(pieces)], strict=True):
            yield list(pieces[start:stop])

    def _follow(self, pieces: Sequence[Tensor]) -> Tensor:
        """Return the rows (pieces, ...) of pieces that continue the stream, or begin one; each crop is a row."""
        pixels = torch.cat(list(pieces)).to(self._device)
        views = replace(self._views, clips=1, frames=len(pixels))
        crops = views.different_crops(pixels.shape)
        if self._stream is None or len(pieces[0]) == self._views.frames:
            self._stream = self._output.stream(self._model, crops)
        clips = torch.empty(crops, 3, len(pixels), views.size, views.size, device=self._device)
        views.finish(pixels, (), clips)
        ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0)
        return self._stream(clips, ends.tolist()).transpose(0, 1).mean(dim=1)  # from (crops, pieces, ...)


def make_batch(videos: Sequence[Tensor], views: TestViews) -> Batch:
    """Return the batch of videos of which the pixels (n, h, w, 3) are given."""
    return collate([Sample(pixels, -1, i, (), []) for i, pixels in enumerate(videos)], views)
