"""Clips of a labelled part of a longer video, as if it were a file of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from stvit_video.data.clips.sampling import TOLERANCE_S, mean_step
from stvit_video.data.decode.types import DecodeError, Frames, Indices, Reader, Segments, Times
from stvit_video.data.lists.annotations import Section

SLACK_S = 1.0  # lists give times rounded to seconds: a section may end so much later than its video


class SectionReader(Reader):
    """The frames of a section as a ``Reader``. Raises DecodeError where the video does not reach so far.

    The video is closed by who opened it.
    """

    def __init__(self, video: Reader, section: Section, path: str) -> None:
        self.path, self.video = path, video
        self.start, stop = _frames_of(video, section, path)
        self.length = stop - self.start

    def times(self) -> Times:
        times = self.video.times()[self.start : self.start + self.length]
        return times - times[:1]

    def segments(self) -> Segments:
        inside = [(a - self.start, b - self.start) for a, b in self.video.segments()]
        return [(max(a, 0), min(b, self.length)) for a, b in inside if a < self.length and b > 0]

    def _read(self, indices: Indices) -> Frames:
        return self.video.frames(indices + self.start)

    def check(self) -> None:
        if not self.video.is_whole:  # a video of a hundred sections is read once
            self.video.check()
            self.video.is_whole = True


def _frames_of(video: Reader, section: Section, path: str) -> tuple[int, int]:
    """Return the first frame of a section and the one after its last."""
    given = f"{section.start:g} to {section.stop:g}"
    if section.in_frames:
        start, stop, end, slack, unit = int(section.start), int(section.stop), float(video.length), 1.0, "frames"
    else:
        try:
            times = video.times()
        except DecodeError as error:
            problem = f"its section is given in seconds ({given}), but {error.message}; give DATA.COLUMNS with frames"
            raise DecodeError(path, problem, error.decoder) from error
        if (np.diff(times) < 0).any():
            problem = (
                f"its section is given in seconds ({given}), but its clock goes back; give DATA.COLUMNS with frames"
            )
            raise DecodeError(path, problem, "pyav")
        end, slack, unit = float(times[-1]) + mean_step(times), SLACK_S, "s"
        start, stop = np.searchsorted(times, np.array([section.start, section.stop]) - TOLERANCE_S).tolist()
    if section.may_be_file and end <= section.stop - section.start + slack:
        return 0, video.length
    if section.start >= section.stop:
        raise DecodeError(path, f"its section ({given} {unit}) ends before it begins; correct the list")
    if start >= video.length or section.stop > end + slack:
        raise DecodeError(path, f"its section ({given} {unit}) is outside of the video, which ends at {end:g} {unit}")
    return start, min(max(stop, start + 1), video.length)


@dataclass(frozen=True)
class InSection:
    """A function of a video, called with a section of it. Indices of frames become those of the whole video."""

    function: Callable[[Reader], Any]
    section: Section
    path: str  # for errors

    def __call__(self, video: Reader) -> Any:
        part = SectionReader(video, self.section, self.path)
        found = self.function(part)
        return part.start + found if isinstance(found, np.ndarray) else found


def within(function: Callable[[Reader], Any], section: Section | None, path: str) -> Callable[[Reader], Any]:
    """Return a function, such as a ``Choice``, of ``section`` alone; the same function where there is none."""
    return function if section is None else InSection(function, section, path)
