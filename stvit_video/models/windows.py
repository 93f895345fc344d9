"""Shifted windows on a token grid: masks, relative position bias, attention inside windows, and the block of a Swin.

Sources: Liu et al. (Swin, arXiv 2103.14030; Video Swin, arXiv 2106.13230).

A map that is not a multiple of its windows is padded at the end. Padding in space takes part as zeros, as in the
published networks; padding in time is masked, since otherwise a clip of equal frames would differ from its image.
timm cuts windows to small maps, and pads shifted maps only after the shift (``fit``).

Legend: B clips, (T, H, W) token grid, (t, h, w) window, (nt, nh, nw) windows along each axis, P = t*h*w positions of a
window, C channels, k heads.
"""

import functools
import math
from itertools import pairwise, product
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvit_video.models import cpu_inference
from stvit_video.models.arguments import Grid
from stvit_video.models.grids import window_partition, window_reverse
from stvit_video.models.layers import Attention, Block
from stvit_video.models.precision import at_least_single


def axis_regions(length: int, window: int, shift: int, hide_padding: bool) -> list[tuple[slice, Tensor]]:
    """Return the runs of equal windows along a padded and shifted axis, with the pairs of positions that are visible.

    Rolling moves the first ``shift`` positions behind the last ones, which are not their neighbours.
    """
    # Equal: the positions are visible. The runs follow from values, so these exist also on ``meta``.
    labels = torch.zeros(math.ceil(length / window) * window, dtype=torch.int64, device="cpu")
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
    keeps its shape, so that weights fit clips of any length. Parameter names are Swin's. ``fit`` "timm" cuts windows
    and their tables to the map in space.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Grid,
        window: Grid,
        window_frames: int,
        shifted: bool,
        fit: Literal["pad", "timm"] = "pad",
    ) -> None:
        super().__init__(dim, num_heads)
        self.grid = grid
        self.shift_first = fit == "timm"
        if fit == "timm":
            window = (window[0], min(window[1], grid[1]), min(window[2], grid[2]))
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
            mask = None
            if not all(axis.all() for axis in visible):
                pairs = functools.reduce(torch.kron, [axis.to(index.device, torch.int64) for axis in visible])
                mask = torch.zeros(pairs.shape).masked_fill(pairs == 0, -math.inf)
            self.register_buffer(f"mask_{len(self.regions)}", mask, persistent=False)
            self.regions.append((slice(None), *slices))

    def bias(self) -> Tensor:
        """Return the relative position bias (k, P, P)."""
        # Contiguous along the keys, or fused attention would copy it for every window. Indexing float32 is several
        # times faster on a CPU than indexing bfloat16.
        positions = math.prod(self.window)
        table = at_least_single(self.relative_position_bias_table).t().contiguous()
        return table.index_select(1, self.get_buffer("relative_position_index")).view(-1, positions, positions)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Map (B, T, H, W, C) to the same shape."""
        T, H, W = self.grid
        frames, rows, columns = (-length % size for length, size in zip(self.grid, self.window, strict=True))
        late = self.shift_first and (rows or columns)  # in time padding always comes first: it is masked there
        if frames or rows or columns:
            x = F.pad(x, (0, 0, 0, 0 if late else columns, 0, 0 if late else rows, 0, frames))
        if any(self.shift):
            x = x.roll([-step for step in self.shift], dims=(1, 2, 3))
        if late:
            x = F.pad(x, (0, 0, 0, columns, 0, rows))
        x = window_reverse(self.proj(self._attend(self.qkv(window_partition(x, self.window)))), self.window)
        if late:
            x = x[:, :, :H, :W]
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


class WindowBlock(Block):
    """Swin's block: its ``attention`` is a WindowAttention. Maps (B, T, H, W, C) to the same shape."""

    attn: WindowAttention

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if cpu_inference.applies(x, self, kinds=cpu_inference.TOKENWISE | {WindowBlock, WindowAttention}):
            return cpu_inference.window_block(self, x)
        return self._add_mlp(x + self.drop_path(self.attn(self.norm1(x))))
