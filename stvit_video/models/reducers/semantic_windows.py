"""Semantic tokens in a windowed backbone: each window becomes 3 x 3 centres, read from larger windows around it.

Source: Chang et al. (STViT, arXiv 2303.08685), sections 3.2 and 3.3, with the sizes of the released STViT-R code where
the paper gives none. What concerns time is this project's extension.

Legend: B clips, (T, H, W) image tokens, (G, h, w) semantic tokens, n = T/G frames a centre; (nh, nw) windows a frame.
A "group" is the n frames that share their centres: generation and recovery happen inside groups, so that they cost as
much a frame as they cost in an image.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stvit_video.models.layers import Grid
from stvit_video.models.reducers.semantic import SemanticTokenGenerator, allowed_counts
from stvit_video.models.windows import partition, unite

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
