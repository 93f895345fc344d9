"""Multi-view testing: each video scored once, or listed as failed, for any number of processes."""

import io
import itertools
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stvit_video.common.errors import RunFailure, Stopped, UsageError
from stvit_video.common.files import write_atomically, write_json
from stvit_video.common.progress import Progress
from stvit_video.data.failures import Failure, check_failures
from stvit_video.data.loader import build_test_loader
from stvit_video.data.workers import Loader, LoaderFailure
from stvit_video.evaluation.predictions import Predictions, predictions_for, probabilities
from stvit_video.evaluation.scores import PartialScores, ScoredBatch, fingerprint, weights_hash
from stvit_video.runs.fingerprint import hash_lists
from stvit_video.runs.log import describe_results
from stvit_video.runs.preflight import OpenRun
from stvit_video.runtime.parallel import compile_model
from stvit_video.runtime.precision import autocast, set_precision
from stvit_video.runtime.stopping import StopSignals
from stvit_video.runtime.world import World, any_of, any_so_far, gather_objects, on_main

STOP = "stop"  # the note that tells all processes to stop


class NothingReadError(UsageError):
    """No video of a list could be read; ``failures`` says why not."""

    def __init__(self, message: str, failures: list[Failure]) -> None:
        super().__init__(message)
        self.failures = failures


def class_probabilities(model: nn.Module, multi_label: bool = False) -> Callable[[Tensor], Tensor]:
    """Return the map from clips (B, 3, T, H, W) to class probabilities (B, classes) of a model, set to evaluation."""
    model.eval()
    return lambda clips: probabilities(model(clips), multi_label)


@torch.no_grad()
def describe_videos(
    describe: Callable[[Tensor], Tensor],
    loader: Loader,
    world: World,
    precision: str,
    title: str = "",
    *,
    partial: PartialScores | None = None,
    signals: StopSignals | None = None,
) -> Predictions:
    """Average the rows ``describe(clips)`` over the views of each video of a list, the same on every process.

    The model is not wrapped for several processes: they exchange nothing until the end, so shards may differ in length.
    Progress is shown where there is a ``title``. Scores in ``partial``, of an interrupted test, are not computed again.
    Raises Stopped after a signal to stop, when ``partial`` is written.
    """
    signals = signals or StopSignals(launched=False)  # without its context, it receives none
    kept = on_main(world, partial.read) if partial is not None else []
    loader.batch_sampler.done = {int(indices[0]) for indices, *_ in kept}
    rows: list[ScoredBatch] = []
    failures: list[Failure] = []
    done, started = 0, time.monotonic()
    with Progress(title, len(loader), enabled=bool(title) and world.is_main) as progress:
        for batch in loader.batches(lambda: signals.received is not None):
            failures += batch.failures
            if len(batch.labels):
                clips = batch.to(world.device).make_clips()
                with autocast(world.device, precision):
                    figures = batch.expand(describe(clips).float()).mean(dim=1).cpu()
                computed = torch.stack([torch.tensor(batch.different_views), batch.short.long()], dim=1)
                # Copies: one array of a batch that a worker has sent keeps the memory of all.
                rows.append((batch.indices.clone(), batch.labels.clone(), figures, computed))
                if partial is not None and not batch.failures:
                    partial.add(rows[-1])
                done += len(batch.labels)
            progress.advance(f"{done / (time.monotonic() - started):.1f} videos/s")
            # Shards differ in length, so no process waits for another's batch here.
            if any_so_far(world, STOP, signals.received is not None):
                break
    any_so_far(world, STOP, signals.received is not None)  # also where the wait for a batch was ended
    if any_of(world, signals.received is not None):
        if partial is not None:
            partial.flush()
        scored = sum(len(indices) for indices, *_ in itertools.chain(kept, *gather_objects(world, rows)))
        raise Stopped(signals.received, f"{scored} of {len(loader.dataset)} videos")
    shards = gather_objects(world, (rows, failures))
    predictions = _join([(kept, []), *shards], len(loader.dataset))
    predictions.kept = sum(len(indices) for indices, *_ in kept)
    predictions.kept_views = sum(int(computed[:, 0].sum()) for *_, computed in kept)
    return predictions


def _join(shards: list[tuple[list[ScoredBatch], list[Failure]]], total: int) -> Predictions:
    """Join the shards of all processes in list order; no video may be missing or counted twice."""
    rows = [row for shard, _ in shards for row in shard]
    failures = [failure for _, shard in shards for failure in shard]
    if not rows:
        raise NothingReadError(
            f"None of the {total} videos could be read, the first failure being {failures[0].path}: "
            f"{failures[0].message}. Check DATA.ROOT and the list.",
            failures,
        )
    indices, labels, scores, computed = (torch.cat(column) for column in zip(*rows, strict=True))
    order = indices.argsort()
    strange = ~scores.isfinite().all(dim=1)
    if strange.any():
        raise RunFailure(
            f"The scores of {int(strange.sum())} of {len(scores)} videos are not finite, the first of them at place "
            f"{int(indices[strange].min()) + 1} of the list; use PRECISION fp32, or other weights."
        )
    assert len(indices.unique()) == len(indices) == total - len(failures), "a video was lost or counted twice"
    made = predictions_for(labels)
    return made(scores[order], labels[order], indices[order], total, failures, computed[order])


