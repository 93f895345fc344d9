"""Projections in a form that is faster than a call of their module, and the question whether it may be used.

Adapters, hooks, quantisation and pruning act where a module is called, or put another in its place. So what reads the
weights of a module past it gives way to the call wherever the module is not plain.

Legend: B clips, N query tokens, K context tokens, C channels; clips (B, 3, T, H, W), kernel (t, h, w).
"""

import copy
from collections.abc import Callable, Container
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook  # there is no public way to ask

from stvit_video.models.arguments import Grid


def is_plain(module: nn.Module, kinds: Container[type[nn.Module]]) -> bool:
    """Return whether a call of ``module`` is the computation of one of ``kinds`` on parameters, and nothing else."""
    return _is_unchanged(module, kinds) and not _has_hooks(module) and not _has_any_global_hook()


def _is_unchanged(module: nn.Module, kinds: Container[type[nn.Module]]) -> bool:
    # Adapters and quantisation put a module of another class in its place, parametrisations a subclass; others replace
    # the instance's forward. Quantised and sharded weights have classes of their own, pruned ones are no parameters.
    own = vars(module)
    if type(module) not in kinds or "forward" in own or "weight" in own or "bias" in own:
        return False
    classes = {type(parameter) for parameter in own["_parameters"].values() if parameter is not None}
    return classes <= {nn.Parameter}


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _may_be_read(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether the weights of ``module`` may be read in place of calling it.

    Counters of operations trace, or use global hooks; they count what is computed without them.
    """
    counting = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return _is_unchanged(module, (kind,)) and (counting or not _has_hooks(module))


def _compute(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return ``forward(x)``, a form of the module's own computation; hooks see it as a call of the module."""
    if is_plain(module, (type(module),)):
        return forward(x)
    seen = copy.copy(module)  # it shares the hooks
    seen.forward = forward
    return seen(x)


def project_apart(qkv: Any, query: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Return the queries of ``query`` (..., C), and keys and values (B, K, 2C) of ``context``, by a joint projection.

    A layer whose weights may not be read is called once, on all tokens and for all outputs: half of them are not used.
    """
    C = query.shape[-1]
    if not _may_be_read(qkv, nn.Linear):
        joint = qkv(torch.cat([query.flatten(0, -2), context.flatten(0, -2)]))
        q, k_v = joint.split([query[..., 0].numel(), context[..., 0].numel()])
        return q[:, :C].unflatten(0, query.shape[:-1]), k_v[:, C:].unflatten(0, context.shape[:-1])
    weight, bias = qkv.weight, qkv.bias

    def project(outputs: slice, x: Tensor) -> Tensor:
        part = None if bias is None else bias[outputs]
        return _compute(qkv, lambda tokens: F.linear(tokens, weight[outputs], part), x)

    return project(slice(C), query), project(slice(C, None), context)


def project_patches(convolution: Any, x: Tensor, kernel: Grid) -> Tensor:
    """Map clips (B, 3, T, H, W) to (B, T/t, H/h, W/w, C) by a convolution whose stride is its ``kernel``."""

    def multiply(x: Tensor) -> Tensor:
        # It is a matrix product, which is faster on a CPU in this form and does not depend on the memory format of x.
        B, _, T, H, W = x.shape
        t, h, w = kernel
        x = x.reshape(B, 3, T // t, t, H // h, h, W // w, w)
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(B, -1, 3 * t * h * w)
        x = F.linear(x, convolution.weight.flatten(1), convolution.bias)
        return x.unflatten(1, (T // t, H // h, W // w)).permute(0, 4, 1, 2, 3)  # as the convolution returns it

    read = _may_be_read(convolution, nn.Conv3d)
    return (_compute(convolution, multiply, x) if read else convolution(x)).permute(0, 2, 3, 4, 1)
