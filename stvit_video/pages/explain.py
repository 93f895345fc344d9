"""Explain a prediction: what a model did with one clip, as plain arrays.

Sources: the assignment of Chang et al. (STViT, arXiv 2303.08685); Grad-CAM of Selvaraju et al. (arXiv 1610.02391).

Legend: clip (3, T, H, W); (t, h, w) a grid of image tokens, N = t*h*w of them; M semantic tokens on a grid of regions.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

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
    stages: list[tuple[str, Grid]]  # the token grids, from the embedding to the last norm
    grad_cam: Array  # (t, h, w), from 0 to 1
    assignment: Array | None = None  # (M, t, h, w): weight of each image token in each semantic token
    regions: Grid | None = None  # the grid of semantic tokens, M in all
    recovery: Array | None = None  # (t, h, w, M): weight of each semantic token in each recovered image token
    attention: Array | None = None  # on a token grid: attention received in the last block; 1 is an even share
    contributions: Array | None = None  # on the last token grid: the part of each token in the logit of ``target``

    @property
    def absent(self) -> list[str]:
        """The reason for each array that is None."""
        return [reason for name, reason in ABSENT.items() if getattr(self, name) is None]

    @property
    def drawn(self) -> Array | None:
        """The total weight of each image token (t, h, w) in all semantic tokens; 1 is an even share."""
        if self.assignment is None:
            return None
        total = self.assignment.sum(axis=0)
        return total / total.mean()

    @property
    def owners(self) -> NDArray[np.int64] | None:
        """The index of the semantic token (t, h, w) that draws most from each image token."""
        return None if self.assignment is None else self.assignment.argmax(axis=0)


def explain(model: nn.Module, clip: Tensor, target: int | None = None) -> Explanation:
    """Run one clip (3, T, H, W) through a model of this package and return what it did.

    ``target`` is the class to explain, by default the most likely one.
    """
    model.eval()
    seen = Intermediates()
    with torch.enable_grad(), _record_attention(model) as weights:
        tokens = model.forward_features(clip.unsqueeze(0), seen)  # type: ignore[operator]
        logits = model.head(tokens)[0].float()  # type: ignore[operator]
    target = int(logits.argmax()) if target is None else target
    stage = last_image_stage(seen)
    grid = seen.grids[stage]
    cam = grad_cam(logits[target], seen.tensors[stage]).reshape(grid)
    generators = [module for module in model.modules() if isinstance(module, SemanticTokenGenerator)]
    with torch.no_grad():
        found = Explanation(_array(logits.softmax(dim=0)), target, _stages(model, seen), _array(cam))
        if seen.assignment is not None and generators:
            found.assignment = _array(seen.assignment[0]).reshape(-1, *grid)
            found.regions = generators[-1].pooling.regions
        if "recovery" in weights:
            groups, queries, semantic = weights["recovery"].shape
            full = weights["recovery"].new_zeros(groups, queries, groups, semantic)
            # A group of image tokens attends to its own semantic tokens only.
            full[torch.arange(groups), :, torch.arange(groups)] = weights["recovery"]
            found.recovery = _array(full).reshape(*grid, groups * semantic)
        if "attention" in weights:  # (frames or 1, queries, keys)
            received = weights["attention"].mean(dim=1) * weights["attention"].shape[2]
            last = next(name for name, size in reversed(seen.grids.items()) if np.prod(size) == received.numel())
            found.attention = _array(_on_grid(received.flatten(), model, seen, last))
        final = seen.tokens["final"][0].detach().float()  # (tokens, C)
        if len(final) > 1:
            # The head is a mean over tokens and a linear map, so these parts and the biases add up to the logit.
            weight: Tensor = model.get_parameter("head.proj.weight").detach().float()
            parts = final @ (weight[target] - weight.mean(dim=0)) / len(final)  # relative to the mean of all logits
            found.contributions = _array(_on_grid(parts, model, seen, "final"))
    return found


def last_image_stage(seen: Intermediates) -> str:
    """Return the last stage with image tokens, at which Grad-CAM is computed."""
    stages = [name for name in seen.tokens if name not in ("semantic", "final")]
    if seen.assignment is None:
        return stages[-1]
    return [name for name in stages if seen.tokens[name].shape[1] == seen.assignment.shape[2]][-1]


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


def _stages(model: nn.Module, seen: Intermediates) -> list[tuple[str, Grid]]:
    """Return the token grids in order, and those of the semantic tokens inside a stage that recovers image tokens."""
    stages = []
    inner = {f"stage{i}": m for i, m in enumerate(getattr(model, "layers", ()), 1) if isinstance(m, SemanticStage)}
    for name, grid in seen.grids.items():
        if name in inner and inner[name].recover:
            stages.append((f"inside {name}", inner[name].regions))
        stages.append((name, grid))
    return stages


def _on_grid(values: Tensor, model: nn.Module, seen: Intermediates, stage: str) -> Tensor:
    """Return the values of a stage's tokens on its grid, or, for a reducer without one, on the grid of image tokens."""
    if getattr(model, "reducer", None) is None or model.regions is not None:
        return values.reshape(seen.grids[stage])
    assert seen.assignment is not None
    return (values @ (seen.assignment[0] > 0).to(values)).reshape(seen.grids["base"])


@contextmanager
def _record_attention(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record attention weights: of the last block, if it attends to a whole clip or frame, and of the last recovery."""
    recorded: dict[str, Tensor] = {}

    def keep(name: str, *counts: int) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Any]], None]:
        def hook(block: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> None:
            if not named and len(inputs) in counts:
                with torch.no_grad():
                    recorded[name] = block.attention_probs(*inputs)[0].mean(dim=1)  # type: ignore[operator]

        return hook

    last = [module for module in model.modules() if isinstance(module, Block)][-1]
    recovering = [stage for stage in model.modules() if isinstance(stage, SemanticStage) and stage.recover]
    hooks = []
    if not isinstance(last, WindowBlock):
        hooks.append(last.register_forward_pre_hook(keep("attention", 1, 3), with_kwargs=True))
    if recovering:
        hooks.append(recovering[-1].blocks[-1].register_forward_pre_hook(keep("recovery", 2), with_kwargs=True))
    try:
        yield recorded
    finally:
        for handle in hooks:
            handle.remove()


def _array(x: Tensor) -> Array:
    return x.detach().float().cpu().numpy()
