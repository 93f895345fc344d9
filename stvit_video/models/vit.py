"""Vision transformer for images and video, with or without semantic tokens.

One class serves both: sizes are (T, H, W) and an image is a clip of one frame.
Sources: Dosovitskiy et al. (ViT, arXiv 2010.11929) without class token; Chang et al. (STViT, arXiv 2303.08685);
tubelets as in Arnab et al. (ViViT, arXiv 2103.15691).

Legend: B clips, input (B, 3, T, H, W); token grid (t, h, w), N = t*h*w tokens, M semantic tokens, C channels.
"""

from typing import Any

import torch
from pytorchvideo.models.head import create_vit_basic_head
from torch import Tensor, nn

from stvit_video.models.layers import (
    Block,
    Grid,
    Intermediates,
    PatchEmbed,
    check_choice,
    check_clip,
    drop_path_rates,
    init_weights,
    note,
    run_block,
)
from stvit_video.models.reducers import REDUCERS, Reduced, Reducer, create_reducer, key_bias, mean_token
from stvit_video.models.reducers.semantic import SemanticTokenGenerator, check_depths, default_regions

BASE_ATTENTION = ("frame", "joint")
POSITIONS = ("frame", "clip")


class VisionTransformer(nn.Module):
    """ViT whose deep layers may run on a few semantic tokens in place of the image tokens.

    With ``semantic_tokens`` the first ``base_depth`` blocks see all image tokens, the next ``stgm_depth`` blocks
    generate the semantic tokens, and the rest of ``depth`` runs on those alone. Without, every block sees all
    tokens. ``base_attention`` is "frame" (the image model's own computation, frame by frame) or "joint".
    ``reducer`` "stgm" generates them as the paper does; the other REDUCERS leave as many tokens in ways of their own,
    with which it can be compared, and none of what belongs to the STGM (``pooling`` to ``first_residual``) is theirs.

    ``positions`` are learned for a frame and for time apart ("frame"), or for every place of the clip ("clip", as
    VideoMAE has them). ``fc_norm`` puts the last norm behind the mean over tokens (VideoMAE, some of timm's ViTs).

    ``tubelet`` frames make one token frame; an image model (``num_frames=1``) has tubelets of 1.
    ``regions`` (t, h, w) is the number of centres along each axis; by default 4 x 4 for every ``frames_per_centre``
    token frames. Raises ValueError on sizes that do not fit.
    """

    def __init__(
        self,
        *,
        num_frames: int,
        image_size: int | tuple[int, int],
        num_classes: int,
        patch_size: int = 16,
        tubelet: int = 2,
        dim: int,
        depth: int = 12,
        num_heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        semantic_tokens: bool = False,
        reducer: str = "stgm",
        base_depth: int = 4,
        stgm_depth: int = 2,
        regions: Grid | None = None,
        frames_per_centre: int = 1,
        pooling: str = "mask",
        offsets: bool = False,
        global_centres: bool = True,
        first_residual: bool = True,
        base_attention: str = "frame",
        positions: str = "frame",
        fc_norm: bool = False,
    ) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        patch = (1 if num_frames == 1 else tubelet, patch_size, patch_size)
        self.input_size = (num_frames, height, width)
        self.grid = t, h, w = token_grid(self.input_size, patch)
        self.depth, self.base_depth, self.stgm_depth = depth, depth, 0
        check_choice("base_attention", base_attention, BASE_ATTENTION)
        check_choice("reducer", reducer, REDUCERS)
        check_choice("positions", positions, POSITIONS)
        if not isinstance(num_heads, int):
            raise ValueError(f"num_heads is {num_heads}; a ViT takes one number, such as 6, for all its blocks.")
        self.base_attention, self.positions, self.fc_norm = base_attention, positions, fc_norm

        self.patch_embed = PatchEmbed(dim, patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, (t if positions == "clip" else 1) * h * w, dim))
        if positions == "frame":
            self.time_embed = nn.Parameter(torch.zeros(1, t, dim))  # zero at the start: a still clip is an image
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio, p) for p in drop_path_rates(drop_path, depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = create_vit_basic_head(
            in_features=dim, out_features=num_classes, seq_pool_type="mean", dropout_rate=dropout
        )
        self.stgm: SemanticTokenGenerator | None = None
        self.reducer: Reducer | None = None
        if semantic_tokens:
            check_depths(depth, base_depth, stgm_depth)
            self.base_depth, self.stgm_depth = base_depth, stgm_depth
            form = {"offsets": offsets, "global_centres": global_centres, "first_residual": first_residual}
            regions = regions or default_regions(self.grid, frames_per_centre)
            self._add_reducer(reducer, dim, num_heads, regions, pooling=pooling, **form)
        self.grad_checkpointing = False
        self._init_weights()

    def _add_reducer(self, name: str, dim: int, num_heads: int, regions: Grid, **form: Any) -> None:
        """Make what leaves few tokens; ``form`` is the STGM's."""
        self.regions = regions if name in ("stgm", "mean") else None  # None: tokens that lie on no grid
        if name == "stgm":
            self.stgm = SemanticTokenGenerator(dim, self.grid, regions, **form)
        else:
            self.reducer = create_reducer(name, dim, num_heads, self.grid, regions)

    def _init_weights(self) -> None:
        self.apply(init_weights)
        nn.init.trunc_normal_(self.head.proj.weight, std=0.02)  # all classes about equally likely at first
        # Sines from the start, learned from there on: places are told apart at once, which saves epochs from scratch.
        with torch.no_grad():
            sines = sine_positions(self.grid[1:], self.pos_embed.shape[-1])
            self.pos_embed.copy_(sines.repeat(1, self.pos_embed.shape[1] // sines.shape[1], 1))
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        if self.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.patch_embed.proj.bias)
        if self.stgm is not None:
            self.stgm.reset_parameters()

    def forward_features(self, x: Tensor, intermediates: Intermediates | None = None) -> Tensor:
        """Map a clip (B, 3, T, H, W) to normalised tokens: (B, M, C) semantic ones, or (B, N, C) in the full twin.

        With ``fc_norm`` there is one token (B, 1, C), the normalised mean; with a reducer whose tokens do not count
        alike there is one too, the weighted mean of the normalised tokens.
        """
        x = self._embed(x)
        note(intermediates, "embed", x, self.grid)
        past: list[tuple[nn.Module, Tensor]] = []
        x = self._base(x, past)
        note(intermediates, "base", x, self.grid)
        grid, weights = self.grid, None
        if self.stgm_depth:
            reduced = self._reduce(x, past, intermediates is not None)
            x, weights = reduced.tokens, reduced.weights
            grid = self.regions or (1, 1, x.shape[1])
            note(intermediates, "semantic", x, grid)
            if intermediates is not None:
                intermediates.assignment = reduced.assignment
            bias = None if weights is None else key_bias(weights)
            x = self._run(self.blocks[self.base_depth + self.stgm_depth :], x, bias)
        if self.fc_norm:
            x, grid = self.norm(mean_token(x, weights)), (1, 1, 1)
        elif weights is not None:
            x, grid = mean_token(self.norm(x), weights), (1, 1, 1)
        else:
            x = self.norm(x)
        note(intermediates, "final", x, grid)
        return x

    def _reduce(self, x: Tensor, past: list[tuple[nn.Module, Tensor]], return_assignment: bool) -> Reduced:
        blocks = list(self.blocks[self.base_depth : self.base_depth + self.stgm_depth])
        if self.reducer is not None:
            return self.reducer(x, blocks, past, return_assignment)
        assert self.stgm is not None
        return Reduced(*self.stgm(x, blocks, return_assignment))

    def auxiliary_loss(self) -> Tensor | None:
        """Return what the last forward pass in training mode adds to the loss, once; None for most models."""
        return None if self.reducer is None else self.reducer.auxiliary_loss()

    def forward(self, x: Tensor, return_intermediates: bool = False) -> Tensor | tuple[Tensor, Intermediates]:
        """Map a clip (B, 3, T, H, W) to logits (B, classes), and to what it went through if asked."""
        if not return_intermediates:
            return self.head(self.forward_features(x))
        intermediates = Intermediates()
        return self.head(self.forward_features(x, intermediates)), intermediates

    def _embed(self, x: Tensor) -> Tensor:
        check_clip(x, self.input_size)
        x = self.patch_embed(x)
        if self.positions == "clip":
            return x + self.pos_embed
        t, h, w = self.grid
        positions = self.pos_embed.unsqueeze(1) + self.time_embed.unsqueeze(2)  # (1, t, h*w, C)
        return x + positions.reshape(1, t * h * w, -1)

    def _base(self, x: Tensor, past: list[tuple[nn.Module, Tensor]]) -> Tensor:
        """Run the blocks that see all image tokens (B, N, C): inside each frame, or over the whole clip.

        The last of them, as many as the reducer asks for, go to ``past`` with what they were given.
        """
        B, N, C = x.shape
        if self.base_attention == "frame":
            x = x.reshape(B * self.grid[0], -1, C)
        watched = 0 if self.reducer is None else self.reducer.past
        for i in range(self.base_depth):
            if i >= self.base_depth - watched:
                past.append((self.blocks[i], x))
            x = self._run(self.blocks[i : i + 1], x)
        return x.reshape(B, N, C)

    def _run(self, blocks: nn.ModuleList, x: Tensor, bias: Tensor | None = None) -> Tensor:
        context = () if bias is None else (None, bias)
        for block in blocks:
            x = run_block(block, x, *context, recompute=self.grad_checkpointing and self.training)
        return x

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that weight decay should leave alone, beside biases and norms."""
        names = {"pos_embed", "time_embed"}
        if self.stgm is not None and self.stgm.global_centres is not None:
            names.add("stgm.global_centres")
        return names

    def layer_id(self, parameter_name: str) -> int:
        """Return the depth of a parameter: 0 embeddings, 1 to ``depth`` blocks, ``depth + 1`` norm and head."""
        root, _, rest = parameter_name.partition(".")
        if root in ("patch_embed", "pos_embed", "time_embed"):
            return 0
        if root == "blocks":
            return int(rest.split(".")[0]) + 1
        if root in ("stgm", "reducer"):
            return self.base_depth + 1
        return self.depth + 1

    def transformer_blocks(self) -> list[nn.Module]:
        """Return the blocks in order: the units that are sharded and compiled."""
        return list(self.blocks)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the plain blocks' activations in the backward pass: less memory, about a third more time."""
        self.grad_checkpointing = enable


def sine_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Return sine and cosine position embeddings (1, h*w, dim): one half by column, the other by row.

    As in the Transformer, extended to two axes; channels beyond a multiple of 4 are zero.
    """
    rates = 10000.0 ** -(torch.arange(dim // 4) / max(1, dim // 4))
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = [place.reshape(-1, 1) * rates for place in (columns, rows)]
    waves = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
    return nn.functional.pad(waves, (0, dim - waves.shape[1])).unsqueeze(0)


def token_grid(input_size: Grid, patch: Grid) -> Grid:
    """Return the token grid (t, h, w) of an input (T, H, W); raises ValueError where the patch does not divide it."""
    for size, step, axis in zip(input_size, patch, ("num_frames", "image height", "image width"), strict=True):
        if size < 1 or size % step:
            raise ValueError(f"{axis} {size} is not a positive multiple of the patch's {step}; choose one that is.")
    return (input_size[0] // patch[0], input_size[1] // patch[1], input_size[2] // patch[2])
