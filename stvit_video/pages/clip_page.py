"""The page of one clip: ``report.html`` of ``stvit_video.visualize``, with the pictures and the video beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from stvit_video.common.errors import UsageError, nearest
from stvit_video.common.files import try_folder, write_atomically, writing
from stvit_video.data.decode.types import Frames
from stvit_video.inference.load import open_checkpoint
from stvit_video.models.layers import Grid
from stvit_video.pages.clip_reader import Clip, read_clip
from stvit_video.pages.explain import Explanation, explain
from stvit_video.pages.html import data_uri, packed, picture_uri, printable, render
from stvit_video.pages.overlay_files import draw_overview, write_panels
from stvit_video.pages.overlays import (
    Layer,
    Scale,
    build_layers,
    enlarge,
    fade,
    paint,
    ratio_share,
    region_colours,
    scale_of,
    tint,
)

FILES = ("report.html", "overlays.png", "overlays.mp4")
TOP_CLASSES = 5
LEVELS = 256  # of colour in a token's map
MAX_SECONDS_PER_FRAME = 1.0  # in the video


@dataclass(frozen=True)
class Pictures:
    """The layers of a clip, and the frames with each layer painted over them."""

    layers: list[Layer]
    painted: list[Frames]  # for each layer (T, H, W, 3)
    labels: list[str]  # the time of each frame
    seconds_per_frame: float


def write_clip_page(
    video: Path, checkpoint: str, output: Path, start: float | None, class_name: str | None, command: str
) -> list[str]:
    """Explain a clip of a video and write FILES into ``output``; return lines for the user. Raises UsageError."""
    trained = open_checkpoint(checkpoint)
    classes = trained.classes
    target = find_class(class_name, classes)
    clip = read_clip(trained.input, video, start)
    _prepare_output(output, video)
    explanation = explain(trained.model, clip.tensor, target)
    pictures = paint_layers(explanation, clip, classes[explanation.target])
    order = np.argsort(-explanation.probabilities)[:TOP_CLASSES]
    scores = [{"name": classes[i], "percent": f"{100 * explanation.probabilities[i]:.1f}"} for i in order]
    answer = f"{scores[0]['name']}, {scores[0]['percent']} %"
    overview = draw_overview(
        pictures.layers,
        pictures.painted,
        explanation.regions,
        f"{trained.model.name} in {video.name}: {answer}",
        pictures.labels,
    )
    with writing(output):
        movie = None
        if len(pictures.labels) > 1:
            write_panels(output / "overlays.mp4", pictures.layers, pictures.painted, pictures.seconds_per_frame)
            movie = data_uri((output / "overlays.mp4").read_bytes(), "mp4")
        write_atomically(output / "overlays.png", overview)
        page = render(
            "visualize.html",
            video=printable(video.name),
            model=str(trained.model.name),
            weights=printable(str(trained.weights)),
            command=printable(command),
            note=printable(trained.note),
            scores=scores,
            explained=classes[explanation.target],
            facts=_facts(explanation, clip),
            stages=_stages(explanation),
            semantic=explanation.assignment is not None,
            absent=explanation.absent,
            last_frame=len(pictures.labels) - 1,
            movie=movie,
            data=_script_data(explanation, pictures, classes[explanation.target]),
        )
        write_atomically(output / "report.html", page.encode())
    notes = [trained.note] if trained.note else []
    return [f"{video}: {answer}", *notes, *explanation.absent, f"open {output / 'report.html'}"]


def find_class(name: str | None, classes: Sequence[str]) -> int | None:
    """Return the index of a class given by name or index. Raises UsageError for an unknown one."""
    if name is None:
        return None
    if name in classes:
        return list(classes).index(name)
    if name.isdecimal() and int(name) < len(classes):
        return int(name)
    shown = ", ".join(classes[:8]) + (" ..." if len(classes) > 8 else "")
    raise UsageError(
        f"--class {name} is unknown; give one of {shown}, or a number from 0 to {len(classes) - 1}."
        f"{nearest(name, list(classes))}"
    )


def _prepare_output(output: Path, video: Path) -> None:
    """Make the output folder. Raises UsageError where it cannot be written to, or the video would be replaced."""
    for name in FILES:
        if (output / name).exists() and (output / name).samefile(video):
            raise UsageError(f"--output {output} would replace VIDEO {video} itself; give another folder.")
    with writing(output):
        try_folder(output)


def paint_layers(explanation: Explanation, clip: Clip, label: str) -> Pictures:
    """Return all layers of a clip, painted; ``label`` is the explained class."""
    layers, frames = build_layers(explanation, label), enlarge(clip.frames)
    painted = [paint(layer, frames, explanation.regions) for layer in layers]
    step = 0.2
    if clip.times is not None and len(clip.times) > 1 and clip.times[-1] > clip.times[0]:
        step = float(clip.times[-1] - clip.times[0]) / (len(clip.times) - 1)
    return Pictures(layers, painted, clip.labels, min(step, MAX_SECONDS_PER_FRAME))


def _facts(explanation: Explanation, clip: Clip) -> dict[str, str]:
    first, last = (int(np.prod(explanation.stages[i][1])) for i in (0, -1))
    if explanation.regions is not None and explanation.assignment is not None:
        semantic, image = int(np.prod(explanation.regions)), int(np.prod(explanation.assignment.shape[1:]))
        headline = f"{image} image tokens become {semantic} semantic tokens"
    else:
        headline = f"No semantic tokens: {first} tokens at first, {last} at last"
    frames = "1 frame" if len(clip.indices) == 1 else f"{len(clip.indices)} frames"
    span = f"numbers {clip.indices[0] + 1} to {clip.indices[-1] + 1} of the {clip.length} in the file"
    if clip.times is not None:
        span += f", from {clip.times[0]:.2f} to {clip.times[-1]:.2f} s"
    height, width = clip.frames.shape[1:3]
    return {"headline": headline, "clip": f"The clip: {frames} of {width} x {height} pixels, {span}."}


def _stages(explanation: Explanation) -> list[dict[str, Any]]:
    """Return a table row for each stage; ``semantic`` says whether its tokens are semantic ones."""
    first = np.prod(explanation.stages[0][1])
    rows, semantic = [], False
    for name, grid in explanation.stages:
        if explanation.regions is not None and explanation.recovery is None:
            semantic = semantic or grid == explanation.regions  # and in all later stages
        count = int(np.prod(grid))
        rows.append(
            {
                "name": name,
                "count": count,
                "grid": " x ".join(map(str, grid)),
                "percent": f"{100 * count / first:.2f}",
                "semantic": semantic or name.startswith("inside"),
            }
        )
    return rows


def _script_data(explanation: Explanation, pictures: Pictures, label: str) -> dict[str, Any]:
    """Return the data of the page's script."""
    layers = [
        {
            "key": layer.key,
            "short": layer.short,
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
        "milliseconds": max(40, round(1000 * pictures.seconds_per_frame)),
        "width": width,
        "height": height,
        "regions": region_colours(explanation.regions).tolist() if explanation.regions else [[]],
        "tokens": _tokens(explanation, pictures, label),
    }


def _scale(scale: Scale | None) -> dict[str, Any] | None:
    return None if scale is None else {"colours": scale.colours.tolist(), "ticks": scale.ticks, "unit": scale.unit}


def _tokens(explanation: Explanation, pictures: Pictures, label: str) -> dict[str, Any] | None:
    """Return the maps of all semantic tokens, as indices into a colour ramp, and a sentence about each."""
    assignment, regions, owners = explanation.assignment, explanation.regions, explanation.owners
    if assignment is None or regions is None or owners is None:
        return None
    reach = (assignment.sum(axis=(2, 3)) > 0).sum(axis=1) * assignment[0, 0].size  # in Swin, its own frames only
    ratios = assignment * reach[:, None, None, None]
    top = max(2.0, float(ratios.max()))
    levels = (ratio_share(ratios, top) * (LEVELS - 1)).round().astype(np.uint8)
    colours, opacity = tint(np.linspace(0, 1, LEVELS))
    t = assignment.shape[1]
    firsts = [-(-i * len(pictures.labels) // t) for i in range(t)]  # the first frame of each token frame
    scale = scale_of(Layer("token", "", "", "ratio", ratios, top, "times the token's even share"))
    return {
        "count": len(assignment),
        "first": int(assignment.max(axis=(1, 2, 3)).argmax()),  # the most concentrated token
        "grid": assignment.shape[1:],
        "slots": _spans(pictures.labels, regions[0]),
        "moments": _spans(pictures.labels, t),
        "frames": [picture_uri(fade(pictures.painted[0][i : i + 1])[0]) for i in firsts],
        "maps": packed(levels),
        "ramp": [[*map(int, rgb), round(float(alpha), 3)] for rgb, alpha in zip(colours, opacity, strict=True)],
        "owners": owners.reshape(-1).tolist(),
        "words": [_describe_token(explanation, i, regions, pictures.labels, label) for i in range(len(assignment))],
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
    weights = explanation.assignment[number]
    total = float(weights.sum())
    frames = weights.sum(axis=(1, 2)) / max(total, 1e-12)
    size = len(frames) // regions[0]
    own_frames = frames[slot * size : (slot + 1) * size].sum()
    words = (
        f"Token {number + 1} of {len(explanation.assignment)} starts in row {row + 1}, column {column + 1} at "
        f"{_spans(labels, regions[0])[slot]}. It draws {100 * total:.0f} % from image tokens and the rest from "
        f"semantic tokens; of the former, {100 * own_frames:.0f} % is from its own frames"
    )
    if explanation.contributions is not None and explanation.contributions.size == len(explanation.assignment):
        words += f". It adds {explanation.contributions.reshape(-1)[number]:+.3f} to the score of “{label}”"
    return words + "."
