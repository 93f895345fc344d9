"""Stems, merging and stages of the Swin models."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from stvit_video.models.layers import Block, Grid, PatchEmbed, check_choice, run_block
from stvit_video.models.reducers import GRID_REDUCERS, Reduced, create_grid_reducer
from stvit_video.models.reducers.semantic import check_depths, check_frames
from stvit_video.models.reducers.semantic_windows import CENTRES, WindowedTokenGenerator, windowed_regions
from stvit_video.models.windows import WindowAttention, WindowBlock, partition, unite


def token_window(regions: Grid, window: Grid) -> Grid:
    """Return the windows (t, 3, 3) of semantic tokens; t is the largest divisor of their frames up to the window's."""
    frames = max(size for size in range(1, window[0] + 1) if regions[0] % size == 0)
    return (frames, *(CENTRES if side % CENTRES == 0 else side for side in regions[1:]))  # type: ignore[return-value]


@dataclass(frozen=True)
class SemanticSettings:
    """How a stage generates semantic tokens, and whether it gives the image tokens back.

    A unit has ``base_depth`` blocks on image tokens, ``stgm_depth`` that generate, the rest on semantic tokens and,
    with ``recover``, one that recovers the image tokens. ``regions`` (t, h, w) counts the centres along each axis; by
    default 3 x 3 a window for every ``frames_per_centre`` token frames. ``layer_scale`` is that of semantic blocks.
    ``reducer`` is "stgm", or one of GRID_REDUCERS to compare it with.
    """

    reducer: str = "stgm"
    recover: bool = False
    units: int = 1
    base_depth: int = 4
    stgm_depth: int = 2
    regions: Grid | None = None
    frames_per_centre: int = 1
    pooling: str = "max"
    offsets: bool = False
    global_centres: bool = False
    first_residual: bool = True
    layer_scale: float | None = None


class SemanticStage(nn.Module):
    """A stage that works on semantic tokens, in one or several units of

        base blocks on image tokens -> generator -> token blocks (-> recovery of the image tokens)

    Token blocks see their (t, 3, 3) window and the whole clip in turn. With recovery the units are the paper's
    dumbbells, whose base blocks do not shift their windows, and image tokens leave the stage; without it semantic
    tokens do. Raises ValueError where the settings do not fit into the stage.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Grid,
        window: Grid,
        settings: SemanticSettings,
        *,
        mlp_ratio: float,
        drop_path: Sequence[float],
        window_frames: int,
        eps: float,
    ) -> None:
        super().__init__()
        self.recover, self.base_depth, self.stgm_depth = settings.recover, settings.base_depth, settings.stgm_depth
        self.unit_depth = check_unit(len(drop_path), settings)
        self.regions = settings.regions or windowed_regions(
            grid, window, settings.frames_per_centre, settings.pooling == "mask" or settings.offsets
        )
        self.out_grid = grid if self.recover else self.regions
        self.token_window = token_window(self.regions, window)
        self.blocks = nn.ModuleList()
        for i, rate in enumerate(drop_path):
            place = i % self.unit_depth
            if place < self.base_depth:
                shifted = place % 2 == 1 and not self.recover
                attention = WindowAttention(dim, num_heads, grid, window, shifted, window_frames)
                self.blocks.append(WindowBlock(dim, mlp_ratio, rate, eps, attention))
            else:
                self.blocks.append(Block(dim, num_heads, mlp_ratio, rate, eps, settings.layer_scale))
        self.generators = nn.ModuleList(
            self._generator(dim, grid, window, settings, first=unit == 0) for unit in range(settings.units)
        )
        self.downsample: nn.Module | None = None
        self.grad_checkpointing = False

    def _generator(self, dim: int, grid: Grid, window: Grid, settings: SemanticSettings, first: bool) -> nn.Module:
        """Make what leaves few tokens in a unit."""
        if settings.reducer != "stgm":
            check_choice("reducer", settings.reducer, GRID_REDUCERS)
            if self.recover:  # frames ask the tokens of their own group
                check_frames(grid[0], self.regions[0])
            return create_grid_reducer(settings.reducer, grid, self.regions)
        return WindowedTokenGenerator(
            dim,
            grid,
            self.regions,
            window,
            pooling=settings.pooling,
            offsets=settings.offsets,
            global_centres=settings.global_centres and first,  # one set a stage, as in the released code
            first_residual=settings.first_residual,
        )

    def forward(self, x: Tensor, return_assignment: bool = False) -> tuple[Tensor, Tensor | None]:
        """Map (B, T, H, W, C) to the grid that leaves the stage, and the last unit's assignment if asked."""
        assignment = None
        for unit, generator in enumerate(self.generators):
            blocks = self.blocks[unit * self.unit_depth : (unit + 1) * self.unit_depth]
            for block in blocks[: self.base_depth]:
                x = self._run(block, x)
            B, C = x.shape[0], x.shape[-1]
            first_token_block = self.base_depth + self.stgm_depth
            on_the_way = list(blocks[self.base_depth : first_token_block])
            reduced = generator(x.reshape(B, -1, C), on_the_way, return_assignment=return_assignment)
            s, assignment = (reduced.tokens, reduced.assignment) if isinstance(reduced, Reduced) else reduced
            for i, block in enumerate(blocks[first_token_block : len(blocks) - self.recover]):
                s = self._local(block, s) if i % 2 == 0 else self._run(block, s)
            if self.recover:
                # X' = X + MHA(X, S, S) and the MLP: image tokens ask the semantic tokens of their own frames.
                groups = B * self.regions[0]
                x = self._run(blocks[-1], x.reshape(groups, -1, C), s.reshape(groups, -1, C)).reshape(x.shape)
            else:
                x = s.reshape(B, *self.regions, C)
        return x, assignment

    def _local(self, block: nn.Module, s: Tensor) -> Tensor:
        windows = partition(s.reshape(s.shape[0], *self.regions, -1), self.token_window)
        out = self._run(block, windows.flatten(0, 3)).reshape(windows.shape)
        return unite(out, self.token_window).reshape(s.shape)

    def _run(self, block: nn.Module, x: Tensor, *context: Tensor) -> Tensor:
        return run_block(block, x, *context, recompute=self.grad_checkpointing and self.training)


