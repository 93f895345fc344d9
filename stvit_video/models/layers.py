"""Patch embedding, attention and the pre-norm block that the models are made of.

Legend: B clips (or frames), N query tokens, K context tokens, C channels, h heads; clips (B, 3, T, H, W).
The parameter names are those of timm's ViT, so that its checkpoints load without renaming.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from pytorchvideo.layers import Mlp
from pytorchvideo.layers.drop_path import DropPath
from pytorchvideo.models.head import create_vit_basic_head
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stvit_video.models import cpu_inference
from stvit_video.models.arguments import Grid as Grid  # also for the rooms above
from stvit_video.models.arguments import NetworkArguments
from stvit_video.models.precision import at_least_single
from stvit_video.models.projections import project_apart, project_patches


@dataclass
class Intermediates:
    """Tokens of a forward pass by stage, and the assignment of the last reducer."""

    tensors: dict[str, Tensor] = field(default_factory=dict)  # (B, N, C) or (B, t, h, w, C), as the model has them
    grids: dict[str, Grid] = field(default_factory=dict)  # (t, h, w)
    assignment: Tensor | None = None  # (B, M, N), see reducers.Reduced

    @property
    def tokens(self) -> dict[str, Tensor]:
        """The tokens (B, N, C) by stage."""
        return {stage: x.reshape(x.shape[0], -1, x.shape[-1]) for stage, x in self.tensors.items()}

    def feature_map(self, stage: str) -> Tensor:
        """Return a stage as a dense map (B, C, t, h, w), as detection and segmentation heads take it."""
        return self.tokens[stage].transpose(1, 2).unflatten(2, self.grids[stage])


def note(
    intermediates: Intermediates | None, stage: str, x: Tensor, grid: Sequence[int], assignment: Tensor | None = None
) -> None:
    """Record the output tokens of ``stage``, and the assignment of its reducer, if intermediates are requested."""
    if intermediates is not None:
        intermediates.tensors[stage], intermediates.grids[stage] = x, (grid[0], grid[1], grid[2])
        if assignment is not None:
            intermediates.assignment = assignment


class PatchEmbed(nn.Module):
    """Cut a clip into tubelets and project each: (B, 3, T, H, W) -> (B, t, h, w, C)."""

    def __init__(self, dim: int, patch: Grid) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv3d(3, dim, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return project_patches(self.proj, x, self.patch)


class Attention(nn.Module):
    """Multi-head self- or cross-attention; both use the parameters of self-attention, so image checkpoints fit."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}; choose a divisor of dim.")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def project(
        self, query: Tensor, context: Tensor | None, reads: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, h, N, C/h), keys and values (B, h, K, C/h).

        ``reads`` (W, P) are the context tokens that each of W windows attends to: queries are then (B*W, N, C), and
        keys and values (B*W, h, P, C/h). Windows may overlap; each token is projected once.
        """
        if context is None:
            q, k, v = self.qkv(query).chunk(3, dim=-1)
        else:
            q, joint = project_apart(self.qkv, query, context)
            if reads is not None:
                joint = joint[:, reads].flatten(0, 1)
            k, v = joint.chunk(2, dim=-1)
        q, k, v = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        return q, k, v

    def forward(
        self,
        query: Tensor,
        context: Tensor | None = None,
        key_bias: Tensor | None = None,
        reads: Tensor | None = None,
    ) -> Tensor:
        """Map (B, N, C) to (B, N, C); ``key_bias`` (K,), or (B, K) by clip, is added to every query's logits."""
        return self.combine(*self.project(query, context, reads), key_bias)

    def combine(self, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None) -> Tensor:
        """Return the output (B, N, C) of what ``project`` returned."""
        mask = None if key_bias is None else _by_query(key_bias).to(q.dtype).expand(q.shape[0], 1, q.shape[2], -1)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, h, N, C/h)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block with self-attention, or cross-attention to a context.

    ``layer_scale`` is the initial value of a learned factor per channel on both branches; None: no factor.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        layer_scale: float | None = None,
        attention: Attention | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = attention or Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.gamma_1 = self.gamma_2 = None
        if layer_scale is not None:
            self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((dim,), float(layer_scale))) for _ in range(2))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        key_bias: Tensor | None = None,
        residual: bool = True,
        reads: Tensor | None = None,
    ) -> Tensor:
        """Map (B, N, C) to (B, N, C); ``residual`` is the one around the attention, ``reads`` as ``Attention`` has."""
        normed = None if context is None else self.norm1(context)
        update = _scale(self.attn(self.norm1(x), normed, key_bias, reads), self.gamma_1)
        # Without the residual a dropped path would leave nothing, so it is never dropped.
        x = x + self.drop_path(update) if residual else update
        return self._add_mlp(x)

    def _add_mlp(self, x: Tensor) -> Tensor:
        """Return x + MLP for tokens (..., C); may be modified in place: the caller must own ``x``."""
        if cpu_inference.applies(x, self.norm2, self.mlp, self.drop_path):
            return cpu_inference.add_mlp(self, x)
        return x + self.mlp_branch(x)

    def mlp_branch(self, x: Tensor) -> Tensor:
        """Return the MLP's update (..., C) of tokens (..., C)."""
        return self.drop_path(_scale(self.mlp(self.norm2(x)), self.gamma_2))

    # Methods that a reducer calls instead of ``forward``. Sharding gathers the weights around each of them, so they and
    # ``forward`` must not call one another.
    STEPS = ("attention_probs", "attend", "mlp_residual")

    def attention_probs(
        self, x: Tensor, context: Tensor | None = None, key_bias: Tensor | None = None, reads: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the attention probabilities (B, h, N, K), at least single precision, and the values (B, h, K, C/h)."""
        q, k, v = self.attn.project(self.norm1(x), None if context is None else self.norm1(context), reads)
        logits = at_least_single(q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        if key_bias is not None:
            logits = logits + _by_query(key_bias)
        return logits.softmax(dim=-1), v

    def attend(self, x: Tensor, key_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the tokens (B, N, C) after the attention, and their keys (B, N, C/h), mean over heads."""
        q, k, v = self.attn.project(self.norm1(x), None)
        x = x + self.drop_path(_scale(self.attn.combine(q, k, v, key_bias), self.gamma_1))
        return x, k.mean(dim=1)

    def mlp_residual(self, x: Tensor) -> Tensor:
        """Return x + MLP for tokens (B, N, C); may be modified in place: the caller must own ``x``."""
        return self._add_mlp(x)


def _by_query(key_bias: Tensor) -> Tensor:
    """Reshape a bias (K,) or (B, K) to broadcast with logits (B, h, N, K)."""
    return key_bias if key_bias.ndim == 1 else key_bias[:, None, None]


def _scale(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x


class BlockRunner(nn.Module):
    """Runs blocks, and in training may recompute their activations in the backward pass instead of storing them."""

    grad_checkpointing = False

    def run(self, block: nn.Module, x: Tensor, *context: Tensor | None) -> Tensor:
        """Return the output of a block."""
        if self.grad_checkpointing and self.training:
            return checkpoint(block, x, *context, use_reentrant=False)
        return block(x, *context)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations of all but the reducers' blocks in the backward pass: about a third more time."""
        for module in self.modules():
            if isinstance(module, BlockRunner):
                module.grad_checkpointing = enable


class Network(BlockRunner):
    """What the ViT and the Swin have in common; they add ``forward_features``, ``layer_id`` and ``token_counts``."""

    forward_features: Callable[..., Tensor]
    input_size: Grid
    head: Any  # pytorchvideo.models.head.VisionTransformerBasicHead
    undecayed: tuple[str, ...]  # ends of the names of parameters without weight decay

    def add_head(self, dim: int, eps: float, arguments: NetworkArguments) -> None:
        """Add the last norm and the classifier, which takes the mean over tokens."""
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.head = create_vit_basic_head(
            in_features=dim, out_features=arguments.num_classes, seq_pool_type="mean", dropout_rate=arguments.dropout
        )

    def check_clip(self, x: Tensor) -> None:
        """Raise ValueError unless ``x`` is a batch of clips (B, 3, T, H, W) of the model's own size."""
        if tuple(x.shape[1:]) != (3, *self.input_size):
            raise ValueError(
                f"input of shape {tuple(x.shape)}; this model takes (B, 3, {', '.join(map(str, self.input_size))}). "
                f"Resample the clip, or build the model with its num_frames and image_size."
            )

    def forward(self, x: Tensor, return_intermediates: bool = False) -> Tensor | tuple[Tensor, Intermediates]:
        """Map a clip (B, 3, T, H, W) to logits (B, classes), and to its intermediates if requested."""
        intermediates = Intermediates() if return_intermediates else None
        logits = self.head(self.forward_features(x, intermediates))
        return logits if intermediates is None else (logits, intermediates)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, in addition to biases and norms."""
        return {name for name, _ in self.named_parameters() if name.endswith(self.undecayed)}

    def transformer_blocks(self) -> list[nn.Module]:
        """Return the blocks in order: the units that are sharded and compiled."""
        return [module for module in self.modules() if isinstance(module, Block)]


def init_linear(module: nn.Module, std: float | None = None) -> None:
    """Initialise a linear layer in place: normal with deviation ``std``, or Xavier; other layers stay."""
    if isinstance(module, nn.Linear):
        if std is None:
            nn.init.xavier_uniform_(module.weight)
        else:
            nn.init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
