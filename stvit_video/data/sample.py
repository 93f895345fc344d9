"""The sample sets: short H.264 videos of moving sprites, generated once, for someone with nothing downloaded.

Of ``sample`` two label sets describe the same videos: ``motion``, which no single frame tells, and ``shape``, what the
sprite is. A folder of stills serves image models. ``sample_hard`` has one label set, ``motion_shape``: one large sprite
among small ones that move otherwise, before a cluttered background, seen by a moving camera.

    python -m stvit_video.data.sample --root data/sample
    python -m stvit_video.data.sample --set sample_hard --root data/sample_hard
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stvit_video.common.cli import Parser, run_command
from stvit_video.common.errors import UsageError
from stvit_video.common.progress import Progress
from stvit_video.data.generated import hard as sample_hard
from stvit_video.data.generated.sprites import MOTIONS, SHAPES, Image, draw, sprite_cover, trajectory

SETS = {"sample": (3072, 256, 512), "sample_hard": (3072, 64, 2048)}  # videos to train, validate and test on
SPLITS = ("train", "val", "test")
RATE = 10  # frames a second
VERSION = 1  # raise with every change of what is drawn


@dataclass(frozen=True)
class Spec:
    """What a folder holds; written beside it, so that another set, seed or size is never mistaken for it."""

    clips: tuple[int, int, int] = SETS["sample"]
    stills: tuple[int, int] = (4096, 512)  # of "sample" only
    seed: int = 0
    version: int = VERSION
    name: str = "sample"


def sprite_mask(split: str, index: int, seed: int = 0) -> NDArray[np.bool_]:
    """Return where the sprite is in the ``index``-th video of ``split``: (FRAMES, SIDE, SIDE), True on the sprite."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    motion, shape = video_labels(index)
    return sprite_cover(shape, trajectory(motion, rng)) > 0.5


def video_labels(index: int) -> tuple[str, str]:
    """Return motion and shape of the ``index``-th video of a split: all 64 pairs in turn."""
    return MOTIONS[index % len(MOTIONS)], SHAPES[index // len(MOTIONS) % len(SHAPES)]


def label_sets(name: str) -> dict[str, tuple[Sequence[str], Callable[[int], str]]]:
    """Return the label sets of a set: names of their classes, and the class of the ``index``-th video of a split."""
    if name == "sample_hard":
        return {"motion_shape": (sample_hard.CLASSES, sample_hard.video_class)}
    return {"motion": (MOTIONS, lambda index: video_labels(index)[0]), "shape": (SHAPES, lambda i: video_labels(i)[1])}


def write_video(path: Path, frames: Image, rate: int | Fraction = RATE) -> None:
    """Write frames (N, H, W, 3) as H.264, complete or not at all."""
    import av

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with av.open(str(temporary), "w", format="mp4") as container:
            # One thread and no lookahead: the bytes then depend on the frames alone. With macroblock trees, x264 gave
            # about one file in a hundred another content from the same frames.
            options = {"crf": "20", "preset": "veryfast", "x264-params": "mbtree=0:rc-lookahead=0:sync-lookahead=0"}
            stream = container.add_stream("libx264", rate=rate, options=options)
            stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
            stream.thread_count = 1
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_still(path: Path, image: Image) -> None:
    """Write one frame (H, W, 3) as PNG, complete or not at all."""
    from PIL import Image as PillowImage

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        PillowImage.fromarray(image).save(temporary, format="PNG")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Job:
    """One file to make. Its content follows from seed, kind and index, not from who makes it or when."""

    path: str
    kind: int  # 0 to 2: videos of a split; 3 and 4: stills to train and to test on
    index: int
    seed: int
    name: str

    def __call__(self) -> None:
        rng = np.random.default_rng([self.seed, self.kind, self.index])
        motion, shape = video_labels(self.index)
        if self.name == "sample_hard":
            write_video(Path(self.path), sample_hard.draw(sample_hard.video_class(self.index), rng))
        elif self.kind < len(SPLITS):
            write_video(Path(self.path), draw(shape, trajectory(motion, rng), rng))
        else:
            shape = SHAPES[self.index % len(SHAPES)]
            write_still(Path(self.path), draw(shape, trajectory(motion, rng, frames=1), rng)[0])


def jobs(root: Path, spec: Spec) -> Iterator[Job]:
    """Yield every file of the set: videos in one flat folder, stills in class folders."""
    for kind, (split, count) in enumerate(zip(SPLITS, spec.clips, strict=True)):
        for i in range(count):
            yield Job(str(root / "videos" / f"{split}_{i:05d}.mp4"), kind, i, spec.seed, spec.name)
    stills = spec.stills if spec.name == "sample" else (0, 0)
    for kind, (split, count) in enumerate(zip(("train", "val"), stills, strict=True), start=len(SPLITS)):
        for i in range(count):
            shape = SHAPES[i % len(SHAPES)]
            yield Job(str(root / "stills" / split / shape / f"{i:05d}.png"), kind, i, spec.seed, spec.name)


def write_lists(root: Path, spec: Spec) -> None:
    """Write ``LABELS/SPLIT.csv`` (lines `path label`) and ``LABELS/classes.txt`` for each label set."""
    for labels, (names, class_of) in label_sets(spec.name).items():
        folder = root / labels
        folder.mkdir(exist_ok=True)
        (folder / "classes.txt").write_text("\n".join(names) + "\n")
        for split, count in zip(SPLITS, spec.clips, strict=True):
            rows = [f"videos/{split}_{i:05d}.mp4 {names.index(class_of(i))}\n" for i in range(count)]
            (folder / f"{split}.csv").write_text("".join(rows))


def prepare(root: str | Path, spec: Spec | None = None, *, workers: int | None = None, progress: bool = True) -> None:
    """Make sure that ``root`` holds the whole set: nothing to do, all to do, or what an interrupted call left.

    Raises UsageError where ``root`` holds something else.
    """
    root, spec = Path(root), spec or Spec()
    record = root / "sample.json"
    _check_root(root, record, spec)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{root} cannot be written ({error.strerror}); give another DATA.ROOT.") from error
    content = json.dumps(asdict(spec))
    if not record.exists():
        record.write_text(content)
    todo = [job for job in jobs(root, spec) if not _is_there(Path(job.path))]
    if not todo and is_complete(root):
        return
    for folder in {Path(job.path).parent for job in todo}:
        folder.mkdir(parents=True, exist_ok=True)
    _run(todo, workers or os.cpu_count() or 1, progress, str(root))
    write_lists(root, spec)
    (root / "complete").touch()


def is_complete(root: str | Path) -> bool:
    """Return whether ``root`` holds a whole generated set."""
    return (Path(root) / "complete").exists()


def _check_root(root: Path, record: Path, spec: Spec) -> None:
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return
    if not record.is_file():
        raise UsageError(f"{root} exists but holds no sample set; give another DATA.ROOT or an empty folder.")
    try:
        found = {"name": "sample", **json.loads(record.read_text())}  # earlier records name no set: there was one
    except json.JSONDecodeError:
        record.unlink()  # cut short while being written, before anything else was
        return
    if found != json.loads(json.dumps(asdict(spec))):
        raise UsageError(
            f"{root} holds the sample set {found}; asked for {asdict(spec)}. "
            f"Delete the folder or give another DATA.ROOT."
        )


def _is_there(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _run(todo: Sequence[Job], workers: int, progress: bool, root: str) -> None:
    # Threads of torch and decord do not survive a fork, so workers start fresh.
    with (
        ProcessPoolExecutor(min(workers, len(todo) // 16 + 1), mp_context=get_context("spawn")) as pool,
        Progress(f"sample set in {root}", len(todo), enabled=progress) as bar,
    ):
        for _ in pool.map(Job.__call__, todo, chunksize=16):
            bar.advance()


def generate(arguments: Sequence[str] | None) -> int:
    """Parse the arguments and make sure that the set is there."""
    parser = Parser(
        prog="python -m stvit_video.data.sample",
        form="[--root FOLDER] [--set NAME] [--seed NUMBER]",
        description="Generate a sample set of moving sprites.",
    )
    parser.add_argument("--root", help="folder to write to (default: data/NAME)")
    parser.add_argument("--set", default="sample", choices=SETS, help="which one (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files (default: %(default)s)")
    options = parser.parse_args(arguments)
    root = options.root or f"data/{options.set}"
    if options.seed < 0:
        raise UsageError(f"--seed {options.seed} is negative; give a whole number from 0.")
    try:
        prepare(root, Spec(SETS[options.set], seed=options.seed, name=options.set))
    except OSError as error:
        raise UsageError(f"--root {root} cannot be written ({error.strerror or error}); give another.") from error
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Generate the set from the command line; return the exit code."""
    return run_command(generate, arguments, stopped="stopped; the same command continues")


if __name__ == "__main__":
    sys.exit(main())
