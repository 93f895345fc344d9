"""Semantic tokens: cluster centres pooled in space and time, recovered by attention.

Source: Chang et al., "Making Vision Transformers Efficient from A Token Sparsification View", CVPR 2023
(arXiv 2303.08685). The paper pools in space; pooling over time is this project's extension.

This module depends on no backbone: its blocks are passed in.
Legend: B clips, (T, H, W) grid of image tokens, N = T*H*W, (t, h, w) grid of centres, M = t*h*w, C channels.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvit_video.models.arguments import Grid, PoolingKind, STGMArguments
from stvit_video.models.reducers.interface import Blocks, Past, Reduced, Reducer

# The paper's logit for padded positions: their weight is negligible, and a softmax over padding alone stays finite.
PADDED_LOGIT = -100.0


def split_axis(length: int, count: int, axis: str) -> tuple[int, int, int]:
    """Cut an axis of ``length`` tokens into ``count`` equal regions; return (region size, padding before, after).

    A 14-row map and 4 regions give (4, 1, 1), the paper's example.
    Raises ValueError where a region would consist of padding only.
    """
    size = math.ceil(length / count)
    padding = size * count - length
    before, after = padding // 2, padding - padding // 2
    if after >= size:
        raise ValueError(
            f"{count} regions over {length} tokens of {axis} leave some empty; allowed for this {axis}: "
            f"{allowed_counts(length)}. Change regions or the input size."
        )
    return size, before, after


def allowed_counts(length: int) -> list[int]:
    """Return the numbers of regions into which ``split_axis`` can cut an axis of ``length`` tokens."""
    sizes = ((count, math.ceil(length / count)) for count in range(1, length + 1))
    return [count for count, size in sizes if (size * count - length + 1) // 2 < size]


def default_regions(grid: Grid, frames_per_centre: int = 1) -> Grid:
    """Return 4 x 4 centres, fewer on small maps, for every ``frames_per_centre`` frames (or the divisor they allow)."""
    t, h, w = grid
    rows, columns = (max(count for count in allowed_counts(length) if count <= 4) for length in (h, w))
    return (t // math.gcd(t, frames_per_centre), rows, columns)


def check_frames(frames: int, regions: int) -> None:
    """Raise ValueError where the regions do not divide the token frames."""
    if regions < 1 or frames % regions:
        allowed = [n for n in range(1, frames + 1) if frames % n == 0]
        raise ValueError(f"{regions} regions do not divide the {frames} token frames of the clip; allowed: {allowed}.")


def check_regions(grid: Grid, regions: Grid) -> None:
    """Raise ValueError where there are more regions than tokens along an axis."""
    for length, count, axis in zip(grid, regions, ("time", "height", "width"), strict=True):
        if not 1 <= count <= length:
            raise ValueError(f"{count} regions over {length} tokens of {axis}; allowed: 1 to {length}.")


class SemanticPooling(nn.Module):
    """Initial cluster centres: one per region of the token grid (paper's Eqs. 4 and 5).

    ``mask``: depth-wise 3x3 convolution, LayerNorm, GELU and 1x1 convolution give one logit per position; a softmax
    inside the region weights its tokens (the paper's intra-window form). ``max`` and ``mean``: adaptive pooling, as in
    the released code.

    ``offsets`` is the inter-window form. Its details were not published; our reading follows deformable attention:
    each centre predicts a displacement of at most one region and pools from the displaced region by bilinear
    sampling. Displacements start at zero, where the form equals the intra-window one.
    """

    def __init__(self, dim: int, grid: Grid, regions: Grid, kind: PoolingKind = "mask", offsets: bool = False) -> None:
        super().__init__()
        check_frames(grid[0], regions[0])
        check_regions(grid, regions)
        self.grid, self.regions, self.kind = grid, regions, kind
        if kind == "mask" or offsets:  # adaptive pooling has its own, overlapping regions
            self.rows = split_axis(grid[1], regions[1], "height")
            self.columns = split_axis(grid[2], regions[2], "width")
        self.frames_merged = grid[0] // regions[0]
        if kind == "mask":
            self.mask_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
            self.mask_norm = nn.LayerNorm(dim, eps=1e-6)
            self.mask_proj = nn.Linear(dim, 1, bias=False)
        self.offset_norm = nn.LayerNorm(dim, eps=1e-6) if offsets else None
        self.offset_proj = nn.Linear(dim, 2) if offsets else None

    def reset_offsets(self) -> None:
        """Start with no displacement, so that switching offsets on does not change a pretrained model."""
        if self.offset_proj is not None:
            nn.init.zeros_(self.offset_proj.weight)
            nn.init.zeros_(self.offset_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map image tokens (B, N, C) to centres (B, M, C)."""
        pool = self._pooler(x)
        centres = pool(x)
        if self.offset_proj is not None:
            centres = pool(self._displace(x, centres))
        return centres

    def _pooler(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the function tokens -> centres; a mask is computed from ``x`` only, not from displaced tokens."""
        if self.kind == "mask":
            weights = self._mask(x)
            return lambda tokens: (weights.unsqueeze(-2) @ self._windows(tokens)).squeeze(-2)
        reduce = F.adaptive_max_pool3d if self.kind == "max" else F.adaptive_avg_pool3d
        B, _, C = x.shape

        def pool(tokens: Tensor) -> Tensor:
            maps = tokens.transpose(1, 2).reshape(B, C, *self.grid)
            return reduce(maps, self.regions).flatten(2).transpose(1, 2)  # (B, M, C)

        return pool

    def _mask(self, x: Tensor) -> Tensor:
        """Return the weights (B, M, P) of the P positions in each region."""
        B, _, C = x.shape
        T, H, W = self.grid
        maps = x.reshape(B * T, H, W, C).permute(0, 3, 1, 2)
        maps = self.mask_conv(maps).permute(0, 2, 3, 1)  # (B*T, H, W, C)
        logits = self.mask_proj(F.gelu(self.mask_norm(maps)))  # (B*T, H, W, 1)
        logits = self._windows(logits.reshape(B, T * H * W, 1), PADDED_LOGIT)  # (B, M, P, 1)
        return logits.squeeze(-1).softmax(dim=-1)

    def _windows(self, x: Tensor, padding: float = 0.0) -> Tensor:
        """Cut tokens (B, N, C) into regions (B, M, P, C), padding the map at its borders."""
        B, _, C = x.shape
        T, H, W = self.grid
        t, h, w = self.regions
        (row, top, bottom), (column, left, right) = self.rows, self.columns
        x = x.reshape(B, T, H, W, C)
        if top or bottom or left or right:
            x = F.pad(x, (0, 0, left, right, top, bottom), value=padding)
        x = x.reshape(B, t, self.frames_merged, h, row, w, column, C)
        return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(B, t * h * w, -1, C)

    def _displace(self, x: Tensor, centres: Tensor) -> Tensor:
        """Resample tokens (B, N, C) so that each region reads from its displaced position."""
        assert self.offset_norm is not None
        assert self.offset_proj is not None
        B, _, C = x.shape
        T, H, W = self.grid
        (row, top, _), (column, left, _) = self.rows, self.columns
        reach = x.new_tensor([2 * column / W, 2 * row / H], dtype=torch.float32)  # one region, in units of grid_sample
        flow = self.offset_proj(self.offset_norm(centres)).float().tanh() * reach  # (B, M, 2) as (x, y)
        flow = flow.reshape(B, *self.regions, 2).repeat_interleave(self.frames_merged, dim=1)
        flow = flow.repeat_interleave(row, dim=2).repeat_interleave(column, dim=3)
        flow = flow[:, :, top : top + H, left : left + W].reshape(B * T, H, W, 2)
        ys = (torch.arange(H, device=x.device, dtype=torch.float32) * 2 + 1) / H - 1
        xs = (torch.arange(W, device=x.device, dtype=torch.float32) * 2 + 1) / W - 1
        positions = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1)  # (H, W, 2)
        maps = x.reshape(B * T, H, W, C).permute(0, 3, 1, 2).float()
        maps = F.grid_sample(maps, positions + flow, padding_mode="border", align_corners=False)
        return maps.permute(0, 2, 3, 1).reshape(B, T * H * W, C).to(x.dtype)


class SemanticTokenGenerator(Reducer):
    """STGM: turns image tokens X into semantic tokens S with two or more of the backbone's own blocks.

        S1 = block(P on X);   S2 = block(S1 + G on [S1; X]);   deeper layers repeat the second form

    P are pooled centres, G learned global ones. X is read, never updated. ``first_residual`` is the residual on P,
    which the paper's equation has and the released checkpoints do not.

    A centre that stands for n merged frames gets log n on its logit beside unmerged image tokens: a clip of equal
    frames then attends exactly as the image does.
    """

    def __init__(self, dim: int, grid: Grid, regions: Grid, settings: STGMArguments) -> None:
        super().__init__(math.prod(regions), regions)
        self.pooling = SemanticPooling(dim, grid, regions, settings.pooling, settings.offsets)
        self.first_residual = settings.first_residual
        self.global_centres = nn.Parameter(torch.zeros(1, self.count, dim)) if settings.global_centres else None

    def reset_parameters(self) -> None:
        self.pooling.reset_offsets()
        if self.global_centres is not None:
            nn.init.normal_(self.global_centres, std=0.02)

    def forward(self, x: Tensor, blocks: Blocks, past: Past = (), return_assignment: bool = False) -> Reduced:
        """Map image tokens (B, N, C) to semantic tokens (B, M, C).

        The assignment says how much each semantic token draws from each image token in the last block; its rows sum
        to at most 1, the rest being drawn from the semantic tokens themselves.
        """
        s, assignment = self.pooling(x), None
        for i, block in enumerate(blocks):
            query = s if i == 0 or self.global_centres is None else s + self.global_centres
            if return_assignment and i + 1 == len(blocks):
                assignment = self.assign(block, query, s, x)
            s = self.attend(i, block, query, s, x)
        return Reduced(s, assignment)

    def attend(self, layer: int, block: nn.Module, query: Tensor, s: Tensor, x: Tensor) -> Tensor:
        """Return the semantic tokens (B, M, C) after the generator's ``layer``-th block, counted from 0."""
        if layer == 0:
            return block(query, context=x, residual=self.first_residual)
        context, key_bias = self.join(s, x)
        return block(query, context=context, key_bias=key_bias)

    def assign(self, block: nn.Module, query: Tensor, s: Tensor, x: Tensor) -> Tensor:
        """Return how much the queries of the last block draw from each image token, (B, M, N)."""
        weights = block.attention_weights(query, *self.join(s, x))  # type: ignore[operator]
        return weights[..., s.shape[1] :]

    def join(self, s: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the context [S; X] (B, M + N, C) and the bias of its keys (M + N,), None where no frames merged."""
        context, merged = torch.cat([s, x], dim=1), self.pooling.frames_merged
        if merged == 1:
            return context, None
        # Joined from two parts: assignment to a slice cannot be exported to ONNX.
        centres = torch.full((s.shape[1],), math.log(merged), device=x.device)
        return context, torch.cat([centres, torch.zeros(x.shape[1], device=x.device)])


def check_depths(depth: int, base_depth: int, stgm_depth: int, recover: bool = False) -> None:
    """Raise ValueError unless base, STGM and, if there is one, the recovery block fit into ``depth`` blocks."""
    most = depth - stgm_depth - recover
    if base_depth > most:
        raise ValueError(
            f"base_depth {base_depth} with stgm_depth {stgm_depth} in {depth} blocks"
            f"{', the last being the recovery' if recover else ''}; "
            + (f"allowed: 1 to {most}." if most >= 1 else "that is too short: take more blocks, or fewer units.")
        )
