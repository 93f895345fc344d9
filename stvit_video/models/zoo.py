"""Named variants: tables of sizes and presets, and the function that builds a model from them.

``vit_*`` and ``swin_*`` are the full twins of ``stvit_vit_*`` and ``stvit_swin_*``: the same networks without semantic
tokens. ``stvit_r_swin_*`` is the paper's form with recovery.
"""

from dataclasses import dataclass, fields
from fnmatch import fnmatch
from inspect import signature
from numbers import Integral, Real
from typing import Any

from fvcore.common.config import CfgNode
from torch import nn

from stvit_video.common.errors import UsageError, nearest
from stvit_video.models.reducers import GRID_REDUCERS, REDUCERS
from stvit_video.models.stages import SemanticSettings
from stvit_video.models.swin import SEMANTIC_STAGE, SwinTransformer
from stvit_video.models.vit import VisionTransformer

VIT_SIZES: dict[str, dict[str, Any]] = {
    "tiny_patch16": {"dim": 192, "depth": 12, "num_heads": 3},
    "small_patch16": {"dim": 384, "depth": 12, "num_heads": 6},
    "base_patch16": {"dim": 768, "depth": 12, "num_heads": 12},
    # For the generated sample set: 64x64 clips, trained in minutes on two CPU cores.
    "sample_patch8": {"dim": 96, "depth": 8, "num_heads": 3, "patch_size": 8},
    # The same for the harder set: as deep as the real ones, so that presets are what they are there.
    "hard_patch8": {"dim": 96, "depth": 12, "num_heads": 3, "patch_size": 8, "tubelet": 4},
}
SWIN_SIZES: dict[str, dict[str, Any]] = {
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
# What the released STViT-R checkpoints were trained with.
RELEASED_R: dict[str, Any] = {
    "recover": True,
    "units": 3,
    "stem": "conv",
    "first_residual": False,
    "layer_scale": 1e-5,
}
# family: class, sizes, what its members share
FAMILIES: dict[str, tuple[type[nn.Module], dict[str, dict[str, Any]], dict[str, Any]]] = {
    "vit": (VisionTransformer, VIT_SIZES, {"base_attention": "joint"}),
    "stvit_vit": (VisionTransformer, VIT_SIZES, {"semantic_tokens": True}),
    "swin": (SwinTransformer, SWIN_SIZES, {}),
    "stvit_swin": (SwinTransformer, SWIN_SIZES, {"semantic_tokens": True}),
    "stvit_r_swin": (
        SwinTransformer,
        {size: SWIN_SIZES[size] for size in ("small", "base")},
        {"semantic_tokens": True, **RELEASED_R},
    ),
}

# base_share: the part of the depth (in Swin, of stage 3) that runs on all image tokens before the semantic ones;
# frames_per_centre: token frames that share their centres (1 is the paper's per-frame scheme).
# window_frames: in video the paper's cost cannot be met with Swin's 8-frame windows at the image model's depth (-21 %
# for T where -27 % is published), so stage 1, which sees edges, looks at 4 frames: -26 %. It is our reading. In "fast"
# the two stages before the semantic tokens look at 2 and 4 frames: their attention is what is left to save there.
SWIN_FRAMES = (4, 8, 8, 8)
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "stvit_vit": {
        "paper": {"base_share": 1 / 3, "frames_per_centre": 1},
        "fast": {"base_share": 1 / 6, "frames_per_centre": 2},
        "balanced": {"base_share": 1 / 4, "frames_per_centre": 1},
    },
    "stvit_swin": {
        "paper": {"base_share": 2 / 3, "frames_per_centre": 1, "window_frames": SWIN_FRAMES},
        "fast": {"base_share": 1 / 6, "frames_per_centre": 2, "window_frames": (2, 4, 8, 8)},
        "balanced": {"base_share": 1 / 3, "frames_per_centre": 2, "window_frames": SWIN_FRAMES},
    },
    "stvit_r_swin": {
        "paper": {"base_depth": 1, "frames_per_centre": 1},
        "fast": {"base_depth": 1, "frames_per_centre": 2},
    },
}
STGM_ARGUMENTS = ("pooling", "offsets", "global_centres", "first_residual")  # no other reducer has them
VIT_SEMANTIC_ARGUMENTS = (
    "reducer", "base_depth", "stgm_depth", "regions", "frames_per_centre", *STGM_ARGUMENTS,
)  # fmt: skip


