"""Published checkpoint layouts: recognise the layout of a state dict, and convert it to this package's names.

A conversion changes names and axes only; ``load.py`` fits the tensors to a model. Every key of the source is either
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
COMPUTED = r"(relative_position_index|relative_coords_table|attn_mask)$"
VIDEOMAE_GRID: Grid = (8, 14, 14)  # 16 frames of 224x224, the size of its published models


@dataclass
class Converted:
    """A state dict under this package's names, and a record of its conversion."""

    state: StateDict
    notes: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)  # keys of the source without a counterpart here
    fc_norm: bool | None = None  # whether the last norm comes after the mean over tokens, if known
    position_grid: Grid | None = None  # of position embeddings over a whole clip
    left_out: list[str] = field(default_factory=list)  # keys that were not requested
    changed: dict[str, str] = field(
        default_factory=dict
    )  # status of keys that were adapted to the model's grid, or cannot be

    def drop(self, pattern: str, reason: str) -> None:
        """Remove the keys that match a pattern, with a note of how many and why."""
        names = [name for name in self.state if re.search(pattern, name)]
        if names:
            self.state = {name: value for name, value in self.state.items() if name not in names}
            self.dropped += names
            self.notes.append(f"{len(names)} {reason}")

    def rename(self, pattern: str, new: str | Callable[[re.Match[str]], str]) -> None:
        """Replace what matches a pattern in all names."""
        self.state = {re.sub(pattern, new, name): value for name, value in self.state.items()}


def from_timm_vit(state: StateDict) -> Converted:
    """Convert a timm or DeiT ViT: class token and its position dropped, layer scale folded in."""
    result = Converted(dict(state))
    prefix = sum(state[name].shape[1] for name in ("cls_token", "dist_token", "reg_token") if name in state)
    result.drop(r"^(cls|dist|reg)_token$", "class or distillation token(s) dropped: tokens are averaged instead")
    result.drop(r"^head_dist\.", "weights of the distillation head dropped")
    positions = result.state.get("pos_embed")
    if positions is not None and math.isqrt(positions.shape[1] - prefix) ** 2 == positions.shape[1] - prefix:
        result.state["pos_embed"] = positions[:, prefix:]
    _finish_vit(result)
    return result


