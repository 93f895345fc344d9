"""What all benchmarks share: the training step that they time, interleaved rounds, and the table of their medians."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from stvit_video.common.tables import format_table
from stvit_video.runtime.precision import autocast

COMPILED = {"none": "eager", "blocks": "blocks compiled", "model": "compiled"}  # COMPILE in words
Figures = dict[str, Any]  # what was measured, as a benchmark's --output holds it


def describe_conditions(figures: Mapping[str, Any]) -> str:
    """Return ``precision`` and ``compiled`` in words."""
    return f"{figures['precision']}, {COMPILED[figures['compiled']]}"


def train_step(
    model: nn.Module, optimizer: Optimizer, clips: Tensor, labels: Tensor, precision: str, clip: float = 0, **loss: Any
) -> Tensor:
    """Take a bare training step on clips (B, 3, T, H, W), and return its loss.

    ``clip`` is the largest norm of the gradients, 0 for any; ``loss`` are options of cross_entropy.
    """
    with autocast(clips.device, precision):
        logits = model(clips)
    value = F.cross_entropy(logits.float(), labels, **loss)
    value.backward()
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value.detach()


def timed(work: Callable[[], Iterable[Any]], count: Callable[[Any], int]) -> Callable[[], float]:
    """Return a timer of ``work``: the seconds per item, of which each of its results holds ``count`` items."""

    def run() -> float:
        started = time.perf_counter()
        done = sum(map(count, work()))
        return (time.perf_counter() - started) / max(1, done)

    return run


def run_rounds(timers: Sequence[Callable[[], Any]], rounds: int, uncounted: int = 1) -> list[list[Any]]:
    """Run all timers in turn, round after round; return what each measured, without the first ``uncounted`` rounds."""
    measured = [[timer() for timer in timers] for _ in range(uncounted + rounds)]
    return [list(found) for found in zip(*measured[uncounted:], strict=True)]


def measure_steps(title: str, item: str, timers: Mapping[str, Callable[[], float]], rounds: int) -> list[Figures]:
    """Run timers of seconds per item in rounds, and print a table of medians and ranges below its title.

    Return the name of each step, its milliseconds in each round, and the ratio of its median to that of the first step.
    """
    steps, rows = [], []
    measured = run_rounds(list(timers.values()), rounds)
    for name, seconds in zip(timers, measured, strict=True):
        middle = median(seconds)
        milliseconds = [1000 * taken for taken in seconds]
        ratio = middle / median(measured[0])
        steps.append({"name": name, "milliseconds": milliseconds, "ratio": ratio})
        figures = f"{1000 * middle:.1f}", min_to_max(milliseconds), f"{1 / middle:.1f}", f"{ratio:.2f}"
        rows.append((name, *figures))
    headers = ("", f"ms per {item}", "min to max", f"{item}s/s", "ratio")
    print(f"{title}\n{format_table(headers, rows)}", flush=True)
    return steps


def min_to_max(values: Sequence[float], digits: int = 1) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"
