"""What the generated videos show: sprites, textured shapes on a torus, their motions, and how they are drawn.

No single frame shows the motion of a sprite. Position, angle and log-size are periodic (a sprite that leaves at one
edge enters at the other; one that outgrows its range starts again small) and start uniformly at random. So each of them
has the same distribution in every frame, for all motions.

The harder set tells methods that save computation apart. Its class is the shape of one large sprite and its motion
relative to a cluttered background, among which small sprites of all shapes move in random directions; the camera pans.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Image = NDArray[np.uint8]

MOTIONS = ("left", "right", "up", "down", "clockwise", "counter-clockwise", "growing", "shrinking")
SIDE, FRAMES = 64, 20  # pixels, frames per video
MIN_RADIUS, MAX_RADIUS = 12.0, 27.0  # pixels
# About the distance of (u, v), which is r from the centre, to the edge of a shape of radius 1; negative outside.
INSIDE: dict[str, Callable[[Float, Float, Float], Float]] = {
    "disc": lambda u, v, r: 0.9 - r,
    "square": lambda u, v, r: 0.75 - np.maximum(abs(u), abs(v)),
    "triangle": lambda u, v, r: np.minimum(0.5 - v, np.minimum(0.5 + v / 2 - u * 0.866, 0.5 + v / 2 + u * 0.866)),
    "star": lambda u, v, r: 0.65 + 0.35 * np.cos(5 * np.arctan2(v, u)) - r,
    "ring": lambda u, v, r: 0.25 - abs(r - 0.7),
    "cross": lambda u, v, r: np.minimum(0.3 - np.minimum(abs(u), abs(v)), 0.95 - np.maximum(abs(u), abs(v))),
    "bar": lambda u, v, r: np.minimum(0.95 - abs(u), 0.45 - abs(v)),
    "half-disc": lambda u, v, r: np.minimum(0.95 - r, v + 0.3),
}
SHAPES = tuple(INSIDE)

# Of the harder set.
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OUTLINES = ("disc", "ring", "cross", "bar")
CLASSES = tuple(f"{motion} {shape}" for shape in OUTLINES for motion in MOVES)
CLUTTER, DISTRACTORS = 14, 3  # still pieces, small moving sprites
TILT = 0.2  # largest rotation of a sprite, in radians
PAN = 0.35  # largest camera movement along an axis over the whole video; 1 is the picture's side


@dataclass(frozen=True)
class State:
    """A sprite's position in pixels, angle in radians and radius in pixels, one value per frame."""

    x: Float
    y: Float
    angle: Float
    radius: Float


def trajectory(motion: str, rng: np.random.Generator, frames: int = FRAMES) -> State:
    """Draw the states of a sprite over ``frames`` frames. Each frame's state is uniform for every motion."""
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
    colours = random_colours(rng)
    centre, slope = rng.uniform(90, 165, size=3), rng.uniform(-15, 15, size=(2, 3))
    place = np.linspace(-1, 1, SIDE)
    background = centre + place[:, None, None] * slope[0] + place[None, :, None] * slope[1]  # a smooth gradient
    frames = np.broadcast_to(background, (len(state.x), SIDE, SIDE, 3)).copy()
    paint(frames, shape, state, *colours, spokes=int(rng.integers(2, 5)), bend=rng.uniform(-1, 1))
    return np.clip(frames, 0, 255).astype(np.uint8)


def random_colours(rng: np.random.Generator) -> tuple[Float, Float]:
    """Draw a light and a dark colour (3,) in random order."""
    light, dark = rng.uniform(180, 255, size=3), rng.uniform(0, 75, size=3)
    return (light, dark) if rng.random() < 0.5 else (dark, light)


def paint(
    frames: Float, shape: str, state: State, light: Float, dark: Float, spokes: int = 0, bend: float = 0.0
) -> None:
    """Paint a sprite with bent spokes in two colours (3,) over ``frames`` (frames, SIDE, SIDE, 3), in place."""
    pixels = np.arange(SIDE) + 0.5
    for i, frame in enumerate(frames):
        # A sprite that leaves at one edge enters at the other.
        dx = (pixels[None, :] - state.x[i] + SIDE / 2) % SIDE - SIDE / 2
        dy = (pixels[:, None] - state.y[i] + SIDE / 2) % SIDE - SIDE / 2
        cos = math.cos(state.angle[i])
        sin = math.sin(state.angle[i])
        radius = state.radius[i]
        u, v = (cos * dx + sin * dy) / radius, (cos * dy - sin * dx) / radius  # on the sprite, whose radius is 1
        r = np.hypot(u, v)
        pattern = np.sin(spokes * (np.arctan2(v, u) + bend * r)) * r  # turns and grows with the sprite
        mix = np.clip(pattern * 4 + 0.5, 0, 1)[..., None]
        cover = np.clip(INSIDE[shape](u, v, r) * radius + 0.5, 0, 1)[..., None]  # with antialiased edges
        frame[:] = cover * (mix * light + (1 - mix) * dark) + (1 - cover) * frame


def draw_hard(label: str, rng: np.random.Generator) -> Image:
    """Draw a video of class ``label`` of the harder set: (FRAMES, SIDE, SIDE, 3)."""
    motion, shape = label.split()
    camera = rng.uniform(-PAN, PAN, size=2)
    frames = _clutter(rng, camera)
    for _ in range(DISTRACTORS):
        angle, speed = rng.uniform(0, 2 * math.pi), rng.uniform(0.3, 1.0)
        velocity = speed * np.array([math.cos(angle), math.sin(angle)])
        _add_sprite(frames, str(rng.choice(SHAPES)), velocity + camera, rng.uniform(4.0, 6.5), rng)
    velocity = rng.uniform(0.5, 1.0) * np.array(MOVES[motion])
    _add_sprite(frames, shape, velocity + camera, rng.uniform(11.0, 17.0), rng)
    return np.clip(frames, 0, 255).astype(np.uint8)


def _add_sprite(frames: Float, shape: str, velocity: Float, radius: float, rng: np.random.Generator) -> None:
    """Paint a sprite that moves by ``velocity`` (x, y) over the video, in picture sides, from a random start."""
    centres = rng.uniform(0, SIDE, size=2) + np.arange(FRAMES)[:, None] * velocity * SIDE / FRAMES
    angle, colours = np.full(FRAMES, rng.uniform(-TILT, TILT)), sorted(random_colours(rng), key=np.sum)
    for colour, share in zip(colours, (1.2, 0.85), strict=True):  # a light body with a dark rim, unlike clutter
        state = State(centres[:, 0], centres[:, 1], angle, np.full(FRAMES, share * radius))
        paint(frames, shape, state, colour, colour)


def _clutter(rng: np.random.Generator, camera: Float) -> Float:
    """Draw still pieces of medium brightness on a plain ground, seen by the camera: (FRAMES, SIDE, SIDE, 3)."""
    ground = np.full((1, SIDE, SIDE, 3), rng.uniform(90, 165, size=3))
    for _ in range(CLUTTER):
        colour = rng.uniform(75, 180, size=3)
        place, angle, radius = rng.uniform(0, SIDE, size=(2, 1)), rng.uniform(0, 2 * math.pi, size=1), rng.uniform(3, 9)
        piece = State(place[0], place[1], angle, np.array([radius]))
        paint(ground, str(rng.choice(SHAPES)), piece, colour, colour)
    shifts = np.rint(np.arange(FRAMES)[:, None] * camera * SIDE / FRAMES).astype(int)  # whole pixels
    return np.stack([np.roll(ground[0], (y, x), axis=(0, 1)) for x, y in shifts])
