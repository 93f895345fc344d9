"""Read the clip of a video that a page shows: the frames as a model sees them, and their times."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from stvit_video.common.errors import UsageError
from stvit_video.data.clips.sampling import ClipSampler
from stvit_video.data.decode.frames import open_video
from stvit_video.data.decode.types import DecodeError, Frames, Indices, Times
from stvit_video.data.streams import KnownTimes
from stvit_video.inference.load import VideoInput


@dataclass(frozen=True)
class Clip:
    """One clip of a video, cut from the centre of its frames."""

    tensor: Tensor  # (3, T, H, W), the model's input
    frames: Frames  # (T, H, W, 3), the same as bytes
    indices: Indices  # (T,), in the file
    times: Times | None  # (T,), seconds after the first frame of the video; None for a folder of images
    length: int  # frames of the whole video

    @property
    def labels(self) -> list[str]:
        """The time of each frame, or its number where the file has no times."""
        if self.times is None:
            return [f"no. {index + 1}" for index in self.indices]
        return [f"{time:.2f} s" for time in self.times]


def read_clip(video_input: VideoInput, path: Path, start: float | None = None) -> Clip:
    """Read the clip in the middle of a video, as a test with one clip does, or the clip from ``start`` seconds on.

    Raises UsageError where the video cannot be read or ends before ``start``.
    """
    sampler = video_input.sampler
    choice = partial(sampler.even_clips, clips=1)
    if start is not None:
        if not isinstance(sampler, ClipSampler) or sampler.kind != "dense":
            raise UsageError(
                f"--start {start:g} does not apply: clips of this model span the video (DATA.SAMPLING); leave it out."
            )
        choice = partial(sampler.starting_at, seconds=start)
    decoding = video_input.start_decoding()
    try:
        frames = decoding.read(decoding.request(str(path), choice))
        times = None if path.is_dir() else decoding.read_times(str(path))
        # Images have been read within the deadline just now, so that it is safe to count them in this process.
        timeline = open_video(str(path)) if times is None else KnownTimes(times)
        indices = choice(timeline)
    except DecodeError as error:
        if start is not None and path.is_dir():
            raise UsageError(f"--start {start:g}: {path} is a folder of images without times; leave it out.") from error
        raise UsageError(f"VIDEO {path} {error.message}; give a video, an image or a folder of images.") from error
    if start is not None and times is not None and start > times[-1]:
        raise UsageError(f"--start {start:g} is after the end of {path}, at {times[-1]:.2f} s; give less.")
    transform = replace(video_input.views.transform, crops=1)
    view = transform(frames)[0]
    mean, std = torch.tensor(transform.normalise.mean), torch.tensor(transform.normalise.std)
    pixels = ((view.permute(1, 2, 3, 0) * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return Clip(view, pixels.numpy(), indices, None if times is None else times[indices], timeline.length)
