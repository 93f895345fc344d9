"""What is kept of a run while it goes on: ``metrics.jsonl``, TensorBoard, and Weights & Biases if asked for."""

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode
from torch.utils.tensorboard import SummaryWriter

from stvit_video.common.errors import UsageError
from stvit_video.common.files import write_atomically


class MetricsLog:
    """One line a row in ``metrics.jsonl``, flushed, and the same in TensorBoard and in ``run`` of Weights & Biases."""

    def __init__(self, folder: Path, step: int, run: Any = None) -> None:
        """Open the log of a run that is at ``step``; rows past it are of work that was lost, and are dropped.

        So is a validation at that step: it comes after its checkpoint, and is done again.
        """
        self.run = run
        path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] < step + (row["split"] == "train")]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self.board = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, epoch: float, split: str, values: dict[str, float]) -> None:
        """Add a row: ``epoch`` counts passes over the training list, with fractions."""
        self.file.write(json.dumps({"step": step, "epoch": round(epoch, 4), "split": split, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(f"{name}/{split}", value, step)
        if self.run is not None:
            self.run.log({f"{name}/{split}": value for name, value in values.items()} | {"epoch": epoch}, step=step)

    def close(self) -> None:
        """Write out what is buffered."""
        self.file.close()
        self.board.close()
        if self.run is not None:
            self.run.finish()


def check_wandb(project: str) -> None:
    """Raise UsageError where a project of Weights & Biases is given and the package is not installed."""
    if project and not _is_installed("wandb"):
        raise UsageError(f"LOG.WANDB {project}: Weights & Biases is not installed; pip install wandb, or LOG.WANDB ''.")


def _is_installed(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def build_log(cfg: CfgNode, folder: Path, step: int) -> MetricsLog:
    """Return the log of a run that is at ``step``; ``check_wandb`` comes first."""
    if not cfg.LOG.WANDB:
        return MetricsLog(folder, step)
    import wandb

    # The same folder is the same run there too, also after an interruption.
    identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    settings = yaml.safe_load(cfg.dump())
    run = wandb.init(project=cfg.LOG.WANDB, name=folder.name, id=identity, resume="allow", dir=folder, config=settings)
    return MetricsLog(folder, step, run)


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
    speed = f", {results['clips_per_second']:.1f} clips/s" if results["clips_per_second"] else ""
    return (
        f"top-1 {results['top1']:.2f} %  top-5 {results['top5']:.2f} %  on {scored} videos "
        f"({100 * results['coverage']:.1f} % coverage, {views['clips']} x {views['crops']} views){speed}"
    )
