"""Shifted windows on a token grid: masks, relative position bias, attention inside windows, and the block of a Swin.

Sources: Liu et al. (Swin, arXiv 2103.14030; Video Swin, arXiv 2106.13230).

A map that is not a multiple of its windows is padded at the end. Padding in space takes part as zeros, as in the
published networks; padding in time is masked, since otherwise a clip of equal frames would differ from its image.

Legend: B clips, (T, H, W) token grid, (t, h, w) window, (nt, nh, nw) windows along each axis, P = t*h*w positions of a
window, C channels, k heads.
"""

import math
from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F
from pytorchvideo.layers import Mlp
from pytorchvideo.layers.drop_path import DropPath
from torch import Tensor, nn

from stvit_video.models import cpu_inference
from stvit_video.models.arguments import Grid
from stvit_video.models.grids import window_partition, window_reverse
from stvit_video.models.layers import Attention


def axis_labels(length: int, window: int, shift: int, hide_padding: bool) -> Tensor:
    """Return a label for each position of a padded and shifted axis; positions see one another if labels are equal.

    Rolling moves the first ``shift`` positions behind the last ones, which are not their neighbours.
    """
    labels = torch.zeros(math.ceil(length / window) * window, dtype=torch.int64)
    if hide_padding:
        labels[length:] = 1
    labels[:shift] += 2
    return labels.roll(-shift)


def equal_runs(labels: Tensor, window: int) -> list[tuple[slice, Tensor]]:
    """Return the runs of windows along an axis that have the same pattern of equal labels, each with one pattern."""
    rows = labels.view(-1, window)
    same = rows.unsqueeze(1) == rows.unsqueeze(2)  # (windows, window, window)
    starts = [0] + [i for i in range(1, len(rows)) if not torch.equal(same[i], same[i - 1])]
    ends = [*starts[1:], len(rows)]
    return [(slice(start, end), rows[start]) for start, end in zip(starts, ends, strict=True)]


class WindowAttention(Attention):
    """Self-attention inside (shifted) windows of a fixed grid, with relative position bias.

    ``window`` is the reach of the bias table; in time, ``window_frames`` and the clip itself may be shorter. The table
    keeps its shape, so that weights fit clips of any length. Parameter names are Swin's.
    """

    def __init__(
        self, dim: int, num_heads: int, grid: Grid, window: Grid, shifted: bool, window_frames: int | None = None
    ) -> None:
        super().__init__(dim, num_heads)
        frames = min(window_frames or window[0], window[0], grid[0])
        self.grid, self.window = grid, (frames, window[1], window[2])
        # No shift along an axis with a single window, as in the published networks.
        self.shift = tuple(
            size // 2 if shifted and length > size else 0 for length, size in zip(grid, self.window, strict=True)
        )
        self.table_shape = (2 * window[0] - 1, 2 * window[1] - 1, 2 * window[2] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(math.prod(self.table_shape), num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", self._relative_position_index(window), persistent=False)
        self.regions = list(self._regions())
        for i, (_, mask) in enumerate(self.regions):
            self.register_buffer(f"mask_{i}", mask, persistent=False)  # so that it follows the model to its device

    def _relative_position_index(self, reach: Grid) -> Tensor:
        """Return the row of the bias table for each pair of positions, (P * P,)."""
        index = torch.zeros((1,) * 6, dtype=torch.int64)  # query along t, h, w, then key along t, h, w
        for axis, size in enumerate(self.window):
            shape = [1] * 6
            shape[axis] = shape[axis + 3] = size
            offsets = torch.arange(size).unsqueeze(1) - torch.arange(size) + reach[axis] - 1  # of query from key
            index = index * self.table_shape[axis] + offsets.reshape(shape)
        return index.flatten()

    def _regions(self) -> Iterator[tuple[tuple[slice, ...], Tensor | None]]:
        """Yield regions of windows that share a mask (P, P); None where all positions see all."""
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
        if len(self.regions) == 1:
            return self._attend_region(qkv, bias, self.get_buffer("mask_0"))
        parts = []
        for i, (region, _) in enumerate(self.regions):
            part = (slice(None), *region)
            parts.append(self._attend_region(qkv[part], bias, self.get_buffer(f"mask_{i}")))
        # Joined axis by axis, the last one first: assignment to a slice cannot be exported to ONNX.
        for axis in (2, 1, 0):
            count = len({region[axis].start for region, _ in self.regions})
            parts = [torch.cat(parts[i : i + count], dim=axis + 1) for i in range(0, len(parts), count)]
        return parts[0]

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
        if cpu_inference.applies(self, x):
            return cpu_inference.window_block(self, x)
        x = x + self.attention_branch(x)
        return x + self.mlp_branch(x)

    def attention_branch(self, x: Tensor) -> Tensor:
        """Return the attention's update of tokens (B, T, H, W, C)."""
        return self.drop_path(self.attn(self.norm1(x)))

    def mlp_branch(self, x: Tensor) -> Tensor:
        """Return the MLP's update (..., C) of tokens (..., C)."""
        return self.drop_path(self.mlp(self.norm2(x)))
