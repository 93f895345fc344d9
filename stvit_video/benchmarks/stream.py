"""Decisions over a moving window: by a stream, by windows of the same model, and by windows of its dense baseline."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from stvit_video.benchmarks.models import MIN_ROUND_S, peak_memory
from stvit_video.benchmarks.rounds import Figures, describe_conditions, min_to_max, run_rounds
from stvit_video.common.errors import UsageError
from stvit_video.common.tables import format_table, three_digits
from stvit_video.data import open_video
from stvit_video.data.clips.transforms import TestViews
from stvit_video.data.loader import build_test_views
from stvit_video.models.arguments import ViTArguments, read_rules
from stvit_video.models.zoo import build_model, create_model
from stvit_video.runs.lists import KINETICS_CLASSES
from stvit_video.runtime.parallel import compile_model
from stvit_video.runtime.precision import HALF, set_precision
from stvit_video.runtime.world import pick_device

Groups = Iterator[Tensor]  # the frames (1, 3, n, H, W) from one decision to the next, endlessly; first a whole window
Decide = Callable[[Tensor], Tensor]  # from a first window, and then from each next group, to logits (classes,)


def build_stream_figures(cfg: CfgNode, video: Path | None, rounds: int) -> Figures:
    """Measure decisions of a model of the streaming form in three ways, and print the tables; return the figures.

    Frames lie in memory, and with ``video`` are also read from that file: each frame once, whatever the way. Raises
    UsageError for a model of another form, a file that is too short, or DEVICE cuda where there is none.
    """
    device, precision = pick_device(cfg.DEVICE, 0, 1), cfg.PRECISION
    set_precision(device, precision)
    if not cfg.MODEL.STREAMING:
        raise UsageError("MODEL.STREAMING is not set; a stream takes a model of that form: add MODEL.STREAMING True.")
    model: Any = build_model(cfg, cfg.MODEL.NUM_CLASSES or KINETICS_CLASSES)
    kind = HALF.get(precision, torch.float32)
    own = {key: value for key, value in model.arguments.items() if key in read_rules(ViTArguments)}
    dense = create_model(model.name.removeprefix("stvit_"), **own)
    for each in (model, dense):
        compile_model(each.to(device, kind).eval(), cfg.COMPILE, dynamic=False)
    stream = model.stream()
    if cfg.COMPILE == "model":
        stream.compile(dynamic=False)
    ways: dict[str, Decide] = {
        "stream": lambda frames: stream.push(frames)[0, -1],
        "windows": slide(model),
        f"windows of {dense.name}": slide(dense),
    }
    views = build_test_views(cfg, 1, 1)
    sources: dict[str, Callable[[], Groups]] = {"frames in memory": partial(random_groups, views, stream.group)}
    if video is not None:
        sources[f"frames of {video.name}"] = partial(read_groups, video, views, stream.group, cfg.DATA.STRIDE)
    figures: Figures = {"device": device.type, "precision": precision, "compiled": cfg.COMPILE, "group": stream.group}
    figures["sources"] = {
        source: measure(ways, partial(moved, groups, device, kind), rounds, device)
        for source, groups in sources.items()
    }
    how = f"{device.type}, {describe_conditions(figures)}"
    size = "x".join(map(str, model.input_size))
    print(f"{model.name}, windows of {size}, a decision every {stream.group} frames; {how}")
    print("\n".join(describe(source, rows) for source, rows in figures["sources"].items()), flush=True)
    return figures


def slide(model: Any) -> Decide:
    """Return the way of a moving window: the model computes all of its frames for each decision."""
    length = model.input_size[0]
    window = torch.empty(0)

    def decide(frames: Tensor) -> Tensor:
        nonlocal window
        new = frames.shape[2]
        window = frames if new == length else torch.cat([window[:, :, new:], frames], dim=2)
        logits: Tensor = model(window)[0]
        return logits

    return decide


def moved(groups: Callable[[], Groups], device: torch.device, kind: torch.dtype) -> Groups:
    """Yield frames on the model's device, in its precision."""
    return (frames.to(device, kind) for frames in groups())


def random_groups(views: TestViews, group: int) -> Groups:
    """Yield frames that lie in memory."""
    sizes = [views.frames, *[group] * views.frames]
    window, *groups = (torch.randn(1, 3, n, views.size, views.size) for n in sizes)
    return chain([window], cycle(groups))


def read_groups(path: Path, views: TestViews, group: int, stride: int) -> Groups:
    """Yield the frames of a file, every ``stride``-th of them, from its start again where it ends."""
    with open_video(path, short_side=views.short_side) as video:
        if video.length < (views.frames + group) * stride:
            raise UsageError(
                f"--video {path} has {video.length} frames; give one of {(views.frames + group) * stride} or more."
            )
        n, start = views.frames, 0
        while True:
            if start + n * stride > video.length:
                start = 0
            pixels = views.prepare(video.frames(range(start, start + n * stride, stride)))
            clip = torch.empty(1, 3, n, views.size, views.size)
            replace(views, frames=n, crops=1).finish(pixels, (), clip)
            yield clip
            start, n = start + n * stride, group


def measure(ways: dict[str, Decide], groups: Callable[[], Groups], rounds: int, device: torch.device) -> list[Figures]:
    """Time decisions from before their frames are taken to their logits; return the figures of each way."""
    first = list(islice(groups(), 3))
    with torch.inference_mode():
        stream, windows, *_ = ([way(frames) for frames in first][-1].float() for way in ways.values())
    difference = float((stream - windows).abs().max() / windows.abs().max())
    rows: list[Figures] = []
    timers: list[Callable[[], list[float]]] = []
    for name, way in ways.items():
        decide = partial(timed_decision, way, groups(), device)
        decide()  # the window before the first group
        timers.append(partial(repeat, decide, max(1, int(MIN_ROUND_S / decide()))))
        rows.append({"name": name, "memory": peak_memory(lambda _, decide=decide: decide(), 1, device)})  # type: ignore[misc]
    for row, found in zip(rows, run_rounds(timers, rounds), strict=True):
        taken = sorted(1000 * seconds for times in found for seconds in times)
        rates = [len(times) / sum(times) for times in found]
        row |= {"latencies": taken, "rates": rates, "decisions_per_second": median(rates), "difference": difference}
        row |= {f"p{quantile}_ms": taken[quantile * len(taken) // 100] for quantile in (50, 95)}
    for row in rows:
        row["ratio"] = row["decisions_per_second"] / rows[-1]["decisions_per_second"]
    return rows


def timed_decision(way: Decide, frames: Groups, device: torch.device) -> float:
    """Return the seconds of a decision."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    with torch.inference_mode():
        way(next(frames))
    wait()
    return time.perf_counter() - started


def repeat(decide: Callable[[], float], count: int) -> list[float]:
    return [decide() for _ in range(count)]


def describe(source: str, rows: list[Figures]) -> str:
    """Return the table of a source, and how far decisions of the stream are from those of windows."""
    columns = (source, "decisions/s", "min to max", "p50 ms", "p95 ms", "MB", "ratio")
    cells = [
        (
            row["name"],
            three_digits(row["decisions_per_second"]),
            min_to_max(row["rates"], 2),
            *(three_digits(row[key]) for key in ("p50_ms", "p95_ms")),
            "-" if row["memory"] is None else f"{1000 * row['memory']:.0f}",
            f"{row['ratio']:.2f}",
        )
        for row in rows
    ]
    return (
        f"{format_table(columns, cells)}\nMB: of a decision, without the weights. The stream's logits differ from its "
        f"windows' by {rows[0]['difference']:.1e} of the largest."
    )
