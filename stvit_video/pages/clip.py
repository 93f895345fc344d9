"""The clip that pictures are made of: the frames of one video as a model sees them, and when they are shown."""

from dataclasses import dataclass
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from stvit_video.common.errors import UsageError
from stvit_video.data.clips.sampling import ClipFrom, ClipSampler, EvenClips, Sampling
from stvit_video.data.clips.transforms import TestTransform
from stvit_video.data.decode.frames import open_video
from stvit_video.data.decode.types import Choice, DecodeError, Frames, Indices, Reader, Times
from stvit_video.data.loader import build_decoding, build_normalise, build_sampler


@dataclass(frozen=True)
class Clip:
    """One clip: what the model takes (3, T, H, W), the same as bytes (T, H, W, 3), and the frames' places in the file.

    ``times`` in seconds after the video's first frame, None where the file does not say.
    """

    tensor: Tensor
    frames: Frames
    indices: Indices
    times: Times | None
    length: int  # frames of the whole video


def read_clip(cfg: CfgNode, path: Path, start: float | None = None) -> Clip:
    """Read one clip of a video, cut from its centre: the one that a test with one clip takes, or from ``start`` on.

    ``start`` is in seconds. Raises UsageError where the video cannot be read or ends before.
    """
    sampler = build_sampler(cfg)
    choice: Choice = EvenClips(sampler, 1) if start is None else _from(sampler, start)
    decoding = build_decoding(cfg, cfg.TEST.SHORT_SIDE)
    try:  # in a process of its own, under the deadline; what opens there is then opened here for the times
        frames = decoding.read(decoding.request(str(path), choice))
        indices, times, length = _places(str(path), choice, decoding.decoders)
    except DecodeError as error:
        if start is not None and path.is_dir():
            raise UsageError(f"--start {start:g}: {path} is a folder of images without times; leave it out.") from error
        raise UsageError(f"VIDEO {path} {error.message}; give a video, an image or a folder of images.") from error
    if start is not None and times is not None and start > times[-1]:
        raise UsageError(f"--start {start:g} is after the end of {path}, at {times[-1]:.2f} s; give less.")
    normalise = build_normalise(cfg)
    view = TestTransform(cfg.DATA.SIZE, normalise, cfg.TEST.SHORT_SIDE, crops=1)(frames)[0]
    pixels = view.permute(1, 2, 3, 0) * torch.tensor(normalise.std) + torch.tensor(normalise.mean)
    pixels = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
    return Clip(view, pixels.numpy(), indices, None if times is None else times[indices], length)


def _from(sampler: Sampling, start: float) -> ClipFrom:
    if not isinstance(sampler, ClipSampler) or sampler.kind != "dense":
        raise UsageError(
            f"--start {start:g} does not apply: clips of this model span the video (DATA.SAMPLING); leave it out."
        )
    return ClipFrom(sampler, start)


def _places(path: str, choice: Choice, decoders: tuple[str, ...]) -> tuple[Indices, Times | None, int]:
    """Return the chosen indices, when each frame of the file is shown, and how many there are."""
    errors = []
    for decoder in decoders:
        try:
            reader = open_video(path, None, decoder)
        except DecodeError as error:
            errors.append(error)
            continue
        try:
            return choice(reader), _times(reader), reader.length
        finally:
            reader.close()
    raise errors[0]


def _times(reader: Reader) -> Times | None:
    try:
        return reader.times()
    except DecodeError:  # a folder of images: it does not say when they were taken
        return None
