"""Arrays on token grids, painted over the frames they are of.

Legend: frames (T, H, W, 3) bytes; a layer's values lie on a token grid (t, h, w), each token a box of pixels.
"""

from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from stvit_video.data.decode.types import Frames
from stvit_video.models.layers import Grid
from stvit_video.pages.explain import Array, Explanation, trajectories

# Of Sasha Trubetskoy's list of simple, distinct colours those that show on grey.
PALETTE = (
    "#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6",
    "#bfef45", "#fabed4", "#469990", "#dcbeff", "#9a6324", "#fffac8", "#aaffc3", "#808000",
)  # fmt: skip
HEAT, SIGNED = "inferno", "RdBu_r"  # matplotlib's
SIDE = 320  # pixels of a painted frame's shorter side, at least


@dataclass(frozen=True)
class Layer:
    """One way of looking at a clip: values (t, h, w) on a token grid, and in words what they are.

    Kinds: ``ratio`` to an even share, painted from 1 to ``top`` on a logarithmic scale; ``heat`` from 0 to ``top``;
    ``signed`` from -top to top; ``owner``, numbers of semantic tokens in the colour of their region, painted where
    ``strength``, a ratio, is above 1; ``tracks``, places (regions, t, 2); ``video``, nothing.
    """

    key: str
    title: str
    caption: str
    kind: Literal["video", "ratio", "heat", "signed", "owner", "tracks"]
    values: NDArray[Any] | None = None
    top: float = 1.0
    unit: str = ""
    strength: Array | None = None


def build_layers(explanation: Explanation, label: str) -> list[Layer]:
    """Return everything that can be shown of a clip; ``label`` names the class that is explained."""
    layers = [Layer("video", "Video", "The clip as the model takes it, scaled and cut.", "video")]
    layers += [*_assignment_layers(explanation), *_recovery_layers(explanation)]
    layers.append(
        Layer(
            "gradcam",
            f"Grad-CAM of “{label}”",
            "Where features speak for the class: the last image tokens' channels, weighted by the mean gradient of the "
            "class's score. 1 is the clip's highest value; 0, unpainted, is also what speaks against it.",
            "heat",
            explanation.grad_cam,
            unit="of the highest value",
        )
    )
    if explanation.attention is not None:
        caption = (
            "How much attention each token gets from all others in the last block, against an even share. A semantic "
            "token is painted on the region where it starts, though it may draw on the whole clip."
        )
        layers.append(_ratio("attention", "Who is listened to in the last block", caption, explanation.attention))
    if explanation.contributions is not None:
        layers.append(
            Layer(
                "contributions",
                f"What each token adds to “{label}”",
                "The head attends to nothing: it takes the mean of its tokens. So the class's score over the mean "
                "of all classes is, but for a constant, exactly the sum of what each token adds (red) or takes (blue).",
                "signed",
                explanation.contributions,
                max(float(np.abs(explanation.contributions).max()), 2 * abs(float(explanation.contributions.mean())))
                or 1.0,
                "share of the class's score (logit)",
            )
        )
    return layers


def _assignment_layers(explanation: Explanation) -> list[Layer]:
    drawn, owners = explanation.drawn, explanation.owners
    if explanation.assignment is None or explanation.regions is None or drawn is None:
        return []
    return [
        _ratio(
            "drawn",
            "What the semantic tokens draw on",
            "Each square is an image token; the brighter, the more all semantic tokens together draw from it "
            "(attention in the block that completes them, mean over heads). Unpainted: no more than if all were alike.",
            drawn,
        ),
        Layer(
            "owners",
            "Which semantic token draws most",
            "Each image token that is drawn on has the colour of the semantic token that draws most from it: the "
            "colour of the region of the frame where that token starts (see its key).",
            "owner",
            owners,
            top=_top(drawn),
            strength=drawn,
        ),
        Layer(
            "tracks",
            "Where each region's token looks",
            "One line for each region, in its colour. The dot is on the square of this frame that the region's token "
            "of this frame draws most from (weighed with the squares around it); the line is the dot's way so far. "
            "Some lines cover others.",
            "tracks",
            trajectories(explanation.assignment, explanation.regions),
        ),
    ]


