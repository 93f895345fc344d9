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

from stvit_video.models.cpu_inference import LOGITS, cuts, feed_forward, in_pieces, pieces
from stvit_video.models.layers import Attention, Grid


def split(x: Tensor, window: Grid) -> Tensor:
    """View (B, T, H, W, C), a multiple of the window, as (B, T/t, H/h, W/w, t, h, w, C)."""
    t, h, w = window
    return x.unflatten(3, (-1, w)).unflatten(2, (-1, h)).unflatten(1, (-1, t)).permute(0, 1, 3, 5, 2, 4, 6, 7)


def partition(x: Tensor, window: Grid) -> Tensor:
    """Cut (B, T, H, W, C), a multiple of the window, into (B, T/t, H/h, W/w, P, C)."""
    return split(x, window).flatten(4, 6)


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
        self.register_buffer("places", self._places(window).flatten(), persistent=False)
        self.regions = list(self._regions())
        for i, (_, mask) in enumerate(self.regions):
            self.register_buffer(f"mask_{i}", mask, persistent=False)  # so that it follows the model to its device
        self.runs = list(product(*map(cuts, grid, self.window, self.shift)))
        self.padded = any(length % size for length, size in zip(grid[1:], self.window[1:], strict=True))

    def _places(self, reach: Grid) -> Tensor:
        """Return where in the flattened table the bias of each pair of positions stands, (P, P)."""
        places = torch.zeros((1,) * 6, dtype=torch.int64)
        for axis, size in enumerate(self.window):
            shape = [1] * 6
            shape[axis] = shape[axis + 3] = size
            offsets = torch.arange(size).unsqueeze(1) - torch.arange(size) + reach[axis] - 1  # of query from key
            places = places * self.table_shape[axis] + offsets.reshape(shape)
        return places.flatten(0, 2).flatten(1)

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
        # Contiguous along the keys: fused attention would copy it for every window otherwise. Picking floats is several
        # times faster on a CPU than picking bfloat16.
        positions = math.prod(self.window)
        table = self.relative_position_bias_table.float().t().contiguous()
        return table.index_select(1, self.get_buffer("places")).view(-1, positions, positions)

    def shorter(self, bias: Tensor, window: Grid) -> Tensor:
        """Return the part of the bias that belongs to a window (t, h, w) at most as large, (k, t*h*w, t*h*w)."""
        if window == self.window:
            return bias
        t, h, w = window
        positions = math.prod(window)
        cut = bias.view(-1, *self.window, *self.window)[:, :t, :h, :w, :t, :h, :w]
        return cut.reshape(-1, positions, positions)

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
        parts = []
        for i, (place, _) in enumerate(self.regions):
            part = (slice(None), *place)
            parts.append(self._attend_region(qkv[part], bias, self.get_buffer(f"mask_{i}")))
        # Joined axis by axis, the last one first: a slice that is assigned to cannot be exported to ONNX.
        for axis in (2, 1, 0):
            count = len({place[axis].start for place, _ in self.regions})
            parts = [torch.cat(parts[i : i + count], dim=axis + 1) for i in range(0, len(parts), count)]
        return parts[0]

    def attend(self, windows: Tensor, bias: Tensor) -> Tensor:
        """Map windows (n, P, C) to the same shape, each attending inside itself, in inference on a CPU."""
        qkv = self.qkv(windows)
        if qkv.dtype == torch.float32:
            return self.proj(self._attend_region(qkv, bias, None))
        # In half precision fused attention is no faster on a CPU than in float32; plain products are, in the cache.
        n, P, C = windows.shape
        q, k, v = qkv.view(n, P, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).flatten(1, 2)  # (n*k, P, C/k)
        each = max(1, min(n, LOGITS // bias.numel()))  # windows whose logits stay in the cache
        biases = bias if each == 1 else bias.repeat(each, 1, 1)
        out = torch.empty_like(q)
        for parts in zip(*(whole.split(each * self.num_heads) for whole in (q, k, v, out)), strict=True):
            queries, keys, values, target = parts
            logits = torch.baddbmm(biases[: len(queries)], queries, keys.mT, alpha=q.shape[-1] ** -0.5)
            torch.bmm(logits.softmax(dim=-1), values, out=target)
        return self.proj(out.view(n, -1, P, C // self.num_heads).transpose(1, 2).reshape(n, P, C))

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
        if in_pieces(self, x) and not self.attn.padded:
            x = self._attend_in_pieces(x)
        else:
            x = x + self.drop_path(self.attn(self.norm1(x)))
        return feed_forward(self, x, self._mlp_branch, self.mlp.fc1.out_features)

    def _mlp_branch(self, x: Tensor) -> Tensor:
        return self.drop_path(self.mlp(self.norm2(x)))

    def _attend_in_pieces(self, x: Tensor) -> Tensor:
        """Return x + attention, some windows after others; windows cut elsewhere take the place of shift and mask."""
        out = torch.empty_like(x)
        bias = self.attn.bias().to(x.dtype)
        for runs in self.attn.runs:
            window = (runs[0][2], runs[1][2], runs[2][2])
            logits = self.attn.shorter(bias, window)
            for place in pieces(len(x), runs, math.prod(window) * self.attn.qkv.out_features * x.element_size()):
                tokens = partition(x[place], window).flatten(0, 3)
                target = split(out[place], window)
                target.copy_((tokens + self.attn.attend(self.norm1(tokens), logits)).view(target.shape))
        return out
