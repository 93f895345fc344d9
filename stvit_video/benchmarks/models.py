"""How fast models run, ours and other libraries'. Nothing is downloaded: speed does not depend on the weights."""

import ctypes
import importlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchvision
from fvcore.common.config import CfgNode
from pytorchvideo.models import hub
from torch import Tensor, nn

from stvit_video.benchmarks.rounds import Figures, describe_conditions, run_rounds, train_step
from stvit_video.common.accuracy import ACCURACIES, accuracy_key
from stvit_video.common.charts import Point, plot_points
from stvit_video.common.errors import UsageError, nearest
from stvit_video.common.tables import format_table, three_digits
from stvit_video.config.load import load_config
from stvit_video.models.cost import count_operations, count_parameters
from stvit_video.models.layers import Grid
from stvit_video.models.zoo import build_model, create_model, list_models
from stvit_video.runs.lists import KINETICS_CLASSES
from stvit_video.runtime.parallel import compile_model
from stvit_video.runtime.precision import HALF, matrix_rate, set_precision
from stvit_video.runtime.world import pick_device

MIN_ROUND_S = 0.5  # of calls at batch 1: short calls are timed often
GAIN = 1.05  # by which twice the batch must be faster to be chosen
VIDEO = ("swin3d_", "mvit_")  # torchvision's video transformers
MVIT_SIZE = (16, 224, 224)  # the published MViT models take no other
# The models of each library that are compared.
LIBRARIES: dict[str, Callable[[], list[str]]] = {
    "stvit_video": list_models,
    "torchvision": lambda: [name for name in torchvision.models.list_models() if name.startswith(VIDEO)],
    "pytorchvideo": lambda: ["mvit_base_16x4"],
    "timm": lambda: importlib.import_module("timm").list_models("vit_*"),
}


class TimedModel:
    """A model of clips (B, 3, *input_size). Prepared and called with a batch size, it returns the seconds of a pass."""

    def __init__(self, name: str, model: nn.Module, input_size: Grid) -> None:
        self.name, self.model, self.input_size = name, model, input_size
        self.optimizer: torch.optim.Optimizer | None = None

    def prepare(self, device: torch.device, precision: str, compiled: str, training: bool) -> None:
        """Put the model on ``device``, for passes of inference, in ``precision`` altogether, or of training."""
        self.precision = precision
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        kind = torch.float32 if training else HALF.get(precision, torch.float32)  # training keeps float32 weights
        self.model.to(device, kind).train(training)
        if training:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        # Shapes are fixed, so a whole model can be recorded as a CUDA graph.
        graphs = device.type == "cuda" and not training and compiled == "model"
        compile_model(self.model, compiled, dynamic=False, mode="reduce-overhead" if graphs else "default")

        @lru_cache(maxsize=2)  # batch 1, and one other
        def make_clips(batch: int) -> Tensor:
            return torch.randn(batch, 3, *self.input_size, device=device).to(kind)

        self.make_clips = make_clips

    def __call__(self, batch: int) -> float:
        clips = self.make_clips(batch)
        labels = torch.zeros(batch, dtype=torch.int64, device=clips.device)
        self.wait()
        started = time.perf_counter()
        if self.optimizer is None:
            with torch.inference_mode():
                self.model(clips)
        else:
            train_step(self.model, self.optimizer, clips, labels, self.precision)
        self.wait()
        return time.perf_counter() - started

    def measure_round(self, batch: int, calls: int) -> tuple[list[float], float]:
        """Return the milliseconds of calls at batch 1, and the clips per second at ``batch``."""
        seconds = [self(1) for _ in range(calls)]
        return [1000 * taken for taken in seconds], 1 / median(seconds) if batch == 1 else batch / self(batch)

    def held(self) -> float:
        """Return the memory (1e9 bytes) of the weights and of the optimiser's state."""
        states = self.optimizer.state.values() if self.optimizer else []
        kept = [*self.model.parameters(), *self.model.buffers(), *(value for s in states for value in s.values())]
        return sum(value.nbytes for value in kept) / 1e9


