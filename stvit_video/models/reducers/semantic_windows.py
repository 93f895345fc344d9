"""Semantic tokens in a windowed backbone: each window becomes 3 x 3 centres, which read larger windows around it.

Source: Chang et al. (STViT, arXiv 2303.08685), sections 3.2 and 3.3, with the sizes of the released STViT-R code where
the paper gives none. The extension in time is this project's.

Legend: B clips, (T, H, W) grid of image tokens, (G, h, w) grid of semantic tokens, C channels, P positions of a window.
A "group" is the T/G frames that share their centres: generation and recovery happen inside groups, so that their cost
per frame is that of an image.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stvit_video.models.arguments import Grid, STGMArguments
from stvit_video.models.grids import window_partition, window_reverse
from stvit_video.models.reducers.semantic import SemanticTokenGenerator, allowed_counts

CENTRES = 3  # along each side of a window, the paper's choice for 7 x 7 windows
KEY_MARGIN = 3  # the first generator block reads windows larger by this: 10 for 7, as in the released code


def windowed_regions(grid: Grid, window: Grid, frames_per_centre: int, even: bool) -> Grid:
    """Return the default grid of centres: 3 x 3 per window, fewer on small maps, every ``frames_per_centre`` frames.

    ``even`` selects counts that cut the map into equal regions, as the learned mask needs them.
    """
    sides = []
    for length, size in zip(grid[1:], window[1:], strict=True):
        windows = math.ceil(length / size)
        counts = [windows * n for n in range(1, CENTRES + 1) if windows * n <= length]
        sides.append(max(count for count in counts if not even or count in allowed_counts(length)))
    return (grid[0] // math.gcd(grid[0], frames_per_centre), sides[0], sides[1])


def centred_windows(length: int, count: int, size: int) -> Tensor:
    """Return the positions (count, size) of windows of ``size`` centred on ``count`` equal parts of an axis.

    Windows that would cross an end are moved inside, so that no position is padding.
    """
    size = min(size, length)
    part = length / count
    starts = [min(max(0, math.floor(i * part - (size - part) / 2)), length - size) for i in range(count)]
    return torch.tensor(starts).unsqueeze(1) + torch.arange(size)


def read_index(grid: Grid, counts: Sequence[int], sides: Sequence[int]) -> Tensor:
    """Return the indices (windows, P) that each window reads in a flattened group of tokens (t, h, w)."""
    rows, columns = (centred_windows(*axis) for axis in zip(grid[1:], counts, sides, strict=True))
    frames = torch.arange(grid[0]).view(1, 1, -1, 1, 1) * grid[1] * grid[2]
    index = rows[:, None, None, :, None] * grid[2] + columns[None, :, None, None, :]
    return (index + frames).flatten(2).flatten(0, 1)


class WindowedTokenGenerator(SemanticTokenGenerator):
    """STGM inside windows: the centres of a window read the image tokens around it and the centres themselves.

    The context of all blocks, the first included, is [S; X], as in the released code. The first block reads a margin
    around each window, deeper ones twice the window, which is the whole 14 x 14 map of a 224-pixel image. If this
    covers the whole map, all its centres form one query. Raises ValueError where ``regions`` do not give every window
    the same number of centres.
    """

    regions: Grid

    def __init__(self, dim: int, grid: Grid, regions: Grid, window: Grid, settings: STGMArguments) -> None:
        super().__init__(dim, grid, regions, settings)
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
            image_index = None if covers else read_index((frames, *grid[1:]), counts, sides)
            centre_index = None if covers else read_index((1, *regions[1:]), counts, centres)
            self.register_buffer(f"image_index_{layer}", image_index, persistent=False)
            self.register_buffer(f"centre_index_{layer}", centre_index, persistent=False)

    def _group(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0] * self.regions[0], -1, x.shape[-1])  # (B*G, tokens of a group, C)

    def _queries(self, s: Tensor) -> Tensor:
        """Cut centres (B, M, C) into windows (B*G*windows, P, C)."""
        _, h, w = self.regions
        return window_partition(s.reshape(-1, 1, h, w, s.shape[-1]), self.own).flatten(0, 3)

    def _ungroup(self, windows: Tensor, B: int) -> Tensor:
        """Undo ``_queries``."""
        (_, h, w), (_, p, q) = self.regions, self.own
        windows = windows.reshape(-1, 1, h // p, w // q, p * q, windows.shape[-1])
        return window_reverse(windows, self.own).reshape(B, -1, windows.shape[-1])

    def _context(self, layer: int, query: Tensor, s: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return queries, their context [S; X] and the bias of its keys: by window, or by group if windows cover it."""
        image_index, centre_index = self._indices(layer)
        s, x = self._group(s), self._group(x)
        if image_index is None:
            query = self._group(query)
        else:
            s = s[:, centre_index].flatten(0, 1)  # (B*G*windows, P, C)
            x = x[:, image_index].flatten(0, 1)
            query = self._queries(query)
        return query, *self.join(s, x)

    def _indices(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """Return which image tokens and centres of a group each window reads; None: all of them."""
        layer = min(layer, 1)
        return getattr(self, f"image_index_{layer}"), getattr(self, f"centre_index_{layer}")

    def attend(self, layer: int, block: nn.Module, query: Tensor, s: Tensor, x: Tensor) -> Tensor:
        windows, context, bias = self._context(layer, query, s, x)
        out = block(windows, context=context, key_bias=bias, residual=layer > 0 or self.first_residual)
        return out.reshape(query.shape) if self._indices(layer)[0] is None else self._ungroup(out, query.shape[0])

    def assign(self, block: nn.Module, query: Tensor, s: Tensor, x: Tensor) -> Tensor:
        windows, context, bias = self._context(1, query, s, x)
        weights = block.attention_weights(windows, context, bias)  # type: ignore[operator]
        B, group_tokens, image_index = query.shape[0], x.shape[1] // self.regions[0], self._indices(1)[0]
        if image_index is None:
            weights = weights[..., -group_tokens:]
        else:
            index = image_index.repeat(B * self.regions[0], 1).unsqueeze(1)
            weights = weights[..., -index.shape[-1] :]
            full = weights.new_zeros(*weights.shape[:2], group_tokens)
            weights = self._ungroup(full.scatter(2, index.expand_as(weights), weights), B)
        weights = weights.reshape(B, self.regions[0], -1, group_tokens)
        return torch.stack([torch.block_diag(*clip) for clip in weights])  # tokens of other groups are not read
