"""The folder of a run: whose it is, what it holds, and what may be written to it."""

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Container, Iterable, Mapping
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from fvcore.common.config import CfgNode

from stvit_video.common.errors import UsageError
from stvit_video.common.files import remove_leftovers, write_atomically, write_json
from stvit_video.common.locks import Lock
from stvit_video.common.tables import to_csv
from stvit_video.config.schema import complete, flatten
from stvit_video.config.yaml_text import parse_yaml, read_text
from stvit_video.data.failures import Failure, failures_csv
from stvit_video.runs.checkpoint import list_checkpoints

# Keys that may change between a run and its continuation: a step sees the same clips. Those of Trainer.setup change how
# sums are rounded, and with them how videos are paired for mixing and what dropout draws; the others change neither.
FREE_KEYS = (
    "MODE", "OUTPUT_DIR", "OVERWRITE", "DEVICE", "COMPILE", "DATA.WORKERS", "DATA.GENERATE", "DATA.MAX_FAILURES",
    "DATA.DEADLINE_S", "DATA.TRANSFORM_ON", "TRAIN.ACCUMULATE", "TRAIN.RESUME", "TRAIN.MAX_BAD_STEPS",
    "MODEL.GRAD_CHECKPOINTING",
    "CHECKPOINT.EVERY_STEPS", "CHECKPOINT.EVERY_MINUTES", "CHECKPOINT.KEEP", "LOG.WANDB", "PARALLEL.STRATEGY",
    "PARALLEL.TIMEOUT_S", "DATA.SHORT_VIDEOS",  # a checkpoint says what was chosen
    "TRANSFER.NEIGHBOURS", "TRANSFER.TEMPERATURE", "TRANSFER.WEIGHT_DECAY", "TRANSFER.RANDOM_BASELINE",
    "TRANSFER.FINETUNE",
)  # fmt: skip
PATH_KEYS = ("DATA.ROOT", "MODEL.INIT")  # the same place may be written in two ways
ROOT_PATH_KEYS = ("DATA.TRAIN_LIST", "DATA.VAL_LIST", "DATA.TEST_LIST", "DATA.CLASSES")  # these start from DATA.ROOT
# What each mode writes and replaces; training writes TRAINING_FILES too. The cached features of a transfer are kept:
# each file carries a fingerprint of what it was computed from.
TEST_FILES = (
    "results.json", "confusion.png", "average_precision.png", "failures.csv", "per_class.csv", "predictions.csv",
    "scores.npy",
)  # fmt: skip
RESULT_FILES = {
    "train": TEST_FILES,
    "test": TEST_FILES,
    "transfer": ("transfer.json", "transfer.png", "failures.csv", "load_report.json"),
}
TRAINING_FILES = (
    "metrics.jsonl", "curves.png", "model.safetensors", "load_report.json", "config.yaml", "environment.json",
)  # fmt: skip
PACKAGES = ("torch", "torchvision", "pytorchvideo", "decord", "decord2", "av", "fvcore", "numpy", "submitit")
LOCK = ".lock"
LEFTOVER = re.compile(r"\.config\.yaml(\..{8})?\.tmp")  # of a run that was killed as it began
LOCK_S = 30  # longer than the processes of a killed start need to end


