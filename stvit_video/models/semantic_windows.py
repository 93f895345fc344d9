"""Semantic tokens in a windowed backbone: each window becomes 3 x 3 centres, read from larger windows around it.

Source: Chang et al. (STViT, arXiv 2303.08685), sections 3.2 and 3.3, with the sizes of the released STViT-R code where
the paper gives none. What concerns time is this project's extension.

Legend: B clips, (T, H, W) image tokens, (G, h, w) semantic tokens, n = T/G frames a centre; (nh, nw) windows a frame.
A "group" is the n frames that share their centres: generation and recovery happen inside groups, so that they cost as
much a frame as they cost in an image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stvit_video.models.arguments import check_choice
from stvit_video.models.layers import Block, Grid, run_block
from stvit_video.models.reducers import GRID_REDUCERS, Reduced, create_grid_reducer
from stvit_video.models.semantic_tokens import SemanticTokenGenerator, allowed_counts, check_depths, check_frames
from stvit_video.models.windows import WindowAttention, WindowBlock, partition, unite

CENTRES = 3  # along each side of a window, the paper's choice for 7 x 7 windows
KEY_MARGIN = 3  # the first generator block reads windows this much larger than 7: the released code's 10


def windowed_regions(grid: Grid, window: Grid, frames_per_centre: int, even: bool) -> Grid:
    """Return 3 x 3 centres a window, fewer on maps too small for that, for every ``frames_per_centre`` frames.

    ``even`` asks for counts that cut the map into equal regions, as the learned mask needs them.
    """
    sides = []
    for length, size in zip(grid[1:], window[1:], strict=True):
        windows = math.ceil(length / size)
        counts = [windows * n for n in range(1, CENTRES + 1) if windows * n <= length]
        sides.append(max(count for count in counts if not even or count in allowed_counts(length)))
    return (grid[0] // math.gcd(grid[0], frames_per_centre), sides[0], sides[1])


def centred_windows(length: int, count: int, size: int) -> Tensor:
    """Return the positions (count, size) of windows of ``size`` centred on ``count`` equal parts of an axis.

    Windows that would reach over an end are moved inside, so every position is a real one.
    """
    size = min(size, length)
    part = length / count
    starts = [min(max(0, math.floor(i * part - (size - part) / 2)), length - size) for i in range(count)]
    return torch.tensor(starts).unsqueeze(1) + torch.arange(size)


class WindowedTokenGenerator(SemanticTokenGenerator):
    """STGM inside windows: the centres of a window read the image tokens around it and the centres themselves.

    A block's context is [S; X] from the first one on, as in the released code; centres that stand for n merged frames
    weigh log n more there. The first block reads a margin around each window, deeper ones twice the window, which is
    the whole 14 x 14 map of a 224-pixel image. Where the window of a block covers the map, all its centres are one
    query. Raises ValueError where ``regions`` do not give every window the same number of centres.
    """

    def __init__(self, dim: int, grid: Grid, regions: Grid, window: Grid, **settings: object) -> None:
        super().__init__(dim, grid, regions, **settings)  # type: ignore[arg-type]
        self.grid, self.regions = grid, regions
        counts = [math.ceil(length / size) for length, size in zip(grid[1:], window[1:], strict=True)]
        for count, windows, axis in zip(regions[1:], counts, ("height", "width"), strict=True):
            if count % windows:
                allowed = [n * windows for n in range(1, CENTRES + 1)]
                raise ValueError(
                    f"{count} regions over the {windows} windows of {axis}; allowed: multiples such as {allowed}."
                )
        self.own = (1, regions[1] // counts[0], regions[2] // counts[1])
        frames = grid[0] // regions[0]
        for layer in range(2):
            sides = [size * 2 if layer else size + KEY_MARGIN for size in window[1:]]
            centres = [size * (layer + 1) for size in self.own[1:]]
            covers = all(
                length <= side for length, side in zip((*grid[1:], *regions[1:]), (*sides, *centres), strict=True)
            )
            places = None if covers else self._places((frames, *grid[1:]), counts, sides)
            own = None if covers else self._places((1, *regions[1:]), counts, centres)
            self.register_buffer(f"image_places_{layer}", places, persistent=False)
            self.register_buffer(f"centre_places_{layer}", own, persistent=False)

    @staticmethod
    def _places(grid: Grid, counts: Sequence[int], sides: Sequence[int]) -> Tensor:
        """Return where in a flattened group each window reads: (windows, positions)."""
        rows, columns = (centred_windows(*axis) for axis in zip(grid[1:], counts, sides, strict=True))
        frames = torch.arange(grid[0]).view(1, 1, -1, 1, 1) * grid[1] * grid[2]
        places = rows[:, None, None, :, None] * grid[2] + columns[None, :, None, None, :]
        return (places + frames).flatten(2).flatten(0, 1)

    def _group(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0] * self.regions[0], -1, x.shape[-1])  # (B*G, tokens of a group, C)

    def _queries(self, s: Tensor) -> Tensor:
        """Cut centres (B, M, C) into windows (B*G*windows, P, C)."""
        _, h, w = self.regions
        return partition(s.reshape(-1, 1, h, w, s.shape[-1]), self.own).flatten(0, 3)

    def _ungroup(self, windows: Tensor, B: int) -> Tensor:
        """Undo ``_queries``."""
        (_, h, w), (_, p, q) = self.regions, self.own
        windows = windows.reshape(-1, 1, h // p, w // q, p * q, windows.shape[-1])
        return unite(windows, self.own).reshape(B, -1, windows.shape[-1])

    def _context(self, layer: int, query: Tensor, s: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return queries and their context [S; X], window by window or group by group, and the bias of its keys."""
        image_places = getattr(self, f"image_places_{min(layer, 1)}")
        centre_places = getattr(self, f"centre_places_{min(layer, 1)}")
        s, x = self._group(s), self._group(x)
        if image_places is None:
            query = self._group(query)
        else:
            s = s[:, centre_places].flatten(0, 1)  # (B*G*windows, P, C)
            x = x[:, image_places].flatten(0, 1)
            query = self._queries(query)
        return query, *self.join(s, x)

    def attend(self, layer: int, block: nn.Module, query: Tensor, s: Tensor, x: Tensor) -> Tensor:
        windows, context, bias = self._context(layer, query, s, x)
        out = block(windows, context=context, key_bias=bias, residual=layer > 0 or self.first_residual)
        if getattr(self, f"image_places_{min(layer, 1)}") is None:
            return out.reshape(query.shape)
        return self._ungroup(out, query.shape[0])

    def assign(self, block: nn.Module, query: Tensor, s: Tensor, x: Tensor) -> Tensor:
        windows, context, bias = self._context(1, query, s, x)
        weights = block.attention_weights(windows, context, bias)  # type: ignore[operator]
        group_tokens = x.shape[1] // self.regions[0]
        if self.image_places_1 is None:
            weights = weights[..., -group_tokens:]
        else:
            places = self.image_places_1.repeat(query.shape[0] * self.regions[0], 1).unsqueeze(1)  # type: ignore[operator]
            weights = weights[..., -places.shape[-1] :]
            full = weights.new_zeros(*weights.shape[:2], group_tokens)
            weights = self._ungroup(full.scatter_(2, places.expand_as(weights), weights), query.shape[0])
        weights = weights.reshape(
            query.shape[0], self.regions[0], -1, group_tokens
        )  # (B, G, centres, tokens) of a group
        return torch.stack([torch.block_diag(*clip) for clip in weights])


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
