"""How fast models run: latency, throughput, memory and share of a matrix product's rate, in interleaved rounds."""

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stvit_video.benchmarks.contestants import Contestant
from stvit_video.engine.parallel import compile_model
from stvit_video.engine.precision import HALF, autocast, matrix_rate, set_precision
from stvit_video.models.complexity import count_operations, count_parameters

LONG_ENOUGH = 0.5  # seconds of calls a round, so that a short call is timed often
GAIN = 1.05  # a batch twice as large must bring so much more, or it is not taken
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Conditions:
    """Under which conditions all are measured: ``training`` steps of AdamW, or inference.

    ``compiled`` is COMPILE's "none", "blocks" or "model".
    """

    device: torch.device
    precision: str
    compiled: str = "none"
    training: bool = False
    largest_batch: int = 64

    @property
    def figures(self) -> dict[str, Any]:
        """The same as plain data, but for what only limits the search for a batch."""
        return {"device": self.device.type, "precision": self.precision, "compiled": self.compiled}

    def __str__(self) -> str:
        how = {"none": "eager", "blocks": "blocks compiled", "model": "compiled"}[self.compiled]
        return f"{self.precision}, {how}"


@dataclass
class Speed:
    """What was measured of one model. Times are of single calls in ms, rates in clips a second, memory in 1e9 bytes."""

    name: str
    input_size: tuple[int, int, int]
    parameters: int
    gflops: float
    unsupported: dict[str, int]
    batch: int = 1
    latencies: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    memory: float | None = None
    share: float = 0.0
    ratio: float = 1.0

    @property
    def rate(self) -> float:
        return median(self.rates)

    def latency(self, quantile: float) -> float:
        """Return the latency in ms that this share of the calls at batch 1 did not exceed."""
        return sorted(self.latencies)[min(len(self.latencies) - 1, int(quantile * len(self.latencies)))]


class Runner:
    """A contestant made ready: call it with a batch size for the seconds that one pass, or training step, takes."""

    def __init__(self, contestant: Contestant, conditions: Conditions) -> None:
        self.conditions, self.input_size = conditions, contestant.input_size
        device, self.half = conditions.device, HALF.get(conditions.precision)
        model = contestant.model.to(device).train(conditions.training)
        if self.half is not None and not conditions.training:
            model = model.to(self.half)  # as deployed; a training step keeps its weights in float32
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5) if conditions.training else None
        # Fixed shapes: on a GPU the launches of a whole model are recorded once as a CUDA graph.
        graphs = device.type == "cuda" and not conditions.training and conditions.compiled == "model"
        compile_model(model, conditions.compiled, dynamic=False, mode="reduce-overhead" if graphs else "default")
        self.model = model
        self.batches: dict[int, Tensor] = {}

    def __call__(self, batch: int) -> float:
        if batch not in self.batches:
            self.batches = {1: self.batches.get(1, self._draw(1)), batch: self._draw(batch)}
        clips = self.batches[batch]
        self._wait()
        started = time.perf_counter()
        if self.optimizer is None:
            with torch.inference_mode():
                self.model(clips)
        else:
            self._train_step(clips, self.optimizer)
        self._wait()
        return time.perf_counter() - started

    def held(self) -> float:
        """Return the memory (1e9 bytes) of weights, and of the optimiser's state where there is one."""
        states = self.optimizer.state.values() if self.optimizer else []
        kept = [*self.model.parameters(), *self.model.buffers()]
        kept += [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return sum(value.nbytes for value in kept) / 1e9

    def _train_step(self, clips: Tensor, optimizer: torch.optim.Optimizer) -> None:
        with autocast(self.conditions.device, self.conditions.precision):
            logits = self.model(clips)
        F.cross_entropy(logits.float(), torch.zeros(len(clips), dtype=torch.int64, device=clips.device)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _draw(self, batch: int) -> Tensor:
        clips = torch.randn(batch, 3, *self.input_size, device=self.conditions.device)
        return clips if self.conditions.training or self.half is None else clips.to(self.half)

    def _wait(self) -> None:
        if self.conditions.device.type == "cuda":
            torch.cuda.synchronize()


def best_batch(run: Callable[[int], float], largest: int) -> int:
    """Return the batch size, of powers of two, beyond which no more clips a second pass or memory ends.

    The fastest of three calls counts, and two sizes in a row have to gain nothing: times are noisy.
    """
    best, best_rate, batch, without_gain = 1, 0.0, 1, 0
    while batch <= largest and without_gain < 2:
        try:
            run(batch)  # compiles, and finds the fastest kernels
            rate = batch / min(run(batch) for _ in range(3))
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if "memory" not in str(error):
                raise
            break
        without_gain += 1
        if rate >= GAIN * best_rate:
            best, best_rate, without_gain = batch, rate, 0
        batch *= 2
    return best


def peak_memory(run: Callable[[int], float], batch: int, device: torch.device) -> float | None:
    """Return the most memory (1e9 bytes) that a pass needs beyond what was held before: of the GPU, or the process's.

    None where the system does not tell, which is everywhere but on Linux.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run(batch)
        return (torch.cuda.max_memory_allocated() - held) / 1e9
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier passes left free counts as held otherwise
        RESET.write_text("5")  # the process's peak begins anew
        before = _resident("VmRSS")
        run(batch)
        return max(0.0, _resident("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def _resident(name: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e9


def measure(
    contestants: Sequence[Contestant],
    conditions: Conditions,
    rounds: int,
    runners: Sequence[Callable[[int], float]] | None = None,
    say: Callable[[str], Any] = print,
) -> tuple[list[Speed], float]:
    """Return the speed of each, ratios and shares filled in, and the rate of a matrix product (1e9 multiply-adds/s).

    All run in turn in each round, the matrix product too. ``runners`` replaces what runs them.
    """
    set_precision(conditions.device, conditions.precision)
    speeds = []
    for contestant in contestants:
        gflops, unsupported = count_operations(contestant.model, contestant.input_size)
        parameters = count_parameters(contestant.model)
        speeds.append(Speed(contestant.name, contestant.input_size, parameters, gflops, unsupported))
    runners = runners or [Runner(contestant, conditions) for contestant in contestants]
    often = []
    for speed, run in zip(speeds, runners, strict=True):
        speed.batch = best_batch(run, conditions.largest_batch)
        often.append(max(1, int(LONG_ENOUGH / run(1))))
        speed.memory = peak_memory(run, speed.batch, conditions.device)
        if speed.memory is not None and isinstance(run, Runner):
            speed.memory += run.held()  # its own, and not that of the others beside it
        say(f"warmed up: {speed.name}, best at batch {speed.batch}")
    products = []
    for _ in range(rounds):
        products.append(matrix_rate(conditions.device, conditions.precision))
        for speed, run, times in zip(speeds, runners, often, strict=True):
            seconds = [run(1) for _ in range(times)]
            speed.latencies += [1000 * taken for taken in seconds]
            speed.rates.append(1 / median(seconds) if speed.batch == 1 else speed.batch / run(speed.batch))
    product = median(products)
    passes = 3 if conditions.training else 1  # backward counts twice, by convention
    for speed in speeds:
        speed.ratio = speed.rate / speeds[0].rate
        speed.share = passes * speed.gflops * speed.rate / product
    return speeds, product
