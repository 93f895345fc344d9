"""Annotated copies: their frames are those of the video, and their text can be read."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stvit_video.data.decode.frames import open_video
from stvit_video.inference.annotate import MIN_TEXT, Copies, draw, load_font, shorten
from stvit_video.inference.prediction import Prediction, Window

LONG = "opening a bottle of sparkling water with the left hand while sitting at a round table outside\n(not wine)"


def gradient(height: int, width: int, count: int, shift: int = 0) -> np.ndarray:
    """Frames (count, height, width, 3) of which no two corners are alike."""
    rows, columns = np.linspace(0, 200, height)[:, None], np.linspace(0, 100, width)
    frame = np.stack([rows + 0 * columns, 0 * rows + columns, 0 * rows + 2 * columns], axis=-1) + shift
    return np.repeat(frame[None], count, axis=0).astype(np.uint8)


@pytest.mark.parametrize("kind", ["turned", "mirrored", "of two sizes"])
def test_frames_of_a_copy_are_those_of_the_video(kind: str, write_clip: Callable[..., Path], tmp_path: Path) -> None:
    if kind == "of two sizes":
        parts = [
            write_clip(gradient(*size, 12, size[0] // 8), name=f"{size[0]}.ts") for size in ((320, 240), (240, 320))
        ]
        path = tmp_path / "both.ts"
        path.write_bytes(b"".join(part.read_bytes() for part in parts))
    else:
        path = write_clip(gradient(240, 320, 12), name="turned.mp4")
        content = path.read_bytes()
        place = content.index(b"tkhd") + 44  # the display matrix of the first track
        turns = {"turned": (0, 1, -1, 0), "mirrored": (-1, 0, 0, 1)}
        a, b, c, d = (value * 65536 for value in turns[kind])
        matrix = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], ">i4").tobytes()
        path.write_bytes(content[:place] + matrix + content[place + 36 :])
    prediction = Prediction(str(path), ["a", LONG], [Window(torch.tensor([0.1, 0.9]), None, 0.0, 0.0)])
    copies = Copies(tmp_path / "out")
    copies.folder.mkdir()
    assert copies.add(prediction).startswith("annotated copy")
    with open_video(path) as video, open_video(tmp_path / "out" / f"{path.stem}.mp4") as copy:
        assert copy.length == video.length
        given, made = video.frames(range(video.length)), copy.frames(range(video.length))
    assert given.shape == made.shape
    assert given.shape[1:3] == ((240, 320) if kind == "mirrored" else (320, 240))
    below = np.s_[:, 100:]  # below the text
    assert np.abs(given[below].astype(int) - made[below]).mean() < 4
    assert np.abs(given[:, 20:].astype(int) - made[:, 20:, ::-1]).mean() > 15, "all pictures would do"


@pytest.mark.parametrize("size", [(240, 240), (240, 1000), (1080, 600), (1080, 1920)])
def test_text_is_large_and_inside_of_the_picture(size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size[::-1], (90, 90, 90))
    scores = [(LONG, 0.931), ("Ünïcode", 0.62), ("x", 0.0051)]  # of a multi-label model
    draw(picture, scores)
    pixels = np.asarray(picture).astype(int)
    dark = np.nonzero((pixels != 90).any(axis=-1))
    assert dark[1].max() < size[1] - 1, "the box is cut at the right"
    text = (pixels[: dark[0].max()] > 180).all(axis=-1)
    assert text.any(axis=1).sum() > 2 * 0.7 * max(MIN_TEXT, min(size) // 24), "the lines are too small"
    alone = Image.new("RGB", size[::-1], (90, 90, 90))
    draw(alone, scores[:1])
    row = round(1.35 * max(MIN_TEXT, min(size) // 24))
    end = np.nonzero((np.asarray(alone)[:row] > 180).all(axis=-1))[1].max()
    assert end <= dark[1].max(), "the percentage is cut"


def test_shortened_names_end_with_dots() -> None:
    font = load_font(20)
    short = shorten(LONG, 200, font)
    assert font.getlength(short) <= 200 < font.getlength(LONG.splitlines()[0])
    assert short.endswith("…")
    assert LONG.startswith(short[:-1])
    assert shorten("a\nb", 200, font) == "a b"
    assert shorten(LONG, 0, font) == "…"
