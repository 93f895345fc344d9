"""Numeric precision: PRECISION names what the forward pass computes in."""

import time
from contextlib import AbstractContextManager
from statistics import median

import torch

from stvit_video.common.errors import UsageError

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def set_precision(device: torch.device, precision: str) -> None:
    """Allow TF32 in matrix products and convolutions of fp32, or forbid it. Raises UsageError for tf32 on a CPU."""
    if precision == "tf32" and device.type != "cuda":
        raise UsageError("PRECISION tf32 on a CPU, which does not have it; choose fp32 or bf16, or DEVICE cuda.")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Return the context in which the forward pass runs in ``precision``."""
    return torch.autocast(device.type, dtype=HALF.get(precision, torch.bfloat16), enabled=precision in HALF)


def matrix_rate(device: torch.device, precision: str) -> float:
    """Measure the rate of a large matrix product in ``precision``, in 1e9 multiply-adds per second; takes 0.1 s."""
    size = 8192 if device.type == "cuda" else 768
    a, b = (torch.randn(size, size, device=device, dtype=HALF.get(precision)) for _ in range(2))
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the GPU
        seconds.append(time.perf_counter() - started)
    return size**3 / median(seconds[1:]) / 1e9  # the first is a warm-up
