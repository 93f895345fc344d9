"""Indexes: kept beside a run where they took decoding, made again where they no longer fit; and reading by them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from stvit_video.data import DecodeError, open_video
from stvit_video.data.decode import av_file, index
from stvit_video.data.decode.frames import Decoding
from stvit_video.data.decode.index import IndexCache
from stvit_video.data.decode.process import Answer
from tests.conftest import numbered_frames, read_number
from tests.data.choices import Frozen


@pytest.fixture
def clip(write_clip: Callable[..., Path]) -> Path:
    """Return a file whose frames have to be counted by decoding."""
    return write_clip(numbered_frames(30), "clip.avi", "mpeg4", g="10")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of the files that are decoded for their index from here on."""
    paths, original = [], index._decode_index
    monkeypatch.setattr(index, "_decode_index", lambda path, *rest: paths.append(path) or original(path, *rest))
    return paths


def length(path: Path, cache: IndexCache) -> int:
    with open_video(path, cache=cache) as video:
        assert read_number(video.frames([video.length - 1])[0]) == video.length - 1
        np.testing.assert_allclose(video.times(), np.arange(video.length) / 25, atol=1e-6)
        return video.length


def test_an_index_that_took_decoding_is_kept(
    clip: Path, write_clip: Callable[..., Path], tmp_path: Path, decoded: list[str]
) -> None:
    folder = tmp_path / "run" / "index"
    folder.parent.mkdir()
    cache = IndexCache(str(folder))
    assert [length(clip, cache) for _ in range(3)] == [30] * 3
    assert decoded == [str(clip)]
    assert length(clip, IndexCache(str(folder))) == 30  # as another process
    assert len(decoded) == 1
    length(write_clip(numbered_frames(10)), cache)  # packets prove the frames of an MP4
    assert len(decoded) == 1
    (stored,) = folder.iterdir()
    stored.write_bytes(stored.read_bytes()[:100])
    assert length(clip, IndexCache(str(folder))) == 30
    assert len(decoded) == 2
    clip.write_bytes(write_clip(numbered_frames(20), "other.avi", "mpeg4").read_bytes())
    for stale in (cache, IndexCache(str(folder))):
        assert length(clip, stale) == 20
    assert len(decoded) == 3


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("stamps", np.arange(30.0)),
        ("stamps", np.arange(30).reshape(2, 15)),
        ("stamps", np.arange(0)),
        ("keys", np.arange(31)),
        ("fields", {"time_base": "0.04"}),
        ("fields", {"size": [96]}),
        ("fields", {"stream": 0.5}),
        ("fields", {"other": 1}),
        ("fields", {"plain": None}),
    ],
    ids=str,
)
def test_an_index_of_other_kinds_is_made_anew(
    clip: Path, tmp_path: Path, decoded: list[str], tensor: str, value: Any
) -> None:
    length(clip, IndexCache(str(tmp_path / "index")))
    (stored,) = (tmp_path / "index").iterdir()
    with safe_open(stored, "np") as file:
        arrays = {key: file.get_tensor(key) for key in ("stamps", "keys")}
        fields = json.loads(file.metadata()["fields"])
    fields |= value if tensor == "fields" else {}
    arrays |= {} if tensor == "fields" else {tensor: value}
    save_file(arrays, stored, {"fields": json.dumps(fields)})
    assert length(clip, IndexCache(str(tmp_path / "index"))) == 30
    assert len(decoded) == 2


def test_the_index_of_a_long_file_is_kept(
    write_clip: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be one of hundreds, and too large to stay in memory until the file comes again."""
    monkeypatch.setattr(index, "LONG", 30)
    for frames in (29, 30):
        path = write_clip(numbered_frames(frames))
        length(path, IndexCache(str(tmp_path / "index")))
    assert len(list((tmp_path / "index").iterdir())) == 1
    known = IndexCache(str(tmp_path / "index")).get(str(path))
    assert known is not None
    assert (len(known.stamps), known.size, known.decoded) == (30, None, False)
    monkeypatch.setattr(index, "prove", None)
    assert length(path, IndexCache(str(tmp_path / "index"))) == 30


def test_a_decoding_process_keeps_indexes_in_its_folder(clip: Path, tmp_path: Path, decoded: list[str]) -> None:
    folder = tmp_path / "index"
    decoding = Decoding("pyav", 60, cache=str(folder))
    assert read_number(decoding.read(decoding.request(str(clip), Frozen((9,))))[0]) == 9
    assert length(clip, IndexCache(str(folder))) == 30
    assert not decoded


@pytest.mark.parametrize("place", ["missing/index", "file/index"])
def test_without_a_place_to_write_only_speed_is_lost(
    clip: Path, tmp_path: Path, place: str, decoded: list[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    for _ in range(2):
        cache = IndexCache(str(tmp_path / place))
        assert [length(clip, cache) for _ in range(2)] == [30, 30]
    assert len(decoded) == 2
    assert not (tmp_path / "missing").exists()


def test_remarks_are_made_once_for_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for cache in (IndexCache(str(tmp_path / "index")), IndexCache(str(tmp_path / "index")), IndexCache()):
        for name in "ab":
            cache.note("pixels", f"{name} has pixels that are not square")
    said = capsys.readouterr().err
    assert said == 2 * "note: a has pixels that are not square\n"  # of the run, and of a process without one


def test_a_long_pass_reports_that_it_goes_forward(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av_file, "PROGRESS_S", 0)
    reports: list[bool] = []
    length(clip, IndexCache(progress=lambda: reports.append(True)))
    assert len(reports) == 30

    class Slow:  # a child whose answer takes longer than the deadline, but which reports in time
        parent, answers = os.getpid(), iter([None, None, Answer(error="the answer")])

        def wait(self, seconds: float) -> bool:
            return True

        def receive(self) -> object:
            return next(self.answers)

    decoding = Decoding("pyav", 1.0)
    decoding._child = Slow()  # type: ignore[assignment]
    decoding._waiting.append(decoding.request("clip.avi", Frozen((0,))))
    answer = decoding._receive()
    assert isinstance(answer, DecodeError)
    assert answer.message == "the answer"


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_frames_are_asked_for_in_any_order(clip: Path, kind: Callable[[list[int]], object]) -> None:
    with open_video(clip, short_side=24) as video:
        frames = video.frames(kind([7, 29, 0, 7]))
        assert [read_number(frame) for frame in frames] == [7, 29, 0, 7]
        assert (frames.dtype, frames.shape) == (np.uint8, (4, 24, 32, 3))
        assert video.frames(kind([])).shape == (0, 24, 32, 3)
        assert video.segments() == [(0, 30)]


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ([3, -1], "frame -1 does not exist; give 0 to 29"),
        ([30], "frame 30 does not exist; give 0 to 29"),
        ([0.5], "as float64; give whole numbers"),
        ([True, False], "as bool; give whole numbers"),
    ],
)
def test_frames_that_do_not_exist_are_refused(clip: Path, wanted: list[float], says: str) -> None:
    with open_video(clip) as video, pytest.raises(DecodeError, match=says):
        video.frames(wanted)
