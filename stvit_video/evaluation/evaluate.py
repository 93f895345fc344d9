"""Multi-view testing: each video scored once, or listed as failed, for any number of processes."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stvit_video.common.charts import plot_confusion
from stvit_video.common.errors import RunFailure, Stopped, UsageError
from stvit_video.common.progress import Progress
from stvit_video.data.failures import Failure, check_failures
from stvit_video.data.lists.videos import build_classes
from stvit_video.data.loader import build_test_loader
from stvit_video.evaluation.metrics import Predictions
from stvit_video.evaluation.score_cache import Parts, Row, fingerprint, weights_hash
from stvit_video.models.cost import Cost
from stvit_video.models.zoo import build_model
from stvit_video.runs.folder import RunFolder
from stvit_video.runs.log import describe_results
from stvit_video.runs.preflight import build_cost, build_data, check_inputs, check_model, report_lists, report_model
from stvit_video.runs.weights import load_tested
from stvit_video.runtime.parallel import compile_model
from stvit_video.runtime.precision import autocast, set_precision
from stvit_video.runtime.stopping import StopSignals
from stvit_video.runtime.world import World, any_of, gather_objects, is_told, on_main, tell_all

STOP = "stop"  # a note among the processes


class NothingReadError(UsageError):
    """No video of a list could be read; ``failures`` says why not."""

    def __init__(self, message: str, failures: list[Failure]) -> None:
        super().__init__(message)
        self.failures = failures


def class_probabilities(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the map from clips (B, 3, T, H, W) to class probabilities (B, classes) of a network, set to evaluation.

    ``model`` is the bare network: nothing is exchanged between processes until the end, so their shares may differ.
    """
    model.eval()
    return lambda clips: model(clips).float().softmax(dim=1)


@torch.no_grad()
def describe_videos(
    describe: Callable[[Tensor], Tensor],
    loader: DataLoader,
    world: World,
    precision: str,
    title: str = "",
    *,
    parts: Parts | None = None,
    signals: StopSignals | None = None,
) -> Predictions:
    """Average the rows ``describe(clips)`` over the views of each video of a list, the same on every process.

    Progress is shown where there is a ``title``. What ``parts`` holds is not computed again. Raises Stopped after a
    signal to stop, when the ``parts`` are written.
    """
    kept = on_main(world, parts.read) if parts is not None else []
    loader.batch_sampler.done = {int(indices[0]) for indices, *_ in kept}  # type: ignore[union-attr]
    rows: list[Row] = []
    failures: list[Failure] = []
    done, started = 0, time.monotonic()
    with Progress(title, len(loader), enabled=bool(title) and world.is_main) as progress:
        for batch in loader:
            failures += batch.failures
            if len(batch.labels):
                clips = batch.to(world.device).clips
                with autocast(world.device, precision):
                    figures = describe(clips).float()
                views = len(figures) // len(batch.labels)
                rows.append((batch.indices, batch.labels, figures.unflatten(0, (-1, views)).mean(dim=1).cpu()))
                if parts is not None and not batch.failures:
                    parts.add(rows[-1])
                done += len(batch.labels)
            progress.advance(f"{done / (time.monotonic() - started):.1f} videos/s")
            if signals is not None and stop_is_asked(world, signals):
                break
    if signals is not None and any_of(world, signals.received is not None):
        if parts is not None:
            parts.flush()
        scored = sum(len(indices) for indices, *_ in itertools.chain(kept, *gather_objects(world, rows)))
        raise Stopped(signals.received, f"{scored} of {len(loader.dataset)} videos")  # type: ignore[arg-type]
    shares = gather_objects(world, (rows, failures))
    predictions = _join([(kept, []), *shares], len(loader.dataset))  # type: ignore[arg-type]
    predictions.kept = sum(len(indices) for indices, *_ in kept)
    return predictions


def stop_is_asked(world: World, signals: StopSignals) -> bool:
    """Say whether any process was told to stop; shares differ in length, so none waits here for another's batch."""
    if signals.received is not None:
        tell_all(world, STOP)
        return True
    return is_told(world, STOP)


