"""Optimiser and learning-rate schedule: which weights are trained, and how fast."""

import fnmatch
from collections.abc import Sequence

import torch
from fvcore.common.config import CfgNode
from fvcore.common.param_scheduler import CompositeParamScheduler, CosineParamScheduler, LinearParamScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from stvit_video.common.errors import UsageError


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Exclude the parameters whose names match a pattern (``blocks.0.*``) from training.

    Raises UsageError for a pattern that no name matches, and where nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            roots = sorted({name.split(".")[0] for name in names})
            raise UsageError(
                f"TRAIN.FREEZE {pattern!r} matches no weight of the model; give patterns of names that begin with "
                f"{', '.join(roots)}, for example {roots[0]}*."
            )
    for name, parameter in model.named_parameters():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(f"TRAIN.FREEZE {list(patterns)} leaves nothing to train; leave out head.* at least.")


def parameter_groups(
    model: nn.Module, lr: float, backbone_scale: float, layer_decay: float, weight_decay: float
) -> list[dict]:
    """Return the trained parameters in groups of equal rate and equal weight decay.

    Matrices decay; biases, norms and what the model exempts do not. The backbone learns at ``lr * backbone_scale``, the
    classifier (``head``) at ``lr``, and every layer below the last at ``layer_decay`` times the rate of the one above.
    """
    exempt = model.no_weight_decay()  # type: ignore[operator]
    layer_id = model.layer_id
    top = layer_id("head.proj.weight")  # type: ignore[operator]
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = 1.0 if name.startswith("head.") else backbone_scale
            rate = lr * scale * layer_decay ** (top - layer_id(name))  # type: ignore[operator]
            decay = weight_decay if parameter.ndim > 1 and name not in exempt else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": found, "lr": rate, "weight_decay": decay} for (rate, decay), found in groups.items()]


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW, fused."""
    optim = cfg.OPTIM
    lr = optim.LR * (cfg.TRAIN.BATCH_SIZE / optim.LR_BATCH if optim.LR_BATCH else 1)
    groups = parameter_groups(model, lr, optim.BACKBONE_SCALE, optim.LAYER_DECAY, optim.WEIGHT_DECAY)
    return torch.optim.AdamW(groups, lr=lr, betas=tuple(optim.BETAS), fused=True)


def build_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer, steps_per_epoch: int, total: int) -> LambdaLR:
    """Return a schedule over ``total`` steps: linear warm-up from 0 over OPTIM.WARMUP_EPOCHS, then a cosine to 0."""
    warmup = min(cfg.OPTIM.WARMUP_EPOCHS * steps_per_epoch / total, 1.0)
    cosine = CosineParamScheduler(1.0, 0.0)
    if warmup == 0:
        multiplier = cosine
    elif warmup == 1:
        multiplier = LinearParamScheduler(0.0, 1.0)
    else:
        multiplier = CompositeParamScheduler(
            [LinearParamScheduler(0.0, 1.0), cosine], [warmup, 1 - warmup], ["rescaled", "rescaled"]
        )
    # Half a step further, so that neither the first nor the last step has a rate of zero.
    return LambdaLR(optimizer, lambda step: multiplier((min(step, total - 1) + 0.5) / total))


def warmed_decay(decay: float, updates: int) -> float:
    """Return the decay after so many updates: small at first, so that the initial weights soon lose their influence.

    As in TensorFlow's ExponentialMovingAverage.
    """
    return min(decay, (1 + updates) / (10 + updates))


def average_weights(model: nn.Module, decay: float) -> AveragedModel:
    """Return an average that begins with the model's weights; ``update_parameters`` adds those of a step."""

    @torch.no_grad()
    def update(averages: list[Tensor], weights: list[Tensor], updates: Tensor | int) -> None:
        torch._foreach_lerp_(averages, weights, 1 - warmed_decay(decay, int(updates)))

    average = AveragedModel(model, multi_avg_fn=update)  # type: ignore[arg-type]
    return average.requires_grad_(False)
