"""Layers of a clip: values on token grids, painted over the frames; all layers as one picture and as one video.

Legend: frames (T, H, W, 3) bytes; values (t, h, w) on a token grid, each token a box of pixels.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw
from torchvision.utils import make_grid

from stvit_video.common.charts import PLAIN_TEXT
from stvit_video.data.decode.types import Frames
from stvit_video.data.sample import write_video
from stvit_video.inference.annotate import load_font, shorten
from stvit_video.models.layers import Grid
from stvit_video.pages.explain import Array, Explanation, trajectories
from stvit_video.pages.html import TEMPLATES, printable

# From Sasha Trubetskoy's list of simple, distinct colours, without those that do not show on grey.
PALETTE = (
    "#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6",
    "#bfef45", "#fabed4", "#469990", "#dcbeff", "#9a6324", "#fffac8", "#aaffc3", "#808000",
)  # fmt: skip
HEAT, SIGNED = "inferno", "RdBu_r"  # colour maps of matplotlib, which colour-blind people can read too
TEXTURE = 24  # levels at most by which a frame shows through a painted square, around the square's colour
MIN_SIDE = 320  # pixels of the shorter side of a painted frame
MAX_COLUMNS = 8  # of the picture
TITLE_HEIGHT = 34  # pixels above each panel of the video
INK, SOFT_INK, PAPER = "#1d2430", "#4a5362", "#ffffff"
Ticks = Sequence[tuple[float, str]]  # place from 0 to 1, label


@dataclass(frozen=True)
class Layer:
    """One view of a clip: its frames with the values of tokens painted over them, and words about it."""

    key: str
    short: str  # the title of its button
    title: str
    caption: str
    frames: Frames
    scale: dict[str, Any] | None  # see ``colour_scale``
    regions: NDArray[np.uint8] | None  # (h, w, 3), where the colours are those of regions


def build_layers(found: Explanation, frames: Frames, label: str) -> list[Layer]:
    """Paint all that the explanation of a clip has over its enlarged frames; ``label`` is the explained class."""
    texts = read_texts()
    grey = fade(frames)
    layers = []
    colours = None if found.regions is None else region_colours(found.regions)

    def add(
        key: str, painted: Frames, ticks: Ticks = (), regions: bool = False, mean: float = 0, top: float = 0
    ) -> None:
        figures = {"mean": f"{mean:+.2g}", "top": f"{top:.2g}"}
        words = {name: text.format(label=label, **figures) for name, text in texts[key].items()}
        scale = colour_scale(ticks, words["unit"], signed=top > 0) if ticks else None
        layers.append(
            Layer(key, words["short"], words["title"], words["caption"], painted, scale, colours if regions else None)
        )

    def add_ratios(key: str, ratios: Array) -> None:
        share, ticks = ratio_share(ratios)
        add(key, paint(grey, tint(share), share > 0), ticks)

    def add_owners(key: str, owners: NDArray[np.int64], strength: Array) -> None:
        """Paint semantic tokens in the colours of their regions, where ``strength`` is above 1."""
        assert colours is not None
        flat = colours.reshape(-1, 3)
        add(key, paint(grey, flat[owners % len(flat)], strength > 1, np.where(strength > 1, owners, -1)), regions=True)

    add("video", frames)
    if found.assignment is not None and found.regions is not None and colours is not None:
        assert found.drawn is not None
        assert found.owners is not None
        add_ratios("drawn", found.drawn)
        add_owners("owners", found.owners, found.drawn)
        add("tracks", paint_tracks(grey, trajectories(found.assignment, found.regions), colours), regions=True)
    if found.recovery is not None and found.regions is not None:
        strongest = found.recovery.max(axis=-1) * np.prod(found.regions[1:])  # relative to an even share
        add_owners("givers", found.recovery.argmax(axis=-1), strongest)
    cam_ticks = [(share, f"{share:g}") for share in (0.0, 0.5, 1.0)]
    add("gradcam", paint(grey, tint(found.grad_cam), found.grad_cam > 0), cam_ticks)
    if found.attention is not None:
        add_ratios("attention", found.attention)
    if found.contributions is not None:
        share, mean, top = contrast(found.contributions)
        ticks = [(0.0, f"{-top:.2g}"), (0.5, "the mean"), (1.0, f"+{top:.2g}")]
        painted = paint(grey, tint(share, signed=True), found.contributions != 0)
        add("contributions", painted, ticks, mean=mean, top=top)
    return layers


def read_texts() -> dict[str, dict[str, str]]:
    """Return the words of each layer."""
    return yaml.safe_load((TEMPLATES / "layers.yaml").read_text("utf-8"))


def region_colours(regions: Grid) -> NDArray[np.uint8]:
    """Return the colour (h, w, 3) of each region of a frame; neighbours differ."""
    _, h, w = regions
    number = np.arange(h)[:, None] * w + np.arange(w)
    return leave_room(np.array([ImageColor.getrgb(colour) for colour in PALETTE], np.uint8))[number % len(PALETTE)]


def enlarge(frames: Frames) -> Frames:
    """Return frames (T, H, W, 3) enlarged by a whole factor to a shorter side of at least ``MIN_SIDE``."""
    factor = max(1, -(-MIN_SIDE // min(frames.shape[1:3])))
    size = (frames.shape[2] * factor, frames.shape[1] * factor)
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in frames])


def fade(frames: Frames) -> Frames:
    """Return frames in grey, so that all colour comes from the overlay."""
    grey = frames @ np.array([0.299, 0.587, 0.114])
    return np.repeat(grey[..., None], 3, axis=-1).round().astype(np.uint8)


def ratio_share(ratios: Array) -> tuple[Array, Ticks]:
    """Map ratios from 1 up to 0 to 1 on a logarithmic scale, below 1 to 0; return the ticks of the scale too.

    The scale ends at 2 at least, so that small differences do not look large.
    """
    top = round_up(max(2.0, float(ratios.max())))
    steps = [step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500) if step <= 0.75 * top]
    ticks = [(float(np.log(step) / np.log(top)), f"{step}") for step in steps]
    return np.log(np.maximum(ratios, 1)) / np.log(top), [*ticks, (1.0, f"{top:.2g}")]


def round_up(top: float) -> float:
    """Return the end of a scale: the next number of two digits, so that its label is exact."""
    unit = 10.0 ** (np.floor(np.log10(top)) - 1)
    return float(np.ceil(np.round(top / unit, 6)) * unit)


def contrast(parts: Array) -> tuple[Array, float, float]:
    """Return parts less their mean, from -1 to 1, then the mean and the difference from it that 1 stands for.

    Without the mean, which all tokens add, the differences between them would hardly be seen. Parts that are 0 are
    those of tokens that were dropped.
    """
    there = parts != 0
    mean = float(parts[there].mean()) if there.any() else 0.0
    differences = np.where(there, parts - mean, 0)
    top = max(float(np.abs(differences).max()), 1e-3 * abs(mean)) or 1.0  # rounding errors are no differences
    top = round_up(top)
    return differences / top, mean, top


def tint(share: Array, signed: bool = False) -> NDArray[np.uint8]:
    """Return the colours (..., 3) of values from 0 (or -1 if ``signed``) to 1."""
    name, place = (SIGNED, (share + 1) / 2) if signed else (HEAT, 0.25 + 0.75 * share)
    return leave_room(matplotlib.colormaps[name](place, bytes=True)[..., :3])


def leave_room(colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return colours with room for TEXTURE above and below."""
    return (TEXTURE + colours * ((255 - 2 * TEXTURE) / 255)).round().astype(np.uint8)