def check_unit(depth: int, settings: SemanticSettings) -> int:
    """Return the blocks a unit has; raise ValueError where the settings do not fit into ``depth`` blocks."""
    units, recover = settings.units, settings.recover
    if units < 1 or depth % units:
        allowed = [count for count in range(1, depth + 1) if depth % count == 0]
        raise ValueError(f"units {units} does not divide the {depth} blocks of stage 3; allowed: {allowed}.")
    if units > 1 and not recover:
        raise ValueError(f"units {units} without recovery; several units need recover=True (stvit_r models).")
    check_depths(depth // units, settings.base_depth, settings.stgm_depth, recover)
    return depth // units


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
    """The released STViT-R's embedding: two convolutions of stride 2, batch norm, Hardswish. Same shapes."""

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
    """Put 2 x 2 neighbours together and project: (B, T, H, W, C) to (B, T, H/2, W/2, 2C), odd maps being padded."""

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


class Stage(nn.Module):
    """Blocks on one grid: windows, every second one shifted, or (``window`` None) all tokens of the clip."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Grid,
        window: Grid | None,
        *,
        mlp_ratio: float,
        drop_path: Sequence[float],
        window_frames: int,
        eps: float,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.out_grid, self.windowed = grid, window is not None
        self.blocks = nn.ModuleList()
        for i, rate in enumerate(drop_path):
            if window is None:
                self.blocks.append(Block(dim, num_heads, mlp_ratio, rate, eps, layer_scale))
            else:
                attention = WindowAttention(dim, num_heads, grid, window, i % 2 == 1, window_frames)
                self.blocks.append(WindowBlock(dim, mlp_ratio, rate, eps, attention))
        self.downsample: nn.Module | None = None
        self.grad_checkpointing = False

    def forward(self, x: Tensor, return_assignment: bool = False) -> tuple[Tensor, Tensor | None]:
        """Map (B, T, H, W, C) to the same shape; there is never an assignment."""
        shape = x.shape
        x = x if self.windowed else x.flatten(1, 3)
        for block in self.blocks:
            x = run_block(block, x, recompute=self.grad_checkpointing and self.training)
        return x.reshape(shape), None
