"""How a checkpoint takes its clips: the configuration keys that describe it, and where their values are found."""

from pathlib import Path
from typing import Any, NamedTuple

import yaml
from fvcore.common.config import CfgNode
from safetensors import SafetensorError

from stvit_video.common.errors import UsageError
from stvit_video.config.schema import flatten, value_of


class ClipKey(NamedTuple):
    """A configuration key that says how videos become clips."""

    name: str
    saved: bool = True  # written into the weights file, so that it is known where the run's folder is not
    adopted: bool = True  # taken by MODEL.NAME auto from the config.yaml beside the weights
    settable: bool = True  # may be overridden for a trained model: it changes what is seen, not the network


CLIP_KEYS = (
    ClipKey("DATA.FRAMES", adopted=False, settable=False),  # as the model's arguments say
    ClipKey("DATA.SIZE", adopted=False, settable=False),
    ClipKey("DATA.SAMPLING"),
    ClipKey("DATA.CLIP_SECONDS"),
    ClipKey("DATA.STRIDE"),
    ClipKey("DATA.FPS"),
    ClipKey("DATA.MEAN"),
    ClipKey("DATA.STD"),
    ClipKey("TEST.SHORT_SIDE"),
    ClipKey("TEST.CLIPS", adopted=False),
    ClipKey("TEST.CROPS", adopted=False),
    ClipKey("TEST.BATCH_SIZE", saved=False, adopted=False),
    ClipKey("DATA.DECODER", saved=False, adopted=False),
    ClipKey("DATA.DEADLINE_S", saved=False, adopted=False),
    ClipKey("DATA.FLIP", settable=False),  # of training clips
    ClipKey("DATA.SHORT_SIDE", saved=False, settable=False),  # of training clips
)
SETTABLE_KEYS = tuple(key.name for key in CLIP_KEYS if key.settable)
# Model arguments that MODEL.NAME auto does not take over: sizes, which the data decide, and what only training needs.
NOT_ADOPTED = ("num_frames", "image_size", "num_classes", "drop_path", "dropout", "init")


def view_settings(cfg: CfgNode) -> dict[str, Any]:
    """Return the settings that a weights file carries as ``views``, by key."""
    return {key.name: value_of(cfg, key.name) for key in CLIP_KEYS if key.saved}


def config_beside(weights: Path) -> Path:
    """Return the path of config.yaml in the run folder that holds ``weights``, directly or in ``checkpoints``."""
    folder = weights.parent.parent if weights.parent.name == "checkpoints" else weights.parent
    return folder / "config.yaml"


def adopted_settings(init: str, keys: list[str]) -> dict[str, Any]:
    """Return the settings for MODEL.NAME auto: those that the checkpoint ``init`` was trained with.

    ``keys`` are all configuration keys. The number of frames of an image checkpoint is not adopted. Empty where the
    file does not exist: missing files are reported together, later. Raises UsageError where the file does not say which
    model it is of.
    """
    if not init:
        raise UsageError("MODEL.NAME auto takes the network from MODEL.INIT, which is empty; give MODEL.INIT FILE.")
    weights = Path(init)
    if not weights.is_file():
        return {}
    from stvit_video.models.weights.files import read_metadata  # imports torch, which other configurations do not need

    try:
        metadata = read_metadata(weights)
    except SafetensorError as error:
        raise UsageError(f"MODEL.INIT {init} is not a complete safetensors file ({error}); fetch it again.") from error
    if not metadata:
        raise UsageError(
            f"MODEL.INIT {init} does not say which model it is of; give MODEL.NAME too, for example "
            f"stvit_vit_small_patch16 for DeiT-S or stvit_swin_tiny for Swin-T."
        )
    arguments = metadata["arguments"]
    found: dict[str, Any] = {"MODEL.NAME": metadata["name"]}
    for name, value in arguments.items():
        if name in NOT_ADOPTED:
            continue
        key = f"MODEL.{name.upper()}"
        if key not in keys:
            raise UsageError(
                f"MODEL.INIT {init} was built with {name}={value!r}, for which there is no key; use Python."
            )
        found[key] = value
    size = arguments["image_size"]
    if not isinstance(size, int):
        raise UsageError(f"MODEL.INIT {init} takes frames of {size} pixels; give MODEL.NAME and DATA.SIZE, one number.")
    found |= {"DATA.SIZE": size, "DATA.SHORT_SIDE": [size, round(size * 8 / 7)], "TEST.SHORT_SIDE": size}
    if arguments["num_frames"] > 1:
        found["DATA.FRAMES"] = arguments["num_frames"]
    try:
        beside = flatten(yaml.safe_load(config_beside(weights).read_text()))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
        beside = {}  # the weights were moved away from their run
    found |= {key.name: beside[key.name] for key in CLIP_KEYS if key.adopted and key.name in beside}
    return found | (metadata["views"] or {})
