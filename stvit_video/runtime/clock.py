"""Time and memory of training steps."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PARTS = ("data", "forward", "backward", "optimizer")


class StepClock:
    """Sums the seconds of each part of a step. On a GPU it uses CUDA events, without a synchronisation per step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.started = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time inside to a part."""
        # Waiting for data is time of the CPU; the GPU is idle meanwhile.
        if self.device.type == "cuda" and name != "data":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self.events.append((name, begin, end))
            return
        begun = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begun

    def lap(self) -> dict[str, float]:
        """Return the seconds of each part and in total (``elapsed``) since the last lap, and start a new lap."""
        for name, begin, end in self.events:
            end.synchronize()
            self.seconds[name] += begin.elapsed_time(end) / 1000
        now = time.perf_counter()
        lap = {**self.seconds, "elapsed": now - self.started}
        self.seconds, self.events, self.started = dict.fromkeys(PARTS, 0.0), [], now
        return lap


def peak_memory(device: torch.device) -> float:
    """Return the peak memory in GB (1e9 bytes): of tensors on the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # KiB on Linux
