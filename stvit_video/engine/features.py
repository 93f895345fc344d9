"""Descriptions of whole lists, computed once: a pass over all videos takes hours, scoring what it gives takes seconds.

A cache file is used again only where the fingerprint of everything that it depends on agrees.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stvit_video.data.ledger import Failure
from stvit_video.distributed import World, on_main
from stvit_video.engine.checkpoint import write_atomically
from stvit_video.engine.evaluate import describe_videos
from stvit_video.engine.fingerprint import fingerprint
from stvit_video.engine.metrics import Predictions

TENSORS = ("scores", "labels", "indices")


@dataclass(frozen=True)
class Describer:
    """A frozen network and the map from clips (B, 3, T, H, W) to what is kept of them, a row each.

    ``kind`` is its name in files; ``weights`` says where its weights are from, as exactly as can be.
    """

    kind: str
    network: nn.Module
    weights: str
    describe: Callable[[Tensor], Tensor]


def pooled_features(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the map from clips (B, 3, T, H, W) to the mean (B, C) of the tokens that would enter the classifier."""
    return lambda clips: model.forward_features(clips).mean(dim=1)  # type: ignore[operator]


def frame_probabilities(image_model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the map from clips (B, 3, T, H, W) to class probabilities (B, classes), averaged over the frames."""

    def describe(clips: Tensor) -> Tensor:
        frames = clips.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # (B*T, 3, 1, H, W)
        probabilities = image_model(frames).float().softmax(dim=1)
        return probabilities.unflatten(0, (len(clips), -1)).mean(dim=1)

    return describe


def describe_list(
    describer: Describer, split: str, loader: DataLoader, folder: Path, world: World, precision: str, seed: int
) -> Predictions:
    """Describe the videos of the loader's list, on every process, or take it from ``folder`` where that has it.

    Says in one line what became of a file that was there.
    """
    path = folder / f"{split}_{describer.kind}.safetensors"
    dataset = loader.dataset
    key = fingerprint(describer.network, describer.weights, dataset, precision, seed)  # type: ignore[arg-type]
    found, said = on_main(world, lambda: read_features(path, key))
    if said and world.is_main:
        print(said, flush=True)
    if found is not None:
        return found
    describer.network.to(world.device).eval()
    title = f"{split} list, {describer.kind}"
    described = describe_videos(describer.describe, loader, world, precision, title)
    describer.network.cpu()
    on_main(world, lambda: write_features(path, key, described))
    return described


def write_features(path: Path, key: str, described: Predictions) -> None:
    """Write a description with its failures, complete or not at all."""
    failures = [dict(asdict(failure), state=_file_state(failure.path)) for failure in described.failures]
    record = json.dumps({"total": described.total, "failures": failures})
    tensors = {name: getattr(described, name).contiguous() for name in TENSORS}
    metadata = {"fingerprint": key, "record": record, "checksum": _checksum(tensors, record)}
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, safetensors.torch.save(tensors, metadata=metadata))


def read_features(path: Path, key: str) -> tuple[Predictions | None, str]:
    """Return the description that ``path`` holds for ``key``, or None, and a line about a file that is there.

    A file that is damaged, of another fingerprint, or older than a change to a video that had failed is not used.
    """
    if not path.exists():
        return None, ""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in TENSORS}
        whole = metadata["checksum"] == _checksum(tensors, metadata["record"])
        record: dict[str, Any] = json.loads(metadata["record"]) if whole else {}
    except (SafetensorError, OSError, KeyError) as error:
        return None, f"{path} is damaged ({str(error).splitlines()[0]}); computing it again"
    if not whole:
        return None, f"{path} is damaged (checksum); computing it again"
    if metadata["fingerprint"] != key:
        return None, f"{path} is of another checkpoint, list or setting; computing it again"
    if any(_file_state(row["path"]) != row.pop("state") for row in record["failures"]):
        return None, f"{path}: videos that could not be read have changed since; computing it again"
    failures = [Failure(**row) for row in record["failures"]]
    return Predictions(**tensors, total=record["total"], failures=failures), f"{path} is used again"


def _checksum(tensors: dict[str, Tensor], record: str) -> str:
    digest = hashlib.sha256(record.encode())
    for name in TENSORS:
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _file_state(path: str) -> list[int] | None:
    """Return size and time of change (ns) of a file, None where there is none."""
    try:
        state = Path(path).stat()
    except OSError:
        return None
    return [state.st_size, state.st_mtime_ns]
