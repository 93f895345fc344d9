"""Swin transformer for images and video, plain or with semantic tokens (STViT-Swin, STViT-R-Swin).

One class serves all: sizes are (T, H, W), an image is a clip of one frame. With ``num_frames=1`` it is Swin, with more
it is Video Swin. Sources: Liu et al. (arXiv 2103.14030, 2106.13230); Chang et al. (STViT, arXiv 2303.08685).

Legend: B clips, input (B, 3, T, H, W); tokens (B, t, h, w, C) until the last norm, then (B, N, C). Parameter names are
those of the published Swin checkpoints.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pytorchvideo.models.head import create_vit_basic_head
from torch import Tensor, nn

from stvit_video.models.layers import Grid, Intermediates, check_choice, check_clip, drop_path_rates, note
from stvit_video.models.reducers.semantic import SemanticTokenGenerator
from stvit_video.models.stages import EPS, ConvStem, PatchMerging, PatchStem, SemanticSettings, SemanticStage, Stage

STEMS = ("patch", "conv")
INITS = ("normal", "xavier")
STAGES = 4
SEMANTIC_STAGE = 2  # the third of four, where the paper generates its tokens


class SwinTransformer(nn.Module):
    """Four stages of shifted windows; with ``semantic_tokens`` the third turns image tokens into a few semantic ones.

    ``semantic`` are the fields of ``SemanticSettings``. Without recovery what follows runs on semantic tokens alone
    (STViT-Swin); with it the third stage is a sequence of dumbbells that give the image tokens back (STViT-R).

    ``window`` (t, h, w) is shortened in time to the clip, and to ``window_frames`` stage by stage. ``stem`` is "patch"
    (Swin's) or "conv" (the released STViT-R's). ``init`` is "normal" (as published: deviation 0.02) or "xavier", with
    which models of few channels begin to learn far sooner: 0.02 is too little for them.
    Any image size works: maps are padded; a last incomplete tubelet repeats its frame. Raises ValueError on sizes,
    depths and regions that do not fit.
    """

    def __init__(
        self,
        *,
        num_frames: int,
        image_size: int | tuple[int, int],
        num_classes: int,
        patch_size: int = 4,
        tubelet: int = 2,
        dim: int,
        depths: tuple[int, ...],
        num_heads: tuple[int, ...],
        window: Grid = (8, 7, 7),
        window_frames: tuple[int, ...] | None = None,
        mlp_ratio: float = 4.0,
        stem: str = "patch",
        init: str = "normal",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        semantic_tokens: bool = False,
        **semantic: Any,
    ) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.input_size: Grid = (num_frames, height, width)
        self.patch: Grid = (1 if num_frames == 1 else tubelet, patch_size, patch_size)
        self.depths = tuple(depths)
        window_frames = window_frames or (window[0],) * STAGES
        check_choice("stem", stem, STEMS)
        check_choice("init", init, INITS)
        _check_arguments({"depths": depths, "num_heads": num_heads, "window_frames": window_frames}, stem, patch_size)
        # An image model's bias tables have one entry in time, which makes them Swin's.
        window = (1 if num_frames == 1 else window[0], window[1], window[2])
        grid = (_ceil(num_frames, self.patch[0]), _ceil(height, patch_size), _ceil(width, patch_size))
        settings = SemanticSettings(**semantic)

        self.patch_embed = (PatchStem if stem == "patch" else ConvStem)(dim, self.patch)
        rates = drop_path_rates(drop_path, sum(depths))
        self.layers = nn.ModuleList()
        for i, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            common = {"mlp_ratio": mlp_ratio, "drop_path": rates[:depth], "window_frames": window_frames[i], "eps": EPS}
            rates = rates[depth:]
            stage: SemanticStage | Stage
            if semantic_tokens and i == SEMANTIC_STAGE:
                stage = SemanticStage(dim, heads, grid, window, settings, **common)  # type: ignore[arg-type]
            else:
                tokens_only = semantic_tokens and not settings.recover and i > SEMANTIC_STAGE
                scale = settings.layer_scale if tokens_only else None
                stage = Stage(dim, heads, grid, None if tokens_only else window, **common, layer_scale=scale)  # type: ignore[arg-type]
            self.layers.append(stage)
            if i + 1 < len(depths):
                stage.downsample = PatchMerging(dim)
                grid, dim = (stage.out_grid[0], _ceil(stage.out_grid[1], 2), _ceil(stage.out_grid[2], 2)), 2 * dim
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.head = create_vit_basic_head(
            in_features=dim, out_features=num_classes, seq_pool_type="mean", dropout_rate=dropout
        )
        self._init_weights(init)

    def _init_weights(self, init: str) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if init == "normal" or module is self.head.proj:
                    nn.init.trunc_normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, SemanticTokenGenerator):
                module.reset_parameters()

    def forward_features(self, x: Tensor, intermediates: Intermediates | None = None) -> Tensor:
        """Map a clip (B, 3, T, H, W) to normalised tokens (B, N, C) of the last stage, image or semantic ones."""
        x = self.patch_embed(self._pad(x))
        note(intermediates, "embed", x, x.shape[1:4])
        for i, stage in enumerate(self.layers, start=1):
            x, assignment = stage(x, intermediates is not None)
            note(intermediates, f"stage{i}", x, x.shape[1:4])
            if intermediates is not None and assignment is not None:
                intermediates.assignment = assignment
            if stage.downsample is not None:
                x = stage.downsample(x)  # type: ignore[operator]
                note(intermediates, f"merged{i}", x, x.shape[1:4])
        x = self.norm(x)
        note(intermediates, "final", x, x.shape[1:4])
        return x.flatten(1, 3)

    def forward(self, x: Tensor, return_intermediates: bool = False) -> Tensor | tuple[Tensor, Intermediates]:
        """Map a clip (B, 3, T, H, W) to logits (B, classes), and to what it went through if asked.

        Intermediates: "embed", "stage1" to "stage4" (before merging: the dense maps that detection and segmentation
        heads take), "merged1" to "merged3", and "final".
        """
        if not return_intermediates:
            return self.head(self.forward_features(x))
        intermediates = Intermediates()
        return self.head(self.forward_features(x, intermediates)), intermediates

    def _pad(self, x: Tensor) -> Tensor:
        """Make a clip a multiple of the patches: zeros in space, as published; its last frame again in time."""
        check_clip(x, self.input_size)
        frames, rows, columns = (-size % step for size, step in zip(self.input_size, self.patch, strict=True))
        if rows or columns:
            x = F.pad(x, (0, columns, 0, rows))
        if frames:
            x = torch.cat([x, x[:, :, -1:].expand(-1, -1, frames, -1, -1)], dim=2)
        return x

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that weight decay should leave alone, beside biases and norms."""
        exempt = ("relative_position_bias_table", "global_centres")
        return {name for name, _ in self.named_parameters() if name.endswith(exempt)}

    def layer_id(self, parameter_name: str) -> int:
        """Return the depth of a parameter: 0 embedding, 1 to ``depth`` blocks, ``depth + 1`` norm and head.

        A merging counts with the block before it, a generator's parameters with its first block.
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
            semantic = self.layers[i]
            assert isinstance(semantic, SemanticStage)
            return before + int(inner[0]) * semantic.unit_depth + semantic.base_depth + 1
        return before + int(inner[0]) + 1

    def transformer_blocks(self) -> list[nn.Module]:
        """Return the blocks in order: the units that are sharded and compiled."""
        return [block for stage in self.layers for block in stage.blocks]  # type: ignore[union-attr]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the plain blocks' activations in the backward pass: less memory, about a third more time."""
        for stage in self.layers:
            stage.grad_checkpointing = enable  # type: ignore[assignment]


def _ceil(size: int, step: int) -> int:
    return math.ceil(size / step)


def _check_arguments(per_stage: Mapping[str, object], stem: str, patch_size: int) -> None:
    for name, numbers in per_stage.items():
        if not isinstance(numbers, tuple | list) or len(numbers) != STAGES:
            raise ValueError(f"{name} is {numbers}; a Swin takes {STAGES} numbers, one a stage, as (3, 6, 12, 24).")
    if stem == "conv" and patch_size != 4:
        raise ValueError(f"patch_size {patch_size} with stem 'conv', whose two strides of 2 make 4; choose 4.")
