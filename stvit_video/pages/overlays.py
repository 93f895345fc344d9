"""Layers of a clip: arrays on token grids, painted over the frames, as one picture and as one video.

Legend: frames (T, H, W, 3) bytes; the values of a layer lie on a token grid (t, h, w), each token a box of pixels.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

from stvit_video.common.charts import PLAIN_TEXT
from stvit_video.data.decode.types import Frames
from stvit_video.data.sample import write_video
from stvit_video.models.layers import Grid
from stvit_video.pages.explain import Array, Explanation, trajectories
from stvit_video.pages.html import printable

# From Sasha Trubetskoy's list of simple, distinct colours, without those that do not show on grey.
PALETTE = (
    "#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6",
    "#bfef45", "#fabed4", "#469990", "#dcbeff", "#9a6324", "#fffac8", "#aaffc3", "#808000",
)  # fmt: skip
HEAT, SIGNED = "inferno", "RdBu_r"  # colour maps of matplotlib
MIN_SIDE = 320  # pixels of the shorter side of a painted frame
MAX_COLUMNS = 8  # of the picture
TITLE_HEIGHT = 34  # pixels above each panel of the video
INK, SOFT_INK, PAPER = "#1d2430", "#4a5362", "#ffffff"

Kind = Literal["video", "ratio", "heat", "signed", "owner", "tracks"]
EVEN_SHARE = "times an even share"
TEXTS = {  # by layer: the title of its button, the title and the caption
    "video": ("video", "Video", "The clip as the model takes it, resized and cropped."),
    "drawn": (
        "drawn on",
        "What the semantic tokens draw on",
        "Each square is an image token. The brighter it is, the more all semantic tokens together draw from it "
        "(attention in the block that completes them, mean over heads). Unpainted: an even share or less.",
    ),
    "owners": (
        "which token",
        "Which semantic token draws most",
        "The colour of an image token shows which semantic token draws most from it: the colour of the region of the "
        "frame where that token starts (see the key).",
    ),
    "tracks": (
        "tracks",
        "Where each region's token looks",
        "One line for each region, in its colour. The dot is on the square of this frame that the region's token draws "
        "most from (averaged with the squares around it); the line is its path so far. Some lines cover others.",
    ),
    "givers": (
        "recovery",
        "Which semantic token gives back most",
        "In the last recovery each image token attends to the semantic tokens of its own frames. Its colour shows the "
        "one that it gets most from: the colour of the region of the frame where that token starts (see the key).",
    ),
    "gradcam": (
        "Grad-CAM",
        "Grad-CAM of “{label}”",
        "Where the features raise the class's score: the channels of the last image tokens, weighted by the mean "
        "gradient of the score. 1 is the highest value of the clip; negative values are unpainted, like 0.",
    ),
    "attention": (
        "last block",
        "Attention received in the last block",
        "How much attention each token receives from all others in the last block, relative to an even share. A "
        "semantic token is painted on the region where it starts, though it may draw on the whole clip.",
    ),
    "contributions": (
        "adds to score",
        "What each token adds to “{label}”",
        "The head takes the mean of its tokens. So the class's score, relative to the mean of all classes, is exactly "
        "a constant plus the sum of what each token adds (red) or takes away (blue).",
    ),
}


@dataclass(frozen=True)
class Layer:
    """One view of a clip: values on a token grid, with a title and a caption.

    Kinds: ``ratio`` to an even share, painted from 1 to ``top`` on a logarithmic scale; ``heat`` from 0 to ``top``;
    ``signed`` from -top to top; ``owner``, indices of semantic tokens, in the colour of their region; ``tracks``,
    positions (regions, t, 2); ``video``, nothing.
    """

    key: str
    kind: Kind
    values: NDArray[Any] | None = None  # (t, h, w)
    top: float = 1.0
    unit: str = ""
    strength: Array | None = None  # (t, h, w): ``owner`` is painted where this ratio is above 1
    label: str = ""  # the explained class, in the title

    @property
    def texts(self) -> tuple[str, str, str]:
        """The title of its button, its title and its caption."""
        short, title, caption = TEXTS[self.key]
        return short, title.format(label=self.label), caption


def build_layers(explanation: Explanation, label: str) -> list[Layer]:
    """Return all layers that the explanation of a clip has; ``label`` is the explained class."""
    assignment, regions, drawn = explanation.assignment, explanation.regions, explanation.drawn
    layers = [Layer("video", "video")]
    if assignment is not None and regions is not None and drawn is not None:
        layers += [
            Layer("drawn", "ratio", drawn, ratio_top(drawn), EVEN_SHARE),
            Layer("owners", "owner", explanation.owners, ratio_top(drawn), strength=drawn),
            Layer("tracks", "tracks", trajectories(assignment, regions)),
        ]
    if explanation.recovery is not None and regions is not None:
        strongest = explanation.recovery.max(axis=-1) * regions[1] * regions[2]  # relative to an even share
        givers = explanation.recovery.argmax(axis=-1)
        layers.append(Layer("givers", "owner", givers, ratio_top(strongest), strength=strongest))
    layers.append(Layer("gradcam", "heat", explanation.grad_cam, 1.0, "of the highest value", label=label))
    if explanation.attention is not None:
        layers.append(Layer("attention", "ratio", explanation.attention, ratio_top(explanation.attention), EVEN_SHARE))
    if explanation.contributions is not None:
        parts = explanation.contributions
        top = max(float(np.abs(parts).max()), 2 * abs(float(parts.mean()))) or 1.0
        layers.append(Layer("contributions", "signed", parts, top, "part of the class's score (logit)", label=label))
    return layers


def ratio_top(ratios: Array) -> float:
    """Return the upper end of a scale of ratios: at least 2, so that small differences do not look large."""
    return max(2.0, float(ratios.max()))


def region_colours(regions: Grid) -> NDArray[np.uint8]:
    """Return the colour (h, w, 3) of each region of a frame; neighbours differ."""
    _, h, w = regions
    number = np.arange(h)[:, None] * w + np.arange(w)
    return np.array([ImageColor.getrgb(colour) for colour in PALETTE], np.uint8)[number % len(PALETTE)]


def enlarge(frames: Frames) -> Frames:
    """Return frames (T, H, W, 3) enlarged by a whole factor to a shorter side of at least ``MIN_SIDE``."""
    factor = max(1, -(-MIN_SIDE // min(frames.shape[1:3])))
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
    size, own = frames.shape[1:3], token_frames(len(colours), len(frames))
    over = np.stack([spread(colour, size) for colour in colours])[own].astype(np.float32)
    weight = np.stack([spread(value, size) for value in opacity])[own][..., None]
    painted = (fade(frames) * (1 - weight) + over * weight).round().clip(0, 255).astype(np.uint8)
    if layer.kind == "owner":
        numbers = np.where(opacity > 0, layer.values, -1)
        painted[np.stack([outline(spread(number, size)) for number in numbers])[own]] = 255
    return painted


def tint(share: Array, signed: bool = False) -> tuple[NDArray[np.uint8], Array]:
    """Return colours (..., 3) and opacities (...) of values from 0 (or -1 if ``signed``) to 1; 0 is transparent."""
    name, place = (SIGNED, (share + 1) / 2) if signed else (HEAT, 0.25 + 0.75 * share)
    opacity = 0.8 * np.abs(share) ** 0.5 if signed else 0.85 * share**0.5
    return matplotlib.colormaps[name](place, bytes=True)[..., :3], opacity


def scale_of(layer: Layer) -> dict[str, Any] | None:
    """Return the colour scale of a layer, None for a kind that has none.

    It has ``colours`` (n, 3) from left to right, as they look over middle grey, ``ticks``, each a position from 0 to 1
    and a label, and a ``unit``.
    """
    if layer.kind not in ("ratio", "heat", "signed"):
        return None
    signed = layer.kind == "signed"
    places = np.linspace(0, 1, 33)
    colours, opacity = tint(places * 2 - 1 if signed else places, signed)
    over_grey = (colours * opacity[:, None] + 160 * (1 - opacity[:, None])).round().astype(np.uint8).tolist()
    if layer.kind == "ratio":
        steps = [step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500) if step <= 0.75 * layer.top]
        ticks = [(float(ratio_share(np.array(float(step)), layer.top)), f"{step}") for step in steps]
        ticks.append((1.0, f"{layer.top:.2g}"))
    elif signed:
        ticks = [(0.0, f"{-layer.top:.2g}"), (0.5, "0"), (1.0, f"+{layer.top:.2g}")]
    else:
        ticks = [(share, f"{share:g}") for share in (0.0, 0.5, 1.0)]
    return {"colours": over_grey, "ticks": ticks, "unit": layer.unit}


def ratio_share(ratios: Array, top: float) -> Array:
    """Map ratios from 1 to ``top`` to 0 to 1 on a logarithmic scale; ratios below 1 become 0."""
    return np.log(np.maximum(ratios, 1)) / np.log(top)


def fade(frames: Frames) -> Frames:
    """Return frames in grey, so that all colour comes from the overlay."""
    grey = frames @ np.array([0.299, 0.587, 0.114])
    return np.repeat(grey[..., None], 3, axis=-1).round().astype(np.uint8)


def spread(values: NDArray[Any], size: tuple[int, ...]) -> NDArray[Any]:
    """Return values (h, w, ...) repeated to the pixels (H, W, ...) of a frame."""
    rows, columns = (np.arange(n) * k // n for n, k in zip(size, values.shape[:2], strict=True))
    return values[rows][:, columns]


def outline(numbers: NDArray[Any]) -> NDArray[np.bool_]:
    """Return a mask (H, W) of the pixels whose number differs from a neighbour's."""
    edges = np.zeros(numbers.shape, bool)
    below, beside = numbers[:-1] != numbers[1:], numbers[:, :-1] != numbers[:, 1:]
    edges[:-1] |= below
    edges[1:] |= below
    edges[:, :-1] |= beside
    edges[:, 1:] |= beside
    return edges


