"""Choices of frames for the decoding process. It imports this module, so keep imports light."""

import os
import signal
import time
from dataclasses import dataclass

import numpy as np

from stvit_video.data.clips.sampling import ClipSampler
from stvit_video.data.decode.types import Indices, Reader, Timeline


@dataclass(frozen=True)
class Frozen:
    """Chooses given frames, for any video."""

    indices: tuple[int, ...]

    def __call__(self, video: Reader) -> Indices:
        return np.asarray(self.indices)


@dataclass(frozen=True)
class Sleeping:
    """Hangs like a decoder in an endless loop."""

    def __call__(self, video: Reader) -> Indices:
        time.sleep(1e6)
        raise AssertionError


@dataclass(frozen=True)
class Crashing:
    """Crashes like native code."""

    def __call__(self, video: Reader) -> Indices:
        os.kill(os.getpid(), signal.SIGSEGV)
        raise AssertionError


@dataclass(frozen=True)
class Every:
    """Chooses all frames."""

    def __call__(self, video: Reader) -> Indices:
        return np.arange(video.length)


@dataclass(frozen=True)
class Killed:
    """Dies by SIGKILL, as where memory is short, until it has done so as often as the file ``count`` says."""

    count: str

    def __call__(self, video: Reader) -> Indices:
        with open(self.count, "r+") as file:
            left = int(file.read())
            file.seek(0)
            file.write(str(left - 1))
        if left > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.asarray([7])


@dataclass(frozen=True)
class FailingSampler(ClipSampler):
    """Crashes at videos of one length, as native code does, and hangs at those of another."""

    crashes: int = 0
    hangs: int = 0

    def is_short(self, video: Timeline) -> bool:
        if video.length == self.crashes:
            os.kill(os.getpid(), signal.SIGSEGV)
        if video.length == self.hangs:
            time.sleep(1e6)
        return super().is_short(video)


def hang(video: Reader) -> Indices:
    """Never choose frames."""
    time.sleep(600)
    raise AssertionError
