"""Semantic tokens: cluster centres pooled in space and time, recovered by attention.

Source: Chang et al., "Making Vision Transformers Efficient from A Token Sparsification View", CVPR 2023
(arXiv 2303.08685), with the sizes of the released code where the paper gives none. The paper pools in space; pooling
over time is this project's extension. No backbone is known here: its blocks are passed in.

Legend: B clips, (T, H, W) grid of image tokens, N = T*H*W, (t, h, w) grid of centres, M = t*h*w, C channels, P
positions of a window. A "group" is the T/t frames that share their centres: in windows, generation and recovery happen
inside groups, so that their cost per frame is that of an image.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvit_video.models.arguments import Grid, PoolingKind, STGMArguments
from stvit_video.models.grids import count_windows, window_partition, window_reverse
from stvit_video.models.precision import at_least_single
from stvit_video.models.reducers.interface import Blocks, Past, Reduced, Reducer, adaptive_pool

CENTRES = 3  # along each side of a window, the paper's choice for 7 x 7 windows
KEY_MARGIN = 3  # the first generator block in windows reads larger ones by this: 10 for 7, as in the released code
# The paper's logit for padded positions: their weight is negligible, and a softmax over padding alone stays finite.
PADDED_LOGIT = -100.0


def split_axis(length: int, count: int, axis: str) -> tuple[int, int, int]:
    """Cut an axis into ``count`` equal regions; return (region size, padding before, after), of 14 and 4 (4, 1, 1).

    Raises ValueError where a region would consist of padding only.
    """
    allowed = allowed_counts(length)
    size = math.ceil(length / count)
    if count not in allowed:
        raise ValueError(
            f"{count} regions over {length} tokens of {axis} leave some empty; allowed for this {axis}: {allowed}. "
            f"Change regions or the input size."
        )
    padding = size * count - length
    return size, padding // 2, padding - padding // 2


def allowed_counts(length: int) -> list[int]:
    """Return the numbers of regions into which ``split_axis`` can cut an axis of ``length`` tokens."""
    sizes = ((count, math.ceil(length / count)) for count in range(1, length + 1))
    return [count for count, size in sizes if (size * count - length + 1) // 2 < size]


def default_regions(grid: Grid, frames_per_centre: int = 1, window: Grid | None = None, even: bool = True) -> Grid:
    """Return 4 x 4 centres, or 3 x 3 in each window, for ``frames_per_centre`` frames (or the divisor they allow).

    Small maps have fewer. ``even`` selects counts that cut the map into equal regions, as the learned mask needs them.
    """
    sides = []
    for axis in (1, 2):
        windows, most = (1, 4) if window is None else (count_windows(grid, window)[axis], CENTRES)
        counts = [windows * n for n in range(1, most + 1) if windows * n <= grid[axis]]
        sides.append(max(count for count in counts if not even or count in allowed_counts(grid[axis])))
    return (grid[0] // math.gcd(grid[0], frames_per_centre), sides[0], sides[1])


def check_frames(frames: int, regions: int) -> None:
    """Raise ValueError where the regions do not divide the token frames."""
    if regions < 1 or frames % regions:
        allowed = [n for n in range(1, frames + 1) if frames % n == 0]
        raise ValueError(f"{regions} regions do not divide the {frames} token frames of the clip; allowed: {allowed}.")


class SemanticPooling(nn.Module):
    """Initial cluster centres: one per region of the token grid (paper's Eqs. 4 and 5).

    ``mask``: depth-wise 3x3 convolution, LayerNorm, GELU and 1x1 convolution give one logit per position; a softmax
    inside the region weights its tokens (the paper's intra-window form). ``max`` and ``mean``: adaptive pooling, as in
    the released code.

    ``offsets`` is the inter-window form, in our reading (as deformable attention): each centre predicts a displacement
    of at most one region, at first none, and pools from the displaced region by bilinear sampling.
    """

    def __init__(self, dim: int, grid: Grid, regions: Grid, kind: PoolingKind = "mask", offsets: bool = False) -> None:
        super().__init__()
        check_frames(grid[0], regions[0])
        self.grid, self.regions, self.kind = grid, regions, kind
        if kind == "mask" or offsets:  # adaptive pooling has its own, overlapping regions
            self.rows = split_axis(grid[1], regions[1], "height")
            self.columns = split_axis(grid[2], regions[2], "width")
        self.frames_merged = grid[0] // regions[0]
        if kind == "mask":
            self.mask_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
            self.mask_norm = nn.LayerNorm(dim, eps=1e-6)
            self.mask_proj = nn.Linear(dim, 1, bias=False)
        self.offset_norm: Any = nn.LayerNorm(dim, eps=1e-6) if offsets else None
        self.offset_proj: Any = nn.Linear(dim, 2) if offsets else None

    def forward(self, x: Tensor) -> Tensor:
        """Map image tokens (B, N, C) to centres (B, M, C)."""
        weights = None
        if self.kind == "mask":  # computed from x, not from displaced tokens
            maps = x.unflatten(1, self.grid).flatten(0, 1).permute(0, 3, 1, 2)
            maps = self.mask_conv(maps).permute(0, 2, 3, 1)  # (B*T, H, W, C)
            logits = self.mask_proj(F.gelu(self.mask_norm(maps))).reshape(*x.shape[:2], 1)
            weights = self._windows(logits, PADDED_LOGIT).squeeze(-1).softmax(dim=-1)  # (B, M, P)
        centres = self._pool(x, weights)
        if self.offset_proj is not None:
            centres = self._pool(self._displace(x, centres), weights)
        return centres

    def _pool(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """Return the centres of x with given weights (B, M, P) of the P positions in each region, or by kind."""
        if weights is None:
            return adaptive_pool(x, self.grid, self.regions, self.kind)
        return (weights.unsqueeze(-2) @ self._windows(x)).squeeze(-2)

    def _windows(self, x: Tensor, padding: float = 0.0) -> Tensor:
        """Cut tokens (B, N, C) into regions (B, M, P, C), padding the map at its borders."""
        (row, top, bottom), (column, left, right) = self.rows, self.columns
        x = x.unflatten(1, self.grid)
        if top or bottom or left or right:
            x = F.pad(x, (0, 0, left, right, top, bottom), value=padding)
        return window_partition(x, (self.frames_merged, row, column)).flatten(1, 3)

    def _displace(self, x: Tensor, centres: Tensor) -> Tensor:
        """Resample tokens (B, N, C) so that each region reads from its displaced position."""
        B, _, C = x.shape
        T, H, W = self.grid
        (row, top, _), (column, left, _) = self.rows, self.columns
        maps = at_least_single(x.reshape(B * T, H, W, C).permute(0, 3, 1, 2))
        reach = maps.new_tensor([2 * column / W, 2 * row / H])  # one region, in units of grid_sample
        flow = at_least_single(self.offset_proj(self.offset_norm(centres))).tanh() * reach  # (B, M, 2) as (x, y)
        flow = flow.reshape(B, *self.regions, 2).repeat_interleave(self.frames_merged, dim=1)
        flow = flow.repeat_interleave(row, dim=2).repeat_interleave(column, dim=3)
        flow = flow[:, :, top : top + H, left : left + W].reshape(B * T, H, W, 2)
        ys = (torch.arange(H, device=x.device, dtype=maps.dtype) * 2 + 1) / H - 1
        xs = (torch.arange(W, device=x.device, dtype=maps.dtype) * 2 + 1) / W - 1
        positions = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1)  # (H, W, 2)
        maps = F.grid_sample(maps, positions + flow, padding_mode="border", align_corners=False)
        return maps.permute(0, 2, 3, 1).reshape(B, T * H * W, C).to(x.dtype)


# Queries, their context, the bias of its keys, and the tokens of the context that each window of queries reads.
Context = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


class SemanticTokenGenerator(Reducer):
    """STGM: turns image tokens X into semantic tokens S with two or more of the backbone's own blocks.

        S1 = block(P on X);   S2 = block(S1 + G on [S1; X]);   deeper layers repeat the second form

    P are pooled centres, G learned global ones. X is read, never updated. ``first_residual`` is the residual on P,
    which the paper's equation has and the released checkpoints do not.

    A centre that stands for n merged frames gets log n on its logit beside unmerged image tokens: a clip of equal
    frames then attends exactly as the image does.
    """

    on_grid = True

    def __init__(self, dim: int, grid: Grid, regions: Grid, settings: STGMArguments) -> None:
        super().__init__(grid, regions)
        self.pooling = SemanticPooling(dim, grid, regions, settings.pooling, settings.offsets)
        self.first_residual = settings.first_residual
        self.global_centres = nn.Parameter(torch.zeros(1, self.count, dim)) if settings.global_centres else None

    def reset_parameters(self) -> None:
        if self.pooling.offset_proj is not None:  # zero at first: offsets do not change a pretrained model
            for parameter in self.pooling.offset_proj.parameters():
                nn.init.zeros_(parameter)
        if self.global_centres is not None:
            nn.init.normal_(self.global_centres, std=0.02)

    def forward(self, x: Tensor, blocks: Blocks, past: Past = (), return_assignment: bool = False) -> Reduced:
        """Map image tokens (B, N, C) to semantic tokens (B, M, C).

        The assignment is that of the last block; its rows sum to at most 1, the rest is drawn from semantic tokens.
        """
        s, assignment = self.pooling(x), None
        for i, block in enumerate(blocks):
            query = s if i == 0 or self.global_centres is None else s + self.global_centres
            if return_assignment and i + 1 == len(blocks):
                assignment = self.assign(block, query, s, x)
            queries, context, bias, reads = self.context(i, query, s, x)
            out = block(queries, context, bias, residual=i > 0 or self.first_residual, reads=reads)
            s = self.reverse(i, out, x.shape[0])
        return Reduced(s, assignment)

    def context(self, layer: int, query: Tensor, s: Tensor, x: Tensor) -> Context:
        """Return what the ``layer``-th block, counted from 0, takes."""
        return (query, x, None, None) if layer == 0 else (query, *self.join(s, x), None)

    def reverse(self, layer: int, queries: Tensor, B: int) -> Tensor:
        """Return queries in the order of ``context`` as semantic tokens (B, M, C)."""
        return queries

    def assign(self, block: nn.Module, query: Tensor, s: Tensor, x: Tensor) -> Tensor:
        """Return how much the queries of the last block draw from each image token, (B, M, N)."""
        weights, _ = block.attention_probs(query, *self.join(s, x))  # type: ignore[operator]
        return weights.mean(dim=1)[..., s.shape[1] :]

    def join(self, s: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the context [S; X] (B, M + N, C) and the bias of its keys (M + N,), None where no frames merged."""
        context, merged = torch.cat([s, x], dim=1), self.pooling.frames_merged
        if merged == 1:
            return context, None
        # Joined from two parts: assignment to a slice cannot be exported to ONNX.
        images = at_least_single(x.new_zeros(x.shape[1]))
        return context, torch.cat([images.new_full((s.shape[1],), math.log(merged)), images])


def join_groups(assignment: Tensor, B: int) -> Tensor:
    """Return the assignment (B, M, N) of clips whose groups have the assignments (B*groups, m, n).

    Tokens of other groups are not read, so the shares of these are 0.
    """
    return torch.stack([torch.block_diag(*groups) for groups in assignment.unflatten(0, (B, -1))])


def check_depths(depth: int, base_depth: int, stgm_depth: int, recover: bool = False) -> None:
    """Raise ValueError unless base, STGM and, if there is one, the recovery block fit into ``depth`` blocks."""
    most = depth - stgm_depth - recover
    if base_depth > most:
        last = ", the last being the recovery" if recover else ""
        allowed = f"allowed: 1 to {most}." if most >= 1 else "that is too short: take more blocks, or fewer units."
        raise ValueError(f"base_depth {base_depth} with stgm_depth {stgm_depth} in {depth} blocks{last}; {allowed}")


def read_index(grid: Grid, counts: Sequence[int], sides: Sequence[int]) -> Tensor:
    """Return the indices (windows, P) that each window reads in a flattened group of tokens (t, h, w).

    Windows of the given sides are centred on ``counts`` equal parts of the map; those that cross an end move inside.
    """
    axes = []
    for length, count, side in zip(grid[1:], counts, sides, strict=True):
        size = min(side, length)
        part = length / count
        starts = [min(max(0, math.floor(i * part - (size - part) / 2)), length - size) for i in range(count)]
        axes.append(torch.tensor(starts).unsqueeze(1) + torch.arange(size))  # (count, size)
    rows, columns = axes
    frames = torch.arange(grid[0]).view(1, 1, -1, 1, 1) * grid[1] * grid[2]
    index = rows[:, None, None, :, None] * grid[2] + columns[None, :, None, None, :]
    return (index + frames).flatten(2).flatten(0, 1)


class WindowedTokenGenerator(SemanticTokenGenerator):
    """STGM inside windows: the centres of a window read the image tokens around it and the centres themselves.

    The context of all blocks, the first included, is [S; X], as in the released code. The first block reads a margin
    around each window, deeper ones twice the window; where this covers the whole map, all its centres form one query.
    Raises ValueError where ``regions`` do not give every window the same number of centres.
    """

    regions: Grid

    def __init__(self, dim: int, grid: Grid, regions: Grid, window: Grid, settings: STGMArguments) -> None:
        super().__init__(dim, grid, regions, settings)
        counts = count_windows(grid, window)[1:]
        for count, number, axis in zip(regions[1:], counts, ("height", "width"), strict=True):
            if count % number:
                allowed = f"multiples such as {[n * number for n in range(1, CENTRES + 1)]}"
                raise ValueError(f"{count} regions over the {number} windows of {axis}; allowed: {allowed}.")
        self.query_windows: list[Grid] = []  # the centres (1, h, w) of a window in the first block and in deeper ones
        group = (grid[0] // regions[0], *grid[1:])
        for layer, sides in enumerate(([size + KEY_MARGIN for size in window[1:]], [2 * size for size in window[1:]])):
            centres = [(layer + 1) * count // number for count, number in zip(regions[1:], counts, strict=True)]
            lengths = (*grid[1:], *regions[1:])
            covers = all(length <= side for length, side in zip(lengths, (*sides, *centres), strict=True))
            windows = (1, 1) if covers else counts
            self.query_windows.append((1, regions[1] // windows[0], regions[2] // windows[1]))
            in_centres = read_index((1, *regions[1:]), windows, centres)
            in_images = read_index(group, windows, sides)
            reads = torch.cat([in_centres, math.prod(regions[1:]) + in_images], dim=1)
            self.register_buffer(f"reads_{layer}", reads, persistent=False)  # of [S; X]

    def context(self, layer: int, query: Tensor, s: Tensor, x: Tensor) -> Context:
        """Return queries (B*G*windows, P, C), the context [S; X] of a group and what windows read of it."""
        G, h, w = self.regions
        layer = min(layer, 1)
        B, _, C = x.shape
        query = window_partition(query.reshape(B * G, 1, h, w, C), self.query_windows[layer]).flatten(0, 3)
        context, bias = self.join(s.reshape(B * G, -1, C), x.reshape(B * G, -1, C))
        if self.query_windows[layer] == (1, h, w):  # one window reads all, and nothing is copied
            return query, context, bias, None
        reads = self.get_buffer(f"reads_{layer}")
        return query, context, None if bias is None else bias[reads[0]], reads  # the same kinds in each window

    def reverse(self, layer: int, queries: Tensor, B: int) -> Tensor:
        window = self.query_windows[min(layer, 1)]
        nt, nh, nw = count_windows((1, *self.regions[1:]), window)
        windows = queries.reshape(-1, nt, nh, nw, *queries.shape[1:])
        return window_reverse(windows, window).reshape(B, -1, windows.shape[-1])

    def assign(self, block: nn.Module, query: Tensor, s: Tensor, x: Tensor) -> Tensor:
        weights, _ = block.attention_probs(*self.context(1, query, s, x))  # type: ignore[operator]
        B, group_tokens = query.shape[0], x.shape[1] // self.regions[0]
        centres = math.prod(self.regions[1:])
        index = self.get_buffer("reads_1")
        index = index[:, index[0] >= centres] - centres  # of image tokens
        index = index.repeat(B * self.regions[0], 1).unsqueeze(1)
        weights = weights.mean(dim=1)[..., -index.shape[-1] :]
        full = weights.new_zeros(*weights.shape[:2], group_tokens)
        weights = self.reverse(1, full.scatter(2, index.expand_as(weights), weights), B)
        return join_groups(weights.reshape(B * self.regions[0], -1, group_tokens), B)
