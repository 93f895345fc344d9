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
    GRID_REDUCERS,
    REDUCERS,
    NetworkArguments,
    SemanticArguments,
    STGMArguments,
    SwinArguments,
    SwinSemanticArguments,
    ViTArguments,
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
RELEASED_R: Settings = {
    **SWIN_SEMANTIC,
    "recover": True,
    "units": 3,
    "stem": "conv",
    "first_residual": False,
    "layer_scale": 1e-5,
}

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
    """Models that differ in size only; ``semantic`` is None for a dense baseline, which has no presets."""

    constructor: Callable[[Any, Any], nn.Module]
    network: type[NetworkArguments]
    sizes: dict[str, Settings]
    semantic: type[SemanticArguments] | None = None
    presets: dict[str, Settings] = field(default_factory=dict)
    shared: Settings = field(default_factory=dict)  # where the family differs from the arguments' defaults


VIT = (VisionTransformer, ViTArguments, VIT_SIZES)
SWIN = (SwinTransformer, SwinArguments, SWIN_SIZES)
R_SIZES = {size: SWIN_SIZES[size] for size in ("small", "base")}
FAMILIES = {
    "vit": Family(*VIT, shared={"base_attention": "joint"}),
    "stvit_vit": Family(*VIT, SemanticArguments, VIT_PRESETS),
    "swin": Family(*SWIN),
    "stvit_swin": Family(*SWIN, SwinSemanticArguments, SWIN_PRESETS, SWIN_SEMANTIC),
    "stvit_r_swin": Family(*SWIN[:2], R_SIZES, SwinSemanticArguments, R_PRESETS, RELEASED_R),
}
# The value of these arguments in models and checkpoints that do not name them.
IMPLIED_ARGUMENTS = {name: read_rules(SemanticArguments)[name].default for name in ("preset", "reducer")}


def list_models(pattern: str = "*") -> list[str]:
    """Return the names that ``create_model`` knows and that match a shell-style pattern."""
    names = [f"{name}_{size}" for name, family in FAMILIES.items() for size in family.sizes]
    return sorted(name for name in names if fnmatch(name, pattern))


def create_model(
    name: str, *, num_frames: int, image_size: int | tuple[int, int], num_classes: int, **overrides: Any
) -> nn.Module:
    """Build a named model for clips (B, 3, num_frames, H, W); ``num_frames=1`` builds the image model.

    Overrides are the fields of ``ViTArguments`` or ``SwinArguments`` and of ``SemanticArguments``. The result carries
    ``name`` and ``arguments``: ``create_model(model.name, **model.arguments)`` builds it again.
    Raises UsageError (a ValueError) for an unknown name, preset or override, or sizes that do not fit.
    """
    if name not in list_models():
        raise UsageError(
            f"Model {name!r} is unknown; choose one of {', '.join(list_models())}.{nearest(str(name), list_models())}"
        )
    family = max((family for family in FAMILIES if name.startswith(f"{family}_")), key=len)
    arguments = {"num_frames": num_frames, "image_size": image_size, "num_classes": num_classes, **overrides}
    _check_names(name, family, overrides)
    try:
        network, semantic = _resolve(FAMILIES[family], name.removeprefix(f"{family}_"), arguments)
        model = FAMILIES[family].constructor(network, semantic)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error
    model.name, model.arguments = name, arguments  # type: ignore[assignment]
    return model


def _resolve(family: Family, size: str, overrides: Settings) -> tuple[NetworkArguments, SemanticArguments | None]:
    """Return the arguments of a model: overrides before the preset's, those before the family's and the size's."""
    settings = {**family.sizes[size], **family.shared}
    if family.semantic is not None:
        preset = overrides.get("preset", IMPLIED_ARGUMENTS["preset"])
        if preset not in list(family.presets):
            raise ValueError(f"preset {preset!r} is unknown; choose one of {', '.join(family.presets)}.")
        settings |= family.presets[preset]
    share = settings.pop("base_share", None)
    settings |= overrides
    network = family.network(**{name: settings[name] for name in read_rules(family.network) if name in settings})
    if family.semantic is None:
        return network, None
    if share is not None and "base_depth" not in overrides:
        depth = network.depths[SEMANTIC_STAGE] if isinstance(network, SwinArguments) else settings["depth"]
        settings["base_depth"] = max(1, int(depth * share))
    return network, family.semantic(**{n: settings[n] for n in read_rules(family.semantic) if n in settings})


def _check_names(name: str, family: str, overrides: Settings) -> None:
    """Raise UsageError for arguments that the model does not have or that cannot go together."""
    own = FAMILIES[family]
    known = list(read_rules(own.network))
    if own.semantic is None:
        semantic = FAMILIES[f"stvit_{family}"].semantic
        assert semantic is not None
        given = [key for key in overrides if key in read_rules(semantic)]
        if given:
            raise UsageError(f"{name} has no semantic tokens, so {', '.join(given)} cannot apply; use stvit_{name}.")
    else:
        known += list(read_rules(own.semantic))
        _check_reducer(name, own.network is SwinArguments, overrides)
    for key in overrides:
        if key not in known:
            raise UsageError(f"{name} takes no argument {key!r}; known: {', '.join(known)}.{nearest(key, known)}")


def _check_reducer(name: str, windowed: bool, overrides: Settings) -> None:
    """Raise UsageError for a reducer that leaves no grid in a Swin, and for the STGM's arguments given to another."""
    reducer = overrides.get("reducer", IMPLIED_ARGUMENTS["reducer"])
    allowed = list(GRID_REDUCERS if windowed else REDUCERS)
    if reducer not in allowed:
        if reducer not in list(REDUCERS):
            raise UsageError(f"{name}: reducer {reducer!r} is unknown; choose one of {', '.join(allowed)}.")
        raise UsageError(
            f"{name} has windows, which need a grid of tokens, so reducer {reducer!r} cannot apply; choose one of "
            f"{', '.join(allowed)}, or use one of {', '.join(list_models('stvit_vit_*'))}."
        )
    foreign = [key for key in read_rules(STGMArguments) if key in overrides]
    if reducer != IMPLIED_ARGUMENTS["reducer"] and foreign:
        raise UsageError(
            f"{name} with reducer {reducer!r} has no {', '.join(foreign)}, which reducer 'stgm' has; leave them out."
        )


def build_model(cfg: CfgNode, num_classes: int) -> nn.Module:
    """Return the model that the configuration names; settings left unset keep the variant's own."""
    if cfg.MODEL.NAME == "auto":
        raise UsageError(
            f"MODEL.NAME auto takes the network from MODEL.INIT {cfg.MODEL.INIT}, which is no file; give one."
        )
    chosen = {name: cfg.MODEL[name.upper()] for name in CONFIGURED}
    model = create_model(
        cfg.MODEL.NAME,
        num_frames=cfg.DATA.FRAMES,
        image_size=cfg.DATA.SIZE,
        num_classes=num_classes,
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in chosen.items()
            if value is not None
        },
    )
    model.set_grad_checkpointing(cfg.MODEL.GRAD_CHECKPOINTING)  # type: ignore[operator]
    return model