UNSAID = {"preset": "paper", "reducer": "stgm"}  # what models that take these are, where nothing was said


def list_models(pattern: str = "*") -> list[str]:
    """Return the names that ``create_model`` knows and that match a shell-style pattern."""
    names = [f"{family}_{size}" for family, (_, sizes, _) in FAMILIES.items() for size in sizes]
    return sorted(name for name in names if fnmatch(name, pattern))


def create_model(
    name: str, *, num_frames: int, image_size: int | tuple[int, int], num_classes: int, **overrides: Any
) -> nn.Module:
    """Build a named model for clips (B, 3, num_frames, H, W); ``num_frames=1`` builds the image model.

    Overrides are the constructor's arguments (see ``VisionTransformer``, ``SwinTransformer``, ``SemanticSettings``) and
    ``preset``. The result carries ``name`` and ``arguments``: ``create_model(model.name, **model.arguments)``
    builds it again.
    Raises UsageError (a ValueError) for an unknown name, preset or override, or sizes that do not fit.
    """
    if name not in list_models():
        raise UsageError(
            f"Model {name!r} is unknown; choose one of {', '.join(list_models())}.{nearest(str(name), list_models())}"
        )
    family = max((family for family in FAMILIES if name.startswith(f"{family}_")), key=len)
    constructor, sizes, shared = FAMILIES[family]
    arguments = {"num_frames": num_frames, "image_size": image_size, "num_classes": num_classes, **overrides}
    _check_names(name, family, constructor, overrides)
    try:
        chosen = {key: check_argument(key, value) for key, value in arguments.items()}
        settings = {**sizes[name.removeprefix(f"{family}_")], **shared}
        if family in PRESETS:
            settings.update(_preset(family, chosen.pop("preset", UNSAID["preset"]), {**settings, **chosen}))
        model = constructor(**{**settings, **chosen})
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error
    model.name, model.arguments = name, arguments  # type: ignore[assignment]
    return model


