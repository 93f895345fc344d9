"""Frames in memory are scored as a file of them, and one process decodes for many calls of a predictor."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stvit_video.common.errors import UsageError
from stvit_video.data.decode.frames import FrameRequest, open_video
from stvit_video.data.decode.types import DecodeError
from stvit_video.predict import Predictor

FRAMES = np.random.default_rng(0).integers(0, 255, (30, 9, 12, 3), np.uint8).repeat(8, axis=1).repeat(8, axis=2)
LOSSLESS = {"codec": "libx264rgb", "pixels": "rgb24", "crf": "0"}
ONE_CLIP = ["TEST.CLIPS=1", "TEST.CROPS=1", "DATA.STRIDE=1"]


@pytest.fixture(scope="module")
def predictor(trained: Path) -> Iterator[Predictor]:
    with Predictor.load(trained, overrides=ONE_CLIP) as found:
        torch.manual_seed(0)
        torch.nn.init.normal_(found.model.head.proj.weight, std=0.5)  # so that the scores of clips differ
        yield found
    assert not found._idle


def children(predictor: Predictor) -> list[int]:
    return [decoding._child.process.pid for decoding in predictor._idle]


@pytest.mark.parametrize("scale", [1, 3])  # the larger one is reduced by decoders
def test_frames_score_as_their_file(predictor: Predictor, write_clip: Callable[..., Path], scale: int) -> None:
    frames = FRAMES.repeat(scale, axis=1).repeat(scale, axis=2)
    path = write_clip(frames, name="clip.mkv", **LOSSLESS)
    expected = predictor(path).scores
    read_only = np.asfortranarray(frames)
    read_only.flags.writeable = False
    backwards = np.ascontiguousarray(frames[::-1, :, ::-1])[::-1, :, ::-1]
    for given in (frames, read_only, backwards, torch.from_numpy(frames), list(frames), list(torch.from_numpy(frames))):
        assert torch.equal(predictor(given).scores, expected)
    assert not torch.equal(predictor(frames[::-1]).scores, expected)
    if torch.cuda.is_available():
        assert torch.equal(predictor(torch.from_numpy(frames).cuda()).scores, expected)
    with open_video(path, short_side=predictor.views.short_side) as video:
        assert torch.equal(predictor(video.frames(range(30))).scores, expected)


def test_images_score_as_their_folder(predictor: Predictor, tmp_path: Path) -> None:
    images = [Image.fromarray(frame).resize((288, 216)) for frame in FRAMES[:9]]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    assert torch.equal(predictor(images).scores, predictor(tmp_path).scores)


def test_sampling_in_time_needs_a_rate(trained: Path, predictor: Predictor, write_clip: Callable[..., Path]) -> None:
    path = write_clip(FRAMES, name="clip.mkv", **LOSSLESS)
    with Predictor.load(trained, overrides=[*ONE_CLIP, "DATA.FPS=12.5"]) as timed:
        assert torch.equal(timed(FRAMES, fps=25).scores, timed(path).scores)
        with pytest.raises(UsageError, match="give fps="):
            timed(FRAMES)
        assert timed(FRAMES[:1]).error is None
    (windowed,) = predictor.predict([FRAMES], window=0.4, fps=25)
    (of_file,) = predictor.predict([path], window=0.4)
    assert np.allclose([w.span for w in windowed.windows], [w.span for w in of_file.windows])
    assert torch.equal(windowed.scores, of_file.scores)
    with pytest.raises(UsageError, match="give fps="):
        list(predictor.predict([FRAMES], window=0.4))


def test_many_clips_are_scored_in_batches(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    score = predictor._score
    monkeypatch.setattr(predictor, "_score", lambda *given: sizes.append(len(given[1])) or score(*given))
    clips = np.stack([FRAMES[i : i + 8] for i in range(20)])
    found = predictor(clips)
    assert max(sizes) <= 2 * predictor.input.batch_size
    single = torch.stack([predictor(list(clip)).scores for clip in clips])
    torch.testing.assert_close(torch.stack([p.scores for p in found]), single, rtol=0, atol=1e-6)
    assert len(predictor([clips[0], list(clips[1])])) == 2


WRONG: list[tuple[Any, str]] = [
    (FRAMES.transpose(0, 3, 1, 2), r"channels last, frames.transpose\(0, 2, 3, 1\)"),
    (torch.from_numpy(FRAMES).permute(0, 3, 1, 2), r"channels last, frames.permute\(0, 2, 3, 1\)"),
    (FRAMES / 255, r"float64 .* values from 0 to 255"),
    (FRAMES[..., 0], "grey pixels three times"),
    (FRAMES[..., :2], "grey pixels three times"),
    (FRAMES[0], r"frames\[None\] for a clip of one frame"),
    (Image.fromarray(FRAMES[0]), "PIL images in a list"),
    (FRAMES[:0], "give at least one"),
    ([], "give at least one"),
    ([FRAMES[0], FRAMES[0, :30]], "frame 1 is 96x30, and the first 96x72; give frames of one size"),
    ([FRAMES, FRAMES[0]], r"memory \[1\].*one frame"),
    (iter(FRAMES), "generator|iterator"),
    (None, "NoneType; give a path"),
]


@pytest.mark.parametrize(("frames", "says"), WRONG, ids=lambda value: value[:20] if isinstance(value, str) else "")
def test_wrong_frames_are_refused(predictor: Predictor, frames: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        predictor(frames)


def test_one_source_is_no_list(predictor: Predictor, small_set: Path) -> None:
    path = small_set / "videos" / "test_00000.mp4"
    for given in (path, str(path), FRAMES, torch.from_numpy(FRAMES)):
        (found,) = predictor.predict(given)
        assert torch.equal(found.scores, predictor(given).scores)
    assert len(list(predictor.predict(frames for frames in (FRAMES, FRAMES[3:])))) == 2
    assert list(predictor.predict([])) == []


def test_wrong_rates_are_refused(predictor: Predictor) -> None:
    for fps in (0, -1, float("nan"), float("inf"), "25"):
        with pytest.raises(UsageError, match="fps="):
            predictor(FRAMES, fps=fps)
    with pytest.raises(UsageError, match="times of its own"):
        predictor("clip.mp4", fps=25)
    with pytest.raises(DecodeError, match="no such file"):
        predictor([FRAMES, "gone.mp4"])


def test_one_process_decodes_for_all_calls(predictor: Predictor, small_set: Path) -> None:
    paths = [str(small_set / "videos" / f"test_{i:05d}.mp4") for i in range(4)]
    predictor.close()
    expected = [predictor(path).scores for path in paths]
    (process,) = children(predictor)
    with pytest.raises(DecodeError):
        predictor("gone.mp4")
    assert children(predictor) == [process]
    os.kill(process, signal.SIGKILL)
    time.sleep(0.05)
    assert torch.equal(predictor(paths[0]).scores, expected[0])
    (other,) = children(predictor)
    assert other != process
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda path: predictor(path).scores, paths * 3))
    assert all(torch.equal(a, b) for a, b in zip(found, expected * 3, strict=True))
    time.sleep(0.05)  # threads that have ended do not end the processes that they started
    assert all(decoding._child.process.poll() is None for decoding in predictor._idle)
    fork = os.fork()
    if fork == 0:
        os._exit(0 if torch.allclose(predictor(paths[1]).scores, expected[1]) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) == 0
    assert torch.equal(predictor(paths[2]).scores, expected[2])
    started = children(predictor)
    predictor.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in started)
    assert torch.equal(predictor(paths[3]).scores, expected[3])


def hang(path: str, cache: object) -> None:
    time.sleep(60)


def test_a_file_that_hung_is_tried_again(predictor: Predictor, small_set: Path) -> None:
    path = str(small_set / "videos" / "test_00000.mp4")
    with predictor._decoding() as decoding, pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "deadline_s", 0.2)
        with pytest.raises(DecodeError, match="took more than"):
            decoding.read(FrameRequest(path, None, question=hang))
    assert predictor(path).error is None
