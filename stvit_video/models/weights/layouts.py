"""Published checkpoint layouts: recognise the layout of a state dict, and convert it to this package's names.

A conversion changes names and axes only; ``resize.py`` fits the tensors to a model. Every key of the source is either
in the result under its new name, or listed in ``dropped`` with a note that says why.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stvit_video.models.layers import Grid
from stvit_video.models.weights.files import StateDict

# Buffers that every Swin computes from its sizes; some checkpoints contain them.
COMPUTED = re.compile(r"(relative_position_index|relative_coords_table|attn_mask)$")
PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token")
VIDEOMAE_GRID: Grid = (8, 14, 14)  # 16 frames of 224x224, the size of its published models


@dataclass
class Converted:
    """A state dict under this package's names, and a record of its conversion."""

    state: StateDict
    notes: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)  # keys of the source without a counterpart here
    fc_norm: bool | None = None  # whether the last norm comes after the mean over tokens, if known
    position_grid: Grid | None = None  # of position embeddings over a whole clip
    unplaced: list[str] = field(default_factory=list)  # keys whose grid is unknown
    left_out: list[str] = field(default_factory=list)  # keys that were not requested
    changed: dict[str, str] = field(default_factory=dict)  # status of keys that were adapted to the model's grid

    def drop(self, names: list[str], reason: str) -> None:
        """Remove keys, with a note of how many and why."""
        present = [name for name in names if self.state.pop(name, None) is not None]
        if present:
            self.dropped += present
            self.notes.append(f"{len(present)} {reason}")

    def rename(self, old: str, new: str) -> None:
        """Rename the key ``old`` if it is there."""
        if old in self.state:
            self.state[new] = self.state.pop(old)


def from_own(state: StateDict) -> Converted:
    """Return a checkpoint of this package unchanged."""
    return Converted(dict(state))


def from_timm_vit(state: StateDict) -> Converted:
    """Convert a timm or DeiT ViT: class token and its position dropped, layer scale folded in, 2-D kernel to 3-D."""
    result = Converted(dict(state))
    prefix = sum(state[name].shape[1] for name in PREFIX_TOKENS if name in state)
    result.drop(list(PREFIX_TOKENS), "class or distillation token(s) dropped: tokens are averaged instead")
    result.drop(["head_dist.weight", "head_dist.bias"], "weights of the distillation head dropped")
    positions = result.state.get("pos_embed")
    if positions is not None and prefix and math.isqrt(positions.shape[1] - prefix) ** 2 == positions.shape[1] - prefix:
        result.state["pos_embed"] = positions[:, prefix:]
    _fold_layer_scale(result, (("ls1.gamma", "attn.proj"), ("ls2.gamma", "mlp.fc2")))
    _finish_vit(result)
    return result