def _join(shares: list[tuple[list[Row], list[Failure]]], total: int) -> Predictions:
    """Put the processes' shares into list order and make sure that no video is missing or counted twice."""
    rows = [row for share, _ in shares for row in share]
    failures = [failure for _, share in shares for failure in share]
    if not rows:
        shown = failures[0] if failures else None
        raise NothingReadError(
            f"None of the {total} videos could be read, the first failure being {shown and shown.path}: "
            f"{shown and shown.message}. Check DATA.ROOT and the list.",
            failures,
        )
    indices, labels, scores = (torch.cat(column) for column in zip(*rows, strict=True))
    order = indices.argsort()
    strange = ~scores.isfinite().all(dim=1)
    if strange.any():
        raise RunFailure(
            f"The scores of {int(strange.sum())} of {len(scores)} videos are not finite, the first of them at place "
            f"{int(indices[strange].min()) + 1} of the list; use PRECISION fp32, or other weights."
        )
    assert len(indices.unique()) == len(indices) == total - len(failures), "a video was lost or counted twice"
    return Predictions(scores[order], labels[order], indices[order], total, failures)


def test_model(
    cfg: CfgNode,
    world: World,
    folder: RunFolder,
    model: nn.Module,
    cost: Cost,
    loader: DataLoader,
    classes: list[str],
    earlier: list[Failure],
    signals: StopSignals,
) -> dict[str, Any]:
    """Test ``model`` with all views; write results, tables, failures and confusion matrix; return the results.

    A test that was interrupted goes on. Raises Stopped, with nothing lost, after a signal to stop.
    """
    started = time.monotonic()
    dataset: Any = loader.dataset
    key = fingerprint(model, weights_hash(model), dataset, cfg.PRECISION, 0)
    parts = Parts(folder.parts, f"{key} in batches of {loader.batch_sampler.batch}", world.rank)  # type: ignore[union-attr]
    try:
        probabilities = class_probabilities(model)
        predictions = describe_videos(probabilities, loader, world, cfg.PRECISION, "test", parts=parts, signals=signals)
    except NothingReadError as error:
        rows = earlier + error.failures
        on_main(world, lambda: folder.write_failures(rows))
        raise
    seconds = time.monotonic() - started
    views = cfg.TEST.CLIPS * cfg.TEST.CROPS
    fresh = len(predictions.labels) - predictions.kept
    results = {
        "model": cfg.MODEL.NAME,
        "top1": predictions.top(1),
        "top5": predictions.top(5),
        "coverage": predictions.coverage,
        "videos": predictions.total,
        "scored": len(predictions.labels),
        "failed": len(predictions.failures),
        "views": {"clips": cfg.TEST.CLIPS, "crops": cfg.TEST.CROPS},
        "parameters": cost.parameters,
        "gflops": cost.gflops,
        "gflops_per_video": cost.gflops * views,
        "clips_per_second": fresh * views / seconds if fresh else None,  # of this process's start, not of earlier ones
        "precision": cfg.PRECISION,
        "processes": world.size,
    }

    def write() -> dict[str, Any]:
        folder.write_failures(earlier + predictions.failures)
        check_failures(len(predictions.failures), predictions.total, cfg.DATA.MAX_FAILURES, "test")
        folder.write_table("per_class.csv", predictions.per_class(classes))
        folder.write_table("predictions.csv", predictions.rows([video.path for video in dataset.videos], classes))
        folder.write_results(results)
        plot_confusion(predictions.confusion(), classes, folder.path / "confusion.png")
        parts.clear()
        print(f"{describe_results(results)}\nresults in {folder.results}", flush=True)
        return results

    return on_main(world, write)


def test(cfg: CfgNode, world: World) -> None:
    """Run MODE test: the weights of MODEL.INIT, or else those that OUTPUT_DIR holds."""
    check_model(cfg)
    build_data(cfg, world)
    check_inputs(cfg)
    folder = RunFolder(cfg.OUTPUT_DIR)
    classes = build_classes(cfg)
    model = build_model(cfg, len(classes))
    report = load_tested(cfg, folder, model)
    cost = build_cost(cfg, model)
    set_precision(world.device, cfg.PRECISION)
    compile_model(model, cfg.COMPILE)
    # Before anything is written: a wrong list is said here.
    loader = build_test_loader(cfg, world, "test", len(classes), clips=cfg.TEST.CLIPS, crops=cfg.TEST.CROPS)
    on_main(world, lambda: folder.claim(cfg))
    if cfg.MODEL.INIT:  # else the report is of this folder's own weights
        on_main(world, lambda: folder.write_load_report(report.to_json()))
    if world.is_main:
        print(report, flush=True)
        report_model(cfg, cost, world, len(classes))
        report_lists({"test": loader})
    with StopSignals(world.launched) as signals:
        test_model(cfg, world, folder, model.to(world.device), cost, loader, classes, [], signals)