def _preset(family: str, preset: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return a preset's settings, its share of the depth made a number of blocks."""
    presets = PRESETS[family]
    if preset not in presets:
        raise ValueError(f"preset {preset!r} is unknown; choose one of {', '.join(presets)}.")
    chosen = dict(presets[preset])
    if "base_share" in chosen:
        depth = settings["depths"][SEMANTIC_STAGE] if "depths" in settings else settings["depth"]
        chosen["base_depth"] = max(1, int(depth * chosen.pop("base_share")))
    return chosen


def _check_names(name: str, family: str, constructor: type[nn.Module], overrides: dict[str, Any]) -> None:
    """Raise UsageError for arguments that the constructor does not have, or that need semantic tokens."""
    semantic = {field.name for field in fields(SemanticSettings)} if constructor is SwinTransformer else set()
    known = [key for key in signature(constructor).parameters if key not in ("semantic_tokens", "semantic")]
    known += sorted(semantic)
    if family in PRESETS:
        known += [key for key in ("preset", "reducer") if key not in known]
    else:
        needing = {"preset", "reducer", *(semantic or VIT_SEMANTIC_ARGUMENTS)}
        given = [key for key in overrides if key in needing]
        if given:
            raise UsageError(f"{name} has no semantic tokens, so {', '.join(given)} cannot apply; use stvit_{name}.")
    _check_reducer(name, constructor, overrides)
    for key in overrides:
        if key not in known:
            raise UsageError(f"{name} takes no argument {key!r}; known: {', '.join(known)}.{nearest(key, known)}")


def _check_reducer(name: str, constructor: type[nn.Module], overrides: dict[str, Any]) -> None:
    """Raise UsageError for a reducer that leaves no grid in a Swin, and for the STGM's arguments given to another."""
    reducer = overrides.get("reducer", UNSAID["reducer"])
    if constructor is SwinTransformer and reducer in REDUCERS and reducer not in GRID_REDUCERS:
        raise UsageError(
            f"{name} has windows, which need a grid of tokens, so reducer {reducer!r} cannot apply; choose one of "
            f"{', '.join(GRID_REDUCERS)}, or use one of {', '.join(list_models('stvit_vit_*'))}."
        )
    foreign = [key for key in STGM_ARGUMENTS if key in overrides]
    if reducer != "stgm" and foreign:
        raise UsageError(
            f"{name} with reducer {reducer!r} has no {', '.join(foreign)}, which reducer 'stgm' has; leave them out."
        )


# Keys of the MODEL section that are overrides of the same name.
CONFIGURED = (
    "preset", "reducer", "base_depth", "stgm_depth", "units", "regions", *STGM_ARGUMENTS, "layer_scale", "stem",
    "window", "base_attention", "positions", "fc_norm",
)  # fmt: skip


def build_model(cfg: CfgNode, num_classes: int) -> nn.Module:
    """Return the model that the configuration names; settings left unset keep the variant's own."""
    if cfg.MODEL.NAME == "auto":
        raise UsageError(
            f"MODEL.NAME auto takes the network from MODEL.INIT {cfg.MODEL.INIT}, which is no file; give one."
        )
    chosen = {name: cfg.MODEL[name.upper()] for name in CONFIGURED if cfg.MODEL[name.upper()] is not None}
    chosen = {name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()}
    model = create_model(
        cfg.MODEL.NAME,
        num_frames=cfg.DATA.FRAMES,
        image_size=cfg.DATA.SIZE,
        num_classes=num_classes,
        drop_path=cfg.MODEL.DROP_PATH,
        dropout=cfg.MODEL.DROPOUT,
        **chosen,
    )
    model.set_grad_checkpointing(cfg.MODEL.GRAD_CHECKPOINTING)  # type: ignore[operator]
    return model


@dataclass(frozen=True)
class Rule:
    """An argument's type, range, and length where it is a sequence; "int or pair" style choices list two lengths."""

    kind: type  # int, float, bool or str
    low: float = 0.0
    below: float = float("inf")
    lengths: tuple[int, ...] = (1,)  # 1: a single value; others: a sequence of so many
    optional: bool = False

    def describe(self) -> str:
        """Return what is allowed, in words."""
        if self.kind in (bool, str):
            return "True or False" if self.kind is bool else "text"
        what = "whole number" if self.kind is int else "number"
        reach = f"from {self.low:g}" + (f" to below {self.below:g}" if self.below < float("inf") else " on")
        forms = [f"a {what}" if length == 1 else f"{length} {what}s" for length in self.lengths]
        return f"{' or '.join(forms)} {reach}" + (", or None" if self.optional else "")


SIZE, COUNT, SHARE = Rule(int, 1, lengths=(1, 2)), Rule(int, 1), Rule(float, 0, 1)
GRID, STAGES = Rule(int, 1, lengths=(3,), optional=True), Rule(int, 1, lengths=(4,))
FLAG, TEXT = Rule(bool), Rule(str)
RULES: dict[str, Rule] = {
    "num_frames": COUNT, "image_size": SIZE, "num_classes": COUNT, "patch_size": COUNT, "tubelet": COUNT, "dim": COUNT,
    "depth": COUNT, "depths": STAGES, "num_heads": Rule(int, 1, lengths=(1, 4)), "mlp_ratio": Rule(float, 0.01),
    "dropout": SHARE, "drop_path": SHARE, "base_depth": COUNT, "stgm_depth": COUNT, "units": COUNT,
    "frames_per_centre": COUNT, "regions": GRID, "window": Rule(int, 1, lengths=(3,)),
    "window_frames": Rule(int, 1, lengths=(4,), optional=True), "layer_scale": Rule(float, 0, optional=True),
    "offsets": FLAG, "global_centres": FLAG, "first_residual": FLAG, "fc_norm": FLAG, "recover": FLAG,
    "pooling": TEXT, "stem": TEXT, "init": TEXT, "base_attention": TEXT, "positions": TEXT, "preset": TEXT,
    "reducer": TEXT,
}  # fmt: skip


def check_argument(name: str, value: Any) -> Any:
    """Return ``value`` as plain numbers, sequences as tuples; raise ValueError where the argument's rule forbids it."""
    rule = RULES[name]
    if value is None and rule.optional:
        return None
    single = not isinstance(value, tuple | list)
    values = [value] if single else list(value)
    if len(values) in rule.lengths and single == (len(values) == 1) and all(_fits(rule, item) for item in values):
        convert = {int: int, float: float}.get(rule.kind, lambda item: item)
        return convert(value) if single else tuple(convert(item) for item in values)
    raise ValueError(f"{name} is {value!r}; allowed: {rule.describe()}.")


def _fits(rule: Rule, value: Any) -> bool:
    if rule.kind in (bool, str):
        return isinstance(value, rule.kind)
    number = isinstance(value, Integral if rule.kind is int else Real) and not isinstance(value, bool)
    return number and rule.low <= value < rule.below
