"""The cost of a model: parameters, multiply-adds (by fvcore, fused attention included), memory for training."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True)
class Cost:
    """Parameters of a model, and multiply-adds (1e9) of one clip (3, T, H, W)."""

    parameters: int
    gflops: float
    input_size: tuple[int, int, int]


def measure_cost(model: nn.Module, input_size: tuple[int, int, int]) -> Cost:
    """Return the cost of a model that is neither compiled nor sharded."""
    return Cost(count_parameters(model), count_gflops(model, input_size), input_size)


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_gflops(model: nn.Module, input_size: tuple[int, int, int]) -> float:
    """Return the multiply-adds, in 1e9, of one clip (3, T, H, W), as fvcore counts them, and fused attention's."""
    return count_operations(model, input_size)[0]


def count_operations(model: nn.Module, input_size: tuple[int, int, int]) -> tuple[float, dict[str, int]]:
    """Return ``count_gflops``, and the number of occurrences of each operation that fvcore does not count."""

    def count_attention(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
        """Queries (B, h, N, d) on keys (B, h, K, d): N*K*d for the logits and as much again for the weighted sum."""
        B, h, N, d = get_shape(inputs[0])
        return Counter({"scaled_dot_product_attention": 2 * B * h * N * get_shape(inputs[1])[-2] * d})

    was_training = model.training
    clip = next(model.parameters()).new_zeros(1, 3, *input_size)
    analysis = FlopCountAnalysis(model.eval(), clip)
    analysis.set_op_handle("aten::scaled_dot_product_attention", count_attention)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    with torch.no_grad():
        total = analysis.total()
    model.train(was_training)
    return total / 1e9, dict(analysis.unsupported_ops())


def count_training_memory(model: nn.Module, input_size: tuple[int, int, int], precision: str = "fp32") -> float:
    """Return the gigabytes (1e9 bytes) that the forward pass of one clip (3, T, H, W) stores for the backward pass.

    The tensors that autograd saves are counted, each storage once, without weights. Weights, gradients and AdamW's
    state take another 16 bytes per parameter. A GPU needs somewhat more: temporary buffers are not counted.
    """
    was_training, device = model.training, next(model.parameters()).device
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # training mode changes batch norms'
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *buffers.values())}
    saved: dict[int, Tensor] = {}  # kept alive, so that addresses are unique

    def keep(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    clip = next(model.parameters()).new_zeros(1, 3, *input_size)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision in ("bf16", "fp16")),  # both have 2 bytes
    ):
        logits = functional_call(model.train(), buffers, (clip,))
    model.train(was_training)
    del logits
    return sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in own) / 1e9