@dataclass(frozen=True)
class Tester:
    """The multi-view test of a run: every view of every video of the test list, and the files that it writes."""

    run: OpenRun
    loader: Loader
    about: dict[str, Any]  # what results.json says of the run
    precision: str
    max_failures: float  # share of the list

    def test(
        self, model: nn.Module, earlier: list[Failure], signals: StopSignals, weights: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Test ``model``; write results, tables, failures and a picture; return the results.

        An interrupted test continues. ``earlier`` are failures of training, ``weights`` say which ones the model has.
        Raises Stopped after a signal to stop, when the scores so far are written.
        """
        started = time.monotonic()
        world = self.run.world
        folder, classes = self.run.folder, self.run.classes
        loader = self.loader
        key = fingerprint(model, weights_hash(model.state_dict()), loader.dataset, self.precision, 0)
        key = f"{key} in batches of {loader.batch_sampler.batch}, views counted"
        partial = PartialScores(folder.partial_scores, key, world.rank)
        how: dict[str, Any] = {"title": "test", "partial": partial, "signals": signals}
        try:
            describe = class_probabilities(model, self.run.multi_label)
            predictions = describe_videos(describe, loader, world, self.precision, **how)
        except NothingReadError as error:
            failed = earlier + error.failures
            on_main(world, lambda: folder.write_failures(failed))
            raise
        except LoaderFailure:
            partial.flush()
            raise
        scored = len(predictions.labels)
        views, short = predictions.computed.sum(dim=0).tolist()  # of all scored videos
        fresh = views - predictions.kept_views  # computed by this start, not by an earlier one
        results = {
            **self.about,
            **weights,
            "gflops_per_video": self.run.cost.gflops * views / scored,  # equal views are computed once
            **predictions.figures(),
            "coverage": predictions.coverage,
            "videos": predictions.total,
            "scored": scored,
            "failed": len(predictions.failures),
            "short_videos": short,  # of the scored ones, shorter than a clip
            "clips_per_second": fresh / (time.monotonic() - started) if fresh else None,
        }

        def write() -> dict[str, Any]:
            folder.write_failures(earlier + predictions.failures)
            check_failures(len(predictions.failures), predictions.total, self.max_failures, "test")
            paths = [video.name for video in loader.dataset.videos]
            folder.write_table("per_class.csv", predictions.per_class(classes))
            folder.write_table("predictions.csv", predictions.rows(paths, classes))
            write_json(folder.results, results)
            if self.run.multi_label:  # predictions.csv has no scores of all classes, which mAP needs
                scores = io.BytesIO()
                np.save(scores, predictions.scores.numpy())
                write_atomically(folder.path / "scores.npy", scores.getvalue())
            picture, content = predictions.picture(classes, folder.path.resolve().name)
            write_atomically(folder.path / picture, content)
            shutil.rmtree(folder.partial_scores, ignore_errors=True)
            print(f"{describe_results(results)}\nresults in {folder.results}", flush=True)
            return results

        return on_main(world, write)


def build_tester(run: OpenRun) -> Tester:
    """Return the multi-view test of a run."""
    cfg, views = run.cfg, {"clips": run.cfg.TEST.CLIPS, "crops": run.cfg.TEST.CROPS}
    about = {
        "model": cfg.MODEL.NAME,
        "views": views,
        "parameters": run.cost.parameters,
        "gflops": run.cost.gflops,
        "precision": cfg.PRECISION,
        "processes": run.world.size,
        **hash_lists(run.lists, run.classes),  # equal where lists and classes are
    }
    loader = build_test_loader(cfg, run.world, run.videos["test"], **views, label_columns=run.label_columns)
    return Tester(run, loader, about, cfg.PRECISION, cfg.DATA.MAX_FAILURES)


def build_tested_model(run: OpenRun) -> nn.Module:
    """Return the model of a run that does not train, ready for inference on the process's device."""
    set_precision(run.world.device, run.cfg.PRECISION)
    compile_model(run.model, run.cfg.COMPILE)
    return run.model.to(run.world.device)


def test(run: OpenRun) -> None:
    """Run MODE test: score the weights of MODEL.INIT, or else those that OUTPUT_DIR holds."""
    model = build_tested_model(run)
    tester = build_tester(run)
    own = run.report is not None and run.report.source == str(run.folder.weights)  # whose report is there already
    run.claim(keep_report=not own)
    with StopSignals(run.world.launched) as signals:
        tester.test(model, [], signals, run.weights)
