"""Explain a prediction: what a model did with one clip, as plain arrays.

Sources: the assignment of Chang et al. (STViT, arXiv 2303.08685); Grad-CAM of Selvaraju et al. (arXiv 1610.02391).

Legend: clip (3, T, H, W); (t, h, w) a grid of image tokens, N = t*h*w of them; M semantic tokens on a grid of regions.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stvit_video.evaluation.predictions import probabilities
from stvit_video.models.layers import Block, Grid, Intermediates
from stvit_video.models.reducers.semantic import SemanticTokenGenerator
from stvit_video.models.swin import SemanticStage
from stvit_video.models.windows import WindowBlock

Array = NDArray[np.floating[Any]]
ABSENT = {  # why an array of an Explanation is None
    "contributions": "The head sees one token only, the mean of all, so the parts of single tokens are not known.",
    "assignment": "This model has no semantic tokens, so neither an assignment nor trajectories are drawn.",
    "attention": (
        "No attention over the whole clip to show: the last block attends inside windows, or it reduces the tokens."
    ),
}


@dataclass
class Explanation:
    """What a model did with one clip. Arrays that do not apply to the model are None, and ``absent`` says why."""

    probabilities: Array  # (classes,)
    target: int  # the explained class, for ``contributions`` and ``grad_cam``
    grad_cam: Array  # (t, h, w), from 0 to 1
    # From the embedding to the last norm: the name of each stage, its tokens, their grid and whether they are semantic.
    stages: list[dict[str, Any]] = field(default_factory=list)
    assignment: Array | None = None  # (M, t, h, w): weight of each image token in each semantic token
    regions: Grid | None = None  # the grid of semantic tokens, M in all
    drawn: Array | None = None  # (t, h, w): total weight of each image token in all of them; 1 is an even share
    owners: NDArray[np.int64] | None = None  # (t, h, w): the semantic token that draws most from each image token
    recovery: Array | None = None  # (t, h, w, M): weight of each semantic token in each recovered image token
    attention: Array | None = None  # on a token grid: attention received in the last block; 1 is an even share
    contributions: Array | None = None  # on the last token grid: the part of each token in the logit of ``target``

    @property
    def absent(self) -> list[str]:
        """The reason for each array that is None."""
        return [reason for name, reason in ABSENT.items() if getattr(self, name) is None]


def explain(model: nn.Module, clip: Tensor, target: int | None = None, multi_label: bool = False) -> Explanation:
    """Run one clip (3, T, H, W) through a model of this package and return what it did.

    ``target`` is the class to explain, by default the most likely one.
    """
    model.eval()
    modules = list(model.modules())
    seen = Intermediates()
    generators = [module for module in modules if isinstance(module, SemanticTokenGenerator)]
    last_block = [module for module in modules if isinstance(module, Block)][-1]
    recovering = [module for module in modules if isinstance(module, SemanticStage) and module.recover]
    attention: list[Tensor] = []  # (frames or 1, queries, keys), of the last block
    recovery: list[Tensor] = []  # (groups of frames, queries, semantic tokens of the group), of each recovery
    with torch.enable_grad(), ExitStack() as hooks:
        if not isinstance(last_block, WindowBlock):
            hooks.enter_context(_record_attention(last_block, attention, counts=(1, 3)))
        if recovering:
            hooks.enter_context(_record_attention(recovering[-1].blocks[-1], recovery, counts=(2,)))
        logits = model.head(model.forward_features(clip.unsqueeze(0), seen))[0].float()  # type: ignore[operator]
    target = int(logits.argmax()) if target is None else target
    # Grad-CAM is computed at the last stage with image tokens.
    stages = [name for name in seen.grids if name not in ("semantic", "final")]
    if seen.assignment is not None:
        stages = [name for name in stages if math.prod(seen.grids[name]) == seen.assignment.shape[2]]
    grid = seen.grids[stages[-1]]
    cam = grad_cam(logits[target], seen.tensors[stages[-1]]).reshape(grid)
    with torch.no_grad():
        found = Explanation(_array(probabilities(logits, multi_label)), target, _array(cam))
        if seen.assignment is not None and generators:
            found.assignment = _array(seen.assignment[0]).reshape(-1, *grid)
            found.regions = getattr(model, "regions", generators[-1].pooling.regions)  # a ViT's, of the whole clip
            found.owners, total = found.assignment.argmax(axis=0), found.assignment.sum(axis=0)
            found.drawn = total / total.mean()
        if recovery:  # a group of image tokens attends to its own semantic tokens only
            found.recovery = _array(torch.block_diag(*recovery[-1])).reshape(*grid, -1)
        if attention:
            received = attention[-1].mean(dim=1) * attention[-1].shape[2]
            last = next(name for name, size in reversed(seen.grids.items()) if np.prod(size) == received.numel())
            found.attention = _array(_on_grid(received.flatten(), model, seen, last))
        final = seen.tokens["final"][0]  # (tokens, C)
        if len(final) > 1:
            # The head is a mean over tokens and a linear map, so these parts and the biases add up to the logit.
            head: Any = model.get_submodule("head.proj")
            scores = (head(final) - head(torch.zeros_like(final[:1]))).float()  # (tokens, classes), without the biases
            parts = (scores[:, target] - scores.mean(dim=1)) / len(final)  # relative to the mean of all logits
            found.contributions = _array(_on_grid(parts, model, seen, "final"))
    found.stages = _stages(model, seen, found)
    return found


def grad_cam(logit: Tensor, features: Tensor) -> Tensor:
    """Return Grad-CAM (N,) of a logit at ``features`` (1, ..., C) of N positions, divided by its largest value.

    This is the sum of the channels, weighted by their mean gradients; negative values become 0.
    """
    (gradient,) = torch.autograd.grad(logit, features, retain_graph=True)
    features, gradient = (x.detach().float().reshape(-1, x.shape[-1]) for x in (features, gradient))  # (N, C)
    cam = (features @ gradient.mean(dim=0)).relu()
    return cam / cam.max().clamp_min(1e-12)


def trajectories(assignment: Array, regions: Grid) -> Array:
    """Return the position (x, y), from 0 to 1, that each region's token looks at in each frame: (h * w, t, 2).

    The position is the image token with the largest weight, moved to the centre of gravity of it and its eight
    neighbours. The mean over the whole frame could lie between two objects, where there is nothing.
    """
    t, h, w = assignment.shape[1:]
    slots = np.arange(t) * regions[0] // t
    by_region = assignment.reshape(regions[0], regions[1] * regions[2], t, h, w)
    own = by_region[slots, :, np.arange(t)]  # (t, regions, h, w)
    row, column = np.divmod(own.reshape(t, -1, h * w).argmax(axis=-1), w)
    rows, columns = np.arange(h), np.arange(w)
    near = (abs(rows - row[..., None]) <= 1)[..., None] & (abs(columns - column[..., None]) <= 1)[..., None, :]
    shares = own * near
    shares = shares / shares.sum(axis=(2, 3), keepdims=True)
    xs, ys = (columns + 0.5) / w, (rows + 0.5) / h
    places = np.stack([(shares * xs).sum(axis=(2, 3)), (shares * ys[:, None]).sum(axis=(2, 3))], axis=-1)
    return places.transpose(1, 0, 2)


def _stages(model: nn.Module, seen: Intermediates, found: Explanation) -> list[dict[str, Any]]:
    """Return the stages in order, and the semantic tokens inside a stage that recovers image tokens."""
    stages, semantic = [], False
    inner = {f"stage{i}": m for i, m in enumerate(getattr(model, "layers", ()), 1) if isinstance(m, SemanticStage)}
    for name, grid in seen.grids.items():
        if name in inner and inner[name].recover:
            stages.append((f"inside {name}", inner[name].regions, True))
        semantic = semantic or (grid == found.regions and found.recovery is None)  # and all later stages
        stages.append((name, grid, semantic))
    return [{"name": name, "tokens": math.prod(grid), "grid": grid, "semantic": flag} for name, grid, flag in stages]


def _on_grid(values: Tensor, model: nn.Module, seen: Intermediates, stage: str) -> Tensor:
    """Return the values of a stage's tokens on its grid, or, for a reducer without one, on the grid of image tokens."""
    if getattr(model, "reducer", None) is None or model.regions is not None:
        return values.reshape(seen.grids[stage])
    assert seen.assignment is not None
    return (values @ (seen.assignment[0] > 0).to(values)).reshape(seen.grids["base"])


def _record_attention(block: nn.Module, recorded: list[Tensor], counts: Sequence[int]) -> RemovableHandle:
    """Append the attention weights of a block to ``recorded`` whenever it is called with so many inputs."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        if not named and len(inputs) in counts:
            with torch.no_grad():
                recorded.append(block.attention_probs(*inputs)[0].mean(dim=1))  # type: ignore[operator]

    return block.register_forward_pre_hook(hook, with_kwargs=True)


def _array(x: Tensor) -> Array:
    return x.detach().float().cpu().numpy()
