"""Published checkpoint layouts: recognise the layout of a state dict, and convert it to this package's names.

A conversion changes names and axes only; ``load.py`` fits the tensors to a model. Every key of the source is either
in the result under its new name, or listed in ``dropped`` with a note that says why.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from stvit_video.common.errors import UsageError, first_line
from stvit_video.models.arguments import VIDEOMAE_EPS
from stvit_video.models.weights.files import DAMAGE, StateDict, choose

Renames = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]
COMPUTED = r"(relative_position_index|relative_coords_table|attn_mask)$"  # buffers of Swin
TOKENS = ("cls_token", "dist_token", "reg_token")  # of a ViT, beside those of the patches


@dataclass
class Converted:
    """A state dict under this package's names, and a record of its conversion."""

    state: StateDict
    notes: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)  # keys of the source without a counterpart here
    needs: dict[str, Any] = field(default_factory=dict)  # arguments of a model whose outputs equal the source's
    tokens: tuple[int, ...] = ()  # of the kinds in TOKENS that the source has
    differs: list[str] = field(default_factory=list)  # why no model here has the source's outputs

    def drop(self, pattern: str, reason: str) -> None:
        """Remove the keys that match a pattern, with a note of how many and why."""
        names = [name for name in self.state if re.search(pattern, name)]
        if names:
            self.state = {name: value for name, value in self.state.items() if name not in names}
            self.dropped += names
            self.notes.append(f"{len(names)} {reason}")

    def rename(self, renames: Renames) -> None:
        """Replace what matches a pattern in all names, one pattern after the other."""
        for pattern, new in renames:
            self.state = {re.sub(pattern, new, name): value for name, value in self.state.items()}

    def join_projections(self) -> None:
        """Concatenate split projections of queries, keys and values; their biases are zero where there are none."""
        for kind in ("weight", "bias"):  # the released STViT-R's semantic blocks have q and kv
            for parts in (("query", "key", "value"), ("q", "kv")):
                ends = [f".attn.{part}.{kind}" for part in parts]
                roots = [name.removesuffix(ends[0]) for name in self.state if name.endswith(ends[0])]
                for root in [root for root in roots if all(root + end in self.state for end in ends)]:
                    self.state[f"{root}.attn.qkv.{kind}"] = torch.cat([self.state.pop(root + end) for end in ends])
        weights = [name for name in self.state if name.endswith(".attn.qkv.weight")]
        biases = [f"{name.removesuffix('weight')}bias" for name in weights]
        if not any(name in self.state for name in biases):  # built without
            for bias, weight in zip(biases, weights, strict=True):
                self.state[bias] = self.state[weight].new_zeros(len(self.state[weight]))
            self.notes.append("it has no biases on queries, keys and values: they are zero")


def _merging(first: int) -> Callable[[re.Match[str]], str]:
    """Return the place of one of torchvision's ``features``, which are stages and patch mergings in turn."""

    def place(match: re.Match[str]) -> str:
        stage, merging = divmod(int(match[1]) - first, 2)
        return f"layers.{stage}.{'downsample' if merging else 'blocks'}."

    return place