def token_frames(tokens: int, frames: int) -> NDArray[np.int64]:
    """Return the index of the token frame of each frame (frames,)."""
    return np.arange(frames) * tokens // frames


def _paint_tracks(paths: Array, frames: Frames, regions: Grid) -> Frames:
    """Draw the path of each region's token (regions, t, 2) up to each frame."""
    colours = region_colours(regions).reshape(-1, 3)
    height, width = frames.shape[1:3]
    scale = np.array([width, height])
    painted = []
    for frame, now in zip(frames, token_frames(paths.shape[1], len(frames)), strict=True):
        picture = Image.fromarray(frame)
        brush = ImageDraw.Draw(picture)
        for path, colour in zip(paths, colours, strict=True):
            points = [(float(x), float(y)) for x, y in path[: now + 1] * scale]
            brush.line(points, fill="white", width=6, joint="curve")
            brush.line(points, fill=tuple(map(int, colour)), width=4, joint="curve")
            x, y = points[-1]
            brush.ellipse((x - 8, y - 8, x + 8, y + 8), fill=tuple(map(int, colour)), outline="white", width=2)
        painted.append(np.asarray(picture))
    return np.stack(painted)


@matplotlib.rc_context(PLAIN_TEXT)
def draw_overview(
    layers: Sequence[Layer], painted: Sequence[Frames], regions: Grid | None, title: str, labels: Sequence[str]
) -> bytes:
    """Return a PNG with a row for each layer: title, key and up to MAX_COLUMNS frames under their ``labels`` (T,)."""
    columns = np.unique(np.linspace(0, len(labels) - 1, min(MAX_COLUMNS, len(labels))).round().astype(int))
    height, width = painted[0].shape[1:3]
    aspect = width / height
    figure = Figure(figsize=(3.4 + 1.75 * aspect * len(columns), 0.7 + 1.85 * len(layers)), facecolor=PAPER)
    text = 3.2 / (1.75 * aspect)  # width of the text column, in frames
    grid = figure.add_gridspec(
        len(layers), len(columns) + 1, width_ratios=[text] + [1] * len(columns), wspace=0.03, hspace=0.06,
        left=0.012, right=0.995, bottom=0.012, top=1 - 0.68 / figure.get_figheight(),
    )  # fmt: skip
    figure.text(0.012, 1 - 0.16 / figure.get_figheight(), printable(title), size=15, weight="bold", color=INK, va="top")
    for row, (layer, frames) in enumerate(zip(layers, painted, strict=True)):
        _describe(figure.add_subplot(grid[row, 0]), layer, regions)
        for column, index in enumerate(columns, start=1):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(frames[index], interpolation="nearest")
            axes.set_axis_off()
            if row == 0:
                axes.set_title(labels[index], size=10, color=INK, pad=4)
    file = BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def _describe(axes: Axes, layer: Layer, regions: Grid | None) -> None:
    """Write a layer's title, caption and key into the axes to the left of its frames."""
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    _, title, caption = layer.texts
    title = textwrap.fill(title, 34)
    axes.text(0, 0.99, title, size=11, weight="bold", color=INK, va="top")
    top = 0.99 - 0.12 * (title.count("\n") + 1)
    axes.text(0, top, textwrap.fill(caption, 56), size=7.2, color=SOFT_INK, va="top", linespacing=1.25)
    scale = scale_of(layer)
    if scale is not None:
        key = axes.inset_axes((0.02, 0.13, 0.86, 0.07))
        key.imshow(np.array([scale["colours"]]), aspect="auto", extent=(0, 1, 0, 1))
        key.set_xticks([place for place, _ in scale["ticks"]], [label for _, label in scale["ticks"]])
        key.set_yticks([])
        key.tick_params(labelsize=7, length=2, pad=1, colors=SOFT_INK)
        key.spines[:].set_visible(False)
        key.text(0, 1.35, scale["unit"], size=7.2, color=SOFT_INK, va="bottom")
    elif regions is not None and layer.kind in ("owner", "tracks"):
        key = axes.inset_axes((0, 0.02, 0.2, 0.24))
        key.imshow(region_colours(regions), interpolation="nearest")
        key.set_xticks(np.arange(regions[2] - 1) + 0.5, [])
        key.set_yticks(np.arange(regions[1] - 1) + 0.5, [])
        key.grid(color="white", linewidth=1)
        key.tick_params(length=0)
        key.spines[:].set_visible(False)
        axes.text(0.23, 0.14, "regions of the frame", size=7.2, color=SOFT_INK, va="center")


