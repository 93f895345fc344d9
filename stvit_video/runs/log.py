"""The log of a run: ``metrics.jsonl``, TensorBoard, and optionally Weights & Biases."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from stvit_video.common.files import has_record, open_to_append, write_atomically


class MetricsLog:
    """Writes rows to ``metrics.jsonl``, one per line, to TensorBoard, and to a ``run`` of Weights & Biases."""

    def __init__(self, folder: Path, step: int, run: Any = None) -> None:
        """Open the log of a run that continues at ``step``, and drop the rows after it, whose work was lost."""
        self.run, path = run, folder / "metrics.jsonl"
        # A validation at ``step`` is dropped too: it follows the checkpoint and is repeated.
        kept = [row for row in read_metrics(path) if row["step"] < step + (row["split"] == "train")]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self.file = open_to_append(path)
        self.board = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, epoch: float, split: str, values: dict[str, float]) -> None:
        """Add a row; ``epoch`` counts passes over the training list, with fractions."""
        self.file.write(json.dumps({"step": step, "epoch": round(epoch, 4), "split": split, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(f"{name}/{split}", value, step)
        if self.run is not None:
            self.run.log({f"{name}/{split}": value for name, value in values.items()} | {"epoch": epoch}, step=step)

    def close(self) -> None:
        """Flush and close all files."""
        self.file.close()
        self.board.close()
        if self.run is not None:
            self.run.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a ``metrics.jsonl``, without a last line that is incomplete."""
    rows = []
    with contextlib.suppress(json.JSONDecodeError):
        for line in path.read_text(encoding="utf-8").splitlines() if has_record(path) else ():
            rows.append(json.loads(line))
    return rows


def describe_results(results: dict[str, Any]) -> str:
    """Return the line that a run prints at its end."""
    views, scored = results["views"], f"{results['scored']} of {results['videos']}"
    short = f", {results['short_videos']} shorter than a clip" if results.get("short_videos") else ""
    speed = f", {results['clips_per_second']:.1f} clips/s" if results["clips_per_second"] else ""
    if "map" in results:
        without = results["classes_without_positives"]
        accuracy = f"mAP {results['map']:.2f} %"
        if without:
            rest = f"{results['map_with_positives']:.2f} % over the others"
            accuracy += f" ({without} class{'es' if without > 1 else ''} without a positive video counted as 0; {rest})"
    else:
        accuracy = f"top-1 {results['top1']:.2f} %  top-5 {results['top5']:.2f} %"
        if "macro_f1" in results:  # older results have none
            without = results["classes_without_videos"]
            rest = f" ({without} class{'es' if without > 1 else ''} without a video left out)" if without else ""
            accuracy += f"  macro top-1 {results['macro_top1']:.2f} %  macro F1 {results['macro_f1']:.2f} %{rest}"
    return (
        f"{accuracy}  on {scored} videos "
        f"({100 * results['coverage']:.1f} % coverage, {views['clips']} x {views['crops']} views{short}){speed}"
        f"{'; ' if 'weights' in results else ''}{describe_weights(results)}"
    )


def describe_weights(about: Mapping[str, Any]) -> str:
    """Return which weights results are of, in some words; "" where they do not say it."""
    kind = about.get("weights", "")
    if "weights_step" not in about:
        return f"weights of {kind}" if kind else ""
    score = f", {about['weights_validation']:.2f} % there" if "weights_validation" in about else ""
    words = {"best": "best weights in validation", "average": "moving average of the weights"}
    return f"{words.get(kind, f'{kind} weights')} (step {about['weights_step']}{score})"
