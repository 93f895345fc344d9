"""A moving average of the weights (EMA), which often generalises better than the last ones."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def warmed_decay(decay: float, updates: int) -> float:
    """Return the decay after so many updates: small at first, so that the initial weights are soon forgotten.

    As in TensorFlow's ExponentialMovingAverage.
    """
    return min(decay, (1 + updates) / (10 + updates))


def average_weights(model: nn.Module, decay: float) -> AveragedModel:
    """Return an average that begins with the model's weights; ``update_parameters`` adds those of a step."""

    @torch.no_grad()
    def update(averages: list[Tensor], weights: list[Tensor], updates: Tensor | int) -> None:
        torch._foreach_lerp_(averages, weights, 1 - warmed_decay(decay, int(updates)))

    multi: Callable[..., None] = update
    average = AveragedModel(model, multi_avg_fn=multi)
    average.requires_grad_(False)
    return average
