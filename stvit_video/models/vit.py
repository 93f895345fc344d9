"""Vision transformer for clips, with or without semantic tokens; an image is a clip of one frame.

Sources: Dosovitskiy et al. (ViT, arXiv 2010.11929) without class token; Chang et al. (STViT, arXiv 2303.08685);
tubelets as in Arnab et al. (ViViT, arXiv 2103.15691).

Legend: B clips, input (B, 3, T, H, W); token grid (t, h, w), N = t*h*w tokens, M semantic tokens, C channels. A
"group" is the token frames that share their centres.
"""

import math
from collections import deque

import torch
from torch import Tensor, nn

from stvit_video.common.errors import UsageError
from stvit_video.models.arguments import (
    EARLIER_EPS,
    STREAMED_REDUCERS,
    VIDEOMAE_EPS,
    Grid,
    ViTArguments,
    ViTSemanticArguments,
)
from stvit_video.models.grids import count_windows
from stvit_video.models.layers import Block, Intermediates, Network, PatchEmbed, init_linear, note
from stvit_video.models.reducers import Reducer, create_reducer, key_bias, mean_token
from stvit_video.models.reducers.semantic import check_depths, check_frames, default_regions, join_groups
from stvit_video.models.stream import TokenStream


class VisionTransformer(Network):
    """ViT whose deep layers may run on a few semantic tokens in place of the image tokens.

    With ``semantic`` the first ``base_depth`` blocks see all image tokens, the next ``stgm_depth`` blocks generate the
    semantic tokens, and the rest of ``depth`` runs on those alone. ``base_attention`` is "frame" (the image model's own
    computation) or "joint" (over the clip). ``positions`` are learned separately for a frame and for time ("frame"), or
    for each position of the clip ("clip", as in VideoMAE). Raises ValueError on sizes that do not fit.

    In the ``streaming`` form the semantic tokens of a group depend on its own frames alone: the generator works inside
    groups, which share the global centres, and a group's position in time is added to its semantic tokens, where other
    forms add it to the image tokens. So windows that overlap have these tokens in common; see ``stream``.
    """

    undecayed = ("pos_embed", "time_embed", "global_centres")

    def __init__(self, network: ViTArguments, semantic: ViTSemanticArguments | None = None) -> None:
        super().__init__()
        self.streaming = semantic is not None and semantic.streaming
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
            reducer = create_reducer(semantic, dim, heads, *self._parts(network, semantic, regions))
            self.regions = regions if reducer.on_grid else None
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

    def _parts(self, network: ViTArguments, semantic: ViTSemanticArguments, regions: Grid) -> tuple[Grid, Grid]:
        """Return the grid and the regions that the reducer works on: those of the clip or, if streaming, of a group."""
        if not self.streaming:
            return self.grid, regions
        if network.positions == "clip":
            raise ValueError("positions 'clip' mix time and space before the base; streaming takes positions 'frame'.")
        if network.base_attention == "joint":
            raise ValueError("base_attention 'joint' reads the whole clip; streaming takes base_attention 'frame'.")
        if semantic.reducer not in STREAMED_REDUCERS:
            allowed = " or ".join(map(repr, STREAMED_REDUCERS))
            raise ValueError(f"reducer {semantic.reducer!r} needs the whole clip; streaming takes reducer {allowed}.")
        check_frames(self.grid[0], regions[0])
        return (self.grid[0] // regions[0], *self.grid[1:]), (1, *regions[1:])

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
        return self.forward_tokens(*self.reduce_frames(x, intermediates), intermediates)

    def reduce_frames(self, x: Tensor, intermediates: Intermediates | None = None) -> tuple[Tensor, Tensor | None]:
        """Map a clip (B, 3, T, H, W) to the tokens (B, M, C) of ``forward_tokens``, and their weights if they have any.

        In the streaming form T may be that of any number of groups, which do not depend on each other.
        """
        x = self.patch_embed(x)
        grid = (x.shape[1] if self.streaming else self.grid[0], *self.grid[1:])
        x = x.flatten(1, 3)
        B, N, C = x.shape
        if self.positions == "clip":
            x = x + self.pos_embed
        elif self.streaming:
            positions = (self.pos_embed.unsqueeze(1) + self._split_times()[1].unsqueeze(2)).flatten(1, 2)  # of a group
            x = x + positions.repeat(1, N // positions.shape[1], 1)
        else:
            x = x + (self.pos_embed.unsqueeze(1) + self.time_embed.unsqueeze(2)).reshape(1, N, C)  # by frame and time
        note(intermediates, "embed", x, grid)
        if self.base_attention == "frame":
            x = x.reshape(B * grid[0], -1, C)
        reducer = self.token_reducer
        past: deque[tuple[nn.Module, Tensor]] = deque(maxlen=0 if reducer is None else reducer.past)
        for block in self.blocks[: self.base_depth]:
            past.append((block, x))
            x = self.run(block, x)
        x = x.reshape(B, N, C)
        note(intermediates, "base", x, grid)
        if reducer is None:
            return x, None
        blocks = list(self.blocks[self.base_depth : self.base_depth + self.stgm_depth])
        if self.streaming:
            x = x.reshape(-1, math.prod(reducer.grid), C)  # (B*groups, n, C)
        reduced = reducer(x, blocks, past, intermediates is not None)
        tokens, assignment = reduced.tokens, reduced.assignment
        if self.streaming:
            tokens = tokens.reshape(B, -1, C)
            assignment = None if assignment is None else join_groups(assignment, B)
        note(intermediates, "semantic", tokens, self._token_grid(tokens), assignment)
        return tokens, reduced.weights

    def forward_tokens(
        self, x: Tensor, weights: Tensor | None = None, intermediates: Intermediates | None = None
    ) -> Tensor:
        """Map what ``reduce_frames`` left of a clip to the tokens that ``forward_features`` returns."""
        grid = self._token_grid(x)
        if self.streaming:
            x = (x.unflatten(1, (grid[0], -1)) + self._split_times()[0].unsqueeze(2)).flatten(1, 2)
        context = () if weights is None else (None, key_bias(weights))
        for block in self.blocks[self.base_depth + self.stgm_depth :]:
            x = self.run(block, x, *context)
        if self.fc_norm:
            x, grid = self.norm(mean_token(x, weights)), (1, 1, 1)
        elif weights is not None:
            x, grid = mean_token(self.norm(x), weights), (1, 1, 1)
        else:
            x = self.norm(x)
        note(intermediates, "final", x, grid)
        return x

    def _split_times(self) -> tuple[Tensor, Tensor]:
        """Return the positions in time of each group (1, t/f, C), and of the f token frames inside any group (1, f, C).

        The second are the same wherever a group stands in the window: image tokens may have them.
        """
        assert self.regions is not None
        times = self.time_embed.unflatten(1, (self.regions[0], -1))
        groups = times.mean(dim=2)
        return groups, (times - groups.unsqueeze(2)).mean(dim=1)

    def _token_grid(self, x: Tensor) -> Grid:
        """Return the grid of the tokens (B, M, C) that ``reduce_frames`` left."""
        if self.token_reducer is None:
            return self.grid
        if self.regions is None:
            return (1, 1, x.shape[1])
        return (x.shape[1] // math.prod(self.regions[1:]), *self.regions[1:])

    def stream(self, batch_size: int = 1) -> TokenStream:
        """Return a stream of ``batch_size`` videos: a decision for each new group of frames, equal to its window's.

        Raises UsageError unless the model has the streaming form.
        """
        if not self.streaming:
            raise UsageError(
                "this model is not of the streaming form, in which frames are computed by themselves; build it with "
                "streaming=True (MODEL.STREAMING True) and train it so."
            )
        return TokenStream(self, batch_size)

    def auxiliary_loss(self) -> Tensor | None:
        """Return the extra loss of the last forward pass in training mode, once; None for most models."""
        return None if self.token_reducer is None else self.token_reducer.auxiliary_loss()

    def layer_id(self, parameter_name: str) -> int:
        """Return the depth of a parameter: 0 embeddings, 1 to ``depth`` blocks, ``depth + 1`` norm and head."""
        root, _, rest = parameter_name.partition(".")
        if root in ("patch_embed", "pos_embed") or (root == "time_embed" and not self.streaming):
            return 0
        if root == "blocks":
            return int(rest.split(".")[0]) + 1
        if root in (self._reducer_name, "time_embed"):
            return self.base_depth + 1
        return self.depth + 1

    def token_counts(self) -> tuple[int, int | None]:
        """Return the number of image tokens, and the tokens that they are reduced to; None: not reduced."""
        reducer = self.token_reducer
        if reducer is None:
            return math.prod(self.grid), None
        return math.prod(self.grid), reducer.count * (self.grid[0] // reducer.grid[0])


def sine_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Return sine and cosine embeddings (1, h*w, dim), half by column, half by row; channels beyond 4n are 0."""
    rates = 10000.0 ** -(torch.arange(dim // 4) / max(1, dim // 4))
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = [position.reshape(-1, 1) * rates for position in (columns, rows)]
    waves = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
    return nn.functional.pad(waves, (0, dim - waves.shape[1])).unsqueeze(0)
