"""What the generated videos show: sprites, textured shapes on a torus, their motions, and how they are drawn.

No single frame shows the motion of a sprite. Position, angle and log-size are periodic (a sprite that leaves at one
edge enters at the other; one that outgrows its range starts again small) and start uniformly at random. So each of them
has the same distribution in every frame, for all motions.

The harder set tells methods that save computation apart. One large sprite moves left, right, up or down over a
cluttered background; small sprites of all shapes move in random directions among the clutter; the camera pans. The
class is the shape of the large sprite and its motion relative to the background.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOTIONS = ("left", "right", "up", "down", "clockwise", "counter-clockwise", "growing", "shrinking")
SHAPES = ("disc", "square", "triangle", "star", "ring", "cross", "bar", "half-disc")
SIDE, FRAMES = 64, 20  # pixels, frames per video
MIN_RADIUS, MAX_RADIUS = 12.0, 27.0  # pixels

# Of the harder set.
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OUTLINES = ("disc", "ring", "cross", "bar")
CLASSES = tuple(f"{motion} {shape}" for shape in OUTLINES for motion in MOVES)
CLUTTER, DISTRACTORS = 14, 3  # still pieces, small moving sprites
TILT = 0.2  # largest rotation of a sprite, in radians
PAN = 0.35  # largest camera movement along an axis over the whole video; 1 is the picture's side

Float = NDArray[np.float64]
Image = NDArray[np.uint8]


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


@dataclass(frozen=True)
class Texture:
    """Bent spokes in two alternating colours (3,)."""

    light: Float
    dark: Float
    spokes: int
    bend: float


def draw(shape: str, state: State, rng: np.random.Generator) -> Image:
    """Draw a sprite of random colours and texture on a random plain background: (frames, SIDE, SIDE, 3)."""
    colours = random_colours(rng)
    centre, slope = rng.uniform(90, 165, size=3), rng.uniform(-15, 15, size=(2, 3))
    place = np.linspace(-1, 1, SIDE)
    background = centre + place[:, None, None] * slope[0] + place[None, :, None] * slope[1]  # a smooth gradient
    frames = np.broadcast_to(background, (len(state.x), SIDE, SIDE, 3)).copy()
    texture = Texture(*colours, spokes=int(rng.integers(2, 5)), bend=rng.uniform(-1, 1))
    paint(frames, shape, state, texture)
    return np.clip(frames, 0, 255).astype(np.uint8)


def random_colours(rng: np.random.Generator) -> tuple[Float, Float]:
    """Draw a light and a dark colour (3,) in random order."""
    light, dark = rng.uniform(180, 255, size=3), rng.uniform(0, 75, size=3)
    return (light, dark) if rng.random() < 0.5 else (dark, light)


def paint(frames: Float, shape: str, state: State, texture: Texture) -> None:
    """Paint a sprite over ``frames`` (frames, SIDE, SIDE, 3), in place."""
    for i, frame in enumerate(frames):
        u, v, cover = _project(shape, state, i)
        r = np.hypot(u, v)
        pattern = np.sin(texture.spokes * (np.arctan2(v, u) + texture.bend * r)) * r  # turns and grows with the sprite
        mix = np.clip(pattern * 4 + 0.5, 0, 1)[..., None]
        cover = cover[..., None]
        sprite = mix * texture.light + (1 - mix) * texture.dark
        frame[:] = cover * sprite + (1 - cover) * frame


def sprite_cover(shape: str, state: State) -> Float:
    """Return the share of each pixel that a sprite covers, with antialiased edges: (frames, SIDE, SIDE)."""
    return np.stack([_project(shape, state, i)[2] for i in range(len(state.x))])


def _project(shape: str, state: State, i: int) -> tuple[Float, Float, Float]:
    """Return the coordinates u, v of frame ``i``'s pixels on the sprite, whose radius there is 1, and its cover.

    Each is (SIDE, SIDE); the cover is the share of a pixel that the sprite covers, with antialiased edges.
    """
    pixels = np.arange(SIDE) + 0.5
    dx = (pixels[None, :] - state.x[i] + SIDE / 2) % SIDE - SIDE / 2  # a sprite that leaves enters at the other edge
    dy = (pixels[:, None] - state.y[i] + SIDE / 2) % SIDE - SIDE / 2
    cos, sin = math.cos(state.angle[i]), math.sin(state.angle[i])
    u, v = (cos * dx + sin * dy) / state.radius[i], (cos * dy - sin * dx) / state.radius[i]
    return u, v, np.clip(_inside(shape, u, v) * state.radius[i] + 0.5, 0, 1)


def _inside(shape: str, u: Float, v: Float) -> Float:
    """Return about the distance of (u, v) to the edge of a shape of radius 1; negative outside."""
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


def hard_class(index: int) -> str:
    """Return the class of the ``index``-th video of a split of the harder set, which cycles through all 16."""
    return CLASSES[index % len(CLASSES)]


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
        paint(frames, shape, state, Texture(colour, colour, spokes=0, bend=0.0))


def _clutter(rng: np.random.Generator, camera: Float) -> Float:
    """Draw still pieces of medium brightness on a plain ground, seen by the camera: (FRAMES, SIDE, SIDE, 3)."""
    ground = np.full((1, SIDE, SIDE, 3), rng.uniform(90, 165, size=3))
    for _ in range(CLUTTER):
        colour = rng.uniform(75, 180, size=3)
        place, angle, radius = rng.uniform(0, SIDE, size=(2, 1)), rng.uniform(0, 2 * math.pi, size=1), rng.uniform(3, 9)
        piece = State(place[0], place[1], angle, np.array([radius]))
        paint(ground, str(rng.choice(SHAPES)), piece, Texture(colour, colour, spokes=0, bend=0.0))
    shifts = np.rint(np.arange(FRAMES)[:, None] * camera * SIDE / FRAMES).astype(int)  # whole pixels
    return np.stack([np.roll(ground[0], (y, x), axis=(0, 1)) for x, y in shifts])
