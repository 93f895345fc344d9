"""Open a trained model, from a run's folder or a weights file, together with how it takes videos."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode
from torch import nn

from stvit_video.common.errors import UsageError, nearest
from stvit_video.common.hub import check_exists, pull
from stvit_video.config.clip_settings import SETTABLE_KEYS, config_beside, read_views, view_settings
from stvit_video.config.load import default_config, load_config, override, parse_overrides
from stvit_video.data.clips.sampling import Sampling
from stvit_video.data.clips.transforms import TestViews
from stvit_video.data.decode.frames import Decoding
from stvit_video.data.loader import build_decoding, build_sampler, build_test_views
from stvit_video.models import create_model, load_pretrained
from stvit_video.models.weights.files import read_checkpoint
from stvit_video.runs.checkpoint import check_all_loaded
from stvit_video.runs.folder import RunFolder


@dataclass(frozen=True)
class VideoInput:
    """How a trained model takes videos: the views, the batch size and the precision of its own test."""

    settings: dict[str, Any]  # by configuration key, as ``view_settings`` returns them
    sampler: Sampling
    views: TestViews
    start_decoding: Callable[[], Decoding]
    batch_size: int  # videos
    precision: str


@dataclass(frozen=True)
class Trained:
    """A model with its weights, the names of its classes, and how it takes videos."""

    model: nn.Module
    classes: list[str]
    input: VideoInput
    weights: Path
    multi_label: bool = False  # each logit is of a class by itself
    note: str = ""  # assumptions that the user should know


def open_checkpoint(path: str | Path, overrides: Sequence[str] = ()) -> Trained:
    """Open the model of a run's folder, of a ``.safetensors`` that a run or an export wrote, or of ``hf://OWNER/NAME``.

    How it takes videos is read from the weights file, then from the run's ``config.yaml``, in the folder or beside the
    file; else defaults apply and ``note`` says so. ``overrides`` are ``KEY=VALUE`` words for SETTABLE_KEYS. Raises
    UsageError where there are no weights, or they do not say which model they are of.
    """
    weights = pull(str(path))
    note = ""
    if not weights.is_file():
        check_exists(str(path))
        folder = RunFolder(weights)
        weights = folder.weights if folder.weights.is_file() else folder.best_weights
        if not weights.is_file():
            raise UsageError(f"Checkpoint {path} holds no {folder.weights.name}; give a trained run or a .safetensors.")
        if weights == folder.best_weights:
            note = f"The run {path} is not finished: these are its best weights so far."
    checkpoint = read_checkpoint(weights)
    metadata = checkpoint.metadata
    if not metadata.get("arguments"):
        raise UsageError(f"Checkpoint {weights} does not say which model it is of; give a finished run or an export.")
    arguments = metadata["arguments"]
    model = create_model(metadata["name"], **arguments)
    check_all_loaded(load_pretrained(model, checkpoint, min_coverage=0.9), model)
    classes = metadata["classes"] or range(arguments["num_classes"])
    assumed_names = "" if metadata["classes"] else "It names no classes, so they are numbers."
    cfg, assumed = _open_config(weights, arguments, read_views(metadata, f"Checkpoint {weights}"), overrides)
    note = " ".join(filter(None, (note, assumed_names, assumed)))
    names = [str(name) for name in classes]
    return Trained(model.eval(), names, build_input(cfg), weights, metadata["multi_label"], note)


def build_input(cfg: CfgNode) -> VideoInput:
    """Return how the model of a configuration takes videos."""
    return VideoInput(
        settings=view_settings(cfg),
        sampler=build_sampler(cfg),
        views=build_test_views(cfg, cfg.TEST.CLIPS, cfg.TEST.CROPS),
        start_decoding=lambda: build_decoding(cfg, cfg.TEST.SHORT_SIDE, in_run=False),
        batch_size=cfg.TEST.BATCH_SIZE,
        precision=cfg.PRECISION,
    )


def _open_config(
    weights: Path, arguments: dict[str, Any], views: dict[str, Any], overrides: Sequence[str]
) -> tuple[CfgNode, str]:
    """Return the configuration of a model's clips, and a note where it is assumed.

    Later sources override earlier ones: defaults, the config.yaml beside the weights, the model's own frames and size,
    the ``views`` in the weights file, ``overrides``.
    """
    beside = config_beside(weights)
    note = ""
    cfg = load_config(beside) if beside.is_file() else default_config()
    if not views and not beside.is_file():
        note = (
            f"Nothing says how {weights} takes clips (no config.yaml beside it), so the defaults do: "
            f"{cfg.DATA.SAMPLING} sampling, stride {cfg.DATA.STRIDE}, ImageNet's mean and deviation."
        )
    size, width = np.broadcast_to(arguments["image_size"], 2).tolist()
    if size != width:
        raise UsageError(f"Checkpoint {weights} takes frames of {size}x{width}; give one of square frames.")
    own = {"DATA.FRAMES": arguments["num_frames"], "DATA.SIZE": size, "DATA.ROOT": cfg.DATA.ROOT or "."}
    if size != cfg.DATA.SIZE:  # of the defaults, or of a config.yaml that belongs to another run
        own |= {"TEST.SHORT_SIDE": size, "DATA.SHORT_SIDE": [size, max(size, cfg.DATA.SHORT_SIDE[1])]}
    chosen = list(parse_overrides(overrides))
    for key, _ in chosen:
        if key not in SETTABLE_KEYS:
            raise UsageError(
                f"{key} cannot be set for a trained model; allowed: {', '.join(SETTABLE_KEYS)}."
                f"{nearest(key, SETTABLE_KEYS)}"
            )
    return override(override(cfg, {**own, **views}.items(), str(weights)), chosen, "--set"), note
