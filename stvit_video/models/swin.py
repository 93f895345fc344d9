"""Swin transformer for images and video, plain or with semantic tokens (STViT-Swin, STViT-R-Swin).

One class for all: sizes are (T, H, W) and an image is a clip of one frame. With ``num_frames=1`` it is Swin, otherwise
Video Swin. Sources: Liu et al. (arXiv 2103.14030, 2106.13230); Chang et al. (STViT, arXiv 2303.08685).

Legend: B clips, input (B, 3, T, H, W); tokens (B, t, h, w, C) until the last norm, then (B, N, C). Parameter names are
those of the published Swin checkpoints.
"""

import math

import torch
import torch.nn.functional as F
from pytorchvideo.models.head import create_vit_basic_head
from torch import Tensor, nn

from stvit_video.models.arguments import Grid, SwinArguments, SwinSemanticArguments
from stvit_video.models.layers import Intermediates, Network, check_clip, drop_path_rates, note
from stvit_video.models.stages import EPS, BlockMaker, ConvStem, PatchMerging, PatchStem, SemanticStage, Stage

SEMANTIC_STAGE = 2  # the third of four, where the paper generates its tokens


class SwinTransformer(Network):
    """Four stages of shifted windows; with ``semantic`` the third turns image tokens into a few semantic ones.

    Without recovery what follows runs on semantic tokens alone (STViT-Swin); with it the third stage is a sequence of
    dumbbells that give the image tokens back (STViT-R). Windows are shortened in time to the clip.
    Any image size works: maps are padded; an incomplete last tubelet repeats its last frame. Raises ValueError on
    depths and regions that do not fit.
    """

    undecayed = ("relative_position_bias_table", "global_centres")

    def __init__(self, network: SwinArguments, semantic: SwinSemanticArguments | None = None) -> None:
        super().__init__()
        self.input_size = num_frames, height, width = network.input_size
        self.patch: Grid = (network.tubelet_frames, network.patch_size, network.patch_size)
        self.depths = network.depths
        # An image model's bias tables have one entry in time, which makes them Swin's.
        window = (1 if num_frames == 1 else network.window[0], *network.window[1:])
        window_frames = network.window_frames or (network.window[0],) * len(self.depths)
        grid = (_ceil(num_frames, self.patch[0]), _ceil(height, self.patch[1]), _ceil(width, self.patch[2]))

        dim = network.dim
        self.patch_embed = (PatchStem if network.stem == "patch" else ConvStem)(dim, self.patch)
        rates = drop_path_rates(network.drop_path, sum(self.depths))
        self.layers = nn.ModuleList()
        for i, (depth, heads) in enumerate(zip(self.depths, network.num_heads, strict=True)):
            make = BlockMaker(dim, heads, network.mlp_ratio, grid, window, window_frames[i])
            own, rates = rates[:depth], rates[depth:]
            if semantic is not None and i == SEMANTIC_STAGE:
                stage: Stage = SemanticStage(make, own, semantic)
            elif semantic is not None and i > SEMANTIC_STAGE and not semantic.recover:
                stage = Stage(make, own, windowed=False, layer_scale=semantic.layer_scale)
            else:
                stage = Stage(make, own)
            self.layers.append(stage)
            if i + 1 < len(self.depths):
                stage.downsample = PatchMerging(dim)
                grid, dim = (stage.out_grid[0], _ceil(stage.out_grid[1], 2), _ceil(stage.out_grid[2], 2)), 2 * dim
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.head = create_vit_basic_head(
            in_features=dim, out_features=network.num_classes, seq_pool_type="mean", dropout_rate=network.dropout
        )
        self._init_weights(network.init)

    def _stages(self) -> list[Stage]:
        return list(self.layers)  # type: ignore[arg-type]

    def _init_weights(self, init: str) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if init == "normal" or module is self.head.proj:
                    nn.init.trunc_normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for stage in self._stages():
            for generator in stage.generators:
                generator.reset_parameters()  # type: ignore[operator]

    def forward_features(self, x: Tensor, intermediates: Intermediates | None = None) -> Tensor:
        """Map a clip (B, 3, T, H, W) to normalised tokens (B, N, C) of the last stage, image or semantic ones.

        Intermediates: "embed", "stage1" to "stage4" (before merging: the dense maps that detection and segmentation
        heads take), "merged1" to "merged3", and "final".
        """
        x = self.patch_embed(self._pad(x))
        note(intermediates, "embed", x, x.shape[1:4])
        for i, stage in enumerate(self._stages(), start=1):
            x, assignment = stage(x, intermediates is not None)
            note(intermediates, f"stage{i}", x, x.shape[1:4])
            if intermediates is not None and assignment is not None:
                intermediates.assignment = assignment
            if stage.downsample is not None:
                x = stage.downsample(x)
                note(intermediates, f"merged{i}", x, x.shape[1:4])
        x = self.norm(x)
        note(intermediates, "final", x, x.shape[1:4])
        return x.flatten(1, 3)

    def _pad(self, x: Tensor) -> Tensor:
        """Pad a clip to a multiple of the patches: zeros in space, as published; its last frame repeated in time."""
        check_clip(x, self.input_size)
        frames, rows, columns = (-size % step for size, step in zip(self.input_size, self.patch, strict=True))
        if rows or columns:
            x = F.pad(x, (0, columns, 0, rows))
        if frames:
            x = torch.cat([x, x[:, :, -1:].expand(-1, -1, frames, -1, -1)], dim=2)
        return x

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
        before, i = sum(self.depths[: int(stage)]), int(stage)
        if part == "downsample":
            return before + self.depths[i]
        if part == "generators":
            return before + self.layers[i].generator_block(int(inner[0])) + 1  # type: ignore[operator]
        return before + int(inner[0]) + 1

    def transformer_blocks(self) -> list[nn.Module]:
        """Return the blocks in order: the units that are sharded and compiled."""
        return [block for stage in self._stages() for block in stage.blocks]

    def token_counts(self) -> tuple[int, int | None]:
        """Return the image tokens of the third stage, and the tokens that they are reduced to; None: not reduced."""
        stage = self._stages()[SEMANTIC_STAGE]
        return math.prod(stage.grid), None if stage.regions is None else math.prod(stage.regions)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations of all but the generators' blocks in the backward pass: about a third more time."""
        for stage in self._stages():
            stage.grad_checkpointing = enable


def _ceil(size: int, step: int) -> int:
    return math.ceil(size / step)
