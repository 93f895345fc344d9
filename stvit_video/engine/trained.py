"""A trained model out of what a run left, its folder or a file of weights, with how it takes its clips."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from safetensors import safe_open
from torch import nn

from stvit_video.adopted import config_beside
from stvit_video.config import default_config, load_config, override, parse_overrides, value_of
from stvit_video.engine.evaluate import check_all_loaded
from stvit_video.engine.run_folder import RunFolder
from stvit_video.errors import UsageError, nearest
from stvit_video.hub import check_exists, is_hub_address, pull
from stvit_video.models import create_model, load_pretrained
from stvit_video.models.checkpoints import read_metadata, read_state_dict

# What says how a video becomes clips; an exported file carries these beside its weights.
VIEW_KEYS = (
    "DATA.FRAMES", "DATA.SAMPLING", "DATA.CLIP_SECONDS", "DATA.STRIDE", "DATA.FPS", "DATA.SIZE", "DATA.MEAN",
    "DATA.STD", "TEST.CLIPS", "TEST.CROPS", "TEST.SHORT_SIDE",
)  # fmt: skip
# What one who trains on has to know beside.
TRAINING_KEYS = ("DATA.FLIP",)
# How a run's test worked, where its config.yaml lies beside: no other file says it.
TEST_KEYS = ("PRECISION", "DATA.DECODER", "DATA.DEADLINE_S", "TEST.BATCH_SIZE")
# What may be set for a model that is there: how videos are read and seen, not what the network is.
FREE_KEYS = (
    *(key for key in VIEW_KEYS if key not in ("DATA.FRAMES", "DATA.SIZE")),
    *(key for key in TEST_KEYS if key != "PRECISION"),
)


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


def read_views(weights: Path) -> dict[str, Any]:
    """Return the settings with their values as the ``.safetensors`` of a run or an export carries them; else empty."""
    with safe_open(weights, "pt") as file:
        text = (file.metadata() or {}).get("views", "{}")
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise UsageError(f"Checkpoint {weights}: its metadata 'views' is not JSON; write it again.") from error


def view_settings(cfg: CfgNode) -> dict[str, Any]:
    """Return VIEW_KEYS and TRAINING_KEYS with their values: what ``read_views`` reads."""
    return {key: value_of(cfg, key) for key in (*VIEW_KEYS, *TRAINING_KEYS)}
