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
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor

from stvit_video.benchmarks.end_to_end import describe_flows, figures_of_flows, measure_flow
from stvit_video.benchmarks.peers import Contestant, build_contestants
from stvit_video.common.errors import UsageError
from stvit_video.models.cost import count_operations, count_parameters
from stvit_video.runtime.join import pick_device
from stvit_video.runtime.parallel import compile_model
from stvit_video.runtime.precision import HALF, autocast, matrix_rate, set_precision

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


def build_conditions(cfg: CfgNode, training: bool, largest_batch: int) -> Conditions:
    """Return the conditions that DEVICE, PRECISION and COMPILE of the first configuration set for all.

    Raises UsageError for DEVICE cuda where there is none.
    """
    return Conditions(pick_device(cfg.DEVICE, 0, 1), cfg.PRECISION, cfg.COMPILE, training, largest_batch)


def benchmark_models(
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
    first, contestants, cfgs = build_contestants(words, overrides)
    if results and len(results) != len(cfgs):
        raise UsageError(
            f"--results was given {len(results)} times and --cfg {len(cfgs)} times; give one for each --cfg."
        )
    accuracies = iter([read_accuracy(path) for path in results])
    conditions = build_conditions(first, training, largest_batch)
    whole = [one.name for one in contestants if not hasattr(one.model, "transformer_blocks")]
    if conditions.compiled == "blocks" and whole:
        raise UsageError(
            f"COMPILE blocks, but the blocks of {whole[0]} are not known here; use COMPILE model, or compare models of "
            f"this package."
        )
    speeds, product = measure(contestants, conditions, rounds, say=lambda line: print(line, flush=True))
    print(describe_speeds(speeds, product, conditions), flush=True)
    found = [next(accuracies, None) if kind == "cfg" else None for kind, _ in words]
    if plot:
        plot_speeds(speeds, found, plot)
    return {**figures_of(speeds, product, conditions), "top1": found}


def benchmark_end_to_end(cfg: CfgNode, clips: int, rounds: int) -> dict[str, Any]:
    """Time files to logits and training with 1, 2 and 4 workers, print the table and return the figures."""
    flows = measure_flow(cfg, clips, rounds)
    shape = f"{cfg.DATA.FRAMES} frames of {cfg.DATA.SIZE}x{cfg.DATA.SIZE}"
    conditions = build_conditions(cfg, False, cfg.TEST.BATCH_SIZE)
    print(f"{cfg.MODEL.NAME}, {conditions.device.type}, {conditions}: from video files, clips of {shape}")
    print("\n".join(describe_flows(flows)), flush=True)
    return {"model": cfg.MODEL.NAME, **conditions.figures, "flows": figures_of_flows(flows)}


COLUMNS = ("clip", "GFLOPs", "p50 ms", "p95 ms", "batch", "clips/s", "least to most", "share", "GB", "ratio")


def describe_speeds(speeds: Sequence[Speed], product: float, conditions: Conditions) -> str:
    """Return the table of what was measured, and below it what fvcore did not count."""
    rows = [("", *COLUMNS), *(_row(speed) for speed in speeds)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    aligned = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    what = "training steps" if conditions.training else "inference"
    lines = [
        f"{what}: {conditions.device.type}, {conditions}; a matrix product runs at {product:.0f} G multiply-adds/s",
        *aligned,
    ]
    lines.append(
        "p50, p95: of a call at batch 1; share: of the matrix product's rate; ratio: clips/s of the first row's"
    )
    for speed in speeds:
        left = ", ".join(f"{name.removeprefix('aten::')} {n}" for name, n in sorted(speed.unsupported.items()))
        lines.append(f"not counted by fvcore in {speed.name}: {left or 'nothing'}")
    return "\n".join(lines)


def _row(speed: Speed) -> tuple[str, ...]:
    return (
        speed.name,
        "x".join(map(str, speed.input_size)),
        f"{speed.gflops:.1f}",
        f"{speed.latency(0.5):.1f}",
        f"{speed.latency(0.95):.1f}",
        str(speed.batch),
        f"{speed.rate:.2f}",
        f"{min(speed.rates):.2f} to {max(speed.rates):.2f}",
        f"{speed.share:.2f}",
        "-" if speed.memory is None else f"{speed.memory:.2f}",
        f"{speed.ratio:.2f}",
    )


def figures_of(speeds: Sequence[Speed], product: float, conditions: Conditions) -> dict[str, Any]:
    """Return what was measured as plain data."""
    models = [
        {**asdict(speed), "clips_per_second": speed.rate, "p50_ms": speed.latency(0.5), "p95_ms": speed.latency(0.95)}
        for speed in speeds
    ]
    return {
        **conditions.figures,
        "training": conditions.training,
        "matrix_product_gmacs_per_second": product,
        "models": models,
    }


def read_accuracy(path: Path) -> float:
    """Return the top-1 of a run's results.json. Raises UsageError where there is none."""
    try:
        return float(json.loads(path.read_text())["top1"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--results {path} holds no top1 ({type(error).__name__}); give the results.json of a run for each --cfg."
        ) from error


def plot_speeds(speeds: Sequence[Speed], accuracies: Sequence[float | None], path: Path) -> None:
    """Draw accuracy (of those that have one) or else GFLOPs against clips a second."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    known = any(accuracy is not None for accuracy in accuracies)
    for i, (speed, accuracy) in enumerate(zip(speeds, accuracies, strict=True)):
        height = accuracy if known else speed.gflops
        if height is None:
            continue
        spread = [[speed.rate - min(speed.rates)], [max(speed.rates) - speed.rate]]
        axes.errorbar(speed.rate, height, xerr=spread, marker="o", color=f"C{i % 10}", capsize=3)
        place, beside = (speed.rate, height), (6, 6)
        axes.annotate(speed.name, place, beside, textcoords="offset points", fontsize=8, parse_math=False)
    axes.set_xlabel("clips a second")
    axes.set_ylabel("top-1 (%)" if known else "GFLOPs a clip")
    axes.set_xlim(0, 1.35 * max(max(speed.rates) for speed in speeds))  # room for the names
    if not known:
        axes.set_ylim(0, 1.15 * max(speed.gflops for speed in speeds))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
