"""The decoder, on files whose frames carry their number."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stvit_video.data.decode import DecodeError, VideoReader
from tests.conftest import numbered_frames, read_number


@pytest.mark.parametrize("options", [{}, {"g": "250", "bf": "3", "b-pyramid": "normal"}, {"g": "1"}], ids=str)
def test_frames_are_the_ones_asked_for_in_the_order_asked(write_clip: Callable[..., Path], options: dict) -> None:
    path = str(write_clip(numbered_frames(90), **options))
    orders = [list(range(90)), [89], [60, 3, 3, 77, 0, 60], list(range(0, 90, 7)), list(range(89, -1, -11))]
    for indices in orders:
        with VideoReader(path) as reader:
            assert len(reader) == 90
            assert [read_number(frame) for frame in reader.frames(indices)] == indices


@pytest.mark.parametrize(("height", "width"), [(240, 320), (320, 240)])
def test_large_files_are_resized_in_the_decoder(write_clip: Callable[..., Path], height: int, width: int) -> None:
    frames = numbered_frames(12).repeat(height // 48 + 1, axis=1).repeat(width // 64 + 1, axis=2)
    path = str(write_clip(frames[:, :height, :width]))
    with VideoReader(path, short_side=120) as reader:
        small = reader.frames([1, 5])
    assert min(small.shape[1:3]) == 120
    assert small.shape[1] / small.shape[2] == pytest.approx(height / width, rel=0.01)
    with VideoReader(path, short_side=400) as reader:  # never enlarged there
        assert reader.frames([0]).shape == (1, height, width, 3)


def test_unreadable_files_say_why(write_clip: Callable[..., Path], tmp_path: Path) -> None:
    whole = write_clip(numbered_frames(60)).read_bytes()
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, len(whole), dtype=np.uint8).tobytes()
    cases = {
        "empty.mp4": b"",
        "text.mp4": b"not a video\n" * 50,
        "cut.mp4": whole[: len(whole) // 2],  # the index stands at the end
        "header.mp4": whole[:40],
        "noise.mp4": noise,
        "damaged.mp4": whole[:48] + noise[48 : len(whole) * 3 // 4] + whole[len(whole) * 3 // 4 :],
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        for side in (None, 32):
            with pytest.raises(DecodeError) as error, VideoReader(str(tmp_path / name), side) as reader:
                reader.frames(range(0, len(reader), 4))
            assert error.value.path == str(tmp_path / name)
            assert "\n" not in error.value.message
    with pytest.raises(DecodeError, match="no such file"):
        VideoReader(str(tmp_path / "absent.mp4"))
    with pytest.raises(DecodeError, match="no such file"):
        VideoReader(str(tmp_path))
