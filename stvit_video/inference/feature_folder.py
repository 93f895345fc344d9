"""A folder of features: a file for each video, the record of each, an index of all, and the settings of all.

``records/FILE.json`` is written after the features FILE, which is then known to be whole. ``settings.json`` says what
all features here were made with: others are refused.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.numpy

from stvit_video.common.errors import RunFailure, UsageError, first_line
from stvit_video.common.files import prepare_folder, remove_leftovers, whole_file, write_atomically, write_json
from stvit_video.common.locks import Lock
from stvit_video.common.tables import to_csv
from stvit_video.data.decode.types import DecodeError, natural_order
from stvit_video.data.lists.folders import is_media
from stvit_video.inference.prediction import Window
from stvit_video.inference.predictor import Cut

FORMATS = ("npy", "npz", "safetensors")
COLUMNS = ("path", "file", "fps", "window", "step", "first", "last", "rows", "error")
GONE = [0, 0]  # in place of size and time, where there is no such file
LOCK_S = 5.0  # for which another command in the folder is waited for


@dataclass
class Record:
    """What is known of the features of a video; times are in seconds after its first frame."""

    path: str  # absolute
    file: str  # of the features, from the folder
    source: list[int]  # size and time of change (ns) of the video
    settings: str  # fingerprint
    bytes: int = 0  # of the features' file
    fps: float | None = None
    window: float | None = None
    step: float | None = None
    first: float | None = None  # start of the first window
    last: float | None = None  # end of the last one
    rows: int = 0
    short: int = 0  # windows that are shorter than a clip
    streamed: int = 0
    error: str | None = None
    times: list[tuple[float, float]] = field(default_factory=list)  # start and end of the window of each row


def name_files(paths: Sequence[str], root: str, kind: str) -> list[str]:
    """Return the name of the features' file of each video (absolute path): its path below ``root``, without its ending.

    The ending stays where other videos have the same name without it.
    """
    whole = [os.path.relpath(path, root) for path in paths]
    names = [os.path.splitext(name)[0] if is_media(name) else name for name in whole]
    places: dict[str, list[int]] = {}
    while True:
        places.clear()
        for i, name in enumerate(names):
            places.setdefault(name, []).append(i)
        alike = [i for same in places.values() if len(same) > 1 for i in same if names[i] != whole[i]]
        if not alike:
            return [f"{name}.{kind}" for name in names]
        for i in alike:
            names[i] = whole[i]


class FeatureFolder:
    """The folder ``path``, whose features are made with ``settings`` and are files of a ``kind`` of FORMATS."""

    def __init__(self, path: Path, settings: Mapping[str, Any], kind: str) -> None:
        self.path, self.kind = path, kind
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.fingerprint = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other commands out of the folder. Raises UsageError where it holds anything but such features."""
        prepare_folder(self.path)
        lock = Lock(self.path / ".lock")
        if not lock.take(LOCK_S, lambda holder: f"waiting for {holder} to end, which writes {self.path}"):
            raise UsageError(f"--output {self.path} is being written by {lock.holder()}; wait for its end, or end it.")
        try:
            self._check_settings()
            for folder, _, _ in os.walk(self.path):
                remove_leftovers(Path(folder))
            write_json(self.path / "settings.json", self.settings)
            yield
        finally:
            lock.close()

    def _check_settings(self) -> None:
        path = self.path / "settings.json"
        if not path.exists():
            if others := sorted(name for name in os.listdir(self.path) if name[0] != "."):
                raise UsageError(
                    f"--output {self.path} holds {others[0]} and no settings.json; give a new or an empty folder."
                )
            return
        then = _read_json(path)
        changed = [name for name in {**self.settings, **then} if then.get(name) != self.settings.get(name)]
        if changed:
            shown = ", ".join(f"{name} {then.get(name)} (now {self.settings.get(name)})" for name in changed[:3])
            raise UsageError(
                f"--output {self.path} holds features of other settings: {shown}; give another --output, or those."
            )

    def find(self, path: str, file: str) -> Record | None:
        """Return the record of a video where its features are whole and of the video as it is now; else None.

        Raises UsageError where the file is of another video.
        """
        record = self._read(self._record(file))
        if record is None or record.settings != self.fingerprint:
            return None
        if record.path != path:
            raise UsageError(
                f"--output {self.path} holds {file} of {record.path}, not of {path}; give another --output."
            )
        is_same = _state(path) in (record.source, GONE)  # features outlive their video
        return record if record.error is None and is_same and self._is_whole(record) else None

    def write(self, path: str, file: str, windows: Iterable[Window | DecodeError | None], cut: Cut) -> Record:
        """Write the features of a video, whose ``windows`` are ``cut`` and end with an error or None, and its record.

        A video that cannot be read to its end leaves no features.
        """
        record = Record(path, file, _state(path), self.fingerprint)
        target = self.path / file
        for folder in (target.parent, self._record(file).parent):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            with whole_file(target) as temporary:
                _write_rows(temporary, windows, cut, record)
                if self.kind != "npy":
                    _convert(temporary, self.kind, record.times)
                with open(temporary, "rb") as content:
                    os.fsync(content.fileno())
                record.bytes = temporary.stat().st_size
        except DecodeError as error:
            target.unlink(missing_ok=True)  # of the video as it was before
            record = Record(path, file, record.source, self.fingerprint, error=error.message)
        write_atomically(self._record(file), json.dumps(asdict(record)).encode())
        return record

    def write_index(self, classes: Sequence[str] | None) -> list[Record]:
        """Write index.csv, a row for each video with a record, and index.json, with the times of each row of features.

        ``classes`` are the names of the columns of logits. Returns the records without these times.
        """
        found: list[Record] = []
        about = {"settings": self.settings, **({} if classes is None else {"classes": list(classes)})}
        with whole_file(self.path / "index.json") as temporary, open(temporary, "w") as file:
            file.write(json.dumps(about)[:-1] + ', "videos": {')
            for record in self._records():
                entry = {"path": record.path, "times": record.times, "error": record.error}
                file.write(f"{',' if found else ''}\n{json.dumps(record.file)}: {json.dumps(entry)}")
                found.append(replace(record, times=[]))
            file.write("\n}}\n")
        write_atomically(self.path / "index.csv", to_csv(map(asdict, found), COLUMNS))
        return found

    def _record(self, file: str) -> Path:
        return self.path / "records" / f"{file}.json"

    def _records(self) -> Iterator[Record]:
        found = [str(path) for path in (self.path / "records").rglob("*.json") if not path.name.endswith(".tmp")]
        for path in sorted(found, key=natural_order):
            record = self._read(Path(path))
            if record is not None and (record.error is not None or self._is_whole(record)):
                yield record

    def _is_whole(self, record: Record) -> bool:
        path = self.path / record.file
        return path.is_file() and path.stat().st_size == record.bytes

    def _read(self, path: Path) -> Record | None:
        try:
            return Record(**_read_json(path)) if path.exists() else None
        except (UsageError, TypeError):  # damaged: the video is read again
            return None