def _recovery_layers(explanation: Explanation) -> list[Layer]:
    if explanation.recovery is None or explanation.regions is None:
        return []
    _, h, w = explanation.regions
    strongest = explanation.recovery.max(axis=-1) * h * w  # against an even share of its frames' semantic tokens
    return [
        Layer(
            "givers",
            "Which semantic token gives back most",
            "In the last recovery each image token asks the semantic tokens of its own frames. It has the colour of "
            "the one that it gets most from: that of the region of the frame where that token starts (see its key).",
            "owner",
            explanation.givers,
            top=_top(strongest),
            strength=strongest,
        )
    ]


def _ratio(key: str, title: str, caption: str, values: Array) -> Layer:
    return Layer(key, title, caption, "ratio", values, _top(values), "times an even share")


def _top(ratios: Array) -> float:
    """Return the end of a scale of ratios: at least 2, so that small differences do not look large."""
    return max(2.0, float(ratios.max()))


def region_colours(regions: Grid) -> NDArray[np.uint8]:
    """Return the colour (h, w, 3) of each region of a frame; neighbours differ."""
    _, h, w = regions
    number = np.arange(h)[:, None] * w + np.arange(w)
    return PALETTE_BYTES[number % len(PALETTE)]


def hex_bytes(colour: str) -> list[int]:
    """Return the three bytes of "#rrggbb"."""
    return list(bytes.fromhex(colour[1:]))


PALETTE_BYTES = np.array([hex_bytes(colour) for colour in PALETTE], np.uint8)


def enlarge(frames: Frames) -> Frames:
    """Return frames (T, H, W, 3) scaled up to a shorter side of ``SIDE`` or a bit more, by a whole factor."""
    factor = max(1, -(-SIDE // min(frames.shape[1:3])))
    size = (frames.shape[2] * factor, frames.shape[1] * factor)
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in frames])


def paint(layer: Layer, frames: Frames, regions: Grid | None) -> Frames:
    """Return the enlarged ``frames`` (T, H, W, 3) with a layer painted over them."""
    if layer.kind == "video":
        return frames
    assert layer.values is not None
    if layer.kind == "tracks":
        assert regions is not None
        return _paint_tracks(layer.values, fade(frames), regions)
    if layer.kind == "owner":
        assert regions is not None
        assert layer.strength is not None
        share = ratio_share(layer.strength, layer.top)
        colours = region_colours(regions).reshape(-1, 3)[layer.values % (regions[1] * regions[2])]
        opacity = np.where(share > 0, 0.4 + 0.5 * share, 0)
    else:
        share = ratio_share(layer.values, layer.top) if layer.kind == "ratio" else layer.values / layer.top
        colours, opacity = tint(share, layer.kind == "signed")
    painted = blend(fade(frames), colours, opacity)
    if layer.kind == "owner":
        numbers = np.where(opacity > 0, layer.values, -1)
        edges = np.stack([outline(spread(number, frames.shape[1:3])) for number in numbers])
        painted[edges[token_frames(len(edges), len(frames))]] = 255
    return painted


def tint(share: Array, signed: bool = False) -> tuple[NDArray[np.uint8], Array]:
    """Return colours (..., 3) and opacities of shares from 0, or -1 where ``signed``, to 1; at 0 nothing is painted."""
    if signed:
        return _mapped(SIGNED, (share + 1) / 2), 0.8 * np.abs(share) ** 0.5
    return _mapped(HEAT, 0.25 + 0.75 * share), 0.85 * share**0.5


@dataclass(frozen=True)
class Scale:
    """The key of a layer: colours (n, 3) as they look over middle grey, from left to right, and labelled places."""

    colours: NDArray[np.uint8]
    ticks: list[tuple[float, str]]  # place from 0 to 1, label
    unit: str


