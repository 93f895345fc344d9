"""Vision transformer for clips, with or without semantic tokens; an image is a clip of one frame.

Sources: Dosovitskiy et al. (ViT, arXiv 2010.11929) without class token; Chang et al. (STViT, arXiv 2303.08685);
tubelets as in Arnab et al. (ViViT, arXiv 2103.15691).

Legend: B clips, input (B, 3, T, H, W); token grid (t, h, w), N = t*h*w tokens, M semantic tokens, C channels.
"""

import math
from collections import deque

import torch
from torch import Tensor, nn

from stvit_video.models.arguments import EARLIER_EPS, VIDEOMAE_EPS, SemanticArguments, ViTArguments
from stvit_video.models.grids import count_windows
from stvit_video.models.layers import Block, Intermediates, Network, PatchEmbed, init_linear, note
from stvit_video.models.reducers import Reducer, create_reducer, key_bias, mean_token
from stvit_video.models.reducers.semantic import check_depths, default_regions


class VisionTransformer(Network):
    """ViT whose deep layers may run on a few semantic tokens in place of the image tokens.

    With ``semantic`` the first ``base_depth`` blocks see all image tokens, the next ``stgm_depth`` blocks generate the
    semantic tokens, and the rest of ``depth`` runs on those alone. ``base_attention`` is "frame" (the image model's own
    computation) or "joint" (over the clip). ``positions`` are learned separately for a frame and for time ("frame"), or
    for each position of the clip ("clip", as in VideoMAE). Raises ValueError on sizes that do not fit.
    """

    undecayed = ("pos_embed", "time_embed", "global_centres")

    def __init__(self, network: ViTArguments, semantic: SemanticArguments | None = None) -> None:
        super().__init__()
        patch = (network.tubelet_frames, network.patch_size, network.patch_size)
        self.input_size = network.input_size
        for size, step, axis in zip(self.input_size, patch, ("num_frames", "image height", "image width"), strict=True):
            if size % step:
                raise ValueError(f"{axis} {size} is not a positive multiple of the patch's {step}; choose one that is.")
        self.grid = t, h, w = count_windows(self.input_size, patch)
        dim, heads = network.dim, network.num_heads
        self.depth = self.base_depth = network.depth
        self.stgm_depth = 0
        self.base_attention, self.positions, self.fc_norm = network.base_attention, network.positions, network.fc_norm

        self.patch_embed = PatchEmbed(dim, patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, (t if self.positions == "clip" else 1) * h * w, dim))
        if self.positions == "frame":
            self.time_embed = nn.Parameter(torch.zeros(1, t, dim))  # zero at the start: a still clip is an image
        self.blocks = nn.ModuleList(
            Block(dim, heads, network.mlp_ratio, rate)
            for rate in torch.linspace(0, network.drop_path, self.depth, device="cpu").tolist()
        )
        eps = VIDEOMAE_EPS if self.positions == "clip" and self.fc_norm else EARLIER_EPS
        self.norm_eps = eps if network.norm_eps is None else network.norm_eps
        self.add_head(dim, self.norm_eps, network)
        # Checkpoints have the semantic token generator's weights under a name of its own.
        self._reducer_name = "stgm" if semantic is not None and semantic.reducer == "stgm" else "reducer"
        if semantic is not None:
            check_depths(self.depth, semantic.base_depth, semantic.stgm_depth)
            self.base_depth, self.stgm_depth = semantic.base_depth, semantic.stgm_depth
            regions = semantic.regions or default_regions(self.grid, semantic.frames_per_centre)
            reducer = create_reducer(semantic, dim, heads, self.grid, regions)
            self.regions = reducer.regions
            self.add_module(self._reducer_name, reducer)
        self.apply(init_linear)
        nn.init.trunc_normal_(self.head.proj.weight, std=0.02)  # all classes about equally likely at the start
        # Learned positions start as sines, so that they differ at once: this saves epochs when training from scratch.
        with torch.no_grad():
            sines = sine_positions((h, w), dim)
            self.pos_embed.copy_(sines.repeat(1, self.pos_embed.shape[1] // sines.shape[1], 1))
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.zeros_(self.patch_embed.proj.bias)  # type: ignore[arg-type]
        if self.token_reducer is not None:
            self.token_reducer.reset_parameters()

    @property
    def token_reducer(self) -> Reducer | None:
        """What leaves few tokens; None in a dense baseline."""
        return self._modules.get(self._reducer_name)  # type: ignore[return-value]

    def forward_features(self, x: Tensor, intermediates: Intermediates | None = None) -> Tensor:
        """Map a clip (B, 3, T, H, W) to normalised tokens: (B, M, C) semantic ones, (B, N, C) in a dense baseline.

        With ``fc_norm`` it is one token (B, 1, C), the normalised mean; with a reducer whose tokens have weights it is
        one token too, the weighted mean of the normalised tokens.
        """
        self.check_clip(x)
        x = self.patch_embed(x).flatten(1, 3)
        B, N, C = x.shape
        if self.positions == "clip":
            x = x + self.pos_embed
        else:
            x = x + (self.pos_embed.unsqueeze(1) + self.time_embed.unsqueeze(2)).reshape(1, N, C)  # by frame and time
        note(intermediates, "embed", x, self.grid)
        if self.base_attention == "frame":
            x = x.reshape(B * self.grid[0], -1, C)
        reducer = self.token_reducer
        past: deque[tuple[nn.Module, Tensor]] = deque(maxlen=0 if reducer is None else reducer.past)
        for block in self.blocks[: self.base_depth]:
            past.append((block, x))
            x = self.run(block, x)
        x = x.reshape(B, N, C)
        note(intermediates, "base", x, self.grid)
        grid, weights = self.grid, None
        if reducer is not None:
            first_token_block = self.base_depth + self.stgm_depth
            blocks = list(self.blocks[self.base_depth : first_token_block])
            reduced = reducer(x, blocks, past, intermediates is not None)
            x, weights = reduced.tokens, reduced.weights
            grid = reducer.regions or (1, 1, x.shape[1])
            note(intermediates, "semantic", x, grid, reduced.assignment)
            context = () if weights is None else (None, key_bias(weights))
            for block in self.blocks[first_token_block:]:
                x = self.run(block, x, *context)
        if self.fc_norm:
            x, grid = self.norm(mean_token(x, weights)), (1, 1, 1)
        elif weights is not None:
            x, grid = mean_token(self.norm(x), weights), (1, 1, 1)
        else:
            x = self.norm(x)
        note(intermediates, "final", x, grid)
        return x

    def auxiliary_loss(self) -> Tensor | None:
        """Return the extra loss of the last forward pass in training mode, once; None for most models."""
        return None if self.token_reducer is None else self.token_reducer.auxiliary_loss()

    def layer_id(self, parameter_name: str) -> int:
        """Return the depth of a parameter: 0 embeddings, 1 to ``depth`` blocks, ``depth + 1`` norm and head."""
        root, _, rest = parameter_name.partition(".")
        if root in ("patch_embed", "pos_embed", "time_embed"):
            return 0
        if root == "blocks":
            return int(rest.split(".")[0]) + 1
        if root == self._reducer_name:
            return self.base_depth + 1
        return self.depth + 1

    def token_counts(self) -> tuple[int, int | None]:
        """Return the number of image tokens, and the tokens that they are reduced to; None: not reduced."""
        return math.prod(self.grid), None if self.token_reducer is None else self.token_reducer.count


def sine_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Return sine and cosine embeddings (1, h*w, dim), half by column, half by row; channels beyond 4n are 0."""
    rates = 10000.0 ** -(torch.arange(dim // 4) / max(1, dim // 4))
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = [position.reshape(-1, 1) * rates for position in (columns, rows)]
    waves = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
    return nn.functional.pad(waves, (0, dim - waves.shape[1])).unsqueeze(0)
