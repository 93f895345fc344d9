"""The work of ``stvit_video.extract``: the features of long videos, a row for each window, by one or many processes."""

import argparse
import os
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from stvit_video.common.errors import UsageError
from stvit_video.common.progress import Progress
from stvit_video.data.clips.sampling import Sampling
from stvit_video.data.scan import read_listing
from stvit_video.data.streams import STDIN, find_sources
from stvit_video.evaluation.scores import weights_hash
from stvit_video.inference.feature_folder import FeatureFolder, Record, name_files
from stvit_video.inference.load import Trained, open_checkpoint
from stvit_video.inference.outputs import LOGITS, features_of
from stvit_video.inference.predict_videos import describe_predictor, describe_short, describe_streamed
from stvit_video.inference.predictor import Cut, Predictor
from stvit_video.runtime.world import gather_objects, join_world, on_main

LIST_SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".jsonl")
WAIT_S = 7 * 86_400  # for another process, which may have the longest videos

Todo = list[tuple[str, str]]  # of each video its absolute path and the name of its features' file


def extract_features(options: argparse.Namespace) -> int:
    """Write the features that the ``options`` of the command name; return the exit code. Raises UsageError."""
    with ExitStack() as stack:
        world = stack.enter_context(join_world(options.device, WAIT_S))
        trained = open_checkpoint(options.checkpoint, options.overrides)
        cut = cut_of(trained.input.sampler, options.window, options.step)
        output = features_of(trained.model, options.layer)
        predictor = stack.enter_context(
            Predictor(
                trained,
                device=world.device,
                precision=options.precision,
                workers=options.workers,
                output=output,
            )
        )
        folder = FeatureFolder(options.output, settings_of(options, trained, predictor), options.format)

        def begin() -> tuple[Todo, Todo]:
            videos, note = find_videos(options.videos, options.root, options.format)
            stack.enter_context(folder.claimed())
            left = [(path, file) for path, file in videos if folder.find(path, file) is None]
            print(describe_predictor(trained, predictor) + (f"\nnote: {note}" if note else ""), flush=True)
            if len(left) < len(videos):
                print(f"{len(videos) - len(left):,} of {len(videos):,} videos are done already", flush=True)
            return videos, left

        videos, left = on_main(world, begin)
        own = left[world.rank :: world.size]
        with Progress("extract", len(own), enabled=world.is_main and bool(own)) as progress:
            windows = predictor.windows([path for path, _ in own], cut)
            for i, items in groupby(windows, key=itemgetter(0)):
                path, file = own[i]
                folder.write(path, file, (item for _, item in items), cut)
                progress.advance()
        gather_objects(world, None)  # once all have written

        def end() -> int:
            records = folder.write_index(trained.classes if options.layer == LOGITS else None)
            ours = {file for _, file in videos}
            return report([record for record in records if record.file in ours], predictor, options.output)

        return on_main(world, end)


def cut_of(sampler: Sampling, window: float | None, step: float | None) -> Cut:
    """Return how videos are cut into windows: by default as long as a clip, one after another. Raises UsageError."""
    if window is None and sampler.seconds_at(1.0) is None:
        raise UsageError(
            "--window is missing: a clip of this model spans any video (DATA.SAMPLING uniform), so it has no length in "
            "time; give --window SECONDS."
        )

    def cut(fps: float) -> tuple[float, float]:
        length = window or sampler.seconds_at(fps) or 0.0
        return length, step or length

    return cut


def settings_of(options: argparse.Namespace, trained: Trained, predictor: Predictor) -> dict[str, object]:
    """Return all that the features depend on, but the videos."""
    return {
        "layer": options.layer,
        "window": options.window,
        "step": options.step,
        "format": options.format,
        "model": str(trained.model.name),
        "weights": weights_hash(trained.model.state_dict()),
        "precision": predictor.precision,
        **trained.input.settings,
    }


def find_videos(names: Sequence[str], root: Path | None, kind: str) -> tuple[Todo, str]:
    """Return the videos that lists, folders and files name, and a note on what folders hold beside videos.

    ``root`` is where relative paths in lists start; by default the folder of the list. Raises UsageError.
    """
    lists = [name for name in names if name.lower().endswith(LIST_SUFFIXES) and not os.path.isdir(name)]
    if root is not None and not lists:
        ends = ", ".join(LIST_SUFFIXES)
        raise UsageError(f"--root {root} is where paths in lists start, and none is given ({ends}); leave it out.")
    paths: list[str] = []
    bases: list[str] = []  # of each name the folder in which its videos lie
    notes: list[str] = []
    for name in names:
        if name in lists:
            base = os.path.abspath(root or os.path.dirname(name))
            listed, *_ = read_listing(Path(name), Path(base))
            found = [os.path.abspath(video.path) for video in listed]
            outside = [path for path in found if os.path.commonpath([path, base]) != base]
            bases += map(os.path.dirname, found) if outside else [base]
        else:
            files, live, unused = find_sources([name])
            if live is not None or files == [STDIN]:
                raise UsageError(f"{name} is a stream, a camera or a pipe; give files, folders or lists of videos.")
            found = [os.path.abspath(path) for path in files]
            base = os.path.abspath(name)
            bases += [base] if os.path.isdir(name) and found != [base] else map(os.path.dirname, found)
            notes += [unused] if unused else []
        paths += found
    paths = list(dict.fromkeys(paths))
    files = name_files(paths, os.path.commonpath(bases), kind)
    return list(zip(paths, files, strict=True)), "; ".join(notes)


def report(records: Sequence[Record], predictor: Predictor, output: Path) -> int:
    """Print what there is of the videos now, and return the exit code."""
    rows, short, streamed = (sum(getattr(record, name) for record in records) for name in ("rows", "short", "streamed"))
    failed = sum(record.error is not None for record in records)
    print(describe_short(short, rows, "windows", predictor), end="")
    print(describe_streamed(streamed, rows, predictor), end="")
    end = f"; {failed:,} could not be read: see {output / 'index.csv'}" if failed else ""
    print(f"{len(records) - failed:,} videos, {rows:,} rows in {output}{end}", flush=True)
    return int(failed > 0)
