"""What a person sees while a run goes on, and what is kept of it: progress, ``metrics.jsonl``, TensorBoard."""

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from stvit_video.engine.checkpoint import write_atomically

PLAIN_LINE_SECONDS = 10.0


class Progress:
    """One progress bar on a terminal, a plain line now and then elsewhere; silent where not ``enabled``."""

    def __init__(self, title: str, total: int, done: int = 0, *, enabled: bool = True) -> None:
        self.title, self.total, self.done, self.first = title, total, done, done
        self.started = self.last_line = time.monotonic()
        on_terminal = sys.stderr.isatty()
        self.plain = enabled and not on_terminal
        self.bar = tqdm(total=total, desc=title, initial=done, disable=not (enabled and on_terminal), leave=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def advance(self, text: str) -> None:
        """Note one more step done, ``text`` saying how it goes."""
        self.done += 1
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        now = time.monotonic()
        if self.plain and (now - self.last_line >= PLAIN_LINE_SECONDS or self.done == self.total):
            self.last_line = now
            left = (now - self.started) / (self.done - self.first) * (self.total - self.done)
            print(f"{self.title} {self.done}/{self.total}  {text}  eta {clock(left)}", flush=True)

    def note(self, text: str) -> None:
        """Print a line of its own beside the bar."""
        if self.plain:
            print(text, flush=True)
        elif not self.bar.disable:
            self.bar.write(text, file=sys.stdout)


def clock(seconds: float) -> str:
    """Return seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class MetricsLog:
    """One line a row in ``metrics.jsonl``, flushed, and the same in TensorBoard."""

    def __init__(self, folder: Path, step: int) -> None:
        """Open the log of a run that is at ``step``; rows past it are of work that was lost, and are dropped."""
        path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self.board = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, epoch: float, split: str, values: dict[str, float]) -> None:
        """Add a row: ``epoch`` counts passes over the training list, with fractions."""
        self.file.write(json.dumps({"step": step, "epoch": round(epoch, 4), "split": split, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(f"{name}/{split}", value, step)

    def close(self) -> None:
        """Write out what is buffered."""
        self.file.close()
        self.board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a ``metrics.jsonl``; a last line that was cut short is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def describe_results(results: dict[str, Any]) -> str:
    """Return the line that a run ends with."""
    views, scored = results["views"], f"{results['scored']} of {results['videos']}"
    return (
        f"top-1 {results['top1']:.2f} %  top-5 {results['top5']:.2f} %  on {scored} videos "
        f"({100 * results['coverage']:.1f} % coverage, {views['clips']} x {views['crops']} views), "
        f"{results['clips_per_second']:.1f} clips/s"
    )
