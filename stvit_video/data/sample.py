"""The sample set: short H.264 videos of moving sprites, generated once, for someone with nothing downloaded.

Two label sets describe the same videos. ``motion`` cannot be told from any single frame: position, angle and size of
a sprite move on circles (a torus for the position; log-size starts again small when it outgrows its range) from a
uniformly random start, so that at every time each of them is distributed alike in all classes. ``shape`` is what the
sprite is. A folder of stills serves image models.

    python -m stvit_video.data.sample --root data/sample
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stvit_video.errors import Parser, UsageError, run_command
from stvit_video.progress import Progress

MOTIONS = ("left", "right", "up", "down", "clockwise", "counter-clockwise", "growing", "shrinking")
SHAPES = ("disc", "square", "triangle", "star", "ring", "cross", "bar", "half-disc")
SPLITS = ("train", "val", "test")
SIDE, FRAMES, RATE = 64, 20, 10  # pixels, frames a video, frames a second
MIN_RADIUS, MAX_RADIUS = 12.0, 27.0  # pixels
VERSION = 1  # raise with every change of what is drawn

Float = NDArray[np.float64]
Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Spec:
    """What a folder holds; written beside it, so that another seed or size is never mistaken for it."""

    clips: tuple[int, int, int] = (3072, 256, 512)
    stills: tuple[int, int] = (4096, 512)
    seed: int = 0
    version: int = VERSION


@dataclass(frozen=True)
class State:
    """A sprite's position in pixels, angle in radians and radius in pixels, one value a frame."""

    x: Float
    y: Float
    angle: Float
    radius: Float


def trajectory(motion: str, rng: np.random.Generator, frames: int = FRAMES) -> State:
    """Draw the states of a sprite over ``frames`` frames; each frame's state alone is uniform whatever the motion."""
    phase = rng.uniform(size=4)  # of x, y, angle and log-radius, each on a circle of length 1
    speed = np.zeros(4)
    axis, sign = {
        "left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1),
        "clockwise": (2, 1), "counter-clockwise": (2, -1), "growing": (3, 1), "shrinking": (3, -1),
    }[motion]  # fmt: skip
    cycles = {0: (0.4, 0.9), 1: (0.4, 0.9), 2: (0.4, 0.7), 3: (0.5, 0.9)}[axis]  # over the whole video
    speed[axis] = sign * rng.uniform(*cycles) / FRAMES
    circle = (phase[:, None] + speed[:, None] * np.arange(frames)) % 1.0
    radius = MIN_RADIUS * (MAX_RADIUS / MIN_RADIUS) ** circle[3]
    return State(circle[0] * SIDE, circle[1] * SIDE, circle[2] * 2 * math.pi, radius)


def draw(shape: str, state: State, rng: np.random.Generator) -> Image:
    """Draw a sprite of random colours and texture on a random plain background: (frames, SIDE, SIDE, 3)."""
    light, dark = rng.uniform(180, 255, size=3), rng.uniform(0, 75, size=3)
    colours = (light, dark) if rng.random() < 0.5 else (dark, light)
    background = _background(rng)
    spokes, bend = int(rng.integers(2, 5)), rng.uniform(-1, 1)
    frames = np.empty((len(state.x), SIDE, SIDE, 3), np.uint8)
    for i in range(len(state.x)):
        u, v = _sprite_places(state, i)
        cover = _cover(shape, state, i, u, v)[..., None]
        mix = np.clip(_texture(spokes, bend, u, v) * 4 + 0.5, 0, 1)[..., None]
        sprite = mix * colours[0] + (1 - mix) * colours[1]
        frames[i] = np.clip(cover * sprite + (1 - cover) * background, 0, 255)
    return frames


