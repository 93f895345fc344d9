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
    """Freeze the parameters whose names match a pattern (``blocks.0.*``). Raises UsageError where one matches none."""
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


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Return fused AdamW over the trained parameters, in groups of equal rate and equal weight decay.

    Matrices decay; biases, norms and what the model exempts do not. The classifier (``head``) learns at OPTIM.LR, the
    backbone at BACKBONE_SCALE times that, and each layer below the last at LAYER_DECAY times the rate of the one above.
    """
    optim = cfg.OPTIM
    exempt = model.no_weight_decay()  # type: ignore[operator]
    layer_id = model.layer_id
    lr = optim.LR * (cfg.TRAIN.BATCH_SIZE / optim.LR_BATCH if optim.LR_BATCH else 1)
    top = layer_id("head.proj.weight")  # type: ignore[operator]
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = 1.0 if name.startswith("head.") else optim.BACKBONE_SCALE
            rate = lr * scale * optim.LAYER_DECAY ** (top - layer_id(name))  # type: ignore[operator]
            decay = optim.WEIGHT_DECAY if parameter.ndim > 1 and name not in exempt else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    options = [{"params": found, "lr": rate, "weight_decay": decay} for (rate, decay), found in groups.items()]
    return torch.optim.AdamW(options, lr=lr, betas=tuple(optim.BETAS), fused=True)


def build_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer, steps_per_epoch: int, total: int) -> LambdaLR:
    """Return a schedule over ``total`` steps: linear warm-up from 0 over OPTIM.WARMUP_EPOCHS, then a cosine to 0."""
    warmup = min(cfg.OPTIM.WARMUP_EPOCHS * steps_per_epoch / total, 1.0)
    line = LinearParamScheduler(0.0, 1.0)
    cosine = CosineParamScheduler(1.0, 0.0)
    both = CompositeParamScheduler([line, cosine], [warmup, 1 - warmup], ["rescaled", "rescaled"])
    multiplier = both if warmup < 1 else line
    # Half a step further, so that neither the first nor the last step has a rate of zero.
    return LambdaLR(optimizer, lambda step: multiplier((min(step, total - 1) + 0.5) / total))


def average_weights(model: nn.Module, decay: float) -> AveragedModel:
    """Return an average that begins with the model's weights; ``update_parameters`` adds those of a step."""

    @torch.no_grad()
    def update(averages: list[Tensor], weights: list[Tensor], updates: Tensor | int) -> None:
        # Small at first, as in TensorFlow's ExponentialMovingAverage: the initial weights soon lose their influence.
        warmed = min(decay, (1 + int(updates)) / (10 + int(updates)))
        torch._foreach_lerp_(averages, weights, 1 - warmed)

    return AveragedModel(model, multi_avg_fn=update).requires_grad_(False)  # type: ignore[arg-type]
