"""The page of one clip: ``report.html`` of ``stvit_video.visualize``, with the pictures and the video beside it."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stvit_video.common.errors import UsageError, nearest
from stvit_video.common.files import prepare_folder, write_atomically
from stvit_video.common.text import printable
from stvit_video.data.clips.sampling import ClipSampler
from stvit_video.data.clips.timeline import KnownTimes
from stvit_video.data.dataset import Sample, collate
from stvit_video.data.decode.frames import open_video
from stvit_video.data.decode.pictures import is_pattern
from stvit_video.data.decode.types import DecodeError, Frames, Indices, Times
from stvit_video.inference.load import VideoInput, open_checkpoint
from stvit_video.pages import overlays
from stvit_video.pages.explain import Explanation, explain
from stvit_video.pages.html import data_uri, picture_uri, render

FILES = ("report.html", "overlays.png", "overlays.mp4")
TOP_CLASSES = 5
LEVELS = 256  # of colour in a token's map
MAX_SECONDS_PER_FRAME = 1.0  # in the video


@dataclass(frozen=True)
class Clip:
    """One clip of a video, cut from the centre of its frames."""

    tensor: Tensor  # (3, T, H, W), the model's input
    frames: Frames  # (T, H, W, 3), the same as bytes
    indices: Indices  # (T,), in the file
    times: Times | None  # (T,), seconds after the first frame of the video; None for a folder of images
    length: int  # frames of the whole video

    @property
    def labels(self) -> list[str]:
        """The time of each frame, or its number where the file has no times."""
        if self.times is None:
            return [f"no. {index + 1}" for index in self.indices]
        return [f"{time:.2f} s" for time in self.times]

    @property
    def seconds_per_frame(self) -> float:
        """Seconds that the page and its video show a frame."""
        if self.times is None or self.times[-1] <= self.times[0]:
            return 0.2
        return min(MAX_SECONDS_PER_FRAME, float(self.times[-1] - self.times[0]) / (len(self.times) - 1))


def read_clip(video_input: VideoInput, path: Path, start: float | None = None) -> Clip:
    """Read the clip in the middle of a video, as a test with one clip does, or the clip from ``start`` seconds on.

    Raises UsageError where the video cannot be read or ends before ``start``.
    """
    sampler = video_input.sampler
    choice = partial(sampler, clips=1)
    if start is not None:
        if not isinstance(sampler, ClipSampler) or sampler.kind != "dense":
            raise UsageError(f"--start {start:g}: this model's clips span the video (DATA.SAMPLING); leave it out.")
        choice = partial(sampler.starting_at, seconds=start)
    decoding = video_input.start_decoding()
    no_times = path.is_dir() or is_pattern(str(path))
    try:
        frames = decoding.read(decoding.request(str(path), choice))
        times = None if no_times else decoding.read_times(str(path))
        # Images have been read within the deadline just now, so that it is safe to count them in this process.
        timeline = open_video(str(path)) if times is None else KnownTimes(times)
        indices = choice(timeline)
    except DecodeError as error:
        if start is not None and no_times:
            raise UsageError(f"--start {start:g}: {path} is a folder of images without times; leave it out.") from error
        raise UsageError(f"VIDEO {path} {error.message}; give a video, an image or a folder of images.") from error
    if start is not None and times is not None and start > times.max():
        raise UsageError(f"--start {start:g} is after the end of {path}, at {times.max():.2f} s; give less.")
    views = replace(video_input.views, clips=1, crops=1)
    (view,) = collate([Sample(views.prepare(frames), -1, 0, (), [])], views).make_clips()
    mean = torch.tensor(views.normalise.mean)
    std = torch.tensor(views.normalise.std)
    pixels = ((view.permute(1, 2, 3, 0) * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return Clip(view, pixels.numpy(), indices, None if times is None else times[indices], timeline.length)


def write_clip_page(
    video: Path, checkpoint: str, output: Path, start: float | None, class_name: str | None, command: str
) -> str:
    """Explain a clip of a video and write FILES into ``output``; return lines for the user. Raises UsageError."""
    trained = open_checkpoint(checkpoint)
    classes = trained.classes
    target = None if class_name is None else find_class(class_name, classes)
    clip = read_clip(trained.input, video, start)
    for name in FILES:
        if (output / name).exists() and video.exists() and (output / name).samefile(video):
            raise UsageError(f"--output {output} would replace VIDEO {video} itself; give another folder.")
    prepare_folder(output)
    explanation = explain(trained.model, clip.tensor, target, trained.multi_label)
    label = classes[explanation.target]
    layers = overlays.build_layers(explanation, overlays.enlarge(clip.frames), label)
    order = np.argsort(-explanation.probabilities)[:TOP_CLASSES]
    scores = [{"name": classes[i], "percent": f"{100 * explanation.probabilities[i]:.1f}"} for i in order]
    # Of classes that do not exclude each other, all that are more likely than not.
    count = max(1, int((explanation.probabilities[order] >= 0.5).sum())) if trained.multi_label else 1
    answer = "; ".join(f"{score['name']}, {score['percent']} %" for score in scores[:count])
    title = f"{trained.model.name} in {video.name}: {answer}"
    write_atomically(output / "overlays.png", overlays.draw_overview(layers, title, clip.labels))
    movie = None
    if len(clip.frames) > 1:
        overlays.write_panels(output / "overlays.mp4", layers, clip.seconds_per_frame)
        movie = data_uri((output / "overlays.mp4").read_bytes(), "video/mp4")
    page = render(
        "visualize.html",
        video=video.name,
        trained=trained,
        command=command,
        scores=scores,
        answers=scores[:count],
        ratio=layers[0].frames.shape[2] / layers[0].frames.shape[1],
        explained=label,
        explanation=explanation,
        clip=clip,
        movie=movie,
        data=_script_data(explanation, layers, clip, label),
    )
    write_atomically(output / "report.html", page.encode())
    lines = [f"{video}: {answer}", trained.note, *explanation.absent, f"open {output / 'report.html'}"]
    return "\n".join(map(printable, filter(None, lines)))


def find_class(name: str, classes: Sequence[str]) -> int:
    """Return the index of a class given by name or index. Raises UsageError for an unknown one."""
    if name in classes:
        return classes.index(name)
    if name.isdecimal() and int(name) < len(classes):
        return int(name)
    shown = ", ".join(classes[:8]) + (" ..." if len(classes) > 8 else "")
    raise UsageError(
        f"--class {name} is unknown; give one of {shown}, or a number from 0 to {len(classes) - 1}."
        f"{nearest(name, classes)}"
    )


def _script_data(explanation: Explanation, layers: Sequence[overlays.Layer], clip: Clip, label: str) -> dict[str, Any]:
    """Return the data of the page's script."""
    height, width = layers[0].frames.shape[1:3]
    parts = []
    for layer in layers:
        pictures = [picture_uri(frame, sharp=True) for frame in layer.frames]
        of_regions = layer.regions is not None
        parts.append(vars(layer) | {"frames": pictures, "regions": of_regions})
    return {
        "layers": parts,
        "first": "drawn" if explanation.assignment is not None else "gradcam",
        "labels": clip.labels,
        "milliseconds": max(40, round(1000 * clip.seconds_per_frame)),
        "width": width,
        "height": height,
        "regions": overlays.region_colours(explanation.regions).tolist() if explanation.regions else [[]],
        "tokens": _tokens(explanation, layers[0].frames, clip.labels, label),
    }


