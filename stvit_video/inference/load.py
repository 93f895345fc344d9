"""A trained model out of what a run left, its folder or a file of weights, with how it takes its clips."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from torch import nn

from stvit_video.common.errors import UsageError, nearest
from stvit_video.common.hub import check_exists, is_hub_address, pull
from stvit_video.config.clip_settings import FREE_KEYS, TEST_KEYS, TRAINING_KEYS, config_beside, read_views
from stvit_video.config.load import default_config, load_config, override, parse_overrides
from stvit_video.config.schema import value_of
from stvit_video.models import create_model, load_pretrained
from stvit_video.models.weights.files import read_metadata, read_state_dict
from stvit_video.runs.folder import RunFolder
from stvit_video.runs.weights import check_all_loaded


@dataclass(frozen=True)
class Trained:
    """A model with its weights, its classes' names, and the configuration that says how it takes its clips."""

    model: nn.Module
    classes: list[str]
    cfg: CfgNode
    weights: Path
    note: str = ""  # what had to be assumed, for the user to know


def open_checkpoint(path: str | Path, overrides: Sequence[str] = ()) -> Trained:
    """Load the model of a run's folder, of a ``.safetensors`` that a run or an export left, or ``hf://OWNER/NAME``.

    The run's ``config.yaml``, in the folder or beside the file, says how clips are taken, else the file itself, else
    defaults: ``note`` then says so. ``overrides`` are ``KEY=VALUE`` words on top, for FREE_KEYS. Raises UsageError
    where there are no weights, or they do not say what model they are of.
    """
    weights, note = find_weights(pull(str(path)) if is_hub_address(str(path)) else Path(path))
    read_state_dict(weights)  # what is wrong with a file is said in its own words
    metadata = read_metadata(weights)
    if not metadata:
        raise UsageError(
            f"Checkpoint {weights} does not say which model it is of; give the folder of a finished run, or a "
            f".safetensors that a run or stvit_video.export wrote."
        )
    arguments = metadata["arguments"]
    model = create_model(metadata["name"], **arguments)
    check_all_loaded(load_pretrained(model, weights, min_coverage=0.9), model)
    model.eval()
    classes = metadata["classes"] or [str(label) for label in range(arguments["num_classes"])]
    cfg, assumed = _find_config(weights, arguments, overrides)
    return Trained(model, [str(name) for name in classes], cfg, weights, " ".join(filter(None, (note, assumed))))


def find_weights(path: Path) -> tuple[Path, str]:
    """Return the file that ``path`` names, or the weights of a run's folder, with a note where those are not final.

    Raises UsageError where there is neither.
    """
    if path.is_file():
        return path, ""
    check_exists(str(path))
    folder = RunFolder(path)
    if folder.weights.is_file():
        return folder.weights, ""
    if folder.best_weights.is_file():
        return folder.best_weights, f"The run {path} is not finished: these are its best weights so far."
    raise UsageError(
        f"Checkpoint {path} holds no {folder.weights.name}; give the folder of a run that was trained, or a "
        f".safetensors file."
    )


def _find_config(weights: Path, arguments: dict[str, Any], overrides: Sequence[str]) -> tuple[CfgNode, str]:
    """Return how clips are taken, and a note where that had to be assumed; frames and size are always the model's."""
    found = config_beside(weights)
    carried = read_views(weights)
    note = ""
    if carried:
        cfg = default_config()
        if found.is_file():  # the weights do not carry all, those of earlier versions even less
            beside = load_config(found)
            carried = {**{key: value_of(beside, key) for key in (*TRAINING_KEYS, *TEST_KEYS)}, **carried}
    elif found.is_file():
        cfg = load_config(found).clone()
    else:
        cfg = default_config()
        note = (
            f"Nothing says how {weights} takes clips (no config.yaml beside it), so the defaults do: "
            f"{cfg.DATA.SAMPLING} sampling, stride {cfg.DATA.STRIDE}, ImageNet's mean and deviation."
        )
    cfg.defrost()
    _fit_to_model(cfg, arguments, weights)
    if carried:  # nearer to the weights than a file beside them
        cfg = override(cfg, carried.items(), str(weights))
    chosen = list(parse_overrides(overrides))
    for key, _ in chosen:
        if key not in FREE_KEYS:
            raise UsageError(
                f"{key} cannot be set for a trained model; allowed: {', '.join(FREE_KEYS)}.{nearest(key, [*FREE_KEYS])}"
            )
    return override(cfg, chosen, "--set"), note


def _fit_to_model(cfg: CfgNode, arguments: dict[str, Any], weights: Path) -> None:
    """Set frames and size to the model's own."""
    size = arguments["image_size"]
    if not isinstance(size, int):
        if size[0] != size[1]:
            raise UsageError(f"Checkpoint {weights} takes frames of {size[0]}x{size[1]}; give one of square frames.")
        size = size[0]
    if size != cfg.DATA.SIZE:  # the defaults', or a config.yaml that is another run's
        cfg.TEST.SHORT_SIDE = size
        cfg.DATA.SHORT_SIDE = [size, max(size, cfg.DATA.SHORT_SIDE[1])]
    cfg.DATA.FRAMES, cfg.DATA.SIZE = arguments["num_frames"], size
    cfg.DATA.ROOT = cfg.DATA.ROOT or "."  # not used, but it may not be empty
