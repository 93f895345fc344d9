"""Which frames a video file shows and when, in the order of display: an ``Index``.

A frame is what FFmpeg's decoder shows. Where the packets of a file prove which these are, a pass over them is enough;
else all of the file is decoded once. Indexes of which either took long are cached.
"""

import hashlib
import json
import os
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from stvit_video.common.files import whole_file
from stvit_video.common.text import printable
from stvit_video.data.decode.av_file import AV_ERRORS, NOT_DECODED, NOT_OPENED, Clock, Survey, frame_rate, open_av
from stvit_video.data.decode.packets import EXACT_CONTAINERS, prove
from stvit_video.data.decode.types import DecodeError, Times, decode_errors, reason

# FLV has no exact index, but its times are right: one can tell from them where a seek landed.
TIMED_CONTAINERS = (*EXACT_CONTAINERS, "flv")
KEPT_FRAMES = 4_000_000  # in the indexes that a process keeps in memory: 64 MB
LONG = 10_000  # frames, from which on a pass over the packets takes long: the file is read whole for it
FORMAT = 2  # of cached files; others are not read


@dataclass(frozen=True, eq=False)
class Index:
    """The frames of a file in the order of display."""

    stream: int  # the number of the video stream
    stamps: NDArray[np.int64]  # (length,) when frames are shown, in units of ``time_base``
    time_base: float  # seconds
    keys: list[int]  # stamps of frames from which decoding may begin; without any, frames are counted from the start
    plain: str  # why decoders that take packets for frames are wrong about this file; empty where they are right
    steady: bool = False  # whether no frame is missing, so that those not referenced can be passed over
    size: tuple[int, int] | None = None  # (width, height) of the first frame as shown, where it was decoded
    damage: str = ""  # what FFmpeg reports about the file, in words, where it was ``decoded``
    decoded: bool = False  # whether all frames were decoded

    def times(self) -> Times:
        """Return the times (length,) in seconds after the first; single ones that are out of line are interpolated."""
        stamps = self.stamps.astype(np.float64)
        before, here, after = stamps[:-2], stamps[1:-1], stamps[2:]
        wrong = (before <= after) & ((here < before) | (here > after))
        stamps[1:-1][wrong] = (before[wrong] + after[wrong]) / 2
        return (stamps - stamps[:1]) * self.time_base


def read_index(path: str, container: InputContainer, stream: VideoStream, decode: bool, cache: "IndexCache") -> Index:
    """Return the index of an open file, which may have been read to its end then. Raises DecodeError.

    With ``decode``, all frames are decoded in any case, to know of damage.
    """
    known = cache.get(path)
    if known is not None and (known.decoded or not decode):
        return known
    with decode_errors(path, NOT_OPENED, "pyav", AV_ERRORS):
        try:
            proof = prove(container, stream)
        except IndexError:
            proof = "has headers that are shorter than they announce"
    number, unit = stream.index, float(stream.time_base or 0)
    if isinstance(proof, str):
        index = _decode_index(path, number, proof, cache.progress)
    elif proof.sure and not decode:
        index = Index(number, np.asarray(proof.stamps, np.int64), unit, proof.keys, proof.plain, proof.steady)
    else:
        index = _decode_index(path, number, proof.plain, cache.progress)
        if np.array_equal(index.stamps, proof.stamps):
            index = replace(index, keys=proof.keys, steady=proof.steady)
        else:
            index = replace(index, plain=index.plain or "has packets that are not shown")
    cache.put(path, index)
    return index


def _decode_index(path: str, number: int, plain: str, progress: Callable[[], None]) -> Index:
    """Decode a file to count its frames."""
    container, stream = open_av(path, number)
    survey = Survey(path, progress)
    stamps: list[int] = []
    known: list[int] = []  # where the container states when a frame is shown
    keys: list[int] = []
    clock = Clock(trusts_pts=container.format.name != "avi")  # which states when to decode a packet only
    unit = float(stream.time_base or 0)
    duration = step = round(1 / (frame_rate(stream) * unit)) if unit else 1
    for frame in survey.frames(container, stream):
        stamp = clock.read(frame)
        if stamp is None:
            stamp = stamps[-1] + duration if stamps else 0
        elif stamp == frame.pts:
            known.append(stamp)
            keys += [stamp] if frame.key_frame else []
        stamps.append(stamp)
        duration = frame.duration or step
    damage = survey.damage(container, stream)
    container.close()
    if not stamps:
        why = f"{NOT_DECODED} ({reason(survey.errors[0])})" if survey.errors else "has no frames"
        raise DecodeError(path, why, "pyav")
    timed = container.format.name in TIMED_CONTAINERS and not damage
    if survey.errors_before and damage and container.format.name in EXACT_CONTAINERS:
        # How many frames a decoder then withholds differs between versions of FFmpeg.
        raise DecodeError(path, f"{NOT_DECODED} from its start on: {damage}", "pyav")
    # A seek is exact where frames are told apart by times that agree with their order.
    exact = timed and len(known) == len(stamps) and all(here < after for here, after in pairwise(known))
    if len(survey.sizes) > 1:
        plain = plain or "changes its size"
    size = next(iter(survey.sizes))
    keys = keys if exact else []
    with decode_errors(path, NOT_DECODED, "pyav", (OverflowError,)):
        numbers = np.asarray(stamps, dtype=np.int64)
    return Index(number, numbers, unit, keys, plain, size=size, damage=damage, decoded=True)