def from_videomae(state: StateDict) -> Converted:
    """Convert a VideoMAE ViT, fine-tuned or pre-trained (its encoder): split biases joined, fixed sines added."""
    result = Converted(dict(state))
    if any(name.startswith("encoder.blocks.") for name in state):
        result.drop(r"^(?!encoder\.)", "weights of the pre-training decoder dropped")
        result.rename(r"^encoder\.", "")
    for name in [name for name in result.state if name.endswith(".q_bias")]:
        root = name.removesuffix("q_bias")
        q, v = result.state.pop(name), result.state.pop(f"{root}v_bias")
        result.state[f"{root}qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])  # VideoMAE has no bias on keys
    if "pos_embed" not in result.state:
        dim = result.state["patch_embed.proj.weight"].shape[0]
        result.state["pos_embed"] = interleaved_sines(math.prod(VIDEOMAE_GRID), dim)
        result.notes.append("positions are VideoMAE's fixed sines for 16 frames of 224x224, which its files leave out")
    if result.state["pos_embed"].shape[1] == math.prod(VIDEOMAE_GRID):
        result.position_grid = VIDEOMAE_GRID
    _finish_vit(result)
    return result


def _finish_vit(result: Converted) -> None:
    """Multiply layer scales into the last layer of their branch, which computes the same, and rename head and norm."""
    scales = [name for name in result.state if re.fullmatch(r"blocks\.\d+\.(ls[12]\.gamma|gamma_[12])", name)]
    for name in scales:
        _, block, gamma = name.split(".", 2)
        layer = f"blocks.{block}.attn.proj" if "1" in gamma else f"blocks.{block}.mlp.fc2"
        factor = result.state.pop(name)
        result.state[f"{layer}.weight"] = result.state[f"{layer}.weight"] * factor.unsqueeze(1)
        result.state[f"{layer}.bias"] = result.state[f"{layer}.bias"] * factor
    if scales:
        result.dropped += scales
        result.notes.append(f"{len(scales)} layer scales multiplied into the weights of their branch")
    result.rename(r"^head\.(?=weight|bias)", "head.proj.")
    if "fc_norm.weight" in result.state:
        result.fc_norm = True
        result.rename(r"^fc_norm\.", "norm.")
    elif "norm.weight" in result.state:
        result.fc_norm = False


def interleaved_sines(count: int, dim: int) -> Tensor:
    """Return VideoMAE's position table (1, count, dim): sines in even channels, cosines in odd ones."""
    rates = 10000.0 ** -(2 * (torch.arange(dim, dtype=torch.float64) // 2) / dim)
    angles = torch.arange(count, dtype=torch.float64).unsqueeze(1) * rates
    table = torch.where(torch.arange(dim) % 2 == 0, angles.sin(), angles.cos())
    return table.float().unsqueeze(0)


def from_swin(state: StateDict) -> Converted:
    """Convert Swin or Video Swin as published by Microsoft, or timm's Swin."""
    result = Converted(dict(state))
    result.drop(COMPUTED, "buffers dropped: they are computed here")
    if any(name.startswith("backbone.") for name in state):
        result.drop(r"^(?!backbone\.|cls_head\.)", "keys outside backbone and classifier dropped")
        result.rename(r"^backbone\.", "")
    result.rename(r"^(head\.fc|head|cls_head\.fc_cls)\.(?=weight|bias)", "head.proj.")
    # timm merges patches at the start of a stage, Microsoft at the end of the one before.
    if not any(name.startswith("layers.0.downsample.") for name in result.state):
        result.rename(r"^layers\.(\d+)\.downsample\.", lambda match: f"layers.{int(match[1]) - 1}.downsample.")
    return result


def from_torchvision_swin(state: StateDict) -> Converted:
    """Convert torchvision's ``swin_*`` and ``swin3d_*``: alternating stages and mergings become stages."""
    image = "features.0.0.weight" in state  # the image model's embedding is the first of its features

    def place(match: re.Match[str]) -> str:
        stage, merging = divmod(int(match[1]) - image, 2)
        return f"layers.{stage}.{'downsample' if merging else 'blocks'}."

    result = Converted(dict(state))
    result.drop(COMPUTED, "buffers dropped: they are computed here")
    result.rename(r"^head\.", "head.proj.")
    if image:
        result.rename(r"^features\.0\.0\.", "patch_embed.proj.")
        result.rename(r"^features\.0\.2\.", "patch_embed.norm.")
    result.rename(r"^features\.(\d+)\.", place)
    result.rename(r"\.mlp\.0\.", ".mlp.fc1.")
    result.rename(r"\.mlp\.3\.", ".mlp.fc2.")
    return result


def from_stvit_r(state: StateDict) -> Converted:
    """Convert the released STViT-R-Swin: split projections of the semantic blocks joined, names replaced."""
    result = from_swin(state)
    for name in [name for name in result.state if ".attn.q." in name]:
        keys_values = result.state.pop(name.replace(".attn.q.", ".attn.kv."))
        result.state[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([result.state.pop(name), keys_values])
    result.rename("layer_scale_", "gamma_")
    result.rename("semantic_token2", "generators.0.global_centres")
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
    ("stvit_video", _has(r"^head\.proj\.weight$"), lambda state: Converted(dict(state))),
    ("STViT-R-Swin", _has(r"^layers\.\d+\.blocks\.\d+\.attn\.kv\.weight$"), from_stvit_r),
    ("torchvision Swin", _has(r"^features\.\d+\.\d+\.attn\.relative_position_bias_table$"), from_torchvision_swin),
    ("Video Swin", _has(r"^backbone\.layers\.0\.blocks\.0\.attn\.relative_position_bias_table$"), from_swin),
    ("Swin", _has(r"^layers\.0\.blocks\.0\.attn\.relative_position_bias_table$"), from_swin),
    ("VideoMAE", _has(r"^(encoder\.)?blocks\.0\.attn\.q_bias$", OTHER_VITS), from_videomae),
    ("timm ViT", _has(r"^blocks\.0\.attn\.qkv\.weight$", r"attn\.q_bias$"), from_timm_vit),
)


def recognise(state: StateDict) -> tuple[str, Callable[[StateDict], Converted]] | None:
    """Return the name of a state dict's layout and its conversion; None if it is not known."""
    return next(((name, convert) for name, fits, convert in LAYOUTS if fits(state)), None)
