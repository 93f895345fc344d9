"""Shifted windows on a token grid: masks, relative position bias, attention inside windows, and the block of a Swin.

Sources: Liu et al. (Swin, arXiv 2103.14030; Video Swin, arXiv 2106.13230).

A map that is not a multiple of its windows is padded at the end. Padding in space takes part as zeros, as in the
published networks; padding in time is masked, since otherwise a clip of equal frames would differ from its image.

Legend: B clips, (T, H, W) token grid, (t, h, w) window, (nt, nh, nw) windows along each axis, P = t*h*w positions of a
window, C channels, k heads.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvit_video.models import layers
from stvit_video.models.arguments import Grid
from stvit_video.models.layers import Attention, Block, in_pieces

LOGITS = 2**18  # attention logits that are computed at a time where they are materialised


def count_windows(grid: Grid, window: Grid) -> Grid:
    """Return how many windows along each axis cover a grid."""
    return (math.ceil(grid[0] / window[0]), math.ceil(grid[1] / window[1]), math.ceil(grid[2] / window[2]))


def window_view(x: Tensor, window: Grid) -> Tensor:
    """View (B, T, H, W, C), a multiple of the window, as (B, T/t, H/h, W/w, t, h, w, C)."""
    t, h, w = window
    return x.unflatten(3, (-1, w)).unflatten(2, (-1, h)).unflatten(1, (-1, t)).permute(0, 1, 3, 5, 2, 4, 6, 7)


def window_partition(x: Tensor, window: Grid) -> Tensor:
    """Cut (B, T, H, W, C), a multiple of the window, into (B, T/t, H/h, W/w, P, C)."""
    return window_view(x, window).flatten(4, 6)


def window_reverse(windows: Tensor, window: Grid) -> Tensor:
    """Undo ``window_partition``: (B, T/t, H/h, W/w, P, C) to (B, T, H, W, C)."""
    B, nt, nh, nw, _, C = windows.shape
    t, h, w = window
    x = windows.reshape(B, nt, nh, nw, t, h, w, C).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(B, nt * t, nh * h, nw * w, C)


def axis_regions(length: int, window: int, shift: int, hide_padding: bool) -> list[tuple[slice, Tensor]]:
    """Return the runs of equal windows along a padded and shifted axis, with the pairs of positions that are visible.

    Rolling moves the first ``shift`` positions behind the last ones, which are not their neighbours.
    """
    labels = torch.zeros(math.ceil(length / window) * window, dtype=torch.int64)  # equal: the positions are visible
    if hide_padding:
        labels[length:] = 1
    labels[:shift] += 2
    rows = labels.roll(-shift).view(-1, window)
    visible = rows.unsqueeze(1) == rows.unsqueeze(2)  # (windows, window, window)
    starts = [0] + [i for i in range(1, len(rows)) if not torch.equal(visible[i], visible[i - 1])]
    return [(slice(start, end), visible[start]) for start, end in pairwise([*starts, len(rows)])]


class WindowAttention(Attention):
    """Self-attention inside (shifted) windows of a fixed grid, with relative position bias.

    ``window`` is the reach of the bias table; in time, ``window_frames`` and the clip itself may be shorter. The table
    keeps its shape, so that weights fit clips of any length. Parameter names are Swin's.
    """

    def __init__(self, dim: int, num_heads: int, grid: Grid, window: Grid, window_frames: int, shifted: bool) -> None:
        super().__init__(dim, num_heads)
        self.grid = grid
        self.window = (min(window_frames, window[0], grid[0]), window[1], window[2])
        # No shift along an axis with a single window, as in the published networks.
        self.shift = tuple(
            size // 2 if shifted and length > size else 0 for length, size in zip(grid, self.window, strict=True)
        )
        self.table_shape = (2 * window[0] - 1, 2 * window[1] - 1, 2 * window[2] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(math.prod(self.table_shape), num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        # The row of the table for each pair of positions; axes are those of the query (t, h, w), then of the key.
        index = torch.zeros((1,) * 6, dtype=torch.int64)
        for axis, size in enumerate(self.window):
            shape = [1] * 6
            shape[axis] = shape[axis + 3] = size
            offsets = torch.arange(size).unsqueeze(1) - torch.arange(size) + window[axis] - 1  # of query from key
            index = index * self.table_shape[axis] + offsets.reshape(shape)
        self.register_buffer("relative_position_index", index.flatten(), persistent=False)
        # Regions of windows that share a mask (P, P), None where all is visible; buffers follow the model's device.
        self.regions: list[tuple[slice, ...]] = []
        for runs in product(*map(axis_regions, grid, self.window, self.shift, (True, False, False))):
            slices, visible = zip(*runs, strict=True)
            hidden = functools.reduce(torch.kron, [axis.long() for axis in visible]) == 0
            mask = torch.zeros(hidden.shape).masked_fill(hidden, -math.inf) if hidden.any() else None
            self.register_buffer(f"mask_{len(self.regions)}", mask, persistent=False)
            self.regions.append((slice(None), *slices))

    def bias(self) -> Tensor:
        """Return the relative position bias (k, P, P)."""
        # Contiguous along the keys, or fused attention would copy it for every window. Indexing float32 is several
        # times faster on a CPU than indexing bfloat16.
        positions = math.prod(self.window)
        table = self.relative_position_bias_table.float().t().contiguous()
        return table.index_select(1, self.get_buffer("relative_position_index")).view(-1, positions, positions)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Map (B, T, H, W, C) to the same shape."""
        T, H, W = self.grid
        padding = [-length % size for length, size in zip(self.grid, self.window, strict=True)]
        if any(padding):
            x = F.pad(x, (0, 0, 0, padding[2], 0, padding[1], 0, padding[0]))
        if any(self.shift):
            x = x.roll([-step for step in self.shift], dims=(1, 2, 3))
        x = window_reverse(self.proj(self._attend(self.qkv(window_partition(x, self.window)))), self.window)
        if any(self.shift):
            x = x.roll(self.shift, dims=(1, 2, 3))
        return x[:, :T, :H, :W]

    def _attend(self, qkv: Tensor) -> Tensor:
        """Map projected windows (B, nt, nh, nw, P, 3C) to (B, nt, nh, nw, P, C) with one fused call per mask."""
        bias = self.bias().to(qkv.dtype)
        parts = []
        for i, region in enumerate(self.regions):
            *windows, P, width = qkv[region].shape
            q, k, v = qkv[region].reshape(-1, P, 3, self.num_heads, width // 3 // self.num_heads).permute(2, 0, 3, 1, 4)
            mask = self.get_buffer(f"mask_{i}")
            logits = bias if mask is None else bias + mask.to(bias.dtype)
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=logits.expand(q.shape[0], -1, -1, -1))
            parts.append(x.transpose(1, 2).reshape(*windows, P, width // 3))
        # Joined axis by axis, the last one first: assignment to a slice cannot be exported to ONNX.
        for axis in (3, 2, 1):
            count = len({region[axis].start for region in self.regions})
            if count > 1:
                parts = [torch.cat(parts[i : i + count], dim=axis) for i in range(0, len(parts), count)]
        return parts[0]

    def attend_few(self, windows: Tensor, bias: Tensor) -> Tensor:
        """Map windows (n, P, C), possibly smaller ones than the attention's own, to the same shape; bias (k, P, P)."""
        n, P, C = windows.shape
        heads = self.num_heads
        q, k, v = self.qkv(windows).view(n, P, 3, heads, C // heads).permute(2, 0, 3, 1, 4)  # (n, k, P, C/k) each
        if q.dtype == torch.float32:
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
        return self.proj(out.transpose(1, 2).reshape(n, P, C))


class WindowBlock(Block):
    """Swin's block: its ``attention`` is a WindowAttention. Maps (B, T, H, W, C) to the same shape."""

    attn: WindowAttention

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        padded = any(length % size for length, size in zip(self.attn.grid[1:], self.attn.window[1:], strict=True))
        if in_pieces(self, x) and not padded:  # padding in space takes part in the attention
            return self._add_mlp(self._attend_in_pieces(x))
        return self._add_mlp(x + self.drop_path(self.attn(self.norm1(x))))

    def _attend_in_pieces(self, x: Tensor) -> Tensor:
        """Return x + attention, computed for a few windows at a time.

        Shifted windows are not rolled and masked: a masked window consists of parts that do not see one another, so
        the parts are windows of their own, cut where they lie.
        """
        out = torch.empty_like(x)
        attn = self.attn
        bias = attn.bias().to(x.dtype).view(-1, *attn.window, *attn.window)
        for runs in product(*map(_equal_windows, attn.grid, attn.window, attn.shift)):
            window = t, h, w = runs[0][2], runs[1][2], runs[2][2]
            positions = t * h * w
            cropped = bias[:, :t, :h, :w, :t, :h, :w].reshape(-1, positions, positions)
            for piece in _pieces(len(x), runs, positions * attn.qkv.out_features * x.element_size()):
                windows = window_partition(x[piece], window).flatten(0, 3)
                target = window_view(out[piece], window)
                target.copy_((windows + attn.attend_few(self.norm1(windows), cropped)).view(target.shape))
        return out


def _equal_windows(length: int, window: int, shift: int) -> list[tuple[int, int, int]]:
    """Return the windows of an axis as runs of equal ones; the ends of a shifted axis are shorter."""
    full, rest = divmod(length - shift, window)
    runs = [(0, 1, shift), (shift, full, window), (length - rest, 1, rest)]
    return [(start, count, size) for start, count, size in runs if count and size]


def _pieces(clips: int, runs: Sequence[tuple[int, int, int]], window_bytes: int) -> Iterator[tuple[slice, ...]]:
    """Yield parts of a batch (B, T, H, W) that consist of whole windows, about PIECE bytes each if not the last."""
    axes, total = [], window_bytes
    for start, count, size in reversed([(0, clips, 1), *runs]):
        step = max(1, min(count, layers.PIECE // total))
        total *= step
        axes.append([slice(start + i * size, start + min(i + step, count) * size) for i in range(0, count, step)])
    return product(*reversed(axes))