class FramesAsBatch(nn.Sequential):
    """An image model applied to each frame of a clip (B, 3, T, H, W); the logits are averaged."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x.transpose(1, 2).flatten(0, 1))
        return logits.unflatten(0, (-1, x.shape[2])).mean(dim=1)


def build_peer(name: str, size: Grid) -> TimedModel:
    """Return a peer such as "torchvision:swin3d_t" or "stvit_video:stvit_swin_tiny:fast", where a preset follows.

    Clips are of ``size``, unless the model is made for one size. Raises UsageError for names that the library lacks.
    """
    library, _, model = name.partition(":")
    if library not in LIBRARIES or not model:
        raise UsageError(
            f"--peer {name}: the library is one of {', '.join(LIBRARIES)}; write LIBRARY:MODEL, as "
            f"torchvision:swin3d_t.{nearest(library, LIBRARIES)}"
        )
    if library == "stvit_video":
        model, *preset = model.split(":", 1)
        if preset == [""]:
            raise UsageError(f"--peer {name} ends in a colon; name a preset behind it, or leave it out.")
    try:
        known = LIBRARIES[library]()
    except ModuleNotFoundError as error:
        raise UsageError(f"--peer {name} needs timm, which is not installed; pip install timm.") from error
    if model not in known:
        listed = ", ".join(known) if library != "timm" else "timm.list_models('vit_*'); timm has no such ViT"
        raise UsageError(f"--peer {name}: choose one of {listed}.{nearest(model, known)}")
    if library == "stvit_video":
        chosen = {"preset": preset[0]} if preset else {}
        built = create_model(model, num_frames=size[0], image_size=size[1:], num_classes=KINETICS_CLASSES, **chosen)
        return TimedModel(name.partition(":")[2], built, size)
    if library == "timm":
        built = importlib.import_module("timm").create_model(model, num_classes=KINETICS_CLASSES, img_size=size[1:])
        return TimedModel(f"{name}, {size[0]} frames as a batch", FramesAsBatch(built), size)
    size = MVIT_SIZE if model.startswith("mvit") else size
    if library == "torchvision":
        return TimedModel(name, torchvision.models.get_model(model, num_classes=KINETICS_CLASSES), size)
    return TimedModel(name, getattr(hub, model)(pretrained=False), size)


def best_batch(run: Callable[[int], float], largest: int) -> int:
    """Return the batch size, a power of two, beyond which throughput does not rise or memory is exhausted.

    Times are noisy: the fastest of three calls counts, and the search ends after two sizes in a row without a gain.
    """
    best, best_rate, batch, without_gain = 1, 0.0, 1, 0
    while batch <= largest and without_gain < 2:
        try:
            run(batch)  # warm-up: compilation, choice of kernels
            rate = batch / min(run(batch) for _ in range(3))
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            break
        without_gain += 1
        if rate >= GAIN * best_rate:
            best, best_rate, without_gain = batch, rate, 0
        batch *= 2
    return best


def peak_memory(run: Callable[[int], float], batch: int, device: torch.device) -> float | None:
    """Return the memory (1e9 bytes) that a pass needs beyond what is in use before; None for a CPU without Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run(batch)
        return (torch.cuda.max_memory_allocated() - held) / 1e9
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that earlier passes freed would count as in use
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _resident("VmRSS")
        run(batch)
        return max(0.0, _resident("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def _resident(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e9


def build_speeds(
    cfg: CfgNode, models: Sequence[TimedModel], *, training: bool, rounds: int, largest_batch: int
) -> Figures:
    """Measure models under the DEVICE, PRECISION and COMPILE of a configuration, and print the table.

    Return these conditions, the rate of a matrix product (1e9 multiply-adds per second), and a row for each model. Each
    round runs all models in turn, and the matrix product. Raises UsageError for DEVICE cuda where there is none.
    """
    device = pick_device(cfg.DEVICE, 0, 1)
    precision = cfg.PRECISION
    compiled = cfg.COMPILE
    set_precision(device, precision)
    rows: list[Figures] = []
    for timed in models:
        gflops, unsupported = count_operations(timed.model, timed.input_size)
        cost = {"parameters": count_parameters(timed.model), "gflops": gflops, "unsupported": unsupported}
        rows.append({"name": timed.name, "input_size": timed.input_size, **cost})
    timers: list[Callable] = [partial(matrix_rate, device, precision)]
    for timed in models:
        timed.prepare(device, precision, compiled, training)
    for row, timed in zip(rows, models, strict=True):
        row["batch"] = best_batch(timed, largest_batch)
        timers.append(partial(timed.measure_round, row["batch"], max(1, int(MIN_ROUND_S / timed(1)))))
        peak = peak_memory(timed, row["batch"], device)
        row["memory"] = None if peak is None else peak + timed.held()
        print(f"warmed up: {timed.name}, best at batch {row['batch']}", flush=True)
    products, *measured = run_rounds(timers, rounds, uncounted=0)  # all are warm
    passes = 3 if training else 1  # by convention, backward costs two forward passes
    for row, found in zip(rows, measured, strict=True):
        latencies = [taken for calls, _ in found for taken in calls]
        rates = [rate for _, rate in found]
        row |= {"latencies": latencies, "rates": rates, "clips_per_second": median(rates)}
        for quantile in (50, 95):
            row[f"p{quantile}_ms"] = sorted(latencies)[quantile * len(latencies) // 100]
        row["ratio"] = row["clips_per_second"] / rows[0]["clips_per_second"]
        row["share"] = passes * row["gflops"] * row["clips_per_second"] / median(products)
    conditions = {"device": device.type, "precision": precision, "compiled": compiled, "training": training}
    figures = {**conditions, "matrix_product_gmacs_per_second": median(products), "models": rows}
    print(describe_speeds(figures), flush=True)
    return figures


def describe_speeds(figures: Figures) -> str:
    """Return the table of what ``build_speeds`` measured, and below it what fvcore did not count."""
    columns = ["", "GFLOPs", "p50 ms", "p95 ms", "batch", "clips/s", "min to max", "share", "GB", "ratio"]
    cells, uncounted = [], []
    sizes = ["x".join(map(str, row["input_size"])) for row in figures["models"]]
    for row in figures["models"]:
        cost = [three_digits(row[key]) for key in ("gflops", "p50_ms", "p95_ms")]
        rates = [three_digits(rate) for rate in (row["clips_per_second"], min(row["rates"]), max(row["rates"]))]
        memory = "-" if row["memory"] is None else f"{row['memory']:.2f}"
        share, ratio = (f"{row[key]:.2f}" for key in ("share", "ratio"))
        speed = rates[0], f"{rates[1]} to {rates[2]}"
        cells.append([row["name"], *cost, row["batch"], *speed, share, memory, ratio])
        left = ", ".join(f"{name.removeprefix('aten::')} {n}" for name, n in sorted(row["unsupported"].items()))
        uncounted.append(f"not counted by fvcore in {row['name']}: {left or 'nothing'}")
    what = "training steps" if figures["training"] else "inference"
    how = f"{figures['device']}, {describe_conditions(figures)}"
    clips = ""
    if len(set(sizes)) == 1:
        clips = f"; clips of {sizes[0]}"
    else:
        columns.insert(1, "clip")
        cells = [[row[0], size, *row[1:]] for row, size in zip(cells, sizes, strict=True)]
    product = f"a matrix product runs at {figures['matrix_product_gmacs_per_second']:.0f} G multiply-adds/s"
    legend = "p50, p95: of a call at batch 1; share: of the matrix product's rate; ratio: clips/s of the first row's"
    return "\n".join([f"{what}: {how}; {product}{clips}", format_table(columns, cells), legend, *uncounted])


def build_model_figures(
    named: Sequence[Path | str], overrides: Sequence[str], results: Sequence[Path], plot: Path | None, **how: Any
) -> Figures:
    """Measure configurations, which are paths, and peers side by side; draw the picture, and return the figures.

    Peers take clips of the first configuration's size, and all are measured under its conditions and ``how``: the
    options of ``build_speeds``.
    """
    cfgs = {place: load_config(path, overrides) for place, path in enumerate(named) if isinstance(path, Path)}
    if results and len(results) != len(cfgs):
        raise UsageError(f"--results was given {len(results)} times; give one for each --cfg, {len(cfgs)} in all.")
    known = list(map(read_accuracy, results))
    if len(kinds := {key for key, _ in known}) > 1:
        raise UsageError("--results of top-1 and of mAP do not fit on one axis; give runs on one set.")
    accuracies = {place: value for place, (_, value) in zip(cfgs, known, strict=False)}
    models = []
    same = Counter[str]()
    first = next(iter(cfgs.values()))
    for place, name in enumerate(named):
        cfg = cfgs.get(place, first)
        size = (cfg.DATA.FRAMES, cfg.DATA.SIZE, cfg.DATA.SIZE)
        if isinstance(name, Path):
            timed = TimedModel(name.stem, build_model(cfg, cfg.MODEL.NUM_CLASSES or KINETICS_CLASSES), size)
        else:
            timed = build_peer(name, size)
        if first.COMPILE == "blocks" and not hasattr(timed.model, "transformer_blocks"):
            raise UsageError(f"COMPILE blocks, but the blocks of {timed.name} are not known here; use COMPILE model.")
        same[timed.name] += 1
        timed.name += f" #{same[timed.name]}" if same[timed.name] > 1 else ""
        models.append(timed)
    figures = build_speeds(first, models, **how)
    found = [accuracies.get(place) for place in range(len(models))]
    key = accuracy_key(kinds)
    if plot:
        plot_speeds(figures["models"], found, plot, ACCURACIES[key])
    return {**figures, key: found}


def read_accuracy(path: Path) -> tuple[str, float]:
    """Return the key and the value of the accuracy in a run's results.json. Raises UsageError where there is none."""
    try:
        results = json.loads(path.read_text())
        key = accuracy_key(results)
        return key, float(results[key])
    except (OSError, ValueError, KeyError, TypeError) as error:
        given = f"--results {path} holds no top1 ({type(error).__name__})"
        raise UsageError(f"{given}; give the results.json of a run for each --cfg.") from error


def plot_speeds(rows: Sequence[Figures], accuracies: Sequence[float | None], path: Path, name: str = "top-1") -> None:
    """Draw accuracy, of the models that have one, or else GFLOPs, over clips per second."""
    known = any(accuracy is not None for accuracy in accuracies)
    points = []
    for i, (row, accuracy) in enumerate(zip(rows, accuracies, strict=True)):
        if accuracy is not None or not known:
            y = row["gflops"] if accuracy is None else accuracy
            x_range = (min(row["rates"]), max(row["rates"]))
            points.append(Point(row["name"], row["clips_per_second"], y, x_range=x_range, colour=f"C{i % 10}"))
    fastest = max(points, key=lambda point: point.x)
    title = f"Fastest is {fastest.name}: {fastest.x:.3g} clips per second"
    plot_points(points, "clips per second", f"{name} (%)" if known else "GFLOPs per clip", path, title)
