"""Cache blocking: on a CPU without gradients, activations are computed in pieces that stay in the cache."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from torch import Tensor, nn

PIECE = 2**23  # bytes of the widest activation of a piece: it then stays in the cache


def in_pieces(module: nn.Module, x: Tensor) -> bool:
    """Say whether ``module`` goes through ``x`` piece by piece, all steps on one piece before the next.

    On a CPU the same work is then done in the cache and without asking the system for new memory: up to twice as fast.
    Not where each layer should be seen once: training, compilation, export, counting operations, hooks.
    """
    if x.device.type != "cpu" or module.training or torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    return not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def feed_forward(block: nn.Module, x: Tensor, branch: Callable[[Tensor], Tensor], width: int) -> Tensor:
    """Return x + branch(x) for tokens (..., C) that nobody else holds; ``width`` is the branch's widest layer."""
    if not in_pieces(block, x):
        return x + branch(x)
    x = x.contiguous()
    for piece in x.view(-1, x.shape[-1]).split(max(1, PIECE // (width * x.element_size()))):
        piece += branch(piece)
    return x


LOGITS = 2**18  # elements of attention logits to have at a time where they are written out

Run = tuple[int, int, int]  # equal windows along an axis: where they start, how many, how long each


def cuts(length: int, window: int, shift: int) -> list[Run]:
    """Return the windows of an axis as runs of equal ones: (start, count, size), the ends being shorter ones.

    Shifted windows under their masks are windows cut elsewhere: the masked ones consist of parts that do not see one
    another.
    """
    full, rest = divmod(length - shift, window)
    runs = [(0, 1, shift), (shift, full, window), (length - rest, 1, rest)]
    return [(start, count, size) for start, count, size in runs if count and size]


def pieces(clips: int, runs: Sequence[Run], size_of_window: int) -> Iterator[tuple[slice, ...]]:
    """Yield parts of a batch (B, T, H, W) of whole windows, each of about PIECE bytes where that many are there."""
    axes, total = [], size_of_window
    for start, count, size in reversed([(0, clips, 1), *runs]):
        step = max(1, min(count, PIECE // total))
        total *= step
        axes.append([slice(start + i * size, start + min(i + step, count) * size) for i in range(0, count, step)])
    return product(*reversed(axes))
