"""The layers of a clip as one picture (overlays.png) and as one video (overlays.mp4)."""

import textwrap
from collections.abc import Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from stvit_video.common.charts import PLAIN_TEXT
from stvit_video.data.decode.types import Frames
from stvit_video.data.sample import write_video
from stvit_video.models.layers import Grid
from stvit_video.pages.html import printable
from stvit_video.pages.overlays import Layer, Scale, region_colours, scale_of

matplotlib.use("Agg")
MAX_COLUMNS = 8
TITLE_HEIGHT = 34  # pixels above each panel of the video
INK, PAPER = "#1d2430", "#ffffff"


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
    title = textwrap.fill(layer.title, 34)
    axes.text(0, 0.99, title, size=11, weight="bold", color=INK, va="top")
    top = 0.99 - 0.12 * (title.count("\n") + 1)
    axes.text(0, top, textwrap.fill(layer.caption, 56), size=7.2, color="#4a5362", va="top", linespacing=1.25)
    scale = scale_of(layer)
    if scale is not None:
        _draw_scale(axes.inset_axes((0.02, 0.13, 0.86, 0.07)), scale)
    elif regions is not None and layer.kind in ("owner", "tracks"):
        key = axes.inset_axes((0, 0.02, 0.2, 0.24))
        key.imshow(region_colours(regions), interpolation="nearest")
        key.set_xticks(np.arange(regions[2] - 1) + 0.5, [])
        key.set_yticks(np.arange(regions[1] - 1) + 0.5, [])
        key.grid(color="white", linewidth=1)
        key.tick_params(length=0)
        key.spines[:].set_visible(False)
        axes.text(0.23, 0.14, "regions of the frame", size=7.2, color="#4a5362", va="center")


def _draw_scale(axes: Axes, scale: Scale) -> None:
    axes.imshow(scale.colours[None], aspect="auto", extent=(0, 1, 0, 1))
    axes.set_xticks([place for place, _ in scale.ticks], [label for _, label in scale.ticks])
    axes.set_yticks([])
    axes.tick_params(labelsize=7, length=2, pad=1, colors="#4a5362")
    axes.spines[:].set_visible(False)
    axes.text(0, 1.35, scale.unit, size=7.2, color="#4a5362", va="bottom")


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
            brush.text((x, y + 8), _shorten(layer.title, font, width), fill=INK, font=font)
            picture.paste(Image.fromarray(panel[i]), (x, y + TITLE_HEIGHT))
        frames.append(np.asarray(picture))
    content = np.stack(frames)
    content = content[:, : content.shape[1] // 2 * 2, : content.shape[2] // 2 * 2]  # H.264 needs even sides
    write_video(path, content, Fraction(1 / seconds_per_frame).limit_denominator(1000))


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    while font.getlength(text) > width and len(text) > 4:
        text = text[:-2].rstrip(" …”") + "…"
    return text
