"""The page of one clip: ``report.html`` of ``stvit_video.visualize``."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from stvit_video import __version__
from stvit_video.data.decode.types import Frames
from stvit_video.models.layers import Grid
from stvit_video.pages.clip import Clip
from stvit_video.pages.explain import Explanation
from stvit_video.pages.overlays import Layer, Scale, fade, ratio_share, region_colours, scale_of, tint
from stvit_video.pages.page import data_uri, packed, picture_uri, printable, render

SHORT = {
    "video": "video",
    "drawn": "drawn on",
    "owners": "which token",
    "tracks": "tracks",
    "givers": "recovery",
    "gradcam": "Grad-CAM",
    "attention": "last block",
    "contributions": "adds to score",
}
SCORES = 5
LEVELS = 256  # of a token's map


@dataclass(frozen=True)
class Subject:
    """What a page is of, in words: the video's and the model's name, the weights, the command that made it."""

    video: str
    model: str
    weights: str
    command: str
    note: str = ""


@dataclass(frozen=True)
class Pictures:
    """A clip's layers, the frames painted with each (T, H, W, 3), and when each frame is shown."""

    layers: list[Layer]
    painted: list[Frames]
    labels: list[str]
    seconds_a_frame: float


def frame_labels(clip: Clip) -> list[str]:
    """Return when each frame of a clip is shown, or its number where the file does not say when."""
    if clip.times is None:
        return [f"no. {index + 1}" for index in clip.indices]
    return [f"{time:.2f} s" for time in clip.times]


def clip_page(
    subject: Subject,
    explanation: Explanation,
    clip: Clip,
    classes: Sequence[str],
    pictures: Pictures,
    movie: bytes | None,
) -> str:
    """Return the page as text; ``movie`` is an MP4."""
    order = np.argsort(-explanation.probabilities)[:SCORES]
    scores = [{"name": classes[i], "percent": f"{100 * explanation.probabilities[i]:.1f}"} for i in order]
    return render(
        "visualize.html",
        video=printable(subject.video),
        model=subject.model,
        weights=printable(subject.weights),
        command=printable(subject.command),
        note=printable(subject.note),
        version=__version__,
        scores=scores,
        explained=classes[explanation.target],
        facts=_facts(explanation, clip),
        stages=_stages(explanation),
        semantic=explanation.assignment is not None,
        absent=explanation.absent,
        last_frame=len(pictures.labels) - 1,
        movie=movie and data_uri(movie, "mp4"),
        data=_data(explanation, pictures, classes[explanation.target]),
    )


def _facts(explanation: Explanation, clip: Clip) -> dict[str, str]:
    first, last = (int(np.prod(explanation.stages[i][1])) for i in (0, -1))
    if explanation.regions is not None and explanation.assignment is not None:
        own, image = int(np.prod(explanation.regions)), int(np.prod(explanation.assignment.shape[1:]))
        headline = f"{image} image tokens become {own} semantic tokens"
    else:
        headline = f"No semantic tokens: {first} tokens at first, {last} at last"
    frames = "1 frame" if len(clip.indices) == 1 else f"{len(clip.indices)} frames"
    span = f"numbers {clip.indices[0] + 1} to {clip.indices[-1] + 1} of the {clip.length} in the file"
    if clip.times is not None:
        span += f", from {clip.times[0]:.2f} to {clip.times[-1]:.2f} s"
    height, width = clip.frames.shape[1:3]
    return {"headline": headline, "clip": f"The clip: {frames} of {width} x {height} pixels, {span}."}


def _stages(explanation: Explanation) -> list[dict[str, Any]]:
    first = np.prod(explanation.stages[0][1])
    rows, made = [], False
    for name, grid in explanation.stages:
        count = int(np.prod(grid))
        inside = name.startswith("inside")
        recovers = explanation.recovery is not None
        if explanation.regions is not None and not recovers:
            made = made or grid == explanation.regions
        rows.append(
            {
                "name": name,
                "count": count,
                "grid": " x ".join(map(str, grid)),
                "percent": f"{100 * count / first:.2f}",
                "semantic": made or inside,
            }
        )
    return rows


def _data(explanation: Explanation, pictures: Pictures, label: str) -> dict[str, Any]:
    """Return what the page's script reads."""
    layers = [
        {
            "key": layer.key,
            "short": SHORT[layer.key],
            "title": layer.title,
            "caption": layer.caption,
            "frames": [picture_uri(frame) for frame in frames],
            "scale": _scale(scale_of(layer)),
            "regions": layer.kind in ("owner", "tracks"),
        }
        for layer, frames in zip(pictures.layers, pictures.painted, strict=True)
    ]
    height, width = pictures.painted[0].shape[1:3]
    return {
        "layers": layers,
        "first": "owners" if explanation.assignment is not None else "gradcam",
        "labels": pictures.labels,
        "milliseconds": max(40, round(1000 * pictures.seconds_a_frame)),
        "width": width,
        "height": height,
        "regions": region_colours(explanation.regions).tolist() if explanation.regions else [[]],
        "tokens": _tokens(explanation, pictures, label),
    }


