"""Optimiser and learning-rate schedule."""

import torch
from fvcore.common.config import CfgNode
from fvcore.common.param_scheduler import CompositeParamScheduler, CosineParamScheduler, LinearParamScheduler
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def parameter_groups(model: nn.Module, lr: float, backbone_scale: float, weight_decay: float) -> list[dict]:
    """Return the groups of backbone and classifier (``head``), each split in two.

    Matrices decay; biases, norms and what the model exempts do not. The backbone learns at ``lr * backbone_scale``.
    """
    exempt = model.no_weight_decay()  # type: ignore[operator]
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (name.startswith("head."), parameter.ndim > 1 and name not in exempt)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": lr if head else lr * backbone_scale,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (head, decays), parameters in groups.items()
    ]


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW, fused."""
    groups = parameter_groups(model, cfg.OPTIM.LR, cfg.OPTIM.BACKBONE_SCALE, cfg.OPTIM.WEIGHT_DECAY)
    return torch.optim.AdamW(groups, lr=cfg.OPTIM.LR, betas=tuple(cfg.OPTIM.BETAS), fused=True)


def build_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> LambdaLR:
    """Return a schedule by step: linear warm-up from 0 over OPTIM.WARMUP_EPOCHS, then a cosine to 0."""
    total = cfg.TRAIN.EPOCHS * steps_per_epoch
    warmup = min(cfg.OPTIM.WARMUP_EPOCHS / cfg.TRAIN.EPOCHS, 1.0)
    cosine = CosineParamScheduler(1.0, 0.0)
    if warmup == 0:
        multiplier = cosine
    elif warmup == 1:
        multiplier = LinearParamScheduler(0.0, 1.0)
    else:
        multiplier = CompositeParamScheduler(
            [LinearParamScheduler(0.0, 1.0), cosine], [warmup, 1 - warmup], ["rescaled", "rescaled"]
        )
    # Half a step in, so that neither the first nor the last step is wasted on a rate of zero.
    return LambdaLR(optimizer, lambda step: multiplier((min(step, total - 1) + 0.5) / total))
