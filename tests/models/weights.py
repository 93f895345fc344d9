"""Weights for the tests of models."""

import torch


def perturb(model: torch.nn.Module) -> torch.nn.Module:
    """Move every weight and statistic, so that no zero or unit value can hide a mistake."""
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer += 0.2 * torch.rand_like(buffer)
    return model.eval()
