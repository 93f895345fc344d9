"""Swin and Video Swin, plain or with semantic tokens (STViT-Swin, STViT-R-Swin); an image is a clip of one frame.

Sources: Liu et al. (arXiv 2103.14030, 2106.13230); Chang et al. (STViT, arXiv 2303.08685).

Legend: B clips, input (B, 3, T, H, W); tokens (B, t, h, w, C) until the last norm, then (B, N, C), s semantic tokens
(B, M, C). Parameter names are those of the published Swin checkpoints.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMerging

from stvit_video.models.arguments import Grid, SwinArguments, SwinSemanticArguments
from stvit_video.models.grids import count_windows, window_partition, window_reverse
from stvit_video.models.layers import Block, BlockRunner, Intermediates, Network, PatchEmbed, init_linear, note
from stvit_video.models.reducers import Reducer, create_reducer
from stvit_video.models.reducers.semantic import CENTRES, check_depths, check_frames, default_regions
from stvit_video.models.windows import WindowAttention, WindowBlock

EPS = 1e-5  # of all layer norms, as published
SEMANTIC_STAGE = 2  # the third of four, where the paper generates its tokens


class PatchStem(PatchEmbed):
    """Swin's patch embedding: one projection and a norm. Maps (B, 3, T, H, W) to (B, t, h, w, C)."""

    def __init__(self, dim: int, patch: Grid) -> None:
        super().__init__(dim, patch)
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class ConvStem(nn.Module):
    """The released STViT-R's embedding: two convolutions of stride 2, batch norm, Hardswish; shapes as PatchStem."""

    def __init__(self, dim: int, patch: Grid) -> None:
        super().__init__()
        self.proj = nn.Sequential()
        for inputs, outputs, frames in ((3, dim // 2, patch[0]), (dim // 2, dim, 1)):
            convolution = nn.Conv3d(inputs, outputs, (frames, 3, 3), (frames, 2, 2), padding=(0, 1, 1), bias=False)
            layers = {"c": convolution, "bn": nn.BatchNorm3d(outputs)}  # names of the released checkpoints
            self.proj.extend([nn.Sequential(OrderedDict(layers)), nn.Hardswish()])

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 4, 1)


class Stage(BlockRunner):
    """Blocks on one grid: windows, every second one shifted, or, with ``semantic``, all tokens of the clip."""

    regions: Grid | None = None  # the grid of semantic tokens, if the stage generates them

    def __init__(self, network: SwinArguments, index: int, grid: Grid, semantic: SwinSemanticArguments | None) -> None:
        super().__init__()
        self.grid = self.out_grid = grid
        self.sizes, self.mlp_ratio = (network.dim * 2**index, network.num_heads[index]), network.mlp_ratio
        # An image model's bias tables have one entry in time, which makes them Swin's.
        self.window = (1 if network.num_frames == 1 else network.window[0], *network.window[1:])
        self.window_fit = network.window_fit
        self.window_frames = (network.window_frames or 4 * network.window[:1])[index]
        self.windowed = semantic is None
        self.layer_scale = None if semantic is None else semantic.layer_scale
        self.blocks = nn.ModuleList()
        self.generators: Sequence[Reducer] | nn.ModuleList = ()
        rates = torch.linspace(0, network.drop_path, sum(network.depths), device="cpu").tolist()
        before = sum(network.depths[:index])
        self.build(rates[before : before + network.depths[index]], semantic)
        self.downsample: PatchMerging | None = None  # set by the network

    def build(self, drop_path: list[float], semantic: Any) -> None:
        """Make the blocks."""
        for i, rate in enumerate(drop_path):
            self.add_block(rate, self.windowed, i % 2 == 1)

    def add_block(self, drop_path: float, windowed: bool, shifted: bool) -> None:
        """Add a block that attends inside windows, or to all tokens that it is given, or to a context."""
        if windowed:
            frames = self.window_frames
            attention = WindowAttention(*self.sizes, self.grid, self.window, frames, shifted, self.window_fit)
            self.blocks.append(WindowBlock(*self.sizes, self.mlp_ratio, drop_path, EPS, attention=attention))
        else:
            self.blocks.append(Block(*self.sizes, self.mlp_ratio, drop_path, EPS, self.layer_scale))

    def forward(self, x: Tensor, return_assignment: bool = False) -> tuple[Tensor, Tensor | None]:
        """Map (B, T, H, W, C) to the same shape; the assignment is None."""
        shape = x.shape
        x = x if self.windowed else x.flatten(1, 3)
        for block in self.blocks:
            x = self.run(block, x)
        return x.reshape(shape), None


class SemanticStage(Stage):
    """A stage that works on semantic tokens, in one or several units of

        base blocks on image tokens -> generator -> token blocks (-> recovery of the image tokens)

    Token blocks attend inside (t, 3, 3) windows of semantic tokens and over the whole clip in turn. With recovery the
    units are the paper's dumbbells, whose base blocks do not shift their windows, and image tokens leave the stage;
    without it semantic tokens do. Raises ValueError where the settings do not fit into the stage.
    """

    regions: Grid

    def build(self, drop_path: list[float], semantic: SwinSemanticArguments) -> None:
        """Make the blocks and the generators."""
        depth = len(drop_path)
        units = semantic.units
        self.recover = semantic.recover
        if depth % units:
            allowed = [count for count in range(1, depth + 1) if depth % count == 0]
            raise ValueError(f"units {units} does not divide the {depth} blocks of stage 3; allowed: {allowed}.")
        if units > 1 and not self.recover:
            raise ValueError(f"units {units} without recovery; several units need recover=True (stvit_r models).")
        self.unit_depth, self.base_depth, self.stgm_depth = depth // units, semantic.base_depth, semantic.stgm_depth
        check_depths(self.unit_depth, self.base_depth, self.stgm_depth, self.recover)
        even = semantic.pooling == "mask" or semantic.offsets
        self.regions = semantic.regions or default_regions(self.grid, semantic.frames_per_centre, self.window, even)
        if self.recover:  # the image tokens of a frame attend to the semantic tokens of their own group of frames
            check_frames(self.grid[0], self.regions[0])
        self.out_grid = self.grid if self.recover else self.regions
        # Token windows are (t, 3, 3), where t is the largest divisor of the regions' frames up to the window's.
        frames = max(size for size in range(1, self.window[0] + 1) if self.regions[0] % size == 0)
        rows, columns = (CENTRES if side % CENTRES == 0 else side for side in self.regions[1:])
        self.token_window = (frames, rows, columns)
        for i, rate in enumerate(drop_path):
            place = i % self.unit_depth
            self.add_block(rate, place < self.base_depth, place % 2 == 1 and not self.recover)
        self.generators = nn.ModuleList()
        for unit in range(units):
            # One set of global centres per stage, as in the released code.
            settings = replace(semantic, global_centres=semantic.global_centres and unit == 0)
            self.generators.append(create_reducer(settings, *self.sizes, self.grid, self.regions, self.window))

    def forward(self, x: Tensor, return_assignment: bool = False) -> tuple[Tensor, Tensor | None]:
        """Map (B, T, H, W, C) to the grid that leaves the stage, and the last unit's assignment if requested."""
        (B, *_, C), assignment = x.shape, None
        first_token_block, last = self.base_depth + self.stgm_depth, self.unit_depth - self.recover
        for unit, generator in enumerate(self.generators):
            blocks = self.blocks[unit * self.unit_depth : (unit + 1) * self.unit_depth]
            for block in blocks[: self.base_depth]:
                x = self.run(block, x)
            generating = list(blocks[self.base_depth : first_token_block])
            reduced = generator(x.reshape(B, -1, C), generating, return_assignment=return_assignment)
            s, assignment = reduced.tokens, reduced.assignment
            for i, block in enumerate(blocks[first_token_block:last]):
                if i % 2 == 0:
                    windows = window_partition(s.reshape(B, *self.regions, C), self.token_window)
                    windows = self.run(block, windows.flatten(0, 3)).reshape(windows.shape)
                    s = window_reverse(windows, self.token_window).reshape(s.shape)
                else:
                    s = self.run(block, s)
            if self.recover:
                # X' = X + MHA(X, S, S) and the MLP, inside each group of frames.
                groups = B * self.regions[0]
                x = self.run(blocks[-1], x.reshape(groups, -1, C), s.reshape(groups, -1, C)).reshape(x.shape)
            else:
                x = s.reshape(B, *self.regions, C)
        return x, assignment


class SwinTransformer(Network):
    """Four stages of shifted windows; with ``semantic`` the third turns image tokens into a few semantic ones.

    Without recovery what follows runs on semantic tokens alone (STViT-Swin); with it the third stage is a sequence of
    dumbbells that give the image tokens back (STViT-R). Windows are shortened in time to the clip.
    Any image size works: maps are padded; an incomplete last tubelet repeats its last frame. Raises ValueError on
    depths and regions that do not fit.
    """

    undecayed = ("relative_position_bias_table", "global_centres")
    layers: Any  # the stages, under the name of the published checkpoints

    def __init__(self, network: SwinArguments, semantic: SwinSemanticArguments | None = None) -> None:
        super().__init__()
        self.input_size = network.input_size
        self.patch: Grid = (network.tubelet_frames, network.patch_size, network.patch_size)
        self.depths, self.window_fit = network.depths, network.window_fit
        grid = count_windows(self.input_size, self.patch)
        dim = network.dim
        self.patch_embed = (PatchStem if network.stem == "patch" else ConvStem)(dim, self.patch)
        self.layers = nn.ModuleList()
        for i in range(len(self.depths)):
            kind = SemanticStage if semantic is not None and i == SEMANTIC_STAGE else Stage
            reduced = semantic is not None and i > SEMANTIC_STAGE and not semantic.recover
            stage = kind(network, i, grid, semantic if reduced or i == SEMANTIC_STAGE else None)
            self.layers.append(stage)
            if i + 1 < len(self.depths):
                stage.downsample = PatchMerging(dim)
                grid = count_windows(stage.out_grid, (1, 2, 2))
                dim = 2 * dim
        self.add_head(dim, EPS, network)
        for module in self.modules():
            init_linear(module, None if network.init == "xavier" and module is not self.head.proj else 0.02)
        for stage in self.layers:
            for generator in stage.generators:
                generator.reset_parameters()

    def forward_features(self, x: Tensor, intermediates: Intermediates | None = None) -> Tensor:
        """Map a clip (B, 3, T, H, W) to normalised tokens (B, N, C) of the last stage, image or semantic ones.

        Intermediates: "embed", "stage1" to "stage4" (before merging: the dense maps that detection and segmentation
        heads take), "merged1" to "merged3", and "final".
        """
        self.check_clip(x)
        # Padded to a multiple of the patches: zeros in space, as published; the last frame repeated in time.
        frames, rows, columns = (-size % step for size, step in zip(self.input_size, self.patch, strict=True))
        if rows or columns:
            x = F.pad(x, (0, columns, 0, rows))
        if frames:
            x = torch.cat([x, x[:, :, -1:].expand(-1, -1, frames, -1, -1)], dim=2)
        x = self.patch_embed(x)
        note(intermediates, "embed", x, x.shape[1:4])
        for i, stage in enumerate(self.layers, start=1):
            x, assignment = stage(x, intermediates is not None)
            note(intermediates, f"stage{i}", x, x.shape[1:4], assignment)
            if stage.downsample is not None:
                x = stage.downsample(x)
                note(intermediates, f"merged{i}", x, x.shape[1:4])
        x = self.norm(x)
        note(intermediates, "final", x, x.shape[1:4])
        return x.flatten(1, 3)

    def layer_id(self, parameter_name: str) -> int:
        """Return the depth of a parameter: 0 embedding, 1 to ``depth`` blocks, ``depth + 1`` norm and head.

        Patch merging has the depth of the block before it, a generator that of its first block.
        """
        root, _, rest = parameter_name.partition(".")
        if root == "patch_embed":
            return 0
        if root != "layers":
            return sum(self.depths) + 1
        stage, part, *inner = rest.split(".")
        own = self.layers[int(stage)]
        before = sum(self.depths[: int(stage)])
        if part == "downsample":
            return before + len(own.blocks)
        if isinstance(own, SemanticStage) and part == "generators":
            return before + int(inner[0]) * own.unit_depth + own.base_depth + 1
        return before + int(inner[0]) + 1

    def token_counts(self) -> tuple[int, int | None]:
        """Return the image tokens of the third stage, and the tokens that they are reduced to; None: not reduced."""
        stage = self.layers[SEMANTIC_STAGE]
        return math.prod(stage.grid), None if stage.regions is None else math.prod(stage.regions)
