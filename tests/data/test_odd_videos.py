"""Unusual videos: with hidden frames, frames before an edit list, or gradual refresh. All frames are exact."""

from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
import pytest

from stvit_video.data.decode.frames import FrameRequest, open_video, read_file
from stvit_video.data.decode.types import DecodeError
from tests.conftest import copy_packets, numbered_frames, read_number
from tests.data.choices import Frozen

COUNT = 200


def check_frames(path: Path, numbers: Sequence[int]) -> None:
    """Check that PyAV reads the frames with these numbers, and that the other decoders refuse the file.

    Each frame is requested alone, then several at once, near and far from each other.
    """
    rng = np.random.default_rng(0)
    choices = [(index,) for index in range(len(numbers))]
    choices += [tuple(range(0, len(numbers), step)) for step in (1, 7, 60)]
    choices += [tuple(rng.integers(0, len(numbers), 8).tolist()) for _ in range(8)]
    assert open_video(str(path), decoder="pyav").length == len(numbers)
    for indices in choices:
        frames = read_file(FrameRequest(str(path), Frozen(indices), None, "pyav"))
        assert [read_number(frame) for frame in frames] == [numbers[index] for index in indices]
    with pytest.raises(DecodeError, match=r"where decord finds wrong frames; DATA\.DECODER pyav reads it"):
        open_video(path, decoder="decord")


@pytest.mark.parametrize("container", ["webm", "mkv"])
def test_hidden_reference_frames_of_vp8_are_not_counted(
    write_clip: Callable[..., Path], tmp_path: Path, container: str
) -> None:
    """libvpx writes them in two passes. Here, some reference frames are marked as hidden, by their fifth bit."""
    hidden = [31, 32, 77, 150]
    source = write_clip(numbered_frames(COUNT), "source.webm", "libvpx", g="60", b="1M", deadline="realtime")
    numbers = iter(range(COUNT))

    def hide(packet: av.Packet) -> av.Packet:
        if next(numbers) not in hidden:
            return packet
        content = bytearray(bytes(packet))
        assert content[0] >> 4 & 1
        content[0] &= ~(1 << 4)
        copy = av.Packet(bytes(content))
        copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
        return copy

    path = copy_packets(source, tmp_path / f"clip.{container}", hide)
    check_frames(path, [number for number in range(COUNT) if number not in hidden])


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_frames_are_exact_with_gradual_refresh(write_clip: Callable[..., Path], container: str) -> None:
    """The picture is refreshed column by column. Only the first frame is a key frame, but others are marked as such."""
    path = write_clip(
        numbered_frames(COUNT), f"clip.{container}", **{"x264-params": "intra-refresh=1:keyint=40:scenecut=0"}
    )
    with av.open(str(path)) as file:
        assert [number for number, frame in enumerate(file.decode(video=0)) if frame.key_frame] == [0]
    with av.open(str(path)) as file:
        assert sum(packet.is_keyframe for packet in file.demux(video=0)) > 1
    check_frames(path, range(COUNT))


@pytest.mark.parametrize("options", [{}, {"bf": "0"}, {"flags": "-cgop", "bf": "2"}], ids=str)
@pytest.mark.parametrize("first", [1, 27, 60])
def test_frames_before_an_edit_list_are_not_counted(
    write_clip: Callable[..., Path], tmp_path: Path, first: int, options: dict
) -> None:
    """Cutting without encoding keeps the references of the first shown frame, at times before 0."""
    source = write_clip(numbered_frames(COUNT), "source.mp4", g="25", **options)

    def shift(packet: av.Packet) -> av.Packet:
        start = round(first / 25 / packet.time_base)
        packet.pts, packet.dts = packet.pts - start, packet.dts - start
        return packet

    path = copy_packets(source, tmp_path / "cut.mp4", shift)
    with av.open(str(path)) as file:
        assert any(packet.is_discard for packet in file.demux(video=0))
    check_frames(path, range(first, COUNT))