def scale_of(layer: Layer) -> Scale | None:
    """Return the key of a layer that runs from little to much; None where it does not."""
    if layer.kind not in ("ratio", "heat", "signed"):
        return None
    signed = layer.kind == "signed"
    places = np.linspace(0, 1, 33)
    colours, opacity = tint(places * 2 - 1 if signed else places, signed)
    over_grey = (colours * opacity[:, None] + 160 * (1 - opacity[:, None])).round().astype(np.uint8)
    if layer.kind == "ratio":
        steps = [step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500) if step <= 0.75 * layer.top]
        ticks = [(float(ratio_share(np.array(float(step)), layer.top)), f"{step}") for step in steps]
        ticks.append((1.0, f"{layer.top:.2g}"))
    else:
        low = -layer.top if signed else 0.0
        ticks = [
            (share, f"{low + share * (layer.top - low):+.2g}" if signed else f"{share:g}") for share in (0, 0.5, 1)
        ]
    return Scale(over_grey, ticks, layer.unit)


def ratio_share(ratios: Array, top: float) -> Array:
    """Return where ratios lie between 1 and ``top`` on a logarithmic scale, 0 to 1; less than 1 is 0."""
    return np.log(np.maximum(ratios, 1)) / np.log(top)


def fade(frames: Frames) -> Frames:
    """Return frames in grey, so that all colour is the overlay's."""
    grey = frames @ np.array([0.299, 0.587, 0.114])
    return np.repeat(grey[..., None], 3, axis=-1).round().astype(np.uint8)


def blend(frames: Frames, colours: NDArray[np.uint8], opacity: Array) -> Frames:
    """Return frames under ``colours`` (t, h, w, 3) with ``opacity`` (t, h, w), from 0 to 1; a token is a plain box."""
    size, own = frames.shape[1:3], token_frames(len(colours), len(frames))
    over = np.stack([spread(colour, size) for colour in colours])[own].astype(np.float32)
    share = np.stack([spread(value, size) for value in opacity])[own][..., None]
    return (frames * (1 - share) + over * share).round().clip(0, 255).astype(np.uint8)


def spread(values: NDArray[Any], size: tuple[int, ...]) -> NDArray[Any]:
    """Return values (h, w, ...) as boxes over a frame of (H, W) pixels."""
    rows, columns = (np.arange(n) * k // n for n, k in zip(size, values.shape[:2], strict=True))
    return values[rows][:, columns]


def outline(numbers: NDArray[Any]) -> NDArray[np.bool_]:
    """Return where (H, W) a number differs from that of a pixel above, below, to the left or to the right."""
    edges = np.zeros(numbers.shape, bool)
    below, beside = numbers[:-1] != numbers[1:], numbers[:, :-1] != numbers[:, 1:]
    edges[:-1] |= below
    edges[1:] |= below
    edges[:, :-1] |= beside
    edges[:, 1:] |= beside
    return edges


def token_frames(tokens: int, frames: int) -> NDArray[np.int64]:
    """Return the token frame (frames,) that each frame belongs to."""
    return np.arange(frames) * tokens // frames


def _mapped(name: str, share: Array) -> NDArray[np.uint8]:
    return matplotlib.colormaps[name](share, bytes=True)[..., :3]


def _paint_tracks(places: Array, frames: Frames, regions: Grid) -> Frames:
    """Draw the way (regions, t, 2) of each region's token up to every frame."""
    colours = region_colours(regions).reshape(-1, 3)
    height, width = frames.shape[1:3]
    scale = np.array([width, height])
    painted = []
    for frame, now in zip(frames, token_frames(places.shape[1], len(frames)), strict=True):
        picture = Image.fromarray(frame)
        brush = ImageDraw.Draw(picture)
        for way, colour in zip(places, colours, strict=True):
            points = [(float(x), float(y)) for x, y in way[: now + 1] * scale]
            brush.line(points, fill="white", width=6, joint="curve")
            brush.line(points, fill=tuple(map(int, colour)), width=4, joint="curve")
            x, y = points[-1]
            brush.ellipse((x - 8, y - 8, x + 8, y + 8), fill=tuple(map(int, colour)), outline="white", width=2)
        painted.append(np.asarray(picture))
    return np.stack(painted)