HUGGING_FACE: Renames = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^encoder\.layers\.(?=\d+\.(blocks|downsample)\.)", "stages."),
    (r"^(encoder\.)?layers?\.", "blocks."),
    (r"^stages\.", "layers."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.((attention|self|relative_position_bias)\.)?", ".attn."),
    (r"\.q_proj\.", ".query."),
    (r"\.k_proj\.", ".key."),
    (r"\.v_proj\.", ".value."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".gamma_\1"),
    (r"^layernorm\.", "norm."),
    (r"^(cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
)
TORCHVISION_VIT: Renames = (
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_", "blocks."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(linear_1|0)\.", ".mlp.fc1."),
    (r"\.mlp\.(linear_2|3)\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
)
TORCHVISION_SWIN: Renames = (
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    (r"^features\.(\d+)\.", _merging(1)),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
)
# swin3d has its embedding beside its features.
TORCHVISION_SWIN3D: Renames = ((r"^features\.(\d+)\.", _merging(0)), *TORCHVISION_SWIN[3:])
HEADS: Renames = (
    (r"^(head\.fc|head|cls_head\.fc_cls)\.(?=weight|bias)", "head.proj."),
    (r"\.ls([12])\.gamma$|\.(?:gamma|lambda|layer_scale)_([12])$", lambda match: f".gamma_{match[1] or match[2]}"),
)


def from_vit(source: StateDict, renames: Renames = ()) -> Converted:
    """Convert a ViT: tokens beside those of the patches are dropped, projections joined."""
    result = Converted(dict(source))
    result.rename(renames)
    state = result.state
    result.tokens = tuple(state[name].shape[-2] for name in TOKENS if name in state)
    if result.tokens:
        result.drop(rf"^({'|'.join(TOKENS)})$", "class or distillation token(s) dropped: tokens are averaged instead")
        result.differs.append("it has a class token, which no model here has, so outputs differ from its own")
    result.drop(r"mask_token$", "token of hidden patches dropped")
    result.drop(r"^head_dist\.", "weights of the distillation head dropped")
    result.drop(r"^pooler\.", "weights of the pooler of the class token dropped")
    result.needs["fc_norm"] = "fc_norm.weight" in state
    result.rename((*HEADS, (r"^fc_norm\.", "norm.")))
    result.rename(((r"\.q_bias$", ".query.bias"), (r"\.v_bias$", ".value.bias")))
    if not any(name.endswith(".key.bias") for name in result.state):  # VideoMAE has none
        for name in [name for name in result.state if name.endswith(".query.bias")]:
            result.state[name.replace(".query.", ".key.")] = torch.zeros_like(result.state[name])
    result.join_projections()
    kernel = result.state.get("patch_embed.proj.weight")
    if kernel is not None and "norm_pre.weight" in result.state:  # CLIP's patches have no bias
        result.state.setdefault("patch_embed.proj.bias", kernel.new_zeros(len(kernel)))
    return result


def from_swin(source: StateDict, renames: Renames = (), window_fit: str = "pad") -> Converted:
    """Convert Swin or Video Swin of Microsoft, timm, torchvision or Hugging Face, or the released STViT-R-Swin."""
    result = Converted(dict(source), needs={"window_fit": window_fit})
    result.drop(COMPUTED, "buffers dropped: they are computed here")
    result.rename((*renames, *HEADS))
    # timm merges patches at the start of a stage, the others at the end of the one before.
    if not any(name.startswith("layers.0.downsample.") for name in result.state):
        earlier = (r"^layers\.(\d+)\.downsample\.", lambda match: f"layers.{int(match[1]) - 1}.downsample.")
        result.rename((earlier,))
    result.rename(((r"semantic_token2", "generators.0.global_centres"),))
    result.join_projections()
    return result


def from_videomae(source: StateDict, renames: Renames = ()) -> Converted:
    """Convert VideoMAE's ViT, fine-tuned or pre-trained (its encoder), whose positions are fixed sines."""
    result = from_vit(source, renames)
    result.needs.update(positions="clip", base_attention="joint")
    if result.needs["fc_norm"]:
        result.needs["norm_eps"] = VIDEOMAE_EPS if renames else 1e-6
    else:
        del result.needs["fc_norm"]
        if "head.proj.weight" in result.state:
            result.differs.append("its classifier reads its first token, here the mean of all")
    return result


def fold_scales(state: StateDict, target: Collection[str], notes: list[str]) -> None:
    """Multiply layer scales that the model lacks into the last layer of their branch, which computes the same."""
    scales = [name for name in state if re.search(r"\.gamma_[12]$", name) and name not in target]
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    if blocks and len(scales) != 2 * len(blocks):
        return  # some are missing, and the rest is refused
    for name in scales:
        root, _, gamma = name.rpartition(".")
        layer = f"{root}.attn.proj" if gamma == "gamma_1" else f"{root}.mlp.fc2"
        if not {f"{layer}.weight", f"{layer}.bias"} <= state.keys():
            return  # a branch of another kind, such as SwiGLU, which is refused
        factor = state.pop(name)
        state[f"{layer}.weight"] = state[f"{layer}.weight"] * factor.unsqueeze(1)
        state[f"{layer}.bias"] = state[f"{layer}.bias"] * factor
    if scales:
        notes.append(f"{len(scales)} layer scales multiplied into the weights of their branch")


@dataclass(frozen=True)
class Layout:
    """How one source names its weights."""

    name: str
    anchor: str  # pattern of a key that the layout has, after any prefix
    convert: Callable[[StateDict], Converted]
    without: str = r"^$"  # pattern of keys that it has not: other networks share its names
    video: bool | None = None  # whether its patches have several frames; None: either


OTHER_VITS = r"relative_position_bias|rel_pos|rope"  # of BEiT, EVA and others that compute something else
SWIN_TABLE = r"layers\.\d+\.blocks\.\d+\.attn\.relative_position_bias_table"
# The first that fits is used.
LAYOUTS = (
    Layout("stvit_video", r"head\.proj\.weight", lambda source: Converted(dict(source))),
    Layout("STViT-R-Swin", r"layers\.\d+\.blocks\.\d+\.attn\.kv\.weight", from_swin),
    Layout(
        "torchvision Swin",
        r"features\.1\.0\.attn\.relative_position_bias_table",
        partial(from_swin, renames=TORCHVISION_SWIN),
    ),
    Layout(
        "torchvision Swin3D",
        r"features\.0\.0\.attn\.relative_position_bias_table",
        partial(from_swin, renames=TORCHVISION_SWIN3D),
    ),
    Layout("Video Swin", SWIN_TABLE, from_swin, video=True),
    Layout("Swin", SWIN_TABLE, partial(from_swin, window_fit="timm")),  # Microsoft's and timm's
    Layout(
        "Hugging Face Swin",
        r"encoder\.layers\.\d+\.blocks\.\d+\.attention\.\w+\.relative_position_bias_table",
        partial(from_swin, renames=HUGGING_FACE),
    ),
    Layout(
        "Hugging Face VideoMAE",
        r"encoder\.layer\.\d+\.attention\.attention\.(q_bias|query\.bias)",
        partial(from_videomae, renames=HUGGING_FACE),
        OTHER_VITS + r"|cls_token|position_embeddings|key\.bias",
        video=True,
    ),
    Layout(
        "Hugging Face ViT",
        r"(encoder\.layer|layers)\.\d+\.attention\.(attention\.query|q_proj)\.weight",
        partial(from_vit, renames=HUGGING_FACE),
        OTHER_VITS,
    ),
    Layout(
        "torchvision ViT",
        r"encoder\.layers\.encoder_layer_\d+\.self_attention\.in_proj_weight",
        partial(from_vit, renames=TORCHVISION_VIT),
    ),
    Layout("VideoMAE", r"blocks\.\d+\.attn\.q_bias", from_videomae, OTHER_VITS + "|cls_token", video=True),
    Layout("timm ViT", r"blocks\.\d+\.attn\.qkv\.weight", from_vit, OTHER_VITS + r"|attn\.q_bias$"),
)
# Keys beside the network itself that belong to its classifier.
CLASSIFIER = re.compile(r"(head|heads\.head|head_dist|fc_norm|(cls_|distillation_)?classifier|cls_head\.fc_cls)\.")
KERNELS = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")
NOT_ENCODERS = re.compile(r"(^|[._])(decoder|predictor)")


def recognise(state: StateDict, source: str) -> tuple[Layout, Converted]:
    """Return the layout of a state dict and its conversion.

    Names may stand behind a prefix such as ``backbone.``. Raises UsageError where none of LAYOUTS fits, where several
    networks have one, and for adapters that are not merged with their weights.
    """
    if any(re.search(r"\.(lora_\w+|base_layer)\.|^base_model\.model\.", name) for name in state):
        raise UsageError(f"{source} holds adapters beside weights; merge them first (PEFT: merge_and_unload()).")
    for layout in LAYOUTS:
        matches = [re.fullmatch(rf"((?:[A-Za-z_]\w*\.)*?){layout.anchor}", name) for name in state]
        prefixes = {match[1] for match in matches if match and not NOT_ENCODERS.search(match[1])}
        notes: list[str] = []
        if not prefixes:
            continue
        prefix = choose(prefixes, source, notes)
        own, outside = _strip(state, prefix)
        kernel = next((own[name] for name in KERNELS if name in own), None)
        is_video = kernel is not None and kernel.ndim == 5 and kernel.shape[2] > 1
        if any(re.search(layout.without, name) for name in own) or layout.video not in (None, is_video):
            continue
        try:
            converted = layout.convert(own)
        except DAMAGE as error:
            raise misfit(source, layout.name, error) from error
        converted.notes[:0] = notes
        converted.dropped = [prefix + name if prefix + name in state else name for name in converted.dropped]
        if outside:
            shown = ", ".join(outside[:2]) + (" ..." if len(outside) > 2 else "")
            converted.notes.append(f"{len(outside)} keys outside the network dropped ({shown})")
            converted.dropped += outside
        return layout, converted
    raise UsageError(
        f"{source}: the layout of its {len(state)} keys ({', '.join(sorted(state)[:3])} ...) is not known; "
        f"allowed: {', '.join(layout.name for layout in LAYOUTS)}. Check that the file belongs to such a model."
    )


def misfit(source: str, layout: str, error: Exception) -> UsageError:
    """Return the error for tensors whose shapes contradict each other."""
    return UsageError(
        f"{source} looks like a {layout} checkpoint, but its tensors do not fit together ({first_line(error)}); "
        f"fetch it again."
    )


def _strip(state: StateDict, prefix: str) -> tuple[StateDict, list[str]]:
    """Return the network behind a prefix with the classifier beside it, and the names of all other keys."""
    parent = prefix[: prefix.rstrip(".").rfind(".") + 1]
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    outside = []
    for name, value in state.items():
        beside = name.removeprefix(parent)
        if name.startswith(prefix):
            continue
        if name.startswith(parent) and CLASSIFIER.match(beside) and beside not in own:
            own[beside] = value
        else:
            outside.append(name)
    return own, outside