class IndexCache:
    """Indexes of files that have not changed since, in memory, and those that took long in a folder too.

    Without a folder, or where it cannot be written to, only speed is lost.
    """

    def __init__(self, folder: str | None = None, progress: Callable[[], None] = lambda: None) -> None:
        self.folder = Path(folder) if folder else None
        self.progress = progress  # called about once a second while a file is decoded for its index
        self._kept: OrderedDict[str, tuple[list[int], Index]] = OrderedDict()
        self._frames = 0
        self._noted: set[str] = set()

    def get(self, path: str) -> Index | None:
        """Return the index of a file, or None."""
        state = _state(path)
        if path not in self._kept:
            self._load(path)
        known, index = self._kept.get(path, (None, None))
        return index if known == state else None

    def put(self, path: str, index: Index) -> None:
        """Keep the index of a file."""
        state = _state(path)
        self._keep(path, state, index)
        if self.folder is None or not (index.decoded or len(index.stamps) >= LONG):
            return
        fields = {**index.__dict__, "path": path, "state": state, "format": FORMAT}
        arrays = {"stamps": fields.pop("stamps"), "keys": np.asarray(fields.pop("keys"), np.int64)}
        try:
            self.folder.mkdir(exist_ok=True)
            with whole_file(self._file(path)) as temporary:
                save_file(arrays, temporary, {"fields": json.dumps(fields)})
        except OSError:  # no space, read-only, or the run's folder is gone
            self.folder = None

    def note(self, kind: str, text: str) -> None:
        """Print a remark about a file, once per kind: once per folder, or without one per process."""
        if kind in self._noted:
            return
        self._noted.add(kind)
        if self.folder is not None:
            try:
                self.folder.mkdir(exist_ok=True)
                (self.folder / f"{kind}.txt").open("x").write(text)
            except FileExistsError:
                return
            except OSError:
                pass
        print(f"note: {printable(text)}", file=sys.stderr, flush=True)

    def _file(self, path: str) -> Path:
        assert self.folder is not None
        name = hashlib.sha256(os.path.abspath(path).encode(errors="surrogateescape")).hexdigest()
        return self.folder / f"{name[:32]}.safetensors"

    def _load(self, path: str) -> None:
        if self.folder is None or not self._file(path).is_file():  # a pipe would hold this up
            return
        try:
            with safe_open(self._file(path), "np") as stored:
                fields = json.loads(stored.metadata()["fields"])
                fields["size"] = fields["size"] and tuple(fields["size"])
                if fields.pop("format") != FORMAT or fields.pop("path") != path:
                    return
                state = fields.pop("state")
                stamps, keys = stored.get_tensor("stamps"), stored.get_tensor("keys")
                index = Index(stamps=stamps, keys=keys.tolist(), **fields)
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError):  # none, or a torn one
            return
        if _is_whole(index, keys):
            self._keep(path, state, index)

    def _keep(self, path: str, state: list[int], index: Index) -> None:
        if path in self._kept:
            self._frames -= len(self._kept.pop(path)[1].stamps)
        self._kept[path] = state, index
        self._frames += len(index.stamps)
        while self._frames > KEPT_FRAMES and len(self._kept) > 1:
            self._frames -= len(self._kept.popitem(last=False)[1][1].stamps)


def _is_whole(index: Index, keys: NDArray[np.int64]) -> bool:
    """Say whether what was read has the kinds that an index has; anything may lie in a folder."""
    kinds = {"stream": int, "time_base": float, "plain": str, "steady": bool, "damage": str, "decoded": bool}
    sides = (1, 1) if index.size is None else index.size
    return (
        index.stamps.dtype == keys.dtype == np.int64
        and index.stamps.ndim == keys.ndim == 1
        and 0 < len(index.stamps) >= len(keys)
        and all(type(getattr(index, name)) is kind for name, kind in kinds.items())
        and len(sides) == 2
        and all(type(side) is int and side > 0 for side in sides)
    )


def _state(path: str) -> list[int]:
    """Return what changes with a file's content: its size and its time."""
    try:
        found = os.stat(path)
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns]