def from_videomae(state: StateDict) -> Converted:
    """Convert a VideoMAE ViT, fine-tuned or pre-trained (its encoder): split biases joined, fixed sines added."""
    result = Converted(dict(state))
    if any(name.startswith("encoder.blocks.") for name in state):
        decoder = [name for name in state if not name.startswith("encoder.")]
        result.drop(decoder, "weights of the pre-training decoder dropped")
        result.state = {name.removeprefix("encoder."): value for name, value in result.state.items()}
    for name in [name for name in result.state if name.endswith(".q_bias")]:
        root = name.removesuffix("q_bias")
        q, v = result.state.pop(name), result.state.pop(f"{root}v_bias")
        result.state[f"{root}qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])  # VideoMAE has no bias on keys
    _fold_layer_scale(result, (("gamma_1", "attn.proj"), ("gamma_2", "mlp.fc2")))
    if "pos_embed" not in result.state:
        dim = result.state["patch_embed.proj.weight"].shape[0]
        result.state["pos_embed"] = interleaved_sines(math.prod(VIDEOMAE_GRID), dim)
        result.notes.append("positions are VideoMAE's fixed sines for 16 frames of 224x224, which its files leave out")
    if result.state["pos_embed"].shape[1] == math.prod(VIDEOMAE_GRID):
        result.position_grid = VIDEOMAE_GRID
    _finish_vit(result)
    return result


def _finish_vit(result: Converted) -> None:
    for name in ("weight", "bias"):
        result.rename(f"head.{name}", f"head.proj.{name}")
    if "fc_norm.weight" in result.state:
        result.fc_norm = True
        for name in ("weight", "bias"):
            result.rename(f"fc_norm.{name}", f"norm.{name}")
    elif "norm.weight" in result.state:
        result.fc_norm = False
    _lift_kernel(result.state, "patch_embed.proj.weight")


def _fold_layer_scale(result: Converted, pairs: tuple[tuple[str, str], ...]) -> None:
    """Multiply the learned factors of a branch into its last linear layer, which computes the same."""
    folded = 0
    for gamma, layer in pairs:
        for name in [name for name in result.state if name.startswith("blocks.") and name.endswith(gamma)]:
            root, factor = name.removesuffix(gamma), result.state.pop(name)
            result.state[f"{root}{layer}.weight"] = result.state[f"{root}{layer}.weight"] * factor.unsqueeze(1)
            result.state[f"{root}{layer}.bias"] = result.state[f"{root}{layer}.bias"] * factor
            result.dropped.append(name)
            folded += 1
    if folded:
        result.notes.append(f"{folded} layer scales multiplied into the weights of their branch")


def _lift_kernel(state: StateDict, name: str) -> None:
    """Add a time axis of length 1 to the kernel of a 2-D convolution."""
    if name in state and state[name].ndim == 4:
        state[name] = state[name].unsqueeze(2)


def interleaved_sines(count: int, dim: int) -> Tensor:
    """Return VideoMAE's position table (1, count, dim): sines in even channels, cosines in odd ones."""
    rates = 10000.0 ** -(2 * (torch.arange(dim, dtype=torch.float64) // 2) / dim)
    angles = torch.arange(count, dtype=torch.float64).unsqueeze(1) * rates
    table = torch.where(torch.arange(dim) % 2 == 0, angles.sin(), angles.cos())
    return table.float().unsqueeze(0)


def from_swin(state: StateDict) -> Converted:
    """Convert Swin or Video Swin as published by Microsoft, or timm's Swin."""
    result = Converted(dict(state))
    result.drop([name for name in state if COMPUTED.search(name)], "buffers dropped: they are computed here")
    if any(name.startswith("backbone.") for name in state):
        others = [name for name in state if not name.startswith(("backbone.", "cls_head."))]
        result.drop(others, "keys outside backbone and classifier dropped")
        result.state = {name.removeprefix("backbone."): value for name, value in result.state.items()}
    for source in ("head", "head.fc", "cls_head.fc_cls"):
        for name in ("weight", "bias"):
            result.rename(f"{source}.{name}", f"head.proj.{name}")
    # timm merges patches at the start of a stage, Microsoft at the end of the one before.
    if not any(name.startswith("layers.0.downsample.") for name in result.state):
        for name in sorted(name for name in result.state if re.match(r"layers\.\d+\.downsample\.", name)):
            _, stage, rest = name.split(".", 2)
            result.rename(name, f"layers.{int(stage) - 1}.{rest}")
    _lift_kernel(result.state, "patch_embed.proj.weight")
    return result


def from_torchvision_swin(state: StateDict) -> Converted:
    """Convert torchvision's ``swin_*`` and ``swin3d_*``: alternating stages and mergings become stages."""
    result = Converted(dict(state))
    result.drop([name for name in state if COMPUTED.search(name)], "buffers dropped: they are computed here")
    image = "features.0.0.weight" in state  # the image model's embedding is the first of its features
    for name in list(result.state):
        result.rename(name, _torchvision_name(name, image))
    _lift_kernel(result.state, "patch_embed.proj.weight")
    return result


def _torchvision_name(name: str, image: bool) -> str:
    if name.startswith("head."):
        return name.replace("head.", "head.proj.")
    if not name.startswith("features."):
        return name
    _, index, rest = name.split(".", 2)
    if image and index == "0":
        return f"patch_embed.proj.{rest[2:]}" if rest.startswith("0.") else f"patch_embed.norm.{rest[2:]}"
    stage, merging = divmod(int(index) - image, 2)
    if merging:
        return f"layers.{stage}.downsample.{rest}"
    return f"layers.{stage}.blocks.{rest}".replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.3.", ".mlp.fc2.")


def from_stvit_r(state: StateDict) -> Converted:
    """Convert the released STViT-R-Swin: split projections of the semantic blocks joined, names replaced."""
    result = from_swin(state)
    for name in [name for name in result.state if ".attn.q." in name]:
        keys_values = result.state.pop(name.replace(".attn.q.", ".attn.kv."))
        result.state[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([result.state.pop(name), keys_values])
    for name in list(result.state):
        new = name.replace("layer_scale_", "gamma_").replace("semantic_token2", "generators.0.global_centres")
        result.rename(name, new)
    for i in (0, 2):
        _lift_kernel(result.state, f"patch_embed.proj.{i}.c.weight")
    return result


Layout = tuple[str, Callable[[StateDict], bool], Callable[[StateDict], Converted]]


def _has(pattern: str, without: str = r"^$") -> Callable[[StateDict], bool]:
    """Return a test whether some key matches ``pattern`` and none matches ``without``."""
    return lambda state: (
        any(re.search(pattern, name) for name in state) and not any(re.search(without, name) for name in state)
    )


# Keys of ViTs that compute something else under the same names, such as BEiT and EVA.
OTHER_VITS = r"(cls_token|relative_position_bias_table|rel_pos_bias|rope|q_norm)"
# The first that matches is used: specific ones come first.
LAYOUTS: tuple[Layout, ...] = (
    ("stvit_video", _has(r"^head\.proj\.weight$"), from_own),
    ("STViT-R-Swin", _has(r"^layers\.\d+\.blocks\.\d+\.attn\.kv\.weight$"), from_stvit_r),
    ("torchvision Swin", _has(r"^features\.\d+\.\d+\.attn\.relative_position_bias_table$"), from_torchvision_swin),
    ("Video Swin", _has(r"^backbone\.layers\.0\.blocks\.0\.attn\.relative_position_bias_table$"), from_swin),
    ("Swin", _has(r"^layers\.0\.blocks\.0\.attn\.relative_position_bias_table$"), from_swin),
    ("VideoMAE", _has(r"^(encoder\.)?blocks\.0\.attn\.q_bias$", OTHER_VITS), from_videomae),
    ("timm ViT", _has(r"^blocks\.0\.attn\.qkv\.weight$", r"attn\.q_bias$"), from_timm_vit),
)


def recognise(state: StateDict) -> tuple[str, Callable[[StateDict], Converted]] | None:
    """Return the name of a state dict's layout and its conversion; None if it is not known."""
    for name, fits, convert in LAYOUTS:
        if fits(state):
            return name, convert
    return None
