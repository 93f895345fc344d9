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

VIDEOMAE_GRID: Grid = (8, 14, 14)  # 16 frames of 224x224, the size of its published models


@dataclass
class Converted:
    """A state dict under this package's names, and a record of its conversion."""

    state: StateDict
    notes: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)  # keys of the source without a counterpart here

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


def from_vit(source: StateDict) -> Converted:
    """Convert a ViT of timm or DeiT, or VideoMAE's, fine-tuned or pre-trained (its encoder)."""
    result = Converted(dict(source))
    if any(name.startswith("encoder.blocks.") for name in source):
        result.drop(r"^(?!encoder\.)", "weights of the pre-training decoder dropped")
        result.rename(r"^encoder\.", "")
    result.drop(r"^(cls|dist|reg)_token$", "class or distillation token(s) dropped: tokens are averaged instead")
    result.drop(r"^head_dist\.", "weights of the distillation head dropped")
    result.rename(r"^head\.(?=weight|bias)", "head.proj.")
    result.rename(r"^fc_norm\.", "norm.")
    state = result.state
    prefix = sum(source[name].shape[1] for name in ("cls_token", "dist_token", "reg_token") if name in source)
    positions = state.get("pos_embed")
    if positions is not None and math.isqrt(positions.shape[1] - prefix) ** 2 == positions.shape[1] - prefix:
        state["pos_embed"] = positions[:, prefix:]
    split = [name.removesuffix("q_bias") for name in state if name.endswith(".q_bias")]
    for layer in split:  # VideoMAE has no bias on keys
        q = state.pop(f"{layer}q_bias")
        v = state.pop(f"{layer}v_bias")
        state[f"{layer}qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    if split and positions is None:
        state["pos_embed"] = interleaved_sines(math.prod(VIDEOMAE_GRID), state["patch_embed.proj.weight"].shape[0])
        result.notes.append("positions are VideoMAE's fixed sines for 16 frames of 224x224, which its files leave out")
    # Layer scales are multiplied into the last layer of their branch, which computes the same.
    scales = [name for name in state if re.fullmatch(r"blocks\.\d+\.(ls[12]\.gamma|gamma_[12])", name)]
    for name in scales:
        _, block, gamma = name.split(".", 2)
        layer = f"blocks.{block}.attn.proj" if "1" in gamma else f"blocks.{block}.mlp.fc2"
        factor = state.pop(name)
        state[f"{layer}.weight"] = state[f"{layer}.weight"] * factor.unsqueeze(1)
        state[f"{layer}.bias"] = state[f"{layer}.bias"] * factor
    if scales:
        result.dropped += scales
        result.notes.append(f"{len(scales)} layer scales multiplied into the weights of their branch")
    return result


def interleaved_sines(count: int, dim: int) -> Tensor:
    """Return VideoMAE's position table (1, count, dim): sines in even channels, cosines in odd ones."""
    rates = 10000.0 ** -(2 * (torch.arange(dim, dtype=torch.float64) // 2) / dim)
    angles = torch.arange(count, dtype=torch.float64).unsqueeze(1) * rates
    table = torch.where(torch.arange(dim) % 2 == 0, angles.sin(), angles.cos())
    return table.float().unsqueeze(0)


def from_swin(source: StateDict) -> Converted:
    """Convert Swin or Video Swin of Microsoft, timm or torchvision, or the released STViT-R-Swin."""
    image = "features.0.0.weight" in source  # torchvision's image model: its features start with the embedding

    def place(match: re.Match[str]) -> str:
        stage, merging = divmod(int(match[1]) - image, 2)  # torchvision's features are stages and mergings in turn
        return f"layers.{stage}.{'downsample' if merging else 'blocks'}."

    result = Converted(dict(source))
    computed = r"(relative_position_index|relative_coords_table|attn_mask)$"
    result.drop(computed, "buffers dropped: they are computed here")
    if any(name.startswith("backbone.") for name in source):
        result.drop(r"^(?!backbone\.|cls_head\.)", "keys outside backbone and classifier dropped")
        result.rename(r"^backbone\.", "")
    result.rename(r"^(head\.fc|head|cls_head\.fc_cls)\.(?=weight|bias)", "head.proj.")
    if image:
        result.rename(r"^features\.0\.0\.", "patch_embed.proj.")
        result.rename(r"^features\.0\.2\.", "patch_embed.norm.")
    result.rename(r"^features\.(\d+)\.", place)
    result.rename(r"\.mlp\.0\.", ".mlp.fc1.")
    result.rename(r"\.mlp\.3\.", ".mlp.fc2.")
    # timm merges patches at the start of a stage, the others at the end of the one before.
    if not any(name.startswith("layers.0.downsample.") for name in result.state):
        result.rename(r"^layers\.(\d+)\.downsample\.", lambda match: f"layers.{int(match[1]) - 1}.downsample.")
    # The released STViT-R's semantic blocks have split projections.
    for name in [name for name in result.state if ".attn.q." in name]:
        keys_values = result.state.pop(name.replace(".attn.q.", ".attn.kv."))
        result.state[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([result.state.pop(name), keys_values])
    result.rename("layer_scale_", "gamma_")
    result.rename("semantic_token2", "generators.0.global_centres")
    return result


# Keys of ViTs that compute something else under the same names, such as BEiT and EVA.
OTHER_VITS = r"(cls_token|relative_position_bias_table|rel_pos_bias|rope|q_norm)"
# Name, pattern of a key that the layout has, pattern of keys that it has not, conversion. The first that fits is used.
LAYOUTS: tuple[tuple[str, str, str, Callable[[StateDict], Converted]], ...] = (
    ("stvit_video", r"^head\.proj\.weight$", r"^$", lambda source: Converted(dict(source))),
    ("STViT-R-Swin", r"^layers\.\d+\.blocks\.\d+\.attn\.kv\.weight$", r"^$", from_swin),
    ("torchvision Swin", r"^features\.\d+\.\d+\.attn\.relative_position_bias_table$", r"^$", from_swin),
    ("Video Swin", r"^backbone\.layers\.0\.blocks\.0\.attn\.relative_position_bias_table$", r"^$", from_swin),
    ("Swin", r"^layers\.0\.blocks\.0\.attn\.relative_position_bias_table$", r"^$", from_swin),
    ("VideoMAE", r"^(encoder\.)?blocks\.0\.attn\.q_bias$", OTHER_VITS, from_vit),
    ("timm ViT", r"^blocks\.0\.attn\.qkv\.weight$", r"attn\.q_bias$", from_vit),
)


def recognise(state: StateDict) -> tuple[str, Callable[[StateDict], Converted]] | None:
    """Return the name of a state dict's layout and its conversion; None if it is not known."""
    for name, key, other, convert in LAYOUTS:
        if any(re.search(key, each) for each in state) and not any(re.search(other, each) for each in state):
            return name, convert
    return None
