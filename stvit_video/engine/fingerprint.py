"""What a computed figure depends on, as a hash: results that were kept are used again only where it agrees."""

import hashlib
import json
from pathlib import Path

from torch import nn

from stvit_video import __version__
from stvit_video.data.dataset import TestDataset


def file_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def weights_hash(model: nn.Module) -> str:
    """Return a SHA-256 of a model's weights and their names."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def fingerprint(model: nn.Module, weights: str, dataset: TestDataset, precision: str, seed: int) -> str:
    """Return a hash of what a description depends on: network, ``weights``, list, views, clips and arithmetic.

    Of the video files themselves, only names and labels count.
    """
    content = {
        "version": __version__,
        "model": [str(model.name), model.arguments],
        "weights": weights,
        "videos": [[video.path, video.label] for video in dataset.videos],
        "decoders": dataset.decoding.decoders,
        "views": [repr(dataset.sampler), repr(dataset.views), dataset.decoding.short_side],
        "precision": precision,
        "seed": seed,  # of the random weights, and of those that a checkpoint does not hold
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
