"""How a checkpoint takes its clips: the configuration keys that describe it, and where their values are found."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from stvit_video.common.errors import UsageError
from stvit_video.config.schema import BY_NAME, MODEL_KEYS, flatten
from stvit_video.config.yaml_text import parse_yaml, read_text

CLIP_KEYS = (
    "DATA.SAMPLING", "DATA.CLIP_SECONDS", "DATA.STRIDE", "DATA.FPS", "DATA.MEAN", "DATA.STD", "TEST.SHORT_SIDE",
)  # fmt: skip
# Written into the weights file, so that they are known where the run's folder is not.
SAVED_KEYS = ("DATA.FRAMES", "DATA.SIZE", *CLIP_KEYS, "TEST.CLIPS", "TEST.CROPS", "DATA.FLIP")
# What a weights file may ask for at most: it may come from anyone.
LARGEST = {
    "DATA.FRAMES": 4096, "DATA.SIZE": 4096, "DATA.STRIDE": 4096, "DATA.CLIP_SECONDS": 3600, "DATA.FPS": 1000,
    "TEST.SHORT_SIDE": 4096, "TEST.CLIPS": 1000,
}  # fmt: skip
MOST_PIXELS = 2**29  # of all views of a video, which are in memory together: 6 GB in float32
# Taken by MODEL.NAME auto from the config.yaml beside the weights; the last two are of training clips.
ADOPTED_KEYS = (*CLIP_KEYS, "DATA.FLIP", "DATA.SHORT_SIDE")
# May be overridden for a trained model: they change what is seen, not the network.
SETTABLE_KEYS = (*CLIP_KEYS, "TEST.CLIPS", "TEST.CROPS", "TEST.BATCH_SIZE", "DATA.DECODER", "DATA.DEADLINE_S")
# Model arguments that MODEL.NAME auto does not take over: sizes, which the data decide, and what only training needs.
NOT_ADOPTED = ("num_frames", "image_size", "num_classes", "drop_path", "dropout", "init")


def view_settings(cfg: CfgNode) -> dict[str, Any]:
    """Return the settings that a weights file carries as ``views``, by key."""
    settings = flatten(cfg)
    return {key: settings[key] for key in SAVED_KEYS}


def read_views(metadata: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the ``views`` that a weights file carries, each in its key's type; empty where it has none.

    Raises UsageError for whatever does not say how clips are seen, or asks for more than LARGEST: a file of weights
    decides neither what is run nor what is written.
    """
    views = metadata.get("views") or {}
    if not isinstance(views, dict):
        raise UsageError(f"{source}: its views are {views!r:.40}, not settings by key; save its weights again.")
    for key in views:
        if key not in SAVED_KEYS:
            raise UsageError(
                f"{source} sets {key!r:.60}; weights may say how clips are seen ({', '.join(SAVED_KEYS)}), nothing "
                f"else: do not trust the file, or save its weights again."
            )
    values = {key: BY_NAME[key].read(value, source) for key, value in views.items()}
    for key, most in LARGEST.items():
        if (value := values.get(key)) is not None and value > most:
            raise UsageError(f"{source} sets {key} {value}; weights may ask for at most {most}: save them again.")
    arguments = metadata.get("arguments") or {}
    for key, own in (("DATA.FRAMES", arguments.get("num_frames")), ("DATA.SIZE", arguments.get("image_size"))):
        if isinstance(own, int) and values.get(key, own) != own:
            raise UsageError(f"{source} sets {key} {values[key]} for a network of {own}; save its weights again.")
    frames, size, side, clips, crops = (
        values.get(key, default)
        for key, default in (
            ("DATA.FRAMES", arguments.get("num_frames", 1)),
            ("DATA.SIZE", 1),
            ("TEST.SHORT_SIDE", 1),
            ("TEST.CLIPS", 1),
            ("TEST.CROPS", 1),
        )
    )
    pixels = clips * frames * max(side**2, crops * size**2)
    if pixels > MOST_PIXELS:
        raise UsageError(
            f"{source} asks for {clips} clips of {frames} frames in {crops} crops of a video, {pixels:,} pixels; "
            f"weights may ask for at most {MOST_PIXELS:,}: save them again with fewer TEST.CLIPS."
        )
    return values


def config_beside(weights: Path) -> Path:
    """Return the path of config.yaml in the run folder that holds ``weights``, directly or in ``checkpoints``."""
    folder = weights.parent.parent if weights.parent.name == "checkpoints" else weights.parent
    return folder / "config.yaml"


def adopted_settings(init: str) -> dict[str, Any]:
    """Return the settings for MODEL.NAME auto: those that the checkpoint ``init`` was trained with.

    The number of frames of an image checkpoint is not adopted. Empty where the file does not exist: missing files are
    reported together, later. Raises UsageError where the file does not say which model it is of.
    """
    if not init:
        raise UsageError("MODEL.NAME auto takes the network from MODEL.INIT, which is empty; give MODEL.INIT FILE.")
    weights = Path(init)
    if not weights.exists():
        return {}
    # Imports torch, which other configurations do not need.
    from stvit_video.models.weights.claims import check_claims
    from stvit_video.models.weights.files import find_file, read_header

    weights = find_file(weights)
    metadata, shapes = read_header(weights)
    if not metadata.get("arguments"):
        raise UsageError(
            f"MODEL.INIT {init} does not say which model it is of; give MODEL.NAME too, for example "
            f"stvit_vit_small_patch16 for DeiT-S or stvit_swin_tiny for Swin-T."
        )
    arguments = metadata["arguments"]
    frames, size = arguments["num_frames"], arguments["image_size"]
    if not isinstance(size, int):
        raise UsageError(f"MODEL.INIT {init} takes frames of {size} pixels; give MODEL.NAME and DATA.SIZE, one number.")
    own = {f"MODEL.{name.upper()}": value for name, value in arguments.items() if name not in NOT_ADOPTED}
    known = {key.name for key in MODEL_KEYS}  # not MODEL.NEW_HEAD and others that no network is built with
    if without := [f"{key[6:].lower()}={value!r}" for key, value in own.items() if key not in known]:
        raise UsageError(f"MODEL.INIT {init} was built with {without[0]}, for which there is no key; use Python.")
    check_claims(metadata, shapes, f"MODEL.INIT {init}")
    try:
        beside = flatten(parse_yaml(read_text(config_beside(weights))))
    except (OSError, ValueError, yaml.YAMLError, AttributeError):
        beside = {}  # the weights were moved away from their run
    return {
        "MODEL.NAME": metadata["name"],
        **own,
        **{"DATA.SIZE": size, "DATA.SHORT_SIDE": [size, round(size * 8 / 7)], "TEST.SHORT_SIDE": size},
        **({"DATA.FRAMES": frames} if frames > 1 else {}),
        **{key: beside[key] for key in ADOPTED_KEYS if key in beside},
        **read_views(metadata, f"MODEL.INIT {init}"),
    }
