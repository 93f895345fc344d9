"""Arguments of the models, each declared once: type, default, range and meaning.

A declaration serves three readers: the dataclass that a constructor takes and that checks its values, the keyword
overrides of ``create_model``, and the MODEL section of the configuration. Nothing here imports torch.
"""

# ruff: noqa: RUF009  (``argument`` returns a field)

from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from stvit_video.common.errors import nearest

Grid = tuple[int, int, int]  # along time, height, width
PerStage = tuple[int, int, int, int]
PoolingKind = Literal["mask", "max", "mean"]
ReducerName = Literal["stgm", "random", "mean", "tome", "dynamicvit", "ats", "spot"]
REDUCERS: tuple[str, ...] = get_args(ReducerName)
GRID_REDUCERS = ("stgm", "random", "mean")  # those that can leave one token for each region, as windows need it
STREAMED_REDUCERS = ("stgm", "mean")  # those of which each token depends on its own frames alone
VIDEOMAE_EPS = 1e-5  # of the last norm in Hugging Face's VideoMAE; its authors' has 1e-6
EARLIER_EPS = 1e-6  # of the last norm in all models before there was a choice


def argument(about: str, default: Any = MISSING, **limits: Any) -> Any:
    """Declare an argument as a dataclass field. ``limits``: ``low`` and ``high``; whole numbers start at 1 without.

    ``key`` makes it a key of the MODEL section: "unset" by default, which keeps the variant's value, or "default",
    which has the argument's own default.
    """
    return field(default=default, metadata={"about": about, **limits})


@dataclass(frozen=True)
class Rule:
    """What an argument takes, as its declaration says."""

    name: str
    default: Any  # None: the argument may be None
    kind: type  # int, float, bool or str
    lengths: tuple[int, ...]  # 1: a single value; others: a sequence of that length
    choices: tuple[str, ...]
    about: str
    low: float | None = None
    high: float | None = None
    key: Literal["unset", "default"] | None = None

    def check(self, value: Any) -> Any:
        """Return ``value`` as plain numbers, sequences as tuples; raise ValueError where it is not allowed."""
        if value is None and self.default is None:
            return None
        if self.choices:
            if value not in self.choices:
                known = f"choose one of {', '.join(self.choices)}.{nearest(str(value), self.choices)}"
                raise ValueError(f"{self.name} {value!r} is unknown; {known}")
            return value
        single = not isinstance(value, tuple | list)
        values = [value] if single else list(value)
        if len(values) not in self.lengths or single != (len(values) == 1) or not all(map(self._fits, values)):
            raise ValueError(f"{self.name} is {value!r}; allowed: {self._describe()}.")
        return self.kind(value) if single else tuple(map(self.kind, values))

    def _fits(self, value: Any) -> bool:
        allowed: Any = {bool: bool, int: Integral, float: Real}[self.kind]
        if isinstance(value, bool) != (self.kind is bool) or not isinstance(value, allowed):
            return False
        return (self.low is None or self.low <= value) and (self.high is None or value <= self.high)

    def _describe(self) -> str:
        if self.kind is bool:
            return "True or False"
        what = "whole number" if self.kind is int else "number"
        forms = " or ".join(f"a {what}" if length == 1 else f"{length} {what}s" for length in self.lengths)
        bounds = f"from {self.low:g}" + (" on" if self.high is None else f" to {self.high:g}")
        return f"{forms} {bounds}" + (", or None" if self.default is None else "")


