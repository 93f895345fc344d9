"""What a job leaves in OUTPUT_DIR/slurm, beside the files of training in OUTPUT_DIR.

``config.yaml`` is the resolved configuration, ``job.json`` how the job was submitted, ``history.jsonl`` the events of
each start, ``failures/`` which task failed where. The last two name the submission by a key of our own, because a SLURM
that is set up anew counts its jobs from 1 again. The logs, ``<job>_<rank>_log.out``, are submitit's.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stvit_video.common.files import write_json


@dataclass(frozen=True)
class TaskFailure:
    """How one task failed. ``problem`` is empty where the task's log says more."""

    submission: str
    start: int
    rank: int
    host: str
    code: int
    problem: str
    time: float


class JobFolder:
    """OUTPUT_DIR/slurm of a run. JSON files are written atomically."""

    def __init__(self, run: str | Path) -> None:
        self.run = Path(run)
        self.path = self.run / "slurm"
        self.config = self.path / "config.yaml"
        self.job = self.path / "job.json"
        self.owner = self.path / "owner.json"  # which start of which submission trains
        self.history = self.path / "history.jsonl"

    def add_event(self, submission: str, start: int, event: str, **more: Any) -> None:
        """Append a line to the history. Called on rank 0 only."""
        row = {"time": time.time(), "submission": submission, "start": start, "event": event, **more}
        with self.history.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def events(self, submission: str) -> list[dict[str, Any]]:
        """Return the history of one submission, oldest first; incomplete lines are left out."""
        lines = self.history.read_text().splitlines() if self.history.is_file() else []
        rows = [row for line in lines if (row := parse_json(line)) is not None]
        return [row for row in rows if row["submission"] == submission]

    def add_failure(self, failure: TaskFailure) -> None:
        path = self.path / "failures" / f"{failure.submission}.{failure.start}.{failure.rank}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, asdict(failure))

    def failures(self, submission: str) -> list[TaskFailure]:
        """Return the failures of a submission's last start that had any, oldest first."""
        paths = self.path.glob(f"failures/{submission}.*.json")
        found = [TaskFailure(**json.loads(path.read_text())) for path in paths]
        last = max((failure.start for failure in found), default=0)
        return sorted((failure for failure in found if failure.start == last), key=lambda failure: failure.time)

    def newest_step(self) -> int:
        """Return the step of the newest checkpoint, 0 where there is none."""
        names = [path.stem.removeprefix("step_") for path in self.run.glob("checkpoints/step_*.pt")]
        return max((int(name) for name in names if name.isdigit()), default=0)


def parse_json(text: str) -> Any:
    """Return the content of JSON text, None where it is incomplete: it may be being written, or cut off by a crash."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, None where it is absent or incomplete."""
    try:
        return parse_json(path.read_text())
    except OSError:
        return None
