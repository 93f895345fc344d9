"""Frames in memory as a video: an array or tensor (T, H, W, 3), or a list of pictures of one size."""

from collections.abc import Callable, Sequence
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from stvit_video.common.errors import UsageError
from stvit_video.data.decode.av_file import Scaler
from stvit_video.data.decode.pictures import IMAGE_ERRORS, convert_image
from stvit_video.data.decode.types import Choice, Frames, Indices, Reader, Segments, Times, decode_errors, reduced_size


def is_several(source: object) -> bool:
    """Say whether a source of frames is several: a list of paths or clips, or an array or tensor of clips."""
    if not isinstance(source, Sequence) or isinstance(source, str | bytes):
        return getattr(source, "ndim", 0) > 4
    return any(not isinstance(part, Image.Image) and getattr(part, "ndim", 4) > 3 for part in source)


class MemoryReader(Reader):
    """Frames in memory, of which only those that are read are copied. Raises UsageError for what is no clip.

    ``fps`` is needed where times are.
    """

    def __init__(self, frames: Any, fps: float | None, short_side: int | None, name: str) -> None:
        self.path, self._fps = name, fps
        self._scaler, self._short_side = Scaler(name, short_side), short_side
        if isinstance(frames, Sequence):
            self._frames: Any = [part if isinstance(part, Image.Image) else self._as_array(part, 3) for part in frames]
        else:
            self._frames = self._as_array(frames, 4)
        self.length = len(self._frames)
        if not self.length:
            raise UsageError(f"{name}: no frames; give at least one.")
        self._check_sizes(self._frames if isinstance(frames, Sequence) else ())

    def _as_array(self, given: Any, dimensions: int) -> Any:
        """Return an array or tensor without copying it. Raises UsageError where it holds no RGB pixels."""
        is_array = isinstance(given, torch.Tensor) or hasattr(given, "__array__")
        array = given if isinstance(given, torch.Tensor) else np.asarray(given) if is_array else None
        wanted = "frames as uint8 (T, H, W, 3) in RGB" if dimensions == 4 else "a list of pictures, uint8 (H, W, 3)"
        if array is None:
            raise UsageError(f"{self.path}: {type(given).__name__}; give a path, {wanted}, or PIL images in a list.")
        shape = tuple(array.shape)
        if array.dtype not in (torch.uint8, np.uint8):
            advice = f"{wanted}, with values from 0 to 255"
        elif len(shape) == dimensions and shape[-1] == 3 and 0 not in shape[1:]:
            return array
        elif len(shape) == 3 and shape[-1] == 3:
            advice = "frames[None] for a clip of one frame"
        elif len(shape) == dimensions and shape[-3] == 3:
            how = "permute" if isinstance(array, torch.Tensor) else "transpose"
            advice = f"{wanted}: channels last, frames.{how}(0, 2, 3, 1)"
        else:
            advice = f"{wanted}; grey pixels three times, and no transparency"
        raise UsageError(f"{self.path}: {str(array.dtype).removeprefix('torch.')} {shape}; give {advice}.")

    def _check_sizes(self, pictures: Sequence[Any]) -> None:
        """Raise UsageError where pictures in a list differ in size."""
        sizes = [p.size if isinstance(p, Image.Image) else (p.shape[1], p.shape[0]) for p in pictures]
        other = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
        if other is not None:
            (a, b), (c, d) = sizes[0], sizes[other]
            raise UsageError(f"{self.path}: frame {other} is {c}x{d}, and the first {a}x{b}; give frames of one size.")

    def times(self) -> Times:
        if self.length > 1 and self._fps is None:
            raise UsageError(f"{self.path}: without times, which DATA.FPS, seconds and windows need; give fps=.")
        return np.arange(self.length) / (self._fps or 1.0)

    def segments(self) -> Segments:
        return [(0, self.length)]

    def answer(
        self, choice: Choice, judge: Callable[[Reader], object] | None = None, keep_open: bool = False
    ) -> tuple[Frames, object]:
        """Return the chosen frames, and what ``judge`` says, as ``decode.frames.answer`` does of a file."""
        return self.frames(choice(self)), judge and judge(self)

    def _read(self, indices: Indices) -> Frames:
        if isinstance(self._frames, list):
            pictures = [self._picture(self._frames[i]) for i in indices.tolist()]
            self._check_sizes(pictures)  # as shown: the files of images say how they are turned
            return np.stack(pictures)
        if isinstance(self._frames, torch.Tensor):
            chosen = self._frames[torch.from_numpy(indices).to(self._frames.device)].cpu().numpy()
        else:
            chosen = np.asarray(self._frames[indices])
        if reduced_size(chosen.shape[2:0:-1], self._short_side) is None:
            return np.ascontiguousarray(chosen)
        return np.stack([self._picture(frame) for frame in chosen])

    def _picture(self, picture: Any) -> Frames:
        """Return one picture (H, W, 3), reduced where a reader of files would reduce it."""
        if isinstance(picture, Image.Image):
            with decode_errors(self.path, "cannot be read as an image", "pillow", IMAGE_ERRORS):
                return convert_image(picture, self._short_side)
        array = picture.cpu().numpy() if isinstance(picture, torch.Tensor) else np.asarray(picture)
        return self._scaler(av.VideoFrame.from_ndarray(np.ascontiguousarray(array), "rgb24"), None)