def _write_rows(path: Path, windows: Iterable[Window | DecodeError | None], cut: Cut, record: Record) -> None:
    """Write the rows (T, ...) of ``windows`` as a .npy file while they come, and note them. Raises DecodeError."""
    shape: tuple[int, ...] = ()
    with open(path, "wb") as file:
        for window in windows:
            if isinstance(window, DecodeError):
                raise window
            if window is None:
                break
            assert window.span is not None
            row = window.scores.numpy()
            if not np.isfinite(row).all():
                raise RunFailure(f"the features of {record.path} are not finite; use --precision fp32 or other weights")
            if record.first is None:
                record.first = round(window.span.start, 6)
                shape = row.shape
                _write_header(file, (0, *shape))
            file.write(row.astype("<f4").tobytes())
            record.times.append((round(window.span.start, 6), round(window.span.end, 6)))
            record.short += window.is_short
            record.streamed += window.is_streamed
            record.rows, record.last, record.fps = len(record.times), round(window.span.end, 6), window.fps
        file.seek(0)
        _write_header(file, (record.rows, *shape))  # as long as before: NumPy leaves room for more rows
    record.window, record.step = cut(record.fps or 0.0)


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _convert(path: Path, kind: str, times: Sequence[tuple[float, float]]) -> None:
    """Make a .npy file of rows a file of another kind, with the arrays ``features`` and ``times`` (T, 2)."""
    arrays = {"features": np.load(path, mmap_mode="r"), "times": np.array(times)}
    with whole_file(path) as temporary:
        if kind == "npz":
            with open(temporary, "wb") as file:
                np.savez(file, **arrays)
        else:
            safetensors.numpy.save_file(arrays, temporary)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({first_line(error)}); remove it, or give another --output.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} is damaged (it holds no object); remove it, or give another --output.")
    return content


def _state(path: str) -> list[int]:
    """Return size and time of change (ns) of a video, or GONE."""
    try:
        state = os.stat(path)
    except OSError:
        return GONE
    return [state.st_size, state.st_mtime_ns]
