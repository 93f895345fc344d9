"""Videos that could not be read: ``failures.csv``, over all workers, processes and restarts of a run."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path

from stvit_video.common.errors import UsageError
from stvit_video.common.files import has_record
from stvit_video.common.tables import read_csv, to_csv
from stvit_video.data.decode.types import DecodeError


@dataclass(frozen=True)
class Failure:
    """A video or image that could not be read: a row of ``failures.csv``. Two at different times are equal."""

    path: str
    stage: str
    decoder: str
    message: str
    first_seen: str = field(compare=False)

    @classmethod
    def of(cls, error: DecodeError, stage: str, name: str) -> "Failure":
        """Return the row for an error that has just happened, of the video or part of one that ``name`` says."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(name, stage, error.decoder, error.message, now)


def merge(failures: Iterable[Failure]) -> list[Failure]:
    """Return the earliest failure of each path and stage, sorted by path."""
    earliest: dict[tuple[str, str], Failure] = {}
    for failure in sorted(failures, key=lambda failure: failure.first_seen):
        earliest.setdefault((failure.path, failure.stage), failure)
    return [earliest[key] for key in sorted(earliest)]


def failures_csv(failures: Iterable[Failure]) -> bytes:
    """Return the merged failures as a CSV file, which has a header even without rows."""
    return to_csv(map(asdict, merge(failures)), [column.name for column in fields(Failure)])


def read_ledger(path: str | Path) -> list[Failure]:
    """Return the rows of ``failures.csv``; none where there is no file."""
    if not has_record(path):
        return []
    return [Failure(*(row[column.name] for column in fields(Failure))) for row in read_csv(path)]


def check_failures(failures: int, total: int, most: float, what: str) -> None:
    """Raise UsageError where more than the share ``most`` of ``total`` videos failed."""
    if failures > most * total:
        raise UsageError(
            f"{failures} of {total} {what} videos could not be read, more than DATA.MAX_FAILURES {most:g} allows; "
            f"they are listed in failures.csv. Repair or remove them, or raise DATA.MAX_FAILURES."
        )
