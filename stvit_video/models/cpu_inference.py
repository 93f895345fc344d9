"""Cache blocking: on a CPU without gradients, blocks are computed in pieces whose activations stay in the cache.

The results are those of the blocks' ordinary forward passes, up to rounding; up to twice as fast, and with less memory
to allocate. All of it is here: a block asks ``applies`` and then calls ``add_mlp`` or ``window_block``.

Legend: B clips, (T, H, W) token grid, (t, h, w) window, P = t*h*w positions of a window, C channels, k heads.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from pytorchvideo.layers import Mlp
from pytorchvideo.layers.drop_path import DropPath
from torch import Tensor, nn

from stvit_video.models.grids import window_partition, window_view
from stvit_video.models.projections import is_plain

PIECE = 2**23  # bytes of the widest activation of a piece: it then stays in the cache
TOKENWISE = frozenset({nn.Linear, nn.LayerNorm, nn.GELU, Mlp, DropPath})  # they map each token by itself
LOGITS = 2**18  # attention logits that are computed at a time where they are materialised

Run = tuple[int, int, int]  # equal windows along an axis: start of the first, number, length of each


def applies(x: Tensor, *modules: nn.Module, kinds: frozenset[type[nn.Module]] = TOKENWISE) -> bool:
    """Return whether ``modules``, their parts included, may be computed in pieces of ``x``.

    Not where each layer has to run once on the whole: training, compilation, export, operation counts, hooks, and parts
    that are not of ``kinds`` and may look at all of their input (adapters, quantisation to int8).
    """
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    return not any(part.training or not is_plain(part, kinds) for module in modules for part in module.modules())


def add_mlp(block: Any, x: Tensor) -> Tensor:
    """Return x + block.mlp_branch(x) for tokens (..., C); modified in place: the caller must own ``x``."""
    x = x.contiguous()
    width = block.mlp.fc1.out_features
    for piece in x.view(-1, x.shape[-1]).split(max(1, PIECE // (width * x.element_size()))):
        piece += block.mlp_branch(piece)
    return x


def window_block(block: Any, x: Tensor) -> Tensor:
    """Return the output of a ``WindowBlock`` for (B, T, H, W, C): its attention for a few windows at a time, its MLP.

    Shifted windows are not rolled and masked: a masked window consists of parts that do not see one another, so the
    parts are windows of their own, cut where they lie.
    """
    attention = block.attn
    if any(length % size for length, size in zip(attention.grid[1:], attention.window[1:], strict=True)):
        return add_mlp(block, x + attention(block.norm1(x)))  # padding in space takes part in the attention
    out = torch.empty_like(x)
    bias = attention.bias().to(x.dtype).view(-1, *attention.window, *attention.window)
    for runs in product(*map(_equal_windows, attention.grid, attention.window, attention.shift)):
        window = t, h, w = runs[0][2], runs[1][2], runs[2][2]
        positions = t * h * w
        cropped = bias[:, :t, :h, :w, :t, :h, :w].reshape(-1, positions, positions)
        for piece in _pieces(len(x), runs, positions * attention.qkv.out_features * x.element_size()):
            windows = window_partition(x[piece], window).flatten(0, 3)
            target = window_view(out[piece], window)
            target.copy_((windows + _attend(attention, block.norm1(windows), cropped)).view(target.shape))
    return add_mlp(block, out)


def _equal_windows(length: int, window: int, shift: int) -> list[Run]:
    """Return the windows of an axis as runs of equal ones; the ends of a shifted axis are shorter."""
    full, rest = divmod(length - shift, window)
    runs = [(0, 1, shift), (shift, full, window), (length - rest, 1, rest)]
    return [(start, count, size) for start, count, size in runs if count and size]


def _pieces(clips: int, runs: Sequence[Run], window_bytes: int) -> Iterator[tuple[slice, ...]]:
    """Yield parts of a batch (B, T, H, W) that consist of whole windows, about PIECE bytes each if not the last."""
    axes, total = [], window_bytes
    for start, count, size in reversed([(0, clips, 1), *runs]):
        step = max(1, min(count, PIECE // total))
        total *= step
        axes.append([slice(start + i * size, start + min(i + step, count) * size) for i in range(0, count, step)])
    return product(*reversed(axes))


def _attend(attention: Any, windows: Tensor, bias: Tensor) -> Tensor:
    """Map windows (n, P, C) to the same shape with a ``WindowAttention``, whose bias is (k, P, P)."""
    n, P, C = windows.shape
    heads = attention.num_heads
    q, k, v = attention.qkv(windows).view(n, P, 3, heads, C // heads).permute(2, 0, 3, 1, 4)  # (n, k, P, C/k) each
    if q.element_size() >= 4:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(n, -1, -1, -1))
    else:
        # In half precision fused attention is no faster on a CPU than in float32; plain products in the cache are.
        out = torch.empty(q.shape, dtype=q.dtype)
        step = max(1, min(n, LOGITS // bias.numel()))  # windows whose logits stay in the cache
        biases = bias.repeat(step, 1, 1)
        for i in range(0, n, step):
            queries, keys, values = (part[i : i + step].flatten(0, 1) for part in (q, k, v))  # (step*k, P, C/k)
            logits = torch.baddbmm(biases[: len(queries)], queries, keys.mT, alpha=q.shape[-1] ** -0.5)
            torch.bmm(logits.softmax(dim=-1), values, out=out[i : i + step].flatten(0, 1))
    return attention.proj(out.transpose(1, 2).reshape(n, P, C))
