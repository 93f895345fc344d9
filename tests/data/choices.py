"""Choices of frames for the decoding process, which imports this module: keep it light."""

import os
import signal
import time
from dataclasses import dataclass

import numpy as np

from stvit_video.data.decode.types import Indices, Reader


@dataclass(frozen=True)
class Frozen:
    """The choice of given frames, whatever the video."""

    indices: tuple[int, ...]

    def __call__(self, video: Reader) -> Indices:
        return np.asarray(self.indices)


@dataclass(frozen=True)
class Sleeping:
    """A decoder that never ends."""

    def __call__(self, video: Reader) -> Indices:
        time.sleep(1e6)
        raise AssertionError


@dataclass(frozen=True)
class Crashing:
    """A decoder that crashes as native code does."""

    def __call__(self, video: Reader) -> Indices:
        os.kill(os.getpid(), signal.SIGSEGV)
        raise AssertionError