def _tokens(explanation: Explanation, frames: Frames, labels: Sequence[str], label: str) -> dict[str, Any] | None:
    """Return the maps of all semantic tokens, as indices into a colour ramp, and figures of each."""
    assignment, regions, owners = explanation.assignment, explanation.regions, explanation.owners
    if assignment is None or regions is None or owners is None:
        return None
    (count, t), parts = assignment.shape[:2], explanation.contributions
    slots = np.arange(count) * regions[0] // count  # (M,)
    weights = assignment.sum(axis=(2, 3))  # (M, t)
    own = np.arange(t) * regions[0] // t == slots[:, None]  # the frames that each token is pooled from
    reach = (weights > 0).sum(axis=1) * assignment[0, 0].size  # in Swin, its own frames only
    share, ticks = overlays.ratio_share(assignment * reach[:, None, None, None])
    grey, words = overlays.fade(frames), overlays.read_texts()["token"]
    texture = (overlays.texture(grey, owners.shape[1:]) + overlays.TEXTURE).round().astype(np.uint8)
    return {
        **words,
        "count": count,
        "first": int(assignment.max(axis=(1, 2, 3)).argmax()),  # the most concentrated token
        "grid": assignment.shape[1:],
        "slots": _spans(labels, regions[0]),
        "frames": [picture_uri(frame) for frame in grey],
        "texture": [picture_uri(np.repeat(frame[..., None], 3, axis=-1)) for frame in texture],
        "room": overlays.TEXTURE,
        # Read by ``unpack`` in the script.
        "maps": base64.b64encode((share * (LEVELS - 1)).round().astype(np.uint8).tobytes()).decode(),
        "ramp": overlays.tint(np.linspace(0, 1, LEVELS)).tolist(),
        "owners": owners.reshape(-1).tolist(),
        # In percent: what each token draws from image tokens, and what of that from its own frames.
        "drawn": (100 * weights.sum(axis=1)).round().astype(int).tolist(),
        "own": (100 * (weights * own).sum(axis=1) / weights.sum(axis=1).clip(1e-12)).round().astype(int).tolist(),
        "parts": parts.reshape(-1).tolist() if parts is not None and parts.size == count else None,
        "mean": 0.0 if parts is None else float(parts.mean()),
        "explained": label,
        "scale": overlays.colour_scale(ticks, words["unit"]),
    }


def _spans(labels: Sequence[str], count: int) -> list[str]:
    """Return the first and last label of each of ``count`` equal parts of the frames."""
    bounds = [-(-i * len(labels) // count) for i in range(count + 1)]
    pairs = [(labels[a], labels[max(a, b - 1)]) for a, b in pairwise(bounds)]
    return [first if first == last else f"{first.removesuffix(' s')} to {last}" for first, last in pairs]
