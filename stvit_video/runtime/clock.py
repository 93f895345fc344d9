"""Where the time and the memory of training steps go."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PARTS = ("data", "forward", "backward", "optimizer")


class StepClock:
    """Adds up the seconds of each part of a step; on a GPU its own, without making the CPU wait for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.started = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside as that of a part."""
        # Waiting for data is the CPU's: a GPU has nothing to do meanwhile and records nothing.
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
        """Return the seconds of each part and of all (``elapsed``) since the last lap, and start a new one."""
        for name, begin, end in self.events:
            end.synchronize()
            self.seconds[name] += begin.elapsed_time(end) / 1000
        now = time.perf_counter()
        lap = {**self.seconds, "elapsed": now - self.started}
        self.seconds, self.events, self.started = dict.fromkeys(PARTS, 0.0), [], now
        return lap


def peak_memory(device: torch.device) -> float:
    """Return the most memory so far in GB (1e9 bytes): of the GPU's tensors, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB
