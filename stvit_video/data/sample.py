"""Generate a sample set: ``python -m stvit_video.data.sample [--root FOLDER] [--set NAME] [--seed NUMBER]``.

Sets are short H.264 videos of moving sprites, generated once, for users without data.

The videos of ``sample`` have two label sets: ``motion``, which no single frame shows, and ``shape``, that of the
sprite. A folder of stills serves image models. ``sample_hard`` has one label set, ``motion_shape``, see ``sprites``.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from stvit_video.common.cli import Parser, number, run_command
from stvit_video.common.errors import RunFailure, UsageError
from stvit_video.common.files import whole_file, write_atomically
from stvit_video.common.locks import Lock
from stvit_video.common.progress import Progress
from stvit_video.data import sprites
from stvit_video.data.sprites import MOTIONS, SHAPES
from stvit_video.runtime.limits import describe_memory, usable_cores

SETS = {"sample": (3072, 256, 512), "sample_hard": (3072, 64, 2048)}  # videos per split
LABELS = {  # of each set: the names of the classes, and how many consecutive videos are of one
    "sample": {"motion": (MOTIONS, 1), "shape": (SHAPES, len(MOTIONS))},
    "sample_hard": {"motion_shape": (sprites.CLASSES, 1)},
}
SPLITS = ("train", "val", "test")
RECORD, LOCK = "sample.json", ".lock"


@dataclass(frozen=True)
class Spec:
    """What a folder holds; recorded in it, so that another set, seed or size is not taken for it."""

    clips: tuple[int, int, int] = SETS["sample"]
    stills: tuple[int, int] = (4096, 512)  # to train and test on; only of "sample"
    seed: int = 0
    version: int = 1  # increase it with every change of what is drawn
    name: str = "sample"


def video_labels(index: int) -> tuple[str, str]:
    """Return motion and shape of the ``index``-th video of a split, which cycles through all 64 pairs."""
    return MOTIONS[index % len(MOTIONS)], SHAPES[index // len(MOTIONS) % len(SHAPES)]


def write_video(path: Path, frames: sprites.Image, rate: int | Fraction = 10) -> None:
    """Write frames (N, H, W, 3) as H.264, complete or not at all, ``rate`` a second."""
    import av

    with whole_file(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        # One thread and no lookahead make the bytes depend on the frames alone. With macroblock trees, x264 gave about
        # one file in a hundred different content for the same frames.
        options = {"crf": "20", "preset": "veryfast", "x264-params": "mbtree=0:rc-lookahead=0:sync-lookahead=0"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


# A file of a set is named by its kind and an index. Kinds 0 to 2 are videos of a split, 3 and 4 stills to train and to
# test on. With the seed, kind and index determine the content, whichever process writes the file.


def _path_of(root: Path, kind: int, index: int) -> Path:
    split = SPLITS[kind % len(SPLITS)]
    if kind < len(SPLITS):
        return root / f"videos/{split}_{index:05d}.mp4"
    return root / f"stills/{split}/{SHAPES[index % len(SHAPES)]}/{index:05d}.png"


def _write_file(root: Path, spec: Spec, file: tuple[int, int]) -> None:
    kind, index = file
    path = _path_of(root, kind, index)
    rng = np.random.default_rng([spec.seed, kind, index])
    motion, shape = video_labels(index)
    if spec.name == "sample_hard":
        write_video(path, sprites.draw_hard(sprites.CLASSES[index % len(sprites.CLASSES)], rng))
    elif kind < len(SPLITS):
        write_video(path, sprites.draw(shape, sprites.trajectory(motion, rng), rng))
    else:
        (still,) = sprites.draw(SHAPES[index % len(SHAPES)], sprites.trajectory(motion, rng, frames=1), rng)
        with whole_file(path) as temporary:
            Image.fromarray(still).save(temporary, format="PNG")


def prepare(root: str | Path, spec: Spec | None = None, *, workers: int | None = None, progress: bool = True) -> None:
    """Generate what is missing of the set in ``root``, with ``LABELS/SPLIT.csv`` (lines `path label`) and class names.

    Another process that does so is waited for. Raises UsageError where ``root`` holds something else.
    """
    root, spec = Path(root), spec or Spec()
    if not find_missing(root, spec) and is_complete(root):
        return
    lock = Lock(root / LOCK)
    try:
        lock.take(math.inf, lambda holder: f"waiting for {holder}, which generates {root}")
    except OSError as error:
        raise UsageError(f"{root} cannot be written ({error.strerror}); give another DATA.ROOT.") from error
    with closing(lock):
        if (todo := find_missing(root, spec)) or not is_complete(root):
            _generate(root, spec, todo, workers, progress)


def find_missing(root: Path, spec: Spec) -> list[tuple[int, int]]:
    """Return kind and index of each file of the set that is not there. Raises UsageError for another set."""
    record = root / RECORD
    content = json.dumps(asdict(spec))
    if record.is_file():
        try:
            found = {"name": "sample", **json.loads(record.read_text())}  # records of older versions name no set
        except (ValueError, TypeError, RecursionError):  # older versions could be stopped while they wrote it
            found = {}
        if found != json.loads(content):
            raise UsageError(
                f"{root} holds the sample set {found}; asked for {content}. Delete it or give another DATA.ROOT."
            )
    elif root.is_file() or (root.is_dir() and any(not _is_temporary(path) for path in root.iterdir())):
        raise UsageError(f"{root} exists but holds no sample set; give another DATA.ROOT or an empty folder.")
    counts = (*spec.clips, *(spec.stills if spec.name == "sample" else ()))
    paths = {(kind, i): _path_of(root, kind, i) for kind, count in enumerate(counts) for i in range(count)}
    return [file for file, path in paths.items() if not path.is_file() or path.stat().st_size == 0]


def _is_temporary(path: Path) -> bool:
    return path.suffix == ".tmp" or path.name.startswith(LOCK)


@contextmanager
def _safe_start() -> Iterator[None]:
    """Have processes that are spawned look for no modules in the current folder, which may hold files of others."""
    name = "PYTHONSAFEPATH"  # of Python 3.11
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        os.environ.update({} if before is None else {name: before})


def _generate(root: Path, spec: Spec, todo: list[tuple[int, int]], workers: int | None, progress: bool) -> None:
    if not (root / RECORD).exists():
        write_atomically(root / RECORD, json.dumps(asdict(spec)).encode())
    for folder in {_path_of(root, *file).parent for file in todo}:
        folder.mkdir(parents=True, exist_ok=True)
    # Threads of torch and decord do not survive a fork, so the workers are spawned.
    processes = min(workers or usable_cores(), len(todo) // 16 + 1)
    with (
        _safe_start(),
        ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool,
        Progress(f"sample set in {root}", len(todo), enabled=progress) as bar,
    ):
        try:
            for _ in pool.map(partial(_write_file, root, spec), todo, chunksize=16):
                bar.advance()
        except BrokenProcessPool:
            raise RunFailure(
                f"one of {processes} processes that write {root} was killed, as systems do where memory is short; "
                f"{describe_memory()}; the same command writes the files that are missing"
            ) from None
    for labels, (names, repeats) in LABELS[spec.name].items():
        folder = root / labels
        folder.mkdir(exist_ok=True)
        write_atomically(folder / "classes.txt", ("\n".join(names) + "\n").encode())
        for split, count in zip(SPLITS, spec.clips, strict=True):
            rows = [f"videos/{split}_{i:05d}.mp4 {i // repeats % len(names)}\n" for i in range(count)]
            write_atomically(folder / f"{split}.csv", "".join(rows).encode())
    write_atomically(root / "complete", b"")


def is_complete(root: str | Path) -> bool:
    """Say whether ``root`` holds a whole generated set."""
    return (Path(root) / "complete").exists()


def generate(arguments: Sequence[str] | None) -> int:
    """Parse the arguments and generate the set."""
    parser = Parser(__doc__)
    parser.add_argument("--root", help="folder to write to (default: data/NAME)")
    parser.add_argument("--set", default="sample", choices=SETS, help="which one (default: %(default)s)")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="same seed, same files (default: %(default)s)")
    options = parser.parse_args(arguments)
    root = options.root or f"data/{options.set}"
    try:
        prepare(root, Spec(SETS[options.set], seed=options.seed, name=options.set))
    except OSError as error:
        raise UsageError(f"--root {root} cannot be written ({error.strerror or error}); give another.") from error
    return 0


main = partial(run_command, generate, stopped="stopped; the same command continues")


if __name__ == "__main__":
    sys.exit(main())
