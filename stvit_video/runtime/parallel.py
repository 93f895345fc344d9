"""A model on one or many processes: wrapped, sharded, compiled, and its state whole again for a checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from stvit_video.runtime.world import World

# torch gives up on a function, and runs it uncompiled, after 8 variants; but the blocks of a network share one
# function, and each of its widths, in training and in evaluation, is a variant.
VARIANTS = 256


def compile_model(model: nn.Module, extent: str, **options: Any) -> None:
    """Compile in place, so that no name changes: each of the "blocks", the whole "model", or, with "none", nothing.

    ``options`` are torch.compile's. Raises how many variants of a function torch compiles, for the whole process.
    """
    if extent == "none":
        return
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, VARIANTS)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 4 * VARIANTS)
    for module in [model] if extent == "model" else model.transformer_blocks():  # type: ignore[operator]
        module.compile(**options)


def shard(model: nn.Module) -> None:
    """Share the parameters of each block, and of what is outside them, out among all processes (FSDP2), in place."""
    for block in model.transformer_blocks():  # type: ignore[operator]
        fully_shard(block)
        for step in getattr(block, "STEPS", ()):  # what a reducer calls in place of the whole block
            register_fsdp_forward_method(block, step)
    fully_shard(model)


def replicate(model: nn.Module, world: World) -> nn.Module:
    """Return ``model`` with its gradients averaged over all processes (DDP)."""
    return DistributedDataParallel(model, device_ids=[world.device] if world.device.type == "cuda" else None)


@contextmanager
def exchanging(model: nn.Module, now: bool) -> Iterator[None]:
    """Exchange gradients between processes in the backward passes inside, or leave it for later ones."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
        yield
    elif isinstance(model, DistributedDataParallel) and not now:
        with model.no_sync():
            yield
    else:
        yield


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """Return the state dict of a model, sharded or not, whole on every process; all of them have to ask."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return ``model`` and ``optimizer`` as states by parameter name, for any strategy and number of processes.

    Of a sharded model only process 0 holds them, in CPU memory; all processes have to ask.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=isinstance(model, FSDPModule))
    # An optimiser that has not stepped has no state, and torch would make one by stepping.
    stepped = get_optimizer_state_dict(model, optimizer, options=options) if optimizer.state else {}
    return {"model": get_model_state_dict(model, options=options), "optimizer": stepped}


def restore_weights(model: nn.Module, state: dict[str, Any]) -> None:
    """Set a model, sharded or not, to a whole state dict, which every process holds."""
    set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))


def restore_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Set model and optimiser to what ``whole_state`` returned, which every process holds."""
    restore_weights(model, state["model"])
    if state["optimizer"]:
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=StateDictOptions(full_state_dict=True))
