"""Attention and the pre-norm block that every model here is made of.

Legend: B clips (or frames), N query tokens, K context tokens, C channels, h heads.
The parameter names are those of timm's ViT, so that its checkpoints fit without renaming.
"""

import torch
import torch.nn.functional as F
from pytorchvideo.layers import Mlp
from pytorchvideo.layers.drop_path import DropPath
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention of a query on itself or on a context, with the parameters of ordinary self-attention.

    Cross-attention slices the joint ``qkv`` projection. Semantic tokens therefore need no weights that an ordinary
    image checkpoint does not have.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}; choose a divisor of dim.")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def _heads(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        return x.view(B, N, self.num_heads, C // self.num_heads).transpose(1, 2)  # (B, h, N, C/h)

    def project(self, query: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, h, N, C/h), keys and values (B, h, K, C/h)."""
        if context is None:
            q, k, v = self.qkv(query).chunk(3, dim=-1)
        else:
            C = query.shape[-1]
            weight, bias = self.qkv.weight, self.qkv.bias
            q = F.linear(query, weight[:C], bias[:C])
            k, v = F.linear(context, weight[C:], bias[C:]).chunk(2, dim=-1)
        return self._heads(q), self._heads(k), self._heads(v)

    def forward(self, query: Tensor, context: Tensor | None = None, key_bias: Tensor | None = None) -> Tensor:
        """Map (B, N, C) to (B, N, C); ``key_bias`` (K,) is added to every query's logits."""
        q, k, v = self.project(query, context)
        mask = None if key_bias is None else key_bias.to(q.dtype).expand(q.shape[0], 1, q.shape[2], -1)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, h, N, C/h)
        return self.proj(x.transpose(1, 2).reshape(query.shape))

    def weights(self, query: Tensor, context: Tensor | None = None, key_bias: Tensor | None = None) -> Tensor:
        """Return the attention probabilities (B, N, K), mean over heads: for pictures and tests, not for speed."""
        q, k, _ = self.project(query, context)
        logits = (q @ k.transpose(-2, -1)).float() * q.shape[-1] ** -0.5
        if key_bias is not None:
            logits = logits + key_bias
        return logits.softmax(dim=-1).mean(dim=1)


class Block(nn.Module):
    """Pre-norm transformer block whose attention may look at a context instead of at its own tokens."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Tensor, context: Tensor | None = None, key_bias: Tensor | None = None, residual: bool = True
    ) -> Tensor:
        """Map (B, N, C) to (B, N, C); ``residual`` is the one around the attention."""
        normed = None if context is None else self.norm1(context)
        update = self.drop_path(self.attn(self.norm1(x), normed, key_bias))
        x = x + update if residual else update
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attention_weights(self, x: Tensor, context: Tensor | None = None, key_bias: Tensor | None = None) -> Tensor:
        """Return the probabilities (B, N, K) with which ``x`` attends to the context, mean over heads."""
        normed = None if context is None else self.norm1(context)
        return self.attn.weights(self.norm1(x), normed, key_bias)


def init_weights(module: nn.Module) -> None:
    """Initialise linear layers (Xavier) in place, as the ViT reference implementation does."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Return the stochastic depth rate of each block, rising linearly from 0 to ``rate``."""
    return torch.linspace(0, rate, depth).tolist()
