"""How many videos of a list are shorter than a clip."""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stvit_video.data.clips.sampling import Sampling
from stvit_video.data.clips.timeline import KnownTimes
from stvit_video.data.decode.av_file import AV_ERRORS, NOT_OPENED, frame_rate
from stvit_video.data.decode.formats import open_file
from stvit_video.data.decode.frames import Decoding, open_video
from stvit_video.data.decode.index import IndexCache
from stvit_video.data.decode.types import IMAGE_SUFFIXES, DecodeError, decode_errors
from stvit_video.data.lists.annotations import Section, Video

MAX_LOOKS = 64  # files that are opened at the start of a run, for which they may be on slow storage
MAX_BYTES = 64 * 2**20  # of a file that is read whole to count its frames
MAX_FRAMES = 100_000  # to which a header is believed
NAMES = {"train": "training", "test": "test"}


class ShortCount(NamedTuple):
    """How many of the videos ``looked_at`` are shorter than a clip, and a line on them, empty where there are none."""

    short: int
    looked_at: int
    line: str


def count_short(
    videos: Sequence[Video], split: str, samplers: Sequence[Sampling], decoding: Decoding
) -> list[ShortCount]:
    """Count the videos of a list that are shorter than each sampler's clip, among at most MAX_LOOKS of it.

    They are evenly spread over the list; those that cannot be read are left out.
    """
    if all(sampler.frames == 1 for sampler in samplers):
        return [ShortCount(0, 0, "")] * len(samplers)
    places = np.linspace(0, len(videos) - 1, min(len(videos), MAX_LOOKS)).round().astype(int)
    found = []
    for video in (videos[place] for place in places):
        with contextlib.suppress(DecodeError, TypeError, ValueError):  # the others for an answer that is none
            answers = decoding.ask(_IsShort(video.section, tuple(samplers)), video.path)
            found += [[bool(short) for short, _ in zip(one, samplers, strict=True)] for one in answers]
    looked_at = "" if len(found) == len(videos) else " looked at"
    counts = []
    for i, sampler in enumerate(samplers):
        short = sum(one[i] for one in found)
        length, effect = sampler.describe()
        line = f"{short} of {len(found)} {NAMES[split]} videos{looked_at} are shorter than a clip of {length}; {effect}"
        counts.append(ShortCount(short, len(found), line if short else ""))
    return counts


@dataclass(frozen=True)
class _IsShort:
    """Says whether a video is shorter than each sampler's clip; a list of one answer, or none for a large file.

    Files of which the header says that they are twice as long, and labelled sections, are not read for that. It is
    called in a decoding process: even a header can make a decoder hang or crash.
    """

    section: Section | None
    samplers: tuple[Sampling, ...]

    def __call__(self, path: str, cache: IndexCache) -> list[list[bool]]:
        if os.path.isfile(path) and not path.lower().endswith(IMAGE_SUFFIXES):
            length, rate = _read_header(path)
            if self.section is not None:
                length = (self.section.stop - self.section.start) * (1 if self.section.in_frames else rate)
            times = np.arange(max(1, min(round(length), MAX_FRAMES))) / rate
            half = KnownTimes(times[: (len(times) + 1) // 2])
            if self.section is not None or not any(sampler.is_short(half) for sampler in self.samplers):
                return [[sampler.is_short(KnownTimes(times)) for sampler in self.samplers]]
            if os.path.getsize(path) > MAX_BYTES:
                return []
        with open_video(path, cache=cache) as reader:
            return [[sampler.is_short(reader) for sampler in self.samplers]]


def _read_header(path: str) -> tuple[float, float]:
    """Return how many frames the header of a video file states, 0 where it does not, and how many a second."""
    with (
        decode_errors(path, NOT_OPENED, "pyav", AV_ERRORS),
        open_file(path) as container,
    ):
        found = [(0.0, 25.0)]
        for stream in container.streams.video:
            rate = frame_rate(stream)
            seconds = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
            seconds = seconds or (container.duration or 0) / 1e6
            found.append((stream.frames or seconds * rate, rate))
        return max(found)
