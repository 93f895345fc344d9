"""What a job leaves in its run folder, beside what training leaves there: OUTPUT_DIR/slurm.

``config.yaml`` is the resolved configuration that the job runs, ``job.json`` how it was submitted, ``history.jsonl``
what became of each of its starts, and ``failures/`` which of its tasks failed where. Both name the submission by a key
of ours: SLURM counts its jobs from 1 again when it is set up anew. Logs are submitit's: ``<job>_<rank>_log.out``.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Failure:
    """One task's end. ``problem`` is empty where its log says more."""

    submission: str
    start: int
    rank: int
    host: str
    code: int
    problem: str
    time: float


class JobFolder:
    """OUTPUT_DIR/slurm of a run. Readers find whole files, or none."""

    def __init__(self, run: str | Path) -> None:
        self.run = Path(run)
        self.path = self.run / "slurm"
        self.config = self.path / "config.yaml"
        self.job = self.path / "job.json"
        self.owner = self.path / "owner.json"
        self.history = self.path / "history.jsonl"

    def write(self, path: Path, content: Any) -> None:
        """Write a JSON file so that nobody reads half of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(temporary, path)

    def note(self, submission: str, start: int, event: str, **more: Any) -> None:
        """Add a line to the history. Rank 0 alone does."""
        row = {"time": time.time(), "submission": submission, "start": start, "event": event, **more}
        with self.history.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def events(self, submission: str) -> list[dict[str, Any]]:
        """Return the history of one submission, oldest first."""
        if not self.history.is_file():
            return []
        rows = []
        for line in self.history.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:  # cut short by a power cut, or being written
                continue
        return [row for row in rows if row["submission"] == submission]

    def add_failure(self, failure: Failure) -> None:
        """Keep a task's failure."""
        path = self.path / "failures" / f"{failure.submission}.{failure.start}.{failure.rank}.json"
        self.write(path, asdict(failure))

    def failures(self, submission: str) -> list[Failure]:
        """Return the failures of a submission's last start that had any, by time: the others follow from the first."""
        found = [Failure(**json.loads(path.read_text())) for path in self.path.glob(f"failures/{submission}.*.json")]
        last = max((failure.start for failure in found), default=0)
        return sorted((failure for failure in found if failure.start == last), key=lambda failure: failure.time)

    def newest_step(self) -> int:
        """Return the step of the newest checkpoint, 0 where there is none."""
        names = [path.stem.removeprefix("step_") for path in self.run.glob("checkpoints/step_*.pt")]
        return max((int(name) for name in names if name.isdigit()), default=0)
