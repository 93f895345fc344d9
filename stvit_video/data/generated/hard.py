"""The scenes of the harder sample set, which tells methods that save computation apart.

One large sprite moves left, right, up or down over a cluttered background; small sprites of all shapes move in random
directions among the clutter; the camera pans. The class is the shape of the large sprite and its motion relative to the
background. Everything lies on a torus of the size of the picture, so that no position gives a class away.
"""

import math

import numpy as np

from stvit_video.data.generated.sprites import FRAMES, SHAPES, SIDE, Float, Image, State, Texture, paint, random_colours

MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OUTLINES = ("disc", "ring", "cross", "bar")
CLASSES = tuple(f"{motion} {shape}" for shape in OUTLINES for motion in MOVES)
CLUTTER, DISTRACTORS = 14, 3  # still pieces, small moving sprites
TILT = 0.2  # largest rotation of a sprite, in radians
PAN = 0.35  # largest camera movement along an axis over the whole video; 1 is the picture's side


def video_class(index: int) -> str:
    """Return the class of the ``index``-th video of a split, which cycles through all 16."""
    return CLASSES[index % len(CLASSES)]


def draw(label: str, rng: np.random.Generator) -> Image:
    """Draw a video of class ``label``: (FRAMES, SIDE, SIDE, 3)."""
    motion, shape = label.split()
    camera = rng.uniform(-PAN, PAN, size=2)
    frames = _background(rng, camera)
    for _ in range(DISTRACTORS):
        angle, speed = rng.uniform(0, 2 * math.pi), rng.uniform(0.3, 1.0)
        velocity = speed * np.array([math.cos(angle), math.sin(angle)])
        _add(frames, str(rng.choice(SHAPES)), velocity + camera, rng.uniform(4.0, 6.5), rng)
    velocity = rng.uniform(0.5, 1.0) * np.array(MOVES[motion])
    _add(frames, shape, velocity + camera, rng.uniform(11.0, 17.0), rng)
    return np.clip(frames, 0, 255).astype(np.uint8)


def _add(frames: Float, shape: str, velocity: Float, radius: float, rng: np.random.Generator) -> None:
    """Paint a sprite that moves by ``velocity`` (x, y) over the video, in picture sides, from a random start."""
    centres = rng.uniform(0, SIDE, size=2) + np.arange(FRAMES)[:, None] * velocity * SIDE / FRAMES
    angle, colours = np.full(FRAMES, rng.uniform(-TILT, TILT)), sorted(random_colours(rng), key=np.sum)
    for colour, share in zip(colours, (1.2, 0.85), strict=True):  # a light body with a dark rim, unlike clutter
        state = State(centres[:, 0], centres[:, 1], angle, np.full(FRAMES, share * radius))
        paint(frames, shape, state, Texture(colour, colour, spokes=0, bend=0.0))


def _background(rng: np.random.Generator, camera: Float) -> Float:
    """Draw still pieces of medium brightness on a plain ground, seen by the camera: (FRAMES, SIDE, SIDE, 3)."""
    ground = np.full((1, SIDE, SIDE, 3), rng.uniform(90, 165, size=3))
    for _ in range(CLUTTER):
        colour = rng.uniform(75, 180, size=3)
        place, angle, radius = rng.uniform(0, SIDE, size=(2, 1)), rng.uniform(0, 2 * math.pi, size=1), rng.uniform(3, 9)
        piece = State(place[0], place[1], angle, np.array([radius]))
        paint(ground, str(rng.choice(SHAPES)), piece, Texture(colour, colour, spokes=0, bend=0.0))
    shifts = np.rint(np.arange(FRAMES)[:, None] * camera * SIDE / FRAMES).astype(int)  # whole pixels
    return np.stack([np.roll(ground[0], (y, x), axis=(0, 1)) for x, y in shifts])