def write_panels(path: Path, layers: Sequence[Layer], painted: Sequence[Frames], seconds_per_frame: float) -> None:
    """Write an H.264 video with all layers side by side, each below its title."""
    font = ImageFont.load_default(17)
    height, width = painted[0].shape[1:3]
    rows = 1 if len(layers) <= 3 else 2
    columns = -(-len(layers) // rows)
    frames = []
    for i in range(len(painted[0])):
        picture = Image.new("RGB", ((width + 8) * columns, (height + TITLE_HEIGHT) * rows), PAPER)
        brush = ImageDraw.Draw(picture)
        for number, (layer, panel) in enumerate(zip(layers, painted, strict=True)):
            row, column = divmod(number, columns)
            x, y = column * (width + 8) + 4, row * (height + TITLE_HEIGHT)
            _, title, _ = layer.texts
            while font.getlength(title) > width and len(title) > 4:
                title = title[:-2].rstrip(" …”") + "…"
            brush.text((x, y + 8), title, fill=INK, font=font)
            picture.paste(Image.fromarray(panel[i]), (x, y + TITLE_HEIGHT))
        frames.append(np.asarray(picture))
    content = np.stack(frames)
    content = content[:, : content.shape[1] // 2 * 2, : content.shape[2] // 2 * 2]  # H.264 needs even sides
    write_video(path, content, Fraction(1 / seconds_per_frame).limit_denominator(1000))