class RunFolder:
    """Paths inside OUTPUT_DIR, and the rules for using it. Raises UsageError where the folder cannot be used."""

    def __init__(self, path: str | Path, settings: Mapping[str, Any] | None = None) -> None:
        """``settings`` is the resolved configuration of a run that wants to write here; None to read only."""
        self.path = Path(path)
        self.settings = settings or {}
        self.checkpoints = self.path / "checkpoints"
        self.results = self.path / "results.json"
        self.transfer = self.path / "transfer.json"
        self.weights = self.path / "model.safetensors"
        self.best_weights = self.checkpoints / "best.safetensors"
        self.partial_scores = self.checkpoints / "test_parts"  # of an interrupted test
        self._lock: Lock | None = None
        self.unlock: Callable[[], object] = lambda: None

    @cached_property
    def config_text(self) -> str:
        """The settings as YAML."""
        return yaml.safe_dump(dict(self.settings))

    def is_finished(self) -> bool:
        """Say whether the run here was trained and tested."""
        return self.results.is_file() and self.weights.is_file()

    def read_results(self) -> dict[str, Any]:
        """Return what ``results.json`` holds. Raises UsageError where that is no results."""
        try:
            results = json.loads(self.results.read_text())
        except (ValueError, RecursionError):
            results = None
        if not isinstance(results, dict) or not results.keys() >= {"views", "scored", "videos", "coverage"}:
            raise UsageError(f"{self.results} is damaged; restore it, or give another OUTPUT_DIR, or OVERWRITE True.")
        return results

    def has_progress(self) -> bool:
        """Say whether there is anything here that a run would lose."""
        if self.results.exists() or self.weights.exists() or list_checkpoints(self.checkpoints):
            return True
        if not self.transfer.exists():
            return False
        try:
            content = json.loads(self.transfer.read_text())
        except (ValueError, RecursionError):
            return True  # not ours to replace unasked
        # The rows that stand before fine-tuning are quickly made again.
        return not isinstance(content, dict) or content.get("complete") is not False

    def check(self) -> None:
        """Make sure that the run may write here; nothing is changed."""
        path = self.path
        mode = self.settings["MODE"]
        self._check_place()
        recorded = self.recorded_config()
        if recorded is None or self.settings["OVERWRITE"] or not self.has_progress():
            return
        problem, remedy = "", ""
        if mode == "train":
            # What lies in DATA.ROOT is compared by its lists, see ``check_continued``.
            if changed := describe_changes(recorded, self.settings, (*FREE_KEYS, "DATA.ROOT")):
                raise UsageError(f"OUTPUT_DIR {path} holds a run with other settings: {changed}; {self.way_on()}")
            if self.settings["TRAIN"]["RESUME"] == "never" and list_checkpoints(self.checkpoints):
                problem, remedy = "checkpoints, and TRAIN.RESUME is never", "set that to auto to continue, "
            elif self.results.exists() and not self.weights.exists():
                problem = "results of a test, not of a training run"
        else:
            results = [name for name in RESULT_FILES[mode] if (path / name).exists()]
            if results and (mode == "transfer" or self.results.exists()):
                problem = f"results ({', '.join(results)})"
                remedy = f"set MODEL.INIT {self.settings['MODEL']['INIT'] or self.weights} and "
        if problem:
            raise UsageError(f"OUTPUT_DIR {path} holds {problem}; {remedy}give another OUTPUT_DIR, or OVERWRITE True.")

    def way_on(self, *, new_head: bool = False) -> str:
        """Return how to train with other data or settings than the run here; ``new_head`` for other classes."""
        weights = next((file for file in (self.weights, *list_checkpoints(self.checkpoints)) if file.is_file()), None)
        # Else parts of the weights would start anew.
        needed = {"NEW_HEAD": new_head, "INIT_DEPTH": None, "INIT_MOTION": 0.0}
        model = self.settings.get("MODEL", {})
        keys = "".join(f" MODEL.{key} {value}" for key, value in needed.items() if model.get(key, value) != value)
        start = f" (with MODEL.INIT {weights}{keys} to go on from its weights, in a schedule of its own)"
        return f"give another OUTPUT_DIR{start if weights else ''}, or OVERWRITE True."

    def _check_place(self) -> None:
        """Raise UsageError where the folder is no run's and holds something."""
        path = self.path
        if path.exists() and not path.is_dir():
            raise UsageError(f"OUTPUT_DIR {path} is a file; give a folder.")
        names = {file.name for file in path.iterdir()} if path.is_dir() and self.recorded_config() is None else set()
        if any(not LEFTOVER.fullmatch(name) and not name.startswith(LOCK) for name in names):
            if "config.yaml" in names:
                raise UsageError(
                    f"OUTPUT_DIR {path} has a config.yaml that is not a run's, or is damaged; restore it, or give "
                    f"another OUTPUT_DIR."
                )
            raise UsageError(f"OUTPUT_DIR {path} holds files that are not a run's; give an empty or new folder.")

    def describe_start(self) -> str:
        """Return in one line what a run that is not refused finds here, and does."""
        checkpoints = list_checkpoints(self.checkpoints)
        if not self.has_progress():
            return f"a run begins in {self.path}, which {'has no results' if self.path.exists() else 'is new'}"
        if self.settings["OVERWRITE"]:
            return f"a run replaces what {self.path} holds (OVERWRITE True)"
        if self.settings["MODE"] != "train":
            return f"a run adds its results to {self.path}"
        if self.is_finished():
            return f"{self.path} is finished: a run prints its results and ends"
        return f"a run continues in {self.path} from {checkpoints[0].name if checkpoints else 'its beginning'}"

    def claim(self) -> None:
        """Make the folder this run's, clearing what it replaces; ``check`` comes first."""
        self.check()
        mode, overwrite = self.settings["MODE"], self.settings["OVERWRITE"]
        if overwrite or not self.has_progress():
            for name in RESULT_FILES[mode] + (TRAINING_FILES if mode == "train" else ()):
                (self.path / name).unlink(missing_ok=True)
            if mode == "train":
                shutil.rmtree(self.checkpoints, ignore_errors=True)
                for events in self.path.glob("events.out.tfevents.*"):
                    events.unlink()
        if overwrite and mode == "test":
            shutil.rmtree(self.partial_scores, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.path)
        # A repeated test or transfer records its new settings, but never replaces those of a training run.
        renewed = mode != "train" and (self.recorded_config() or {}).get("MODE") == mode
        if renewed or not (self.path / "config.yaml").exists():  # first of all files: it marks the folder
            write_atomically(self.path / "config.yaml", self.config_text.encode())
        if renewed or not (self.path / "environment.json").exists():
            write_json(self.path / "environment.json", environment())
        self.checkpoints.mkdir(exist_ok=True)

    def lock(self) -> None:
        """Keep other processes from the folder until this one ends; wait LOCK_S seconds for another one's end.

        What is then seen in the folder stays so. A folder that is made for that is removed unless it is claimed.
        """
        if self._lock is not None or (self.path.is_dir() and not os.access(self.path, os.W_OK)):  # nobody writes there
            return
        if not (self.path / LOCK).exists():  # else another process may be clearing it
            with contextlib.suppress(FileNotFoundError):  # or removing it
                self._check_place()
        made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        before = self._results_time()
        lock = Lock(self.path / LOCK)
        if not lock.take(LOCK_S, lambda holder: f"waiting for {holder} to end, which still writes {self.path}"):
            raise UsageError(
                f"OUTPUT_DIR {self.path} is being written by {lock.holder()}; wait for its end, end it, or give "
                f"another OUTPUT_DIR."
            )
        self._lock = lock
        self.unlock = weakref.finalize(self, _leave, lock, self.path, made, os.getpid())
        if self.settings["OVERWRITE"] and self._results_time() != before:
            raise UsageError(
                f"OUTPUT_DIR {self.path} was finished by another process that this one waited for; give each its own, "
                f"or start this one again: OVERWRITE True then replaces those results."
            )

    def _results_time(self) -> list[int]:
        """Return when the results were written that are here."""
        times = []
        for path in (self.results, self.transfer):
            with contextlib.suppress(FileNotFoundError):  # another process may be clearing them
                times.append(path.stat().st_mtime_ns)
        return times

    def recorded_config(self) -> dict[str, Any] | None:
        """Return the configuration of the run that owns the folder, None where no run does."""
        try:
            recorded = parse_yaml(read_text(self.path / "config.yaml"))
        except (OSError, ValueError, yaml.YAMLError):
            return None
        return recorded if isinstance(recorded, dict) and {"MODEL", "DATA", "OUTPUT_DIR"} <= recorded.keys() else None

    def write_table(self, name: str, rows: list[dict[str, object]]) -> None:
        """Write rows as a CSV file of that name, columns as in the first."""
        write_atomically(self.path / name, to_csv(rows, list(rows[0]) if rows else []))

    def write_failures(self, failures: Iterable[Failure]) -> None:
        """Write ``failures.csv``, each video once a stage; a header alone where none failed."""
        write_atomically(self.path / "failures.csv", failures_csv(failures))


