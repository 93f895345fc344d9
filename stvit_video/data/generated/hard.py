"""The scenes of the harder sample set: what tells ways to save computation apart.

One large sprite moves left, right, up or down over a cluttered background; small sprites of all shapes move in random
directions among the clutter; the camera pans. The class is motion and shape of the large sprite together. Its motion
is that over the background. Everything lies on a torus of the size of the picture, so that no place tells a class.
"""

import math

import numpy as np

from stvit_video.data.generated.sprites import FRAMES, SHAPES, SIDE, Float, Image, Look, State, paint, random_colours

MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OUTLINES = ("disc", "ring", "cross", "bar")
CLASSES = tuple(f"{motion} {shape}" for shape in OUTLINES for motion in MOVES)
CLUTTER, DISTRACTORS = 14, 3  # still pieces, small moving sprites
TILT = 0.2  # most that a sprite is turned, in radians
PAN = 0.35  # most that the camera moves along an axis over the video, in pictures


def video_class(index: int) -> str:
    """Return the class of the ``index``-th video of a split: all 16 in turn."""
    return CLASSES[index % len(CLASSES)]


def draw(label: str, rng: np.random.Generator) -> Image:
    """Draw a video of class ``label``: (FRAMES, SIDE, SIDE, 3)."""
    motion, shape = label.split()
    camera = rng.uniform(-PAN, PAN, size=2)
    frames = _background(rng, camera)
    for _ in range(DISTRACTORS):
        angle, speed = rng.uniform(0, 2 * math.pi), rng.uniform(0.3, 1.0)
        course = speed * np.array([math.cos(angle), math.sin(angle)])
        _add(frames, str(rng.choice(SHAPES)), course + camera, rng.uniform(4.0, 6.5), rng)
    course = rng.uniform(0.5, 1.0) * np.array(MOVES[motion])
    _add(frames, shape, course + camera, rng.uniform(11.0, 17.0), rng)
    return np.clip(frames, 0, 255).astype(np.uint8)


def _add(frames: Float, shape: str, course: Float, radius: float, rng: np.random.Generator) -> None:
    """Paint a sprite that moves by ``course`` (x, y), in pictures over the video, from a random start."""
    places = rng.uniform(0, SIDE, size=2) + np.arange(FRAMES)[:, None] * course * SIDE / FRAMES
    angle, colours = np.full(FRAMES, rng.uniform(-TILT, TILT)), sorted(random_colours(rng), key=np.sum)
    for colour, share in zip(colours, (1.2, 0.85), strict=True):  # a light body with a dark rim: clutter is neither
        state = State(places[:, 0], places[:, 1], angle, np.full(FRAMES, share * radius))
        paint(frames, shape, state, Look(colour, colour, spokes=0, bend=0.0))


def _background(rng: np.random.Generator, camera: Float) -> Float:
    """Return still pieces of middle brightness on a plain ground, seen by the camera: (FRAMES, SIDE, SIDE, 3)."""
    ground = np.full((1, SIDE, SIDE, 3), rng.uniform(90, 165, size=3))
    for _ in range(CLUTTER):
        colour = rng.uniform(75, 180, size=3)
        place, angle, radius = rng.uniform(0, SIDE, size=(2, 1)), rng.uniform(0, 2 * math.pi, size=1), rng.uniform(3, 9)
        piece = State(place[0], place[1], angle, np.array([radius]))
        paint(ground, str(rng.choice(SHAPES)), piece, Look(colour, colour, spokes=0, bend=0.0))
    shifts = np.rint(np.arange(FRAMES)[:, None] * camera * SIDE / FRAMES).astype(int)  # whole pixels
    return np.stack([np.roll(ground[0], (y, x), axis=(0, 1)) for x, y in shifts])
