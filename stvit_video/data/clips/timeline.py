"""Timelines of known times, and of parts of videos: runs of continuous time, windows, labelled sections."""

from stvit_video.data.decode.types import Segments, Timeline, Times, find_segments


class KnownTimes:
    """A ``Timeline`` of known times (length,) in seconds, which are counted from the first."""

    def __init__(self, times: Times) -> None:
        self.length = len(times)
        self._times = times - times[:1]

    def times(self) -> Times:
        return self._times

    def segments(self) -> Segments:
        return find_segments(self._times)


class Part:
    """The frames ``start`` to before ``stop`` of a video as a ``Timeline`` of its own, which starts at time 0."""

    def __init__(self, video: Timeline, start: int, stop: int) -> None:
        self.video, self.start, self.length = video, start, stop - start

    def times(self) -> Times:
        times = self.video.times()[self.start : self.start + self.length]
        return times - times[:1]

    def segments(self) -> Segments:
        inside = [(a - self.start, b - self.start) for a, b in self.video.segments()]
        return [(max(a, 0), min(b, self.length)) for a, b in inside if a < self.length and b > 0]