def _leave(lock: Lock, path: Path, made: list[Path], process: int) -> None:
    """Release a folder's lock, and remove what was ``made`` of a folder that is still no run's."""
    if os.getpid() != process:  # a fork inherits the finalizer but not the lock
        return
    claimed = (path / "config.yaml").exists()
    lock.close()
    with contextlib.suppress(OSError):  # another process may use it by now
        for folder in made if not claimed else ():
            folder.rmdir()


def environment() -> dict[str, Any]:
    """Return what figures were measured in: the command, versions of packages, the machine, the state of the source."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    git = None  # where this package does not run from a checkout
    options: dict[str, Any] = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "timeout": 10}
    checkout = Path(__file__).parents[2] / ".git"  # a repository around an installed package is another's
    command = ["git", "-c", "core.fsmonitor=false"]  # which settings may make a program
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        checkout.stat()
        commit = subprocess.run([*command, "rev-parse", "HEAD"], check=True, **options).stdout.strip()
        changed = subprocess.run([*command, "status", "--porcelain"], **options).stdout.splitlines()
        git = {"commit": commit, "changed_files": len(changed)}
    return {
        "command": [sys.executable, *sys.orig_argv[1:]],
        "python": platform.python_version(),
        "packages": versions,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "git": git,
    }


def build_run_folder(cfg: CfgNode) -> RunFolder:
    """Return the folder of the configured run, OUTPUT_DIR."""
    return RunFolder(cfg.OUTPUT_DIR, json.loads(json.dumps(cfg)))


def describe_changes(recorded: Mapping[str, Any], current: Mapping[str, Any], free: Container[str] = FREE_KEYS) -> str:
    """Return which settings differ, but for ``free`` ones; "" for none."""

    def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
        values = complete(flatten(settings))
        root = os.path.abspath(values.get("DATA.ROOT") or "")
        places = {key: os.path.abspath(values[key]) for key in PATH_KEYS if values.get(key)}
        named = {
            key: os.path.relpath(os.path.join(root, values[key]), root) for key in ROOT_PATH_KEYS if values.get(key)
        }
        return {**dict.fromkeys(PATH_KEYS, ""), **values, **places, **named}

    old, new = plain(recorded), plain(current)
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key) and key not in free]
    shown = ", ".join(f"{key} {old.get(key)!r} (now {new.get(key)!r})" for key in changed[:5])
    return f"{shown} ..." if len(changed) > 5 else shown