def colour_scale(ticks: Ticks, unit: str, signed: bool = False) -> dict[str, Any]:
    """Return a scale: ``colours`` (n, 3) from left to right, ``ticks`` (place, label), ``unit``."""
    return {"colours": tint(np.linspace(-1 if signed else 0, 1, 65), signed).tolist(), "ticks": ticks, "unit": unit}


def paint(
    frames: Frames, colours: NDArray[np.uint8], shown: NDArray[np.bool_], numbers: NDArray[np.int64] | None = None
) -> Frames:
    """Paint colours (t, h, w, 3) over grey frames where ``shown`` (t, h, w), as squares whose mean is that colour.

    Between tokens with different ``numbers`` (t, h, w) there is a white line.
    """
    steps = zip(frames.shape[:3], shown.shape, strict=True)
    box = np.ix_(*(np.arange(pixels) * tokens // pixels for pixels, tokens in steps))  # the token of each pixel
    squares = (colours[box] + texture(frames, shown.shape[1:])[..., None]).round().astype(np.uint8)
    painted = np.where(shown[box][..., None], squares, frames)
    if numbers is not None:
        painted[np.any(np.gradient(numbers[box], axis=(1, 2)), axis=0)] = 255
    return painted


def texture(frames: Frames, grid: tuple[int, ...]) -> Array:
    """Return what grey frames (T, H, W, 3) differ by from the mean of each square of a grid (h, w): (T, H, W).

    Added to a colour it leaves the mean as it is, so that a painted square has the colour of the scale. Blending would
    make it darker or lighter with the frame. Differences of more than TEXTURE are reduced to that.
    """
    places = [np.arange(pixels) * tokens // pixels for pixels, tokens in zip(frames.shape[1:3], grid, strict=True)]
    starts = [np.flatnonzero(np.diff(place, prepend=-1)) for place in places]

    def of_squares(values: Array, reduce: np.ufunc) -> Array:
        for axis, start in enumerate(starts, 1):
            values = reduce.reduceat(values, start, axis=axis)
        return values[np.ix_(np.arange(len(values)), *places)]

    grey = frames[..., 0].astype(np.float64)
    detail = grey - of_squares(grey, np.add) / of_squares(np.ones_like(grey), np.add)
    return detail * np.minimum(1, TEXTURE / of_squares(np.abs(detail), np.maximum).clip(1e-9))


def paint_tracks(frames: Frames, paths: Array, colours: NDArray[np.uint8]) -> Frames:
    """Draw the path of each region's token (h * w, t, 2) up to each frame, in the colours (h, w, 3) of regions."""
    scale = np.array(frames.shape[2:0:-1])
    painted = []
    for i, frame in enumerate(frames):
        picture = Image.fromarray(frame)
        brush = ImageDraw.Draw(picture)
        for path, colour in zip(paths * scale, map(tuple, colours.reshape(-1, 3).tolist()), strict=True):
            points = path[: i * len(path) // len(frames) + 1].ravel().tolist()
            x, y = points[-2:]
            brush.line(points, fill="white", width=6, joint="curve")
            brush.line(points, fill=colour, width=4, joint="curve")
            brush.ellipse((x - 8, y - 8, x + 8, y + 8), fill=colour, outline="white", width=2)
        painted.append(np.asarray(picture))
    return np.stack(painted)


@matplotlib.rc_context(PLAIN_TEXT)
def draw_overview(layers: Sequence[Layer], title: str, labels: Sequence[str]) -> bytes:
    """Return a PNG with a row for each layer: title, key and up to MAX_COLUMNS frames under their ``labels`` (T,)."""
    shown = np.unique(np.linspace(0, len(labels) - 1, min(MAX_COLUMNS, len(labels))).round().astype(int))
    height, width = layers[0].frames.shape[1:3]
    side = 1.75 * width / height  # of a frame, in inches
    figure = Figure(figsize=(3.4 + side * len(shown), 0.7 + 1.85 * len(layers)), facecolor=PAPER)
    edges = {"left": 0.012, "right": 0.995, "bottom": 0.012, "top": 1 - 0.68 / figure.get_figheight()}
    widths = [3.2 / side, *[1] * len(shown)]
    spaces = {"wspace": 0.03, "hspace": 0.06, **edges}
    grid = figure.subplots(len(layers), len(widths), width_ratios=widths, gridspec_kw=spaces)
    figure.text(0.012, 1 - 0.16 / figure.get_figheight(), printable(title), size=15, weight="bold", color=INK, va="top")
    for layer, (text, *row) in zip(layers, grid, strict=True):
        _describe(text, layer)
        for axes, index in zip(row, shown, strict=True):
            axes.imshow(layer.frames[index], interpolation="nearest")
            axes.set_axis_off()
            if layer is layers[0]:
                axes.set_title(labels[index], size=10, color=INK, pad=4)
    file = BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def _describe(axes: Axes, layer: Layer) -> None:
    """Write a layer's title, caption and key into the axes to the left of its frames."""
    axes.set_axis_off()
    title = textwrap.fill(layer.title, 34)
    axes.text(0, 0.99, title, size=11, weight="bold", color=INK, va="top")
    top = 0.99 - 0.12 * (title.count("\n") + 1)
    axes.text(0, top, textwrap.fill(layer.caption, 56), size=7.2, color=SOFT_INK, va="top", linespacing=1.25)
    if layer.scale is not None:
        key = axes.inset_axes((0.02, 0.13, 0.86, 0.07))
        key.imshow(np.array([layer.scale["colours"]]), aspect="auto", extent=(0, 1, 0, 1))
        places, labels = zip(*layer.scale["ticks"], strict=True)
        key.set(xticks=places, xticklabels=labels, yticks=[])
        key.tick_params(labelsize=7, length=2, pad=1, colors=SOFT_INK)
        key.spines[:].set_visible(False)
        key.text(0, 1.35, layer.scale["unit"], size=7.2, color=SOFT_INK, va="bottom")
    elif layer.regions is not None:
        key = axes.inset_axes((0, 0.02, 0.2, 0.24))
        key.imshow(layer.regions, interpolation="nearest")
        rows, columns = layer.regions.shape[:2]
        key.set_xticks(np.arange(columns - 1) + 0.5, [])
        key.set_yticks(np.arange(rows - 1) + 0.5, [])
        key.grid(color="white", linewidth=1)
        key.tick_params(length=0)
        key.spines[:].set_visible(False)
        axes.text(0.23, 0.14, "regions of the frame", size=7.2, color=SOFT_INK, va="center")


def write_panels(path: Path, layers: Sequence[Layer], seconds_per_frame: float) -> None:
    """Write an H.264 video with all layers side by side, each below its title."""
    font = load_font(17)
    panels = []
    for layer in layers:
        count, _, width, _ = layer.frames.shape
        title = shorten(layer.title, width, font)
        strip = Image.new("RGB", (width + 8, TITLE_HEIGHT), PAPER)
        ImageDraw.Draw(strip).text((4, 8), title, fill=INK, font=font)
        below = np.pad(layer.frames, ((0, 0), (0, 0), (4, 4), (0, 0)), constant_values=255)
        panels.append(np.concatenate([np.stack([np.asarray(strip)] * count), below], axis=1))
    columns = len(layers) if len(layers) <= 3 else -(-len(layers) // 2)
    moments = torch.from_numpy(np.stack(panels, axis=1)).permute(0, 1, 4, 2, 3)  # (T, layers, 3, H, W)
    grids = torch.stack([make_grid(moment, columns, padding=0, pad_value=255) for moment in moments])
    content = grids.permute(0, 2, 3, 1).numpy()
    content = content[:, : content.shape[1] // 2 * 2, : content.shape[2] // 2 * 2]  # H.264 needs even sides
    write_video(path, content, Fraction(1 / seconds_per_frame).limit_denominator(1000))
