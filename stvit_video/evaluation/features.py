"""Features of whole lists, computed once: a pass over all videos takes hours, scoring its features seconds.

A cached file is used only where the fingerprint of everything that it depends on agrees.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from torch.utils.data import DataLoader

from stvit_video.evaluation.evaluate import describe_videos
from stvit_video.evaluation.metrics import Predictions
from stvit_video.evaluation.score_cache import fingerprint, read_features, write_features
from stvit_video.runtime.world import World, on_main


@dataclass(frozen=True)
class Describer:
    """A frozen network and the map from clips (B, 3, T, H, W) to a row of features or probabilities each.

    ``kind`` is its name in files; ``weights`` identifies its weights: a hash, or how they were drawn.
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
    """Return the features of the loader's videos, on every process: from ``folder`` where it has them, else computed.

    Prints a line about a cached file, used or not.
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
