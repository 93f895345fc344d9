"""How fast models run: latency, throughput, memory and share of a matrix product's rate, in interleaved rounds."""

import ctypes
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from stvit_video.benchmarks.peers import TimedModel, build_timed_models
from stvit_video.benchmarks.rounds import min_to_max, train_step
from stvit_video.common.charts import Point, plot_points
from stvit_video.common.errors import UsageError
from stvit_video.common.tables import format_table
from stvit_video.models.cost import count_operations, count_parameters
from stvit_video.runtime.parallel import compile_model
from stvit_video.runtime.precision import HALF, matrix_rate, set_precision
from stvit_video.runtime.world import pick_device

MIN_ROUND_S = 0.5  # of calls at batch 1: short calls are timed often
GAIN = 1.05  # by which twice the batch must be faster to be chosen
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Conditions:
    """The conditions that hold for all models."""

    device: torch.device
    precision: str
    compiled: str = "none"  # or blocks, model: as COMPILE
    training: bool = False  # steps of AdamW; else inference
    largest_batch: int = 64  # to try

    @property
    def figures(self) -> dict[str, Any]:
        return {"device": self.device.type, "precision": self.precision, "compiled": self.compiled}

    def __str__(self) -> str:
        how = {"none": "eager", "blocks": "blocks compiled", "model": "compiled"}[self.compiled]
        return f"{self.precision}, {how}"


@dataclass
class Speed:
    """What was measured of one model."""

    name: str
    input_size: tuple[int, int, int]
    parameters: int
    gflops: float
    unsupported: dict[str, int]  # operations that fvcore does not count, and how many
    batch: int = 1  # the best one
    latencies: list[float] = field(default_factory=list)  # ms of single calls at batch 1
    rates: list[float] = field(default_factory=list)  # clips per second in each round
    memory: float | None = None  # peak, 1e9 bytes
    share: float = 0.0  # of the rate of a matrix product
    ratio: float = 1.0  # of the first model's clips per second

    @property
    def rate(self) -> float:
        return median(self.rates)

    def latency(self, quantile: float) -> float:
        return sorted(self.latencies)[min(len(self.latencies) - 1, int(quantile * len(self.latencies)))]


