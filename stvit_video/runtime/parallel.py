"""A model on one or many processes: compiled, replicated (DDP) or sharded (FSDP2), and its unsharded state."""

from contextlib import AbstractContextManager, nullcontext
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

# After 8 recompilations torch runs a function uncompiled. All blocks of a network share one function, which is compiled
# once for each width, in training and in evaluation.
RECOMPILE_LIMIT = 256


def compile_model(model: nn.Module, extent: str, **options: Any) -> None:
    """Compile in place, which keeps parameter names: ``extent`` is "blocks" (each), "model" or "none"."""
    if extent == "none":
        return
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, RECOMPILE_LIMIT)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 4 * RECOMPILE_LIMIT)
    for module in [model] if extent == "model" else model.transformer_blocks():  # type: ignore[operator]
        module.compile(**options)


def shard(model: nn.Module) -> None:
    """Shard the parameters of each block, and the rest, over all processes (FSDP2), in place."""
    for block in model.transformer_blocks():  # type: ignore[operator]
        fully_shard(block)
        for step in getattr(block, "STEPS", ()):  # forward methods that a reducer calls instead of the block's own
            register_fsdp_forward_method(block, step)
    fully_shard(model)


def replicate(model: nn.Module, world: World) -> nn.Module:
    """Return ``model`` wrapped in DDP, which averages its gradients over all processes."""
    return DistributedDataParallel(model, device_ids=[world.device] if world.device.type == "cuda" else None)


def gradient_sync(model: nn.Module, enabled: bool) -> AbstractContextManager:
    """Return the context of backward passes that average gradients over all processes, or only accumulate them."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    elif isinstance(model, DistributedDataParallel) and not enabled:
        return model.no_sync()
    return nullcontext()


def model_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return the unsharded state dict of a model on every process. Collective: all processes have to call it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def full_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the unsharded states of model and optimiser by parameter name, for any strategy and number of processes.

    Of a sharded model only rank 0 holds them, in CPU memory. Collective: all processes have to call it.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=isinstance(model, FSDPModule))
    # torch would take a step to create the state of an optimiser that has none yet.
    optimizer_state = get_optimizer_state_dict(model, optimizer, options=options) if optimizer.state else {}
    return {"model": get_model_state_dict(model, options=options), "optimizer": optimizer_state}


def load_model_state_dict(model: nn.Module, state: dict[str, Any]) -> None:
    """Load an unsharded state dict, which every process holds, into a model that may be sharded."""
    set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))


def load_full_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what ``full_state_dict`` returned, which every process holds."""
    load_model_state_dict(model, state["model"])
    if state["optimizer"]:
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=StateDictOptions(full_state_dict=True))
