"""What a model costs: parameters, multiply-adds (fvcore, with fused attention included), memory to train it."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from torch import Tensor, nn


@dataclass(frozen=True)
class Cost:
    """What a model costs: its parameters, and the multiply-adds (1e9) of one clip (3, T, H, W)."""

    parameters: int
    gflops: float
    input_size: tuple[int, int, int]


def measure_cost(model: nn.Module, input_size: tuple[int, int, int]) -> Cost:
    """Return the cost of ``model`` as it is built: before it is compiled or shared out among processes."""
    return Cost(count_parameters(model), count_gflops(model, input_size), input_size)


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_gflops(model: nn.Module, input_size: tuple[int, int, int]) -> float:
    """Return the multiply-adds, in 1e9, of one clip (3, T, H, W) through ``model``, as fvcore counts them.

    fvcore passes over fused attention; its two matrix products are added here.
    """
    return count_operations(model, input_size)[0]


def count_operations(model: nn.Module, input_size: tuple[int, int, int]) -> tuple[float, dict[str, int]]:
    """Return ``count_gflops``, and how often each operation occurs that fvcore has no count for."""
    was_training = model.training
    clip = torch.zeros(1, 3, *input_size, device=next(model.parameters()).device)
    analysis = FlopCountAnalysis(model.eval(), clip)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_flops)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    with torch.no_grad():
        total = analysis.total()
    model.train(was_training)
    return total / 1e9, dict(analysis.unsupported_ops())


def count_training_memory(model: nn.Module, input_size: tuple[int, int, int], precision: str = "fp32") -> float:
    """Return the gigabytes (1e9 bytes) that the backward pass of one clip (3, T, H, W) needs from the forward pass.

    Counted on the tensors that autograd saves, each storage once, weights left out. Weights, gradients and AdamW's
    state come to 16 bytes a parameter beside it. A GPU needs somewhat more: temporary buffers are not saved.
    """
    was_training, device = model.training, next(model.parameters()).device
    statistics = {
        name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name or "tracked" in name
    }
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, Tensor] = {}  # kept alive, so that no two share an address

    def keep(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    clip = torch.zeros(1, 3, *input_size, device=device)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision in ("bf16", "fp16")),  # of one size
    ):
        logits = model.train()(clip)
    model.train(was_training)
    model.load_state_dict(statistics, strict=False)  # of batch norms, which training mode has moved
    del logits
    return sum(t.untyped_storage().nbytes() for place, t in saved.items() if place not in own) / 1e9


def _attention_flops(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Queries (B, h, N, d) on keys (B, h, K, d): N*K*d for the logits and as much again for the weighted sum."""
    B, h, N, d = get_shape(inputs[0])
    K = get_shape(inputs[1])[-2]
    return Counter({"scaled_dot_product_attention": 2 * B * h * N * K * d})
