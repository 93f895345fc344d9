"""The precision of sums, softmaxes and positions inside models of any precision."""

import torch
from torch import Tensor


def at_least_single(x: Tensor) -> Tensor:
    """Return ``x`` in single precision, or in double where it is double."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