class Runner:
    """Times a model: called with a batch size, it returns the seconds of one forward pass, or of one training step."""

    def __init__(self, timed: TimedModel, conditions: Conditions) -> None:
        self.conditions, self.input_size = conditions, timed.input_size
        device, self.kind = conditions.device, torch.float32
        if not conditions.training:
            self.kind = HALF.get(conditions.precision, torch.float32)  # as deployed; training keeps float32 weights
        model = timed.model.to(device, self.kind).train(conditions.training)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5) if conditions.training else None
        # Shapes are fixed, so a whole model can be recorded as a CUDA graph.
        graphs = device.type == "cuda" and not conditions.training and conditions.compiled == "model"
        compile_model(model, conditions.compiled, dynamic=False, mode="reduce-overhead" if graphs else "default")
        self.model = model
        self.batches: dict[int, Tensor] = {}
        self.labels = torch.zeros(conditions.largest_batch, dtype=torch.int64, device=device)

    def __call__(self, batch: int) -> float:
        if batch not in self.batches:  # batch 1 is kept, and the last other one
            shape = (batch, 3, *self.input_size)
            kept = {1: self.batches[1]} if 1 in self.batches else {}
            self.batches = {**kept, batch: torch.randn(shape, device=self.conditions.device).to(self.kind)}
        clips = self.batches[batch]
        self._wait()
        started = time.perf_counter()
        if self.optimizer is None:
            with torch.inference_mode():
                self.model(clips)
        else:
            train_step(self.model, self.optimizer, clips, self.labels[:batch], self.conditions.precision)
        self._wait()
        return time.perf_counter() - started

    def held(self) -> float:
        """Return the memory (1e9 bytes) of the weights and of the optimiser's state."""
        states = self.optimizer.state.values() if self.optimizer else []
        kept = [*self.model.parameters(), *self.model.buffers()]
        kept += [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return sum(value.nbytes for value in kept) / 1e9

    def _wait(self) -> None:
        if self.conditions.device.type == "cuda":
            torch.cuda.synchronize()


def best_batch(run: Callable[[int], float], largest: int) -> int:
    """Return the batch size, a power of two, beyond which throughput does not rise or memory is exhausted.

    Times are noisy: the fastest of three calls counts, and the search ends after two sizes in a row without a gain.
    """
    best, best_rate, batch, without_gain = 1, 0.0, 1, 0
    while batch <= largest and without_gain < 2:
        try:
            run(batch)  # warm-up: compilation, choice of kernels
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
    """Return the peak memory (1e9 bytes) of a pass beyond what was in use before it, on the GPU or in the process.

    None for a CPU on other systems than Linux.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run(batch)
        return (torch.cuda.max_memory_allocated() - held) / 1e9
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that earlier passes freed would count as in use
        RESET.write_text("5")  # resets VmHWM
        before = _resident("VmRSS")
        run(batch)
        return max(0.0, _resident("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def _resident(name: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e9


def measure(
    models: Sequence[TimedModel],
    conditions: Conditions,
    rounds: int,
    runners: Sequence[Callable[[int], float]] | None = None,
) -> tuple[list[Speed], float]:
    """Return the speed of each model, and the rate of a matrix product (1e9 multiply-adds per second).

    Each round runs all models in turn, and the matrix product. Tests replace ``runners``.
    """
    set_precision(conditions.device, conditions.precision)
    speeds = []
    for timed in models:
        gflops, unsupported = count_operations(timed.model, timed.input_size)
        parameters = count_parameters(timed.model)
        speeds.append(Speed(timed.name, timed.input_size, parameters, gflops, unsupported))
    runners = runners or [Runner(timed, conditions) for timed in models]
    often = []
    for speed, run in zip(speeds, runners, strict=True):
        speed.batch = best_batch(run, conditions.largest_batch)
        often.append(max(1, int(MIN_ROUND_S / run(1))))
        speed.memory = peak_memory(run, speed.batch, conditions.device)
        if speed.memory is not None and isinstance(run, Runner):
            speed.memory += run.held()
        print(f"warmed up: {speed.name}, best at batch {speed.batch}", flush=True)
    products = []
    for _ in range(rounds):
        products.append(matrix_rate(conditions.device, conditions.precision))
        for speed, run, times in zip(speeds, runners, often, strict=True):
            seconds = [run(1) for _ in range(times)]
            speed.latencies += [1000 * taken for taken in seconds]
            speed.rates.append(1 / median(seconds) if speed.batch == 1 else speed.batch / run(speed.batch))
    product = median(products)
    passes = 3 if conditions.training else 1  # by convention, backward costs two forward passes
    for speed in speeds:
        speed.ratio = speed.rate / speeds[0].rate
        speed.share = passes * speed.gflops * speed.rate / product
    return speeds, product


def build_conditions(cfg: CfgNode, training: bool, largest_batch: int) -> Conditions:
    """Return the conditions that DEVICE, PRECISION and COMPILE of the first configuration set for all.

    Raises UsageError for DEVICE cuda where there is none.
    """
    return Conditions(pick_device(cfg.DEVICE, 0, 1), cfg.PRECISION, cfg.COMPILE, training, largest_batch)


def build_model_figures(
    words: Sequence[tuple[str, str]],
    overrides: Sequence[str],
    *,
    training: bool,
    rounds: int,
    largest_batch: int,
    results: Sequence[Path] = (),
    plot: Path | None = None,
) -> dict[str, Any]:
    """Measure configurations and peers side by side, print the table, draw the picture, and return the figures."""
    first, models, cfgs = build_timed_models(words, overrides)
    if results and len(results) != len(cfgs):
        raise UsageError(
            f"--results was given {len(results)} times and --cfg {len(cfgs)} times; give one for each --cfg."
        )
    accuracies = iter([read_accuracy(path) for path in results])
    conditions = build_conditions(first, training, largest_batch)
    whole = [one.name for one in models if not hasattr(one.model, "transformer_blocks")]
    if conditions.compiled == "blocks" and whole:
        raise UsageError(
            f"COMPILE blocks, but the blocks of {whole[0]} are not known here; use COMPILE model, or compare models of "
            f"this package."
        )
    speeds, product = measure(models, conditions, rounds)
    print(describe_speeds(speeds, product, conditions), flush=True)
    found = [next(accuracies, None) if kind == "cfg" else None for kind, _ in words]
    if plot:
        plot_speeds(speeds, found, plot)
    return {**figures_of(speeds, product, conditions), "top1": found}


def describe_speeds(speeds: Sequence[Speed], product: float, conditions: Conditions) -> str:
    """Return the table of what was measured, and below it what fvcore did not count."""
    columns = ("", "clip", "GFLOPs", "p50 ms", "p95 ms", "batch", "clips/s", "min to max", "share", "GB", "ratio")
    rows = [
        (
            speed.name,
            "x".join(map(str, speed.input_size)),
            f"{speed.gflops:.1f}",
            f"{speed.latency(0.5):.1f}",
            f"{speed.latency(0.95):.1f}",
            speed.batch,
            f"{speed.rate:.2f}",
            min_to_max(speed.rates, digits=2),
            f"{speed.share:.2f}",
            "-" if speed.memory is None else f"{speed.memory:.2f}",
            f"{speed.ratio:.2f}",
        )
        for speed in speeds
    ]
    what = "training steps" if conditions.training else "inference"
    lines = [
        f"{what}: {conditions.device.type}, {conditions}; a matrix product runs at {product:.0f} G multiply-adds/s",
        format_table(columns, rows),
        "p50, p95: of a call at batch 1; share: of the matrix product's rate; ratio: clips/s of the first row's",
    ]
    for speed in speeds:
        left = ", ".join(f"{name.removeprefix('aten::')} {n}" for name, n in sorted(speed.unsupported.items()))
        lines.append(f"not counted by fvcore in {speed.name}: {left or 'nothing'}")
    return "\n".join(lines)


def figures_of(speeds: Sequence[Speed], product: float, conditions: Conditions) -> dict[str, Any]:
    """Return what was measured as plain data."""
    models = [
        {**asdict(speed), "clips_per_second": speed.rate, "p50_ms": speed.latency(0.5), "p95_ms": speed.latency(0.95)}
        for speed in speeds
    ]
    how = {**conditions.figures, "training": conditions.training}
    return {**how, "matrix_product_gmacs_per_second": product, "models": models}


def read_accuracy(path: Path) -> float:
    """Return the top-1 of a run's results.json. Raises UsageError where there is none."""
    try:
        return float(json.loads(path.read_text())["top1"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--results {path} holds no top1 ({type(error).__name__}); give the results.json of a run for each --cfg."
        ) from error


def plot_speeds(speeds: Sequence[Speed], accuracies: Sequence[float | None], path: Path) -> None:
    """Draw accuracy, of the models that have one, or else GFLOPs, over clips per second."""
    known = any(accuracy is not None for accuracy in accuracies)
    points = [
        Point(
            speed.name,
            speed.rate,
            speed.gflops if accuracy is None else accuracy,
            x_range=(min(speed.rates), max(speed.rates)),
            colour=f"C{i % 10}",
        )
        for i, (speed, accuracy) in enumerate(zip(speeds, accuracies, strict=True))
        if accuracy is not None or not known
    ]
    plot_points(points, "clips per second", "top-1 (%)" if known else "GFLOPs per clip", path)
