"""MODEL.NAME auto: the network and the clips that a checkpoint was trained with, as configuration keys."""

import json
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode
from safetensors import SafetensorError, safe_open

from stvit_video.common.errors import UsageError
from stvit_video.config.schema import value_of

# How a run's videos became clips, taken over from the config.yaml beside its weights.
RUN_KEYS = (
    "DATA.SAMPLING", "DATA.CLIP_SECONDS", "DATA.STRIDE", "DATA.FPS", "DATA.SHORT_SIDE", "DATA.FLIP", "DATA.MEAN",
    "DATA.STD", "TEST.SHORT_SIDE",
)  # fmt: skip
NOT_ADOPTED = ("num_frames", "image_size", "num_classes", "drop_path", "dropout", "init")  # sizes, what training needs


def config_beside(weights: Path) -> Path:
    """Return where the configuration of the run is whose folder, or ``checkpoints`` in it, ``weights`` lie in."""
    folder = weights.parent.parent if weights.parent.name == "checkpoints" else weights.parent
    return folder / "config.yaml"


def adopted_settings(init: str, keys: list[str]) -> dict[str, Any]:
    """Return values of configuration ``keys`` that the checkpoint ``init`` says it was trained with.

    An image checkpoint leaves the number of frames open. Where there is no such file, nothing is adopted: that it is
    missing is said with all else that is. Raises UsageError for a file that does not name its model.
    """
    if not init:
        raise UsageError("MODEL.NAME auto takes the network from MODEL.INIT, which is empty; give MODEL.INIT FILE.")
    if not Path(init).is_file():
        return {}
    metadata = _read_metadata(Path(init))
    arguments = json.loads(metadata["arguments"])
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
    return {**found, **json.loads(metadata.get("views", "{}")), **_read_run(Path(init))}


def _read_metadata(path: Path) -> dict[str, str]:
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
        except SafetensorError as error:
            raise UsageError(
                f"MODEL.INIT {path} is not a complete safetensors file ({error}); fetch it again."
            ) from error
    if not {"name", "arguments"} <= metadata.keys():
        raise UsageError(
            f"MODEL.INIT {path} does not say which model it is of; give MODEL.NAME too, for example "
            f"stvit_vit_small_patch16 for DeiT-S or stvit_swin_tiny for Swin-T."
        )
    return metadata


def _read_run(weights: Path) -> dict[str, Any]:
    """Return RUN_KEYS from the configuration of the run that ``weights`` lie in; nothing where they do not."""
    try:
        content = yaml.safe_load(config_beside(weights).read_text())
        return {key: content[key.split(".")[0]][key.split(".")[1]] for key in RUN_KEYS}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, LookupError, TypeError):
        return {}  # the file lies elsewhere than where it was made


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
