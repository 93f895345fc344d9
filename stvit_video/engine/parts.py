"""The scores of a long test so far: kept now and then, so that the same command goes on where it was interrupted."""

import shutil
import time
import warnings
from pathlib import Path

from torch import Tensor

from stvit_video.engine.checkpoint import DAMAGED, pack, read_checked, write_atomically

Row = tuple[Tensor, Tensor, Tensor]  # of a batch: list positions (videos,), labels (videos,), scores (videos, columns)


class Parts:
    """A folder of scored batches, written by each process for itself.

    ``key`` is the fingerprint of all that the scores depend on; parts of another are not used. Batches in which a video
    failed are not kept: it may be mended until the next start.
    """

    def __init__(self, folder: Path, key: str, rank: int, every_s: float = 30.0) -> None:
        self.folder, self.key, self.rank, self.every_s = folder, key, rank, every_s
        self.waiting: list[Row] = []
        self.written = time.monotonic()

    def read(self) -> list[Row]:
        """Return what was kept, each batch once; files that are damaged or of another key are passed over."""
        rows: dict[int, Row] = {}
        for path in sorted(self.folder.glob("*.pt")):
            try:
                content = read_checked(path)
                if content["key"] == self.key:
                    rows.update({int(row[0][0]): row for row in content["rows"]})
            except (*DAMAGED, KeyError, TypeError, IndexError):
                warnings.warn(f"{path} is damaged; its videos are scored again", stacklevel=2)
        return list(rows.values())

    def add(self, row: Row) -> None:
        """Take in a batch, and write what is waiting if the last time is long ago."""
        self.waiting.append(row)
        if time.monotonic() - self.written >= self.every_s:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting."""
        if self.waiting:
            self.folder.mkdir(exist_ok=True)
            packed = pack({"key": self.key, "rows": self.waiting})
            write_atomically(self.folder / f"{time.time_ns()}_{self.rank}.pt", packed)
            self.waiting = []
        self.written = time.monotonic()

    def clear(self) -> None:
        """Delete the folder: the test is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)
