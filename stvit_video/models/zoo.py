"""Named variants: tables of sizes and presets, and the function that builds a model from them.

``vit_*`` and ``swin_*`` are the dense baselines of ``stvit_vit_*`` and ``stvit_swin_*``: the same networks without
semantic tokens. ``stvit_r_swin_*`` is the paper's form with recovery.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from fvcore.common.config import CfgNode
from torch import nn

from stvit_video.common.errors import UsageError, nearest
from stvit_video.models.arguments import (
    CONFIGURED,
    EARLIER_EPS,
    Arguments,
    STGMArguments,
    SwinArguments,
    SwinSemanticArguments,
    ViTArguments,
    ViTSemanticArguments,
    read_rules,
)
from stvit_video.models.swin import SEMANTIC_STAGE, SwinTransformer
from stvit_video.models.vit import VisionTransformer

Settings = dict[str, Any]  # arguments by name

VIT_SIZES: dict[str, Settings] = {
    "tiny_patch16": {"dim": 192, "depth": 12, "num_heads": 3},
    "small_patch16": {"dim": 384, "depth": 12, "num_heads": 6},
    "base_patch16": {"dim": 768, "depth": 12, "num_heads": 12},
    # For the generated sample set: 64x64 clips, trained in minutes on two CPU cores.
    "sample_patch8": {"dim": 96, "depth": 8, "num_heads": 3, "patch_size": 8},
    # For the harder generated set: as deep as the published sizes, so that presets mean the same.
    "hard_patch8": {"dim": 96, "depth": 12, "num_heads": 3, "patch_size": 8, "tubelet": 4},
}
SWIN_SIZES: dict[str, Settings] = {
    "tiny": {"dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "small": {"dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "base": {"dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    # For the harder generated set: 64x64 clips, one 4x4 window in the third stage.
    "hard_patch4": {
        "dim": 32,
        "depths": (2, 2, 6, 2),
        "num_heads": (1, 2, 4, 8),
        "tubelet": 4,
        "window": (8, 4, 4),
        "stem": "conv",
        "init": "xavier",
    },
}
# As the released code: adaptive max pooling, no global centres.
SWIN_SEMANTIC: Settings = {"pooling": "max", "global_centres": False}
# What the released STViT-R checkpoints were trained with.
RELEASED_R: Settings = dict(SWIN_SEMANTIC, recover=True, units=3, stem="conv", first_residual=False, layer_scale=1e-5)

# base_share: the part of the depth (in Swin, of stage 3) that runs on all image tokens before the semantic ones.
# window_frames: with Swin's 8-frame windows a video model at the image model's depth saves less than published (-21 %
# for T, published -27 %), so stage 1, which sees edges, uses windows of 4 frames: -26 %. This is our reading. In "fast"
# stages 1 and 2 use 2 and 4 frames, since their attention is most of what remains before the semantic tokens.
SWIN_FRAMES = (4, 8, 8, 8)
VIT_PRESETS: dict[str, Settings] = {
    "paper": {"base_share": 1 / 3, "frames_per_centre": 1},
    "fast": {"base_share": 1 / 6, "frames_per_centre": 2},
    "balanced": {"base_share": 1 / 4, "frames_per_centre": 1},
}
SWIN_PRESETS: dict[str, Settings] = {
    "paper": {"base_share": 2 / 3, "frames_per_centre": 1, "window_frames": SWIN_FRAMES},
    "fast": {"base_share": 1 / 6, "frames_per_centre": 2, "window_frames": (2, 4, 8, 8)},
    "balanced": {"base_share": 1 / 3, "frames_per_centre": 2, "window_frames": SWIN_FRAMES},
}
R_PRESETS: dict[str, Settings] = {
    "paper": {"base_depth": 1, "frames_per_centre": 1},
    "fast": {"base_depth": 1, "frames_per_centre": 2},
}


@dataclass(frozen=True)
class Family:
    """Models that differ in size only; those with semantic tokens have presets and the arguments of two classes."""

    constructor: Callable[..., nn.Module]
    sizes: dict[str, Settings]
    arguments: tuple[type[Arguments], ...]
    presets: dict[str, Settings] = field(default_factory=dict)
    shared: Settings = field(default_factory=dict)  # where the family differs from the arguments' defaults


R_SIZES = {size: SWIN_SIZES[size] for size in ("small", "base")}
SWIN_ARGUMENTS = (SwinArguments, SwinSemanticArguments)
FAMILIES = {
    "vit": Family(VisionTransformer, VIT_SIZES, (ViTArguments,), shared={"base_attention": "joint"}),
    "stvit_vit": Family(VisionTransformer, VIT_SIZES, (ViTArguments, ViTSemanticArguments), VIT_PRESETS),
    "swin": Family(SwinTransformer, SWIN_SIZES, (SwinArguments,)),
    "stvit_swin": Family(SwinTransformer, SWIN_SIZES, SWIN_ARGUMENTS, SWIN_PRESETS, SWIN_SEMANTIC),
    "stvit_r_swin": Family(SwinTransformer, R_SIZES, SWIN_ARGUMENTS, R_PRESETS, RELEASED_R),
}
# The value of these arguments in models and checkpoints that do not name them.
IMPLIED_ARGUMENTS = {
    name: read_rules(ViTSemanticArguments)[name].default for name in ("preset", "reducer", "streaming")
}


def list_models(pattern: str = "*") -> list[str]:
    """Return the names that ``create_model`` knows and that match a shell-style pattern."""
    names = [f"{name}_{size}" for name, family in FAMILIES.items() for size in family.sizes]
    return sorted(name for name in names if fnmatch(name, pattern))


def create_model(
    name: str, *, num_frames: int, image_size: int | tuple[int, int], num_classes: int, **overrides: Any
) -> nn.Module:
    """Build a named model for clips (B, 3, num_frames, H, W); ``num_frames=1`` builds the image model.

    Overrides are the fields of ``ViTArguments`` and ``ViTSemanticArguments``, or of those of a Swin. The result carries
    ``name`` and ``arguments``: ``create_model(model.name, **model.arguments)`` builds it again.
    Raises UsageError (a ValueError) for an unknown name, preset or override, or sizes that do not fit.
    """
    names = list_models()
    if name not in names:
        raise UsageError(f"Model {name!r} is unknown; choose one of {', '.join(names)}.{nearest(str(name), names)}")
    prefix = max((prefix for prefix in FAMILIES if name.startswith(f"{prefix}_")), key=len)
    family = FAMILIES[prefix]
    overrides = {"num_frames": num_frames, "image_size": image_size, "num_classes": num_classes, **overrides}
    try:
        _check_overrides(name, prefix, overrides)
        preset = family.presets.get(overrides.get("preset", IMPLIED_ARGUMENTS["preset"]), {})
        settings = {**family.sizes[name.removeprefix(f"{prefix}_")], **family.shared, **preset, **overrides}
        arguments: list[Arguments] = []
        for kind in family.arguments:  # the network's come first: the default base_depth is a share of its depth
            if arguments and "base_share" in settings and "base_depth" not in settings:
                depth = settings["depth"] if "depth" in settings else settings["depths"][SEMANTIC_STAGE]
                settings["base_depth"] = max(1, int(depth * settings["base_share"]))
            arguments.append(kind(**{key: settings[key] for key in read_rules(kind) if key in settings}))
        model = family.constructor(*arguments)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error
    if getattr(model, "norm_eps", EARLIER_EPS) != EARLIER_EPS:  # recorded, as checkpoints without it have that one
        overrides["norm_eps"] = model.norm_eps
    model.name, model.arguments = name, overrides  # type: ignore[assignment]
    return model


def _check_overrides(name: str, prefix: str, overrides: Settings) -> None:
    """Raise ValueError for arguments that the models of a family do not have or that cannot go together."""
    family = FAMILIES[prefix]
    sibling = FAMILIES.get(f"stvit_{prefix}")  # which a dense baseline has
    known = [key for kind in family.arguments for key in read_rules(kind)]
    unknown = [key for key in overrides if key not in known]
    foreign = [key for key in unknown if sibling and key in read_rules(sibling.arguments[1])]
    if foreign:
        raise ValueError(f"it has no semantic tokens, so {', '.join(foreign)} cannot apply; use stvit_{name}.")
    if unknown:
        raise ValueError(f"it takes no argument {unknown[0]!r}; known: {', '.join(known)}.{nearest(unknown[0], known)}")
    preset, reducer, _ = (overrides.get(key, default) for key, default in IMPLIED_ARGUMENTS.items())
    if family.presets and preset not in list(family.presets):
        known_presets = f"choose one of {', '.join(family.presets)}.{nearest(str(preset), family.presets)}"
        raise ValueError(f"preset {preset!r} is unknown; {known_presets}")
    foreign = [key for key in read_rules(STGMArguments) if key in overrides]
    if foreign and reducer != IMPLIED_ARGUMENTS["reducer"]:
        raise ValueError(f"reducer {reducer!r} has no {', '.join(foreign)}, which reducer 'stgm' has; leave them out.")


def build_model(cfg: CfgNode, num_classes: int) -> nn.Module:
    """Return the model that the configuration names; settings left unset keep the variant's own."""
    if cfg.MODEL.NAME == "auto":
        raise UsageError(
            f"MODEL.NAME auto takes the network from MODEL.INIT {cfg.MODEL.INIT}, which is no file; give one."
        )
    chosen = {name: cfg.MODEL[name.upper()] for name in CONFIGURED if cfg.MODEL[name.upper()] is not None}
    sizes = {"num_frames": cfg.DATA.FRAMES, "image_size": cfg.DATA.SIZE, "num_classes": num_classes}
    model = create_model(cfg.MODEL.NAME, **sizes, **chosen)
    model.set_grad_checkpointing(cfg.MODEL.GRAD_CHECKPOINTING)  # type: ignore[operator]
    return model
