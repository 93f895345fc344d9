"""Windows on a token grid: cutting, shifting, which positions may see one another, and attention inside them.

Sources: Liu et al. (Swin, arXiv 2103.14030; Video Swin, arXiv 2106.13230).

Where a map is no multiple of its windows, it is padded at the end. Padding in space takes part with zeros, as in the
published networks; padding in time is hidden, since otherwise a clip of equal frames would differ from its image.

Legend: B clips, (T, H, W) token grid, (t, h, w) window, P = t*h*w positions of a window, C channels, k heads.
"""

import math
from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F
from pytorchvideo.layers import Mlp
from pytorchvideo.layers.drop_path import DropPath
from torch import Tensor, nn

from stvit_video.models.layers import Attention, Grid


def partition(x: Tensor, window: Grid) -> Tensor:
    """Cut (B, T, H, W, C), a multiple of the window, into (B, T/t, H/h, W/w, P, C)."""
    B, T, H, W, C = x.shape
    t, h, w = window
    x = x.reshape(B, T // t, t, H // h, h, W // w, w, C)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(B, T // t, H // h, W // w, t * h * w, C)


def unite(windows: Tensor, window: Grid) -> Tensor:
    """Undo ``partition``: (B, T/t, H/h, W/w, P, C) to (B, T, H, W, C)."""
    B, nt, nh, nw, _, C = windows.shape
    t, h, w = window
    x = windows.reshape(B, nt, nh, nw, t, h, w, C).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(B, nt * t, nh * h, nw * w, C)


def axis_labels(length: int, window: int, shift: int, hide_padding: bool) -> Tensor:
    """Return a label for each position of a padded and shifted axis; only positions of one label see one another.

    Rolling brings the first ``shift`` positions behind the last ones, which are no neighbours of theirs.
    """
    labels = torch.zeros(math.ceil(length / window) * window, dtype=torch.int64)
    if hide_padding:
        labels[length:] = 1
    labels[:shift] += 2
    return labels.roll(-shift)


def equal_runs(labels: Tensor, window: int) -> list[tuple[slice, Tensor]]:
    """Return the windows of an axis as runs that hold the same pattern of labels, and that pattern (window,)."""
    rows = labels.view(-1, window)
    same = rows.unsqueeze(1) == rows.unsqueeze(2)  # (windows, window, window): the pattern whatever the labels' names
    starts = [0] + [i for i in range(1, len(rows)) if not torch.equal(same[i], same[i - 1])]
    ends = [*starts[1:], len(rows)]
    return [(slice(start, end), rows[start]) for start, end in zip(starts, ends, strict=True)]


class WindowAttention(Attention):
    """Self-attention inside (shifted) windows of a grid that is fixed, with relative position bias.

    ``window`` says how far the bias table reaches; in time, ``window_frames`` and the clip itself may be shorter.
    The table then keeps its shape, so that weights fit clips of any length. Parameter names are Swin's.
    """

    def __init__(
        self, dim: int, num_heads: int, grid: Grid, window: Grid, shifted: bool, window_frames: int | None = None
    ) -> None:
        super().__init__(dim, num_heads)
        frames = min(window_frames or window[0], window[0], grid[0])
        self.grid, self.window = grid, (frames, window[1], window[2])
        # One window along an axis: nothing to shift to, as in the published networks.
        self.shift = tuple(
            size // 2 if shifted and length > size else 0 for length, size in zip(grid, self.window, strict=True)
        )
        self.table_shape = (2 * window[0] - 1, 2 * window[1] - 1, 2 * window[2] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(math.prod(self.table_shape), num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        for axis, (size, reach) in enumerate(zip(self.window, window, strict=True)):
            places = torch.arange(size)
            shape = [1] * 6
            shape[axis] = shape[axis + 3] = size
            offsets = (places.unsqueeze(1) - places + reach - 1).reshape(shape)  # of query from key, from 0 on
            self.register_buffer(f"offsets_{axis}", offsets, persistent=False)
        self.regions = list(self._regions())
        for i, (_, mask) in enumerate(self.regions):
            self.register_buffer(f"mask_{i}", mask, persistent=False)  # so that it follows the model to its device

    def _regions(self) -> Iterator[tuple[tuple[slice, ...], Tensor | None]]:
        """Yield blocks of windows that share a mask (P, P), the mask being None where all positions see all."""
        hidden = (True, False, False)
        axes = [
            equal_runs(axis_labels(*sizes), sizes[1])
            for sizes in zip(self.grid, self.window, self.shift, hidden, strict=True)
        ]
        for runs in product(*axes):
            seen = torch.ones(1, 1, dtype=torch.bool)
            for _, labels in runs:
                same = labels.unsqueeze(0) == labels.unsqueeze(1)
                seen = (seen[:, None, :, None] & same[None, :, None, :]).flatten(0, 1).flatten(1, 2)
            mask = None if seen.all() else torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
            yield tuple(run for run, _ in runs), mask

    def bias(self) -> Tensor:
        """Return the relative position bias (k, P, P)."""
        table = self.relative_position_bias_table.view(*self.table_shape, self.num_heads)
        offsets = [getattr(self, f"offsets_{axis}") for axis in range(3)]
        return table[offsets[0], offsets[1], offsets[2]].flatten(0, 2).flatten(1, 3).permute(2, 0, 1)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Map (B, T, H, W, C) to the same shape."""
        T, H, W = self.grid
        padding = [-length % size for length, size in zip(self.grid, self.window, strict=True)]
        if any(padding):
            x = F.pad(x, (0, 0, 0, padding[2], 0, padding[1], 0, padding[0]))
        if any(self.shift):
            x = x.roll([-step for step in self.shift], dims=(1, 2, 3))
        x = unite(self.proj(self._attend(self.qkv(partition(x, self.window)))), self.window)
        if any(self.shift):
            x = x.roll(self.shift, dims=(1, 2, 3))
        return x[:, :T, :H, :W]

    def _attend(self, qkv: Tensor) -> Tensor:
        """Map projected windows (B, nt, nh, nw, P, 3C) to (B, nt, nh, nw, P, C), one fused call a mask."""
        bias = self.bias().to(qkv.dtype)
        if len(self.regions) == 1:
            return self._attend_region(qkv, bias, self.get_buffer("mask_0"))
        out = qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)
        for i, (place, _) in enumerate(self.regions):
            part = (slice(None), *place)
            out[part] = self._attend_region(qkv[part], bias, self.get_buffer(f"mask_{i}"))
        return out

    def _attend_region(self, qkv: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        *windows, P, width = qkv.shape
        q, k, v = qkv.reshape(-1, P, 3, self.num_heads, width // 3 // self.num_heads).permute(2, 0, 3, 1, 4)
        logits = bias if mask is None else bias + mask.to(bias.dtype)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=logits.expand(q.shape[0], -1, -1, -1))
        return x.transpose(1, 2).reshape(*windows, P, width // 3)


class WindowBlock(nn.Module):
    """Swin's pre-norm block: attention inside windows, then an MLP. Maps (B, T, H, W, C) to the same shape."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float, eps: float, attention: WindowAttention) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))