def read_rules(arguments: type) -> dict[str, Rule]:
    """Return the rules that the fields of a dataclass declare, by name."""
    rules = {}
    for declared in fields(arguments):
        hint: Any = declared.type
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        forms = [form for form in get_args(hint) if form is not NoneType] if isinstance(hint, UnionType) else [hint]
        elements = [(str,)] if choices else [get_args(form) or (form,) for form in forms]  # of a tuple those it holds
        kind = elements[0][0]
        lengths = tuple(map(len, elements))
        limits = {"low": 1 if kind is int else None, **declared.metadata}
        rules[declared.name] = Rule(declared.name, declared.default, kind, lengths, choices, **limits)
    return rules


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Base of the arguments: raises ValueError for values that their declarations do not allow."""

    def __post_init__(self) -> None:
        for name, rule in read_rules(type(self)).items():
            object.__setattr__(self, name, rule.check(getattr(self, name)))


@dataclass(frozen=True, kw_only=True)
class NetworkArguments(Arguments):
    """What a ViT and a Swin have in common."""

    num_frames: int = argument("frames of a clip; 1 builds the image model, with tubelets of 1 frame")
    image_size: int | tuple[int, int] = argument("height and width in pixels, one number where they are equal")
    num_classes: int = argument("outputs of the classifier")
    tubelet: int = argument("frames that make one token frame", 2)
    dim: int = argument("channels of a token (in a Swin, of its first stage)")
    mlp_ratio: float = argument("hidden channels of the MLPs, in multiples of the tokens' channels", 4.0, low=0.01)
    drop_path: float = argument(
        "stochastic depth of the last block; 0.1 when fine-tuning for long", 0.0, low=0, high=0.99, key="default"
    )
    dropout: float = argument("dropout before the classifier", 0.0, low=0, high=0.99, key="default")

    @property
    def input_size(self) -> Grid:
        """The size (T, H, W) of a clip."""
        sides = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        return (self.num_frames, sides[0], sides[1])

    @property
    def tubelet_frames(self) -> int:
        """Frames of a tubelet: 1 in an image model."""
        return 1 if self.num_frames == 1 else self.tubelet


@dataclass(frozen=True, kw_only=True)
class ViTArguments(NetworkArguments):
    """A vision transformer."""

    patch_size: int = argument("height and width of a patch in pixels", 16)
    depth: int = argument("blocks", 12)
    num_heads: int = argument("attention heads, the same number in each block")
    base_attention: Literal["frame", "joint"] = argument("of a ViT: frame or joint", "frame", key="unset")
    positions: Literal["frame", "clip"] = argument("of a ViT: frame, or clip as in VideoMAE", "frame", key="unset")
    fc_norm: bool = argument("of a ViT: last norm after the mean over tokens, as in VideoMAE", False, key="unset")
    norm_eps: float | None = argument(
        "of a ViT: added to the variance in its last norm; if unset 1e-6, with clip positions and fc_norm 1e-5",
        None,
        low=0,
        key="unset",
    )


@dataclass(frozen=True, kw_only=True)
class SwinArguments(NetworkArguments):
    """A Swin transformer."""

    patch_size: int = argument("height and width of a patch in pixels", 4)
    depths: PerStage = argument("blocks of each stage")
    num_heads: PerStage = argument("attention heads of each stage")
    stem: Literal["patch", "conv"] = argument("Swin's patch embedding, or the released STViT-R's", "patch", key="unset")
    window: Grid = argument("Swin's window along time, height, width", (8, 7, 7), key="unset")
    window_fit: Literal["pad", "timm"] = argument(
        "of a Swin, on maps that are no multiple of the window: pad as torchvision, or windows cut to the map as timm",
        "pad",
        key="unset",
    )
    window_frames: PerStage | None = argument("frames of the windows of each stage; None: those of window", None)
    init: Literal["normal", "xavier"] = argument(
        "initial weights: normal as published (deviation 0.02), or xavier, which trains sooner with few channels",
        "normal",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stem == "conv" and self.patch_size != 4:
            raise ValueError(f"patch_size {self.patch_size} with stem 'conv', whose two strides of 2 make 4; choose 4.")


@dataclass(frozen=True, kw_only=True)
class STGMArguments(Arguments):
    """What only the semantic token generator (STGM) has, and no other reducer."""

    pooling: PoolingKind = argument("how centres start", "mask", key="unset")
    offsets: bool = argument("inter-window form: learned displacement of the pooled regions", False, key="unset")
    global_centres: bool = argument("learned global centres G", True, key="unset")
    first_residual: bool = argument("residual on the pooled centres", True, key="unset")


@dataclass(frozen=True, kw_only=True)
class SemanticArguments(STGMArguments):
    """How a network goes on with few tokens."""

    preset: Literal["paper", "balanced", "fast"] = argument(
        "paper (default of stvit models), balanced (not of stvit_r) or fast", "paper", key="unset"
    )
    reducer: ReducerName = argument(
        "of a stvit model: what leaves few tokens; stgm (default) makes the semantic ones, the others are for "
        "comparison (a Swin takes random and mean)",
        "stgm",
        key="unset",
    )
    base_depth: int = argument("blocks on all tokens before the semantic ones; fewer is faster", 4, key="unset")
    stgm_depth: int = argument("blocks that generate semantic tokens", 2, low=2, high=4, key="unset")
    regions: Grid | None = argument(
        "centres along time, height, width; if unset 4 x 4 a frame (ViT), 3 x 3 a window (Swin)", None, key="unset"
    )
    frames_per_centre: int = argument("token frames that share their centres, where regions does not say", 1)


@dataclass(frozen=True, kw_only=True)
class ViTSemanticArguments(SemanticArguments):
    """How a ViT goes on with few tokens."""

    streaming: bool = argument(
        "of a stvit_vit: each group of frames that shares centres is computed by itself, so that a stream computes "
        "every frame once",
        False,
        key="unset",
    )


@dataclass(frozen=True, kw_only=True)
class SwinSemanticArguments(SemanticArguments):
    """How the third stage of a Swin goes on with few tokens."""

    recover: bool = argument("give the image tokens back at the end of each unit (STViT-R)", False)
    units: int = argument("dumbbell units of stvit_r models", 1, key="unset")
    layer_scale: float | None = argument(
        "start of the learned factors of semantic blocks (Swin)", None, low=0, key="unset"
    )


# The keys of the MODEL section that are arguments, by the arguments' names.
CONFIGURED: dict[str, Rule] = {
    name: rule
    for declared in (SwinSemanticArguments, ViTSemanticArguments, SwinArguments, ViTArguments)
    for name, rule in read_rules(declared).items()
    if rule.key
}
