"""Timelines of known times: of runs of continuous time, and of windows."""

from stvit_video.data.decode.types import Segments, Times, find_segments


class KnownTimes:
    """A ``Timeline`` of known times (length,) in seconds, which are counted from the first."""

    def __init__(self, times: Times) -> None:
        self.length = len(times)
        self._times = times - times[:1]

    def times(self) -> Times:
        return self._times

    def segments(self) -> Segments:
        return find_segments(self._times)
