"""Stems, patch merging and stages of the Swin models.

Legend: B clips, input (B, 3, T, H, W); tokens (B, T, H, W, C), s semantic tokens (B, M, C); (t, h, w) windows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from stvit_video.models.arguments import Grid, SwinSemanticArguments
from stvit_video.models.grids import window_partition, window_reverse
from stvit_video.models.layers import Block, PatchEmbed, run_block
from stvit_video.models.reducers import Reduced, Reducer, create_reducer
from stvit_video.models.reducers.semantic import check_depths, check_frames
from stvit_video.models.reducers.semantic_windows import CENTRES, windowed_regions
from stvit_video.models.windows import WindowAttention, WindowBlock

EPS = 1e-5  # of all layer norms, as published


class PatchStem(PatchEmbed):
    """Swin's patch embedding: one projection and a norm. Maps (B, 3, T, H, W) to (B, t, h, w, C)."""

    def __init__(self, dim: int, patch: Grid) -> None:
        super().__init__(dim, patch)
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        grid = [size // step for size, step in zip(x.shape[2:], self.patch, strict=True)]
        return self.norm(super().forward(x)).reshape(x.shape[0], *grid, -1)


class ConvStem(nn.Module):
    """The released STViT-R's embedding: two convolutions of stride 2, batch norm, Hardswish; shapes as PatchStem."""

    def __init__(self, dim: int, patch: Grid) -> None:
        super().__init__()
        frames = patch[0]
        self.proj = nn.Sequential(
            self._layer(3, dim // 2, frames), nn.Hardswish(), self._layer(dim // 2, dim, 1), nn.Hardswish()
        )

    @staticmethod
    def _layer(inputs: int, outputs: int, frames: int) -> nn.Module:
        layer = nn.Sequential()
        kernel, stride = (frames, 3, 3), (frames, 2, 2)
        layer.add_module("c", nn.Conv3d(inputs, outputs, kernel, stride, padding=(0, 1, 1), bias=False))
        layer.add_module("bn", nn.BatchNorm3d(outputs))
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 4, 1)


class PatchMerging(nn.Module):
    """Concatenate 2 x 2 neighbours and project: (B, T, H, W, C) to (B, T, H/2, W/2, 2C); odd maps are padded."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:4]
        if H % 2 or W % 2:
            x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
        x = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, T, H/2, 2, W/2, 2, C)
        return self.reduction(self.norm(x.permute(0, 1, 2, 4, 5, 3, 6).flatten(4)))


@dataclass(frozen=True)
class BlockMaker:
    """Makes the blocks of a stage, which have all this in common."""

    dim: int
    num_heads: int
    mlp_ratio: float
    grid: Grid
    window: Grid
    window_frames: int  # of the window, at most; see WindowAttention

    def windowed(self, drop_path: float, shifted: bool) -> WindowBlock:
        """Return a block that attends inside windows."""
        attention = WindowAttention(self.dim, self.num_heads, self.grid, self.window, shifted, self.window_frames)
        return WindowBlock(self.dim, self.mlp_ratio, drop_path, EPS, attention)

    def plain(self, drop_path: float, layer_scale: float | None) -> Block:
        """Return a block that attends to all tokens that it is given, or to a context."""
        return Block(self.dim, self.num_heads, self.mlp_ratio, drop_path, EPS, layer_scale)


class Stage(nn.Module):
    """Blocks on one grid: windows, every second one shifted, or (``windowed`` False) all tokens of the clip.

    ``downsample`` and ``grad_checkpointing`` are set by the network.
    """

    regions: Grid | None = None  # the grid of semantic tokens, if the stage generates them

    def __init__(
        self, make: BlockMaker, drop_path: Sequence[float], windowed: bool = True, layer_scale: float | None = None
    ) -> None:
        super().__init__()
        self.grid = self.out_grid = make.grid
        self.windowed = windowed
        self.blocks = nn.ModuleList(
            make.windowed(rate, i % 2 == 1) if windowed else make.plain(rate, layer_scale)
            for i, rate in enumerate(drop_path)
        )
        self.generators: Sequence[Reducer] | nn.ModuleList = ()
        self.downsample: PatchMerging | None = None
        self.grad_checkpointing = False

    def forward(self, x: Tensor, return_assignment: bool = False) -> tuple[Tensor, Tensor | None]:
        """Map (B, T, H, W, C) to the same shape; the assignment is None."""
        shape = x.shape
        x = x if self.windowed else x.flatten(1, 3)
        for block in self.blocks:
            x = self._run(block, x)
        return x.reshape(shape), None

    def _run(self, block: nn.Module, x: Tensor, *context: Tensor) -> Tensor:
        return run_block(block, x, *context, recompute=self.grad_checkpointing and self.training)


class SemanticStage(Stage):
    """A stage that works on semantic tokens, in one or several units of

        base blocks on image tokens -> generator -> token blocks (-> recovery of the image tokens)

    Token blocks attend inside (t, 3, 3) windows of semantic tokens and over the whole clip in turn. With recovery the
    units are the paper's dumbbells, whose base blocks do not shift their windows, and image tokens leave the stage;
    without it semantic tokens do. Raises ValueError where the settings do not fit into the stage.
    """

    regions: Grid

    def __init__(self, make: BlockMaker, drop_path: Sequence[float], settings: SwinSemanticArguments) -> None:
        super().__init__(make, ())
        self.recover, self.base_depth, self.stgm_depth = settings.recover, settings.base_depth, settings.stgm_depth
        self.unit_depth = check_unit(len(drop_path), settings)
        even = settings.pooling == "mask" or settings.offsets
        self.regions = settings.regions or windowed_regions(make.grid, make.window, settings.frames_per_centre, even)
        if self.recover:  # the image tokens of a frame attend to the semantic tokens of their own group of frames
            check_frames(make.grid[0], self.regions[0])
        self.out_grid = make.grid if self.recover else self.regions
        self.token_window = token_window(self.regions, make.window)
        for i, rate in enumerate(drop_path):
            depth = i % self.unit_depth
            if depth < self.base_depth:
                self.blocks.append(make.windowed(rate, shifted=depth % 2 == 1 and not self.recover))
            else:
                self.blocks.append(make.plain(rate, settings.layer_scale))
        self.generators = nn.ModuleList()
        for unit in range(settings.units):
            # One set of global centres per stage, as in the released code.
            stgm = replace(settings, global_centres=settings.global_centres and unit == 0)
            generator = create_reducer(
                settings.reducer, make.dim, make.num_heads, make.grid, self.regions, stgm=stgm, window=make.window
            )
            self.generators.append(generator)

    def generator_block(self, unit: int) -> int:
        """Return the index of the first block that the generator of a unit runs."""
        return unit * self.unit_depth + self.base_depth

    def forward(self, x: Tensor, return_assignment: bool = False) -> tuple[Tensor, Tensor | None]:
        """Map (B, T, H, W, C) to the grid that leaves the stage, and the last unit's assignment if requested."""
        assignment = None
        for unit, generator in enumerate(self.generators):
            blocks = self.blocks[unit * self.unit_depth : (unit + 1) * self.unit_depth]
            for block in blocks[: self.base_depth]:
                x = self._run(block, x)
            B, C = x.shape[0], x.shape[-1]
            first_token_block = self.base_depth + self.stgm_depth
            generating = list(blocks[self.base_depth : first_token_block])
            reduced: Reduced = generator(x.reshape(B, -1, C), generating, return_assignment=return_assignment)
            s, assignment = reduced.tokens, reduced.assignment
            for i, block in enumerate(blocks[first_token_block : len(blocks) - self.recover]):
                s = self._run_in_windows(block, s) if i % 2 == 0 else self._run(block, s)
            if self.recover:
                # X' = X + MHA(X, S, S) and the MLP, inside each group of frames.
                groups = B * self.regions[0]
                x = self._run(blocks[-1], x.reshape(groups, -1, C), s.reshape(groups, -1, C)).reshape(x.shape)
            else:
                x = s.reshape(B, *self.regions, C)
        return x, assignment

    def _run_in_windows(self, block: nn.Module, s: Tensor) -> Tensor:
        windows = window_partition(s.reshape(s.shape[0], *self.regions, -1), self.token_window)
        out = self._run(block, windows.flatten(0, 3)).reshape(windows.shape)
        return window_reverse(out, self.token_window).reshape(s.shape)


def token_window(regions: Grid, window: Grid) -> Grid:
    """Return the windows (t, 3, 3) of semantic tokens; t is the largest divisor of their frames up to the window's."""
    frames = max(size for size in range(1, window[0] + 1) if regions[0] % size == 0)
    rows, columns = (CENTRES if side % CENTRES == 0 else side for side in regions[1:])
    return (frames, rows, columns)


def check_unit(depth: int, settings: SwinSemanticArguments) -> int:
    """Return the blocks of a unit; raise ValueError where the settings do not fit into ``depth`` blocks."""
    units, recover = settings.units, settings.recover
    if depth % units:
        allowed = [count for count in range(1, depth + 1) if depth % count == 0]
        raise ValueError(f"units {units} does not divide the {depth} blocks of stage 3; allowed: {allowed}.")
    if units > 1 and not recover:
        raise ValueError(f"units {units} without recovery; several units need recover=True (stvit_r models).")
    check_depths(depth // units, settings.base_depth, settings.stgm_depth, recover)
    return depth // units
