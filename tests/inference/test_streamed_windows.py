"""Overlapping windows scored by a stream, in which each frame is computed once, equal windows scored by themselves."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stvit_video import predict
from stvit_video.config.clip_settings import view_settings
from stvit_video.data import live, open_video
from stvit_video.data.clips.sampling import ClipSampler
from stvit_video.data.clips.timeline import KnownTimes
from stvit_video.data.windows import plan_reading, windows_of
from stvit_video.models.zoo import build_model
from stvit_video.runs.checkpoint import save_weights
from tests.conftest import REPOSITORY, data_config
from tests.data.odd_files import find_command

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, small_set: Path) -> Path:
    """Weights of a network of the streaming form, whose scores of windows differ."""
    words = "MODEL.STREAMING True TEST.CLIPS 1 TEST.CROPS 3 TEST.SHORT_SIDE 72 DATA.STRIDE 2 TEST.BATCH_SIZE 3"
    cfg = data_config(small_set, *words.split())
    torch.manual_seed(0)
    model = build_model(cfg, 8)
    for parameter in (model.head.proj.weight, model.time_embed, model.stgm.global_centres):
        torch.nn.init.normal_(parameter, std=0.5)
    path = tmp_path_factory.mktemp("streaming") / "model.safetensors"
    save_weights(path, model, [*"abcdefgh"], view_settings(cfg))
    return path


def make_frames(count: int, width: int = 96) -> np.ndarray:
    """Return frames (count, 72, width, 3) whose windows differ: a coarse pattern that changes from frame to frame."""
    coarse = RNG.integers(0, 256, (count, 6, width // 12, 3), np.uint8)
    return coarse.repeat(12, axis=1).repeat(12, axis=2)


def compare(predictor: predict.Predictor, paths: list[Path], window: float, step: float) -> list[int]:
    """Check that windows score alike with and without a stream; return how many of each video were streamed."""
    computed: list[int] = []
    patches = predictor.model.patch_embed
    hook = patches.register_forward_hook(lambda _, inputs, tokens: computed.append(tokens[..., 0].numel()))
    streamed = list(predictor.predict(paths, window=window, step=step))
    frames = sum(computed)
    computed.clear()
    group, predictor.group = predictor.group, None
    alone = list(predictor.predict(paths, window=window, step=step))
    predictor.group = group
    hook.remove()
    for found, expected in zip(streamed, alone, strict=True):
        assert found.error is expected.error is None
        assert [w.span for w in found.windows] == [w.span for w in expected.windows]
        assert [w.segment for w in found.windows] == [w.segment for w in expected.windows]
        scores, wanted = (torch.stack([w.scores for w in result.windows]) for result in (found, expected))
        assert (wanted - wanted[0]).abs().max() > 0.01 or len(wanted) == 1
        torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-5)
    counts = [sum(w.is_streamed for w in result.windows) for result in streamed]
    assert not any(counts) or frames < sum(computed)
    return counts


# At 25 frames per second and stride 2, a step of a group of 2 sampled frames is 0.16 s.
@pytest.mark.parametrize(
    ("window", "step", "streamed"),
    [(0.8, 0.16, [15, 16, 0]), (0.8, 0.32, [8, 9, 0]), (0.8, 0.2, [0] * 3), (0.8, 0.8, [0] * 3), (9, 0.16, [0] * 3)],
)
def test_windows_on_one_grid_are_streamed(
    checkpoint: Path, write_clip: Callable[..., Path], window: float, step: float, streamed: list[int]
) -> None:
    paths = [write_clip(make_frames(n, w), f"{n}.mp4") for n, w in ((76, 96), (80, 72), (12, 96))]
    for workers in (1, 2):
        with predict.Predictor.load(checkpoint, workers=workers) as predictor:
            assert compare(predictor, paths, window, step) == streamed


def test_streams_that_are_read_and_scored_in_parts(
    checkpoint: Path, write_clip: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_clip(make_frames(300))
    with predict.Predictor.load(checkpoint, overrides=["DATA.FPS=12.5", "DATA.STRIDE=1"]) as predictor:
        for frames in (8, 11, 32, 256):
            monkeypatch.setattr("stvit_video.inference.predictor.PIECE_FRAMES", frames)
            # The first of parts of one window is scored by itself.
            assert compare(predictor, [path], 0.8, 0.16) == [70 if frames == 8 else 71]


def test_a_stream_begins_anew_after_a_gap_and_where_samples_leave_the_grid(checkpoint: Path, small_set: Path) -> None:
    steps = np.full(100, 0.04)
    steps[[40, 70]] = 30.0, 0.1  # a pause, and a frame that was lost
    times = np.cumsum(steps) - steps[0]
    sampler = ClipSampler("dense", 8, 2)
    windows = windows_of(times, 0.8, 0.16)
    parts = list(plan_reading(times, windows, sampler, 1, 2, 1000))
    assert [part.is_streamed for part in parts] == [True]
    whole = [i for i, indices in enumerate(parts[0].indices) if len(indices) == 8]
    assert windows[whole[0]].start == 0
    assert any(windows[i].segment == 1 for i in whole)
    assert all(len(indices) in (2, 8) for indices in parts[0].indices)
    clip = np.array([], int)
    for window, new in zip(windows, parts[0].indices, strict=True):
        clip = np.concatenate([clip, new])[-8:]
        part = times[window.start : window.stop]
        expected = sampler.choose(KnownTimes(part), 1, None) + window.start
        np.testing.assert_array_equal(clip, expected)


def test_the_command_says_what_was_streamed(
    checkpoint: Path, write_clip: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(write_clip(make_frames(76))), "--checkpoint", str(checkpoint)]
    for options, line in (
        (["--window", "0.8", "--step", "0.16"], "streamed: 15 of 15 windows; each of their frames was computed once\n"),
        (["--window", "0.8", "--step", "0.2"], "a --step of a multiple of 2 sampled frames\n"),
        (["--window", "0.8", "--step", "0.16", "--set", "TEST.CLIPS=2"], "--set TEST.CLIPS=1 is\n"),
        ([], ""),
    ):
        assert predict.main([*words, *options]) == 0
        out = capsys.readouterr().out
        assert line in out
        assert bool(line) == ("streamed" in out)


@pytest.mark.parametrize(
    ("overrides", "step", "every"), [([], None, 4), ([], 0.32, 8), (["DATA.FPS=12.5", "DATA.STRIDE=1"], None, 4)]
)
def test_a_live_source_has_a_decision_at_each_group(
    overrides: list[str],
    step: float | None,
    every: int,
    checkpoint: Path,
    write_clip: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Each is that of the model on the last 8 samples, here every second frame, of its segment."""
    frames = make_frames(90)
    path = write_clip(frames, "stream.mkv", "ffv1", pixels="yuv444p")
    with open_video(path) as video:
        shown = video.frames(range(90))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_bytes, args=(path.read_bytes(),), daemon=True).start()
    with predict.Predictor.load(checkpoint, overrides=overrides) as predictor:
        computed: list[int] = []
        patches = predictor.model.patch_embed
        patches.register_forward_hook(lambda _, inputs, tokens: computed.append(inputs[0].shape[2]))
        found = list(predictor.watch(str(pipe), window=1.0, step=step))
        assert computed == [8, *[every // 2] * (len(found) - 1)]
        assert [round(window.span[0] * 25) for window in found] == list(range(0, 76, every))
        assert [window.span[1] - window.span[0] for window in found] == pytest.approx([8 * 0.08] * len(found))
        clips = [shown[i : i + 15] for i in range(0, 76, every)]
        expected = torch.stack([each.scores for each in predictor(clips, fps=25)])
    torch.testing.assert_close(torch.stack([window.scores for window in found]), expected, rtol=0, atol=1e-5)


def test_a_live_source_that_is_shorter_than_a_clip_is_said(
    checkpoint: Path, write_clip: Callable[..., Path], tmp_path: Path
) -> None:
    path, pipe, output = write_clip(make_frames(14), "stream.mkv"), tmp_path / "pipe", tmp_path / "found.json"
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_bytes, args=(path.read_bytes(),), daemon=True).start()
    assert predict.main([str(pipe), "--checkpoint", str(checkpoint), "--window", "1", "--output", str(output)]) == 1
    (found,) = json.loads(output.read_text())
    assert found["error"] == "ended before there were frames for a clip of 15 frames"
    assert found["top"] == []


def test_samples_of_a_live_source_are_those_of_a_clip() -> None:
    """Also where frames are late, lost or interrupted; a segment begins a new grid."""
    times = np.cumsum([0.0, *RNG.uniform(0.001, 0.12, 400)])
    pixels = np.zeros((1, 1, 3), np.uint8)
    run = [live.LiveFrame(0, 0.0, float(time), np.full_like(pixels, i % 256)) for i, time in enumerate(times)]
    for sampler in (ClipSampler("dense", 8, 3), ClipSampler("dense", 8, 2, 15.0)):
        samples = list(live._sample(iter(run), sampler.stride, sampler.rate))
        clip = sampler.starting_at(KnownTimes(times), 0.0)
        assert [sample.pixels[0, 0, 0] for sample in samples[:8]] == [i % 256 for i in clip]
        whole = replace(sampler, frames=len(samples)).starting_at(KnownTimes(times), 0.0)
        assert [sample.pixels[0, 0, 0] for sample in samples] == [i % 256 for i in whole]


@pytest.mark.parametrize(
    "minutes", [pytest.param(5, marks=pytest.mark.long), pytest.param(60, marks=[pytest.mark.long, pytest.mark.slow])]
)
def test_memory_does_not_grow_with_the_length_of_a_stream(
    minutes: int, checkpoint: Path, write_clip: Callable[..., Path], tmp_path: Path
) -> None:
    """A file that is sent again and again through a pipe, 30 frames per second."""
    program = find_command()
    if program is None:
        pytest.skip("FFmpeg's command sends the stream")
    path = write_clip(make_frames(300), "loop.mp4", rate=30)
    send = [program, "-v", "error", "-stream_loop", "-1", "-i", path, "-t", str(60 * minutes), "-c", "copy"]
    words = ["-", "--checkpoint", str(checkpoint), "--window", "1"]
    with (
        subprocess.Popen([*send, "-f", "matroska", "-"], stdout=subprocess.PIPE) as sender,
        subprocess.Popen(
            [sys.executable, "-m", "stvit_video.predict", *words],
            stdin=sender.stdout,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        ) as process,
    ):
        memory: dict[int, float] = {}  # MB, at the first decision of each minute
        lines = iter(process.stdout.readline, "")
        for line in lines:
            if start := re.match(r" +(?:(\d+):)?(\d+):(\d\d)\.\d to ", line):
                minute = 60 * int(start[1] or 0) + int(start[2])
                if minute not in memory:
                    memory[minute] = resident(process.pid)
        assert process.wait() == 0
    assert list(memory) == list(range(minutes))
    assert max(memory[minute] for minute in range(1, minutes)) - memory[1] < 20


def resident(process: int) -> float:
    """Return the resident memory of a process in MB."""
    (line,) = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(line) / 1000