def sprite_mask(split: str, index: int, seed: int = 0) -> NDArray[np.bool_]:
    """Return where the sprite is in the ``index``-th video of ``split``: (FRAMES, SIDE, SIDE), True on the sprite."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    motion, shape = video_labels(index)
    state = trajectory(motion, rng)
    return np.stack([_cover(shape, state, i, *_sprite_places(state, i)) > 0.5 for i in range(FRAMES)])


def _sprite_places(state: State, i: int) -> tuple[Float, Float]:
    """Return what place (u, v) of the sprite, of radius 1, each pixel of frame ``i`` shows: (SIDE, SIDE) each."""
    pixels = np.arange(SIDE) + 0.5
    dx = (pixels[None, :] - state.x[i] + SIDE / 2) % SIDE - SIDE / 2  # what leaves at one edge enters at the other
    dy = (pixels[:, None] - state.y[i] + SIDE / 2) % SIDE - SIDE / 2
    cos, sin = math.cos(state.angle[i]), math.sin(state.angle[i])
    return (cos * dx + sin * dy) / state.radius[i], (cos * dy - sin * dx) / state.radius[i]


def _cover(shape: str, state: State, i: int, u: Float, v: Float) -> Float:
    """Return how much of each pixel of frame ``i`` the sprite covers, its edge antialiased: (SIDE, SIDE)."""
    return np.clip(_inside(shape, u, v) * state.radius[i] + 0.5, 0, 1)


def _background(rng: np.random.Generator) -> Float:
    """Return a smooth, still gradient of middle brightness."""
    centre, slope = rng.uniform(90, 165, size=3), rng.uniform(-15, 15, size=(2, 3))
    place = np.linspace(-1, 1, SIDE)
    return centre + place[:, None, None] * slope[0] + place[None, :, None] * slope[1]


def _inside(shape: str, u: Float, v: Float) -> Float:
    """Return how far (u, v) lies inside a shape of radius 1, about a distance; negative outside."""
    r = np.hypot(u, v)
    match shape:
        case "disc":
            return 0.9 - r
        case "square":
            return 0.75 - np.maximum(abs(u), abs(v))
        case "triangle":
            return np.minimum(0.5 - v, np.minimum(0.5 + v / 2 - u * 0.866, 0.5 + v / 2 + u * 0.866))
        case "star":
            return 0.65 + 0.35 * np.cos(5 * np.arctan2(v, u)) - r
        case "ring":
            return 0.25 - abs(r - 0.7)
        case "cross":
            narrow, wide = np.minimum(abs(u), abs(v)), np.maximum(abs(u), abs(v))
            return np.minimum(0.3 - narrow, 0.95 - wide)
        case "bar":
            return np.minimum(0.95 - abs(u), 0.45 - abs(v))
        case _:
            return np.minimum(0.95 - r, v + 0.3)


def _texture(spokes: int, bend: float, u: Float, v: Float) -> Float:
    """Return a signed pattern of bent spokes in sprite coordinates, which turns and grows with the sprite."""
    r = np.hypot(u, v)
    return np.sin(spokes * (np.arctan2(v, u) + bend * r)) * r


def video_labels(index: int) -> tuple[str, str]:
    """Return motion and shape of the ``index``-th video of a split: all 64 pairs in turn."""
    return MOTIONS[index % len(MOTIONS)], SHAPES[index // len(MOTIONS) % len(SHAPES)]


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

    def __call__(self) -> None:
        rng = np.random.default_rng([self.seed, self.kind, self.index])
        motion, shape = video_labels(self.index)
        if self.kind < len(SPLITS):
            write_video(Path(self.path), draw(shape, trajectory(motion, rng), rng))
        else:
            shape = SHAPES[self.index % len(SHAPES)]
            write_still(Path(self.path), draw(shape, trajectory(motion, rng, frames=1), rng)[0])


def jobs(root: Path, spec: Spec) -> Iterator[Job]:
    """Yield every file of the set: videos in one flat folder, stills in class folders."""
    for kind, (split, count) in enumerate(zip(SPLITS, spec.clips, strict=True)):
        for i in range(count):
            yield Job(str(root / "videos" / f"{split}_{i:05d}.mp4"), kind, i, spec.seed)
    for kind, (split, count) in enumerate(zip(("train", "val"), spec.stills, strict=True), start=len(SPLITS)):
        for i in range(count):
            yield Job(str(root / "stills" / split / SHAPES[i % len(SHAPES)] / f"{i:05d}.png"), kind, i, spec.seed)


def write_lists(root: Path, spec: Spec) -> None:
    """Write ``LABELS/SPLIT.csv`` (lines `path label`) and ``LABELS/classes.txt`` for both label sets."""
    for column, (labels, names) in enumerate((("motion", MOTIONS), ("shape", SHAPES))):
        folder = root / labels
        folder.mkdir(exist_ok=True)
        (folder / "classes.txt").write_text("\n".join(names) + "\n")
        for split, count in zip(SPLITS, spec.clips, strict=True):
            rows = [f"videos/{split}_{i:05d}.mp4 {names.index(video_labels(i)[column])}\n" for i in range(count)]
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
    if not todo and (root / "complete").exists():
        return
    for folder in {Path(job.path).parent for job in todo}:
        folder.mkdir(parents=True, exist_ok=True)
    _run(todo, workers or os.cpu_count() or 1, progress, str(root))
    write_lists(root, spec)
    (root / "complete").touch()


def _check_root(root: Path, record: Path, spec: Spec) -> None:
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return
    if not record.is_file():
        raise UsageError(f"{root} exists but holds no sample set; give another DATA.ROOT or an empty folder.")
    try:
        found = json.loads(record.read_text())
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
        form="[--root FOLDER] [--seed NUMBER]",
        description="Generate the sample set of moving sprites.",
    )
    parser.add_argument("--root", default="data/sample", help="folder to write to (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.seed < 0:
        raise UsageError(f"--seed {options.seed} is negative; give a whole number from 0.")
    try:
        prepare(options.root, Spec(seed=options.seed))
    except OSError as error:
        raise UsageError(
            f"--root {options.root} cannot be written ({error.strerror or error}); give another."
        ) from error
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Generate the set from the command line; return the exit code."""
    return run_command(generate, arguments, stopped="stopped; the same command continues")


if __name__ == "__main__":
    sys.exit(main())
