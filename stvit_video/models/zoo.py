"""Named variants: one table of sizes, one of presets, and the function that builds a model from them.

``vit_*`` is the full twin of ``stvit_vit_*``: the same network without semantic tokens, attending over the whole clip.
"""

from fnmatch import fnmatch
from inspect import signature
from typing import Any

from fvcore.common.config import CfgNode
from torch import nn

from stvit_video.errors import UsageError, nearest
from stvit_video.models.vit import VisionTransformer

SIZES: dict[str, dict[str, Any]] = {
    "tiny_patch16": {"dim": 192, "depth": 12, "num_heads": 3},
    "small_patch16": {"dim": 384, "depth": 12, "num_heads": 6},
    "base_patch16": {"dim": 768, "depth": 12, "num_heads": 12},
    # For the generated sample set: 64x64 clips, trained in minutes on two CPU cores.
    "sample_patch8": {"dim": 96, "depth": 8, "num_heads": 3, "patch_size": 8},
}

# base_share: the part of the depth that runs on all image tokens before the semantic ones (a third is the paper's);
# frames_per_centre: token frames that share their centres (1 is the paper's per-frame scheme).
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"base_share": 1 / 3, "frames_per_centre": 1},
    "fast": {"base_share": 1 / 6, "frames_per_centre": 2},
}


def list_models(pattern: str = "*") -> list[str]:
    """Return the names that ``create_model`` knows and that match a shell-style pattern."""
    names = [f"{family}_{size}" for family in ("vit", "stvit_vit") for size in SIZES]
    return sorted(name for name in names if fnmatch(name, pattern))


def create_model(
    name: str, *, num_frames: int, image_size: int | tuple[int, int], num_classes: int, **overrides: Any
) -> nn.Module:
    """Build a named model for clips (B, 3, num_frames, H, W); ``num_frames=1`` builds the image model.

    Overrides are the constructor's arguments (see ``VisionTransformer``) and ``preset``. The result carries ``name``
    and ``arguments``: ``create_model(model.name, **model.arguments)`` builds it again.
    Raises UsageError (a ValueError) for an unknown name, preset or override, or sizes that do not fit.
    """
    if name not in list_models():
        raise UsageError(
            f"Model {name!r} is unknown; choose one of {', '.join(list_models())}.{nearest(name, list_models())}"
        )
    semantic = name.startswith("stvit_")
    arguments = {"num_frames": num_frames, "image_size": image_size, "num_classes": num_classes, **overrides}
    settings = dict(SIZES[name.removeprefix("stvit_").removeprefix("vit_")], semantic_tokens=semantic)
    if semantic:
        preset = _preset(name, overrides.pop("preset", "paper"))
        depth = overrides.get("depth", settings["depth"])
        settings["base_depth"] = max(1, int(depth * preset["base_share"]))
        settings["frames_per_centre"] = preset["frames_per_centre"]
    else:
        settings["base_attention"] = "joint"
        _refuse_semantic_settings(name, overrides)
    _check_names(name, overrides)
    settings.update(overrides)
    try:
        model = VisionTransformer(num_frames=num_frames, image_size=image_size, num_classes=num_classes, **settings)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error
    model.name, model.arguments = name, arguments  # type: ignore[assignment]
    return model


def _preset(name: str, preset: str) -> dict[str, Any]:
    if preset not in PRESETS:
        raise UsageError(f"Preset {preset!r} of {name} is unknown; choose one of {', '.join(PRESETS)}.")
    return PRESETS[preset]


SEMANTIC_SETTINGS = (
    "preset",
    "base_depth",
    "stgm_depth",
    "regions",
    "frames_per_centre",
    "pooling",
    "offsets",
    "global_centres",
    "first_residual",
)


def _refuse_semantic_settings(name: str, overrides: dict[str, Any]) -> None:
    given = [key for key in SEMANTIC_SETTINGS if key in overrides]
    if given:
        raise UsageError(f"{name} has no semantic tokens, so {', '.join(given)} cannot apply; use stvit_{name}.")


def _check_names(name: str, overrides: dict[str, Any]) -> None:
    known = [key for key in signature(VisionTransformer.__init__).parameters if key not in ("self", "semantic_tokens")]
    for key in overrides:
        if key not in known:
            raise UsageError(f"{name} takes no argument {key!r}; known: {', '.join(known)}.{nearest(key, known)}")


def build_model(cfg: CfgNode, num_classes: int) -> nn.Module:
    """Return the model that the configuration names; settings left unset keep the variant's own."""
    chosen = {
        "preset": cfg.MODEL.PRESET,
        "base_depth": cfg.MODEL.BASE_DEPTH,
        "stgm_depth": cfg.MODEL.STGM_DEPTH,
        "regions": None if cfg.MODEL.REGIONS is None else tuple(cfg.MODEL.REGIONS),
        "pooling": cfg.MODEL.POOLING,
        "offsets": cfg.MODEL.OFFSETS,
        "global_centres": cfg.MODEL.GLOBAL_CENTRES,
        "first_residual": cfg.MODEL.FIRST_RESIDUAL,
        "base_attention": cfg.MODEL.BASE_ATTENTION,
    }
    model = create_model(
        cfg.MODEL.NAME,
        num_frames=cfg.DATA.FRAMES,
        image_size=cfg.DATA.SIZE,
        num_classes=num_classes,
        drop_path=cfg.MODEL.DROP_PATH,
        dropout=cfg.MODEL.DROPOUT,
        **{name: value for name, value in chosen.items() if value is not None},
    )
    model.set_grad_checkpointing(cfg.MODEL.GRAD_CHECKPOINTING)  # type: ignore[operator]
    return model
