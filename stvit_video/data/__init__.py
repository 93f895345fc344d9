"""From a list of videos to batches of clips: annotations, sampling, decoding, transforms, dataset, loader."""

from stvit_video.data.decode.frames import open_video
from stvit_video.data.decode.types import DecodeError

__all__ = ["DecodeError", "open_video"]