def _scale(scale: Scale | None) -> dict[str, Any] | None:
    if scale is None:
        return None
    return {"colours": scale.colours.tolist(), "ticks": scale.ticks, "unit": scale.unit}


def _tokens(explanation: Explanation, pictures: Pictures, label: str) -> dict[str, Any] | None:
    """Return the maps of all semantic tokens, as numbers of a ramp of colours, and a sentence on each."""
    assignment, regions, owners = explanation.assignment, explanation.regions, explanation.owners
    if assignment is None or regions is None or owners is None:
        return None
    reach = (assignment.sum(axis=(2, 3)) > 0).sum(axis=1) * assignment[0, 0].size  # in Swin, its own frames only
    ratios = assignment * reach[:, None, None, None]
    top = max(2.0, float(ratios.max()))
    levels = (ratio_share(ratios, top) * (LEVELS - 1)).round().astype(np.uint8)
    colours, opacity = tint(np.linspace(0, 1, LEVELS))
    t = assignment.shape[1]
    frames = len(pictures.labels)
    firsts = [-(-i * frames // t) for i in range(t)]  # the first frame of each token frame
    scale = scale_of(Layer("token", "", "", "ratio", ratios, top, "times the token's even share"))
    return {
        "count": len(assignment),
        "first": int(assignment.max(axis=(1, 2, 3)).argmax()),  # the one that is surest of what it draws on
        "grid": assignment.shape[1:],
        "slots": _spans(pictures.labels, regions[0]),
        "moments": _spans(pictures.labels, t),
        "frames": [picture_uri(fade(pictures.painted[0][i : i + 1])[0]) for i in firsts],
        "maps": packed(levels),
        "ramp": [[*map(int, rgb), round(float(alpha), 3)] for rgb, alpha in zip(colours, opacity, strict=True)],
        "owners": owners.reshape(-1).tolist(),
        "words": [
            _describe_token(explanation, number, regions, pictures.labels, label) for number in range(len(assignment))
        ],
        "scale": _scale(scale),
    }


def _spans(labels: Sequence[str], count: int) -> list[str]:
    """Return the first and last label of each of ``count`` equal parts of the frames."""
    bounds = [-(-i * len(labels) // count) for i in range(count + 1)]
    pairs = [(labels[a], labels[max(a, b - 1)]) for a, b in pairwise(bounds)]
    return [first if first == last else f"{first.removesuffix(' s')} to {last}" for first, last in pairs]


def _describe_token(explanation: Explanation, number: int, regions: Grid, labels: Sequence[str], label: str) -> str:
    assert explanation.assignment is not None
    slot, row, column = (int(i) for i in np.unravel_index(number, regions))
    own = explanation.assignment[number]
    inside = float(own.sum())
    frames = own.sum(axis=(1, 2)) / max(inside, 1e-12)
    size = len(frames) // regions[0]
    at_home = frames[slot * size : (slot + 1) * size].sum()
    words = (
        f"Token {number + 1} of {len(explanation.assignment)} starts in row {row + 1}, column {column + 1} at "
        f"{_spans(labels, regions[0])[slot]}. It draws {100 * inside:.0f} % from image tokens and the rest from "
        f"semantic tokens; of the former {100 * at_home:.0f} % lie in its own frames"
    )
    if explanation.contributions is not None and explanation.contributions.size == len(explanation.assignment):
        words += f". It adds {explanation.contributions.reshape(-1)[number]:+.3f} to the score of “{label}”"
    return words + "."


SLOWEST = 1.0  # seconds a frame, in the video that is written


def paint_layers(explanation: "Explanation", clip: "Clip", label: str) -> "Pictures":
    """Return every layer of a clip, painted."""
    from stvit_video.pages.overlays import build_layers, enlarge, paint

    layers, frames = build_layers(explanation, label), enlarge(clip.frames)
    painted = [paint(layer, frames, explanation.regions) for layer in layers]
    step = 0.2
    if clip.times is not None and len(clip.times) > 1 and clip.times[-1] > clip.times[0]:
        step = float(clip.times[-1] - clip.times[0]) / (len(clip.times) - 1)
    return Pictures(layers, painted, frame_labels(clip), min(step, SLOWEST))
