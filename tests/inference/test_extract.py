"""stvit_video.extract: a row of features for each window, files and index, resumption, and several processes."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from stvit_video import extract
from stvit_video.config.clip_settings import view_settings
from stvit_video.data.windows import Span
from stvit_video.inference.feature_folder import FeatureFolder, name_files
from stvit_video.inference.prediction import Window
from stvit_video.inference.predictor import Predictor
from stvit_video.models.zoo import build_model
from stvit_video.runs.checkpoint import save_weights
from tests.conftest import REPOSITORY, data_config
from tests.inference.test_streamed_windows import make_frames

VIEWS = "DATA.STRIDE 2 TEST.CLIPS 1 TEST.CROPS 3 TEST.SHORT_SIDE 72 TEST.BATCH_SIZE 3"
FRAMES = 8  # of a clip: 0.64 s at 25 frames per second
NAMES = [*"abcdefgh"]


def make_checkpoint(folder: Path, small_set: Path, *words: str) -> Path:
    """Write weights of a network whose features differ from window to window."""
    cfg = data_config(small_set, *VIEWS.split(), *words)
    torch.manual_seed(0)
    model = build_model(cfg, len(NAMES))
    for parameter in (model.head.proj.weight, model.time_embed, model.stgm.global_centres):
        torch.nn.init.normal_(parameter, std=0.5)
    save_weights(folder / "model.safetensors", model, NAMES, view_settings(cfg))
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, small_set: Path) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("windows"), small_set)


@pytest.fixture(scope="module")
def streaming(tmp_path_factory: pytest.TempPathFactory, small_set: Path) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("streaming"), small_set, "MODEL.STREAMING", "True")


@pytest.fixture
def run(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Extract into ``tmp_path``/out, check the exit code, and return what was said."""

    def extract_into(*words: str | Path, code: int = 0, weights: Path = checkpoint) -> str:
        capsys.readouterr()
        fixed = ["--output", str(tmp_path / "out"), "--checkpoint", str(weights)]
        assert extract.main([*fixed, *map(str, words)]) == code
        out, err = capsys.readouterr()
        assert code != 2 or (err.startswith("error: ") and err.count("\n") == 1), err
        return out + err

    return extract_into


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of each file below, without those of the lock."""
    found = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {str(name): path.read_bytes() for name, path in found.items() if not name.name.startswith(".lock")}


def features(folder: Path) -> set[str]:
    """Return the names of the features' files."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*.npy")}


def index(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "index.csv").open()))


def make_videos(write_clip: Callable[..., Path], tmp_path: Path, *names: str, count: int = 40) -> Path:
    """Encode videos of different frames below ``tmp_path``/videos, and return that folder."""
    for i, name in enumerate(names):
        write_clip(make_frames(count + 10 * (i % 3)), f"videos/{name}")
    return tmp_path / "videos"


@torch.no_grad()
def test_rows_are_those_of_forward_on_each_windows_clip(
    run: Callable[..., str], checkpoint: Path, write_clip: Callable[..., Path], tmp_path: Path
) -> None:
    frames = make_frames(75)
    lossless = {"codec": "libx264rgb", "pixels": "rgb24", "crf": "0"}
    run(write_clip(frames, "long.mp4", **lossless), "--window", "1", "--step", "0.8")
    rows = np.load(tmp_path / "out" / "long.npy")
    model = Predictor.load(checkpoint).model
    clips = Predictor.load(checkpoint)  # of a file that is one window
    starts = [0.0, 0.8, 1.6, 2.0]
    assert rows.shape == (len(starts), model.pos_embed.shape[2])
    assert rows.dtype == np.float32
    for row, start in zip(rows, starts, strict=True):
        first = round(25 * start)
        views = clips.clips(write_clip(frames[first : first + 25], "window.mp4", **lossless))
        assert views.shape[:3] == (3, 3, FRAMES)
        np.testing.assert_allclose(row, model.forward_features(views).mean(dim=(0, 1)).numpy(), atol=1e-5)
    assert np.abs(rows - rows[0]).max() > 0.05
    (entry,) = index(tmp_path / "out")
    expected = {"file": "long.npy", "fps": "25.0", "window": "1.0", "step": "0.8", "first": "0.0", "last": "3.0"}
    assert {name: entry[name] for name in expected} == expected
    assert (entry["path"], entry["rows"], entry["error"]) == (str(tmp_path / "long.mp4"), "4", "")
    found = json.loads((tmp_path / "out" / "index.json").read_text())
    assert found["videos"]["long.npy"]["times"] == [[start, start + 1] for start in starts]
    assert "classes" not in found


def test_windows_are_as_long_as_a_clip_and_one_where_the_video_is_shorter(
    run: Callable[..., str], write_clip: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_videos(write_clip, tmp_path, "long.mp4", count=64)
    write_clip(make_frames(10), "videos/short.mp4")
    write_clip(make_frames(80), "videos/fast.mp4", rate=50)
    said = run(folder)
    assert "1 of 10 windows are shorter than a clip of 15 frames" in said
    rows = {row["file"]: row for row in index(tmp_path / "out")}
    assert [(name, row["rows"], row["fps"], row["window"], row["step"], row["last"]) for name, row in rows.items()] == [
        ("fast.npy", "5", "50.0", "0.32", "0.32", "1.6"),
        ("long.npy", "4", "25.0", "0.64", "0.64", "2.56"),
        ("short.npy", "1", "25.0", "0.64", "0.64", "0.4"),
    ]
    said = run(folder, "--set", "DATA.SAMPLING=uniform", code=2)
    assert "--window is missing" in said


@torch.no_grad()
def test_layers(run: Callable[..., str], checkpoint: Path, write_clip: Callable[..., Path], tmp_path: Path) -> None:
    video = write_clip(make_frames(40))
    predictor = Predictor.load(checkpoint)
    seen = predictor.model(predictor.clips(video), return_intermediates=True)[1].tokens
    means = {name: seen[name].mean(dim=(0, 1)) for name in ("embed", "base", "final")}
    for layer, expected in {**means, "pooled": means["final"], "semantic": seen["semantic"].mean(dim=0)}.items():
        run(video, "--window", "9", "--layer", layer, "--output", tmp_path / layer)
        np.testing.assert_allclose(np.load(tmp_path / layer / "clip.npy"), expected.numpy()[None], atol=1e-5)
    said = run(video, "--layer", "bass", code=2)
    assert "has pooled, logits, embed, base, semantic, final; give one of these. Did you mean base?" in said


def test_logits_are_those_of_the_timeline(
    run: Callable[..., str], checkpoint: Path, write_clip: Callable[..., Path], tmp_path: Path
) -> None:
    video = write_clip(make_frames(75))
    one_view = "TEST.CROPS=1"  # of several, features are averaged, and predict averages probabilities
    run(video, "--window", "1", "--step", "0.5", "--layer", "logits", "--set", one_view)
    (result,) = Predictor.load(checkpoint, overrides=[one_view]).predict([video], window=1, step=0.5)
    scores = torch.from_numpy(np.load(tmp_path / "out" / "clip.npy")).softmax(dim=1)
    torch.testing.assert_close(scores, torch.stack([window.scores for window in result.windows]), rtol=0, atol=1e-6)
    assert (scores - scores[0]).abs().max() > 0.01
    found = json.loads((tmp_path / "out" / "index.json").read_text())
    assert found["classes"] == NAMES
    assert found["videos"]["clip.npy"]["times"] == [[w.span.start, w.span.end] for w in result.windows]


def test_formats(run: Callable[..., str], write_clip: Callable[..., Path], tmp_path: Path) -> None:
    video = write_clip(make_frames(75))
    for kind in ("npy", "npz", "safetensors"):
        run(video, "--format", kind, "--output", tmp_path / kind)
    rows = np.load(tmp_path / "npy" / "clip.npy")
    times = json.loads((tmp_path / "npy" / "index.json").read_text())["videos"]["clip.npy"]["times"]
    for found in (np.load(tmp_path / "npz" / "clip.npz"), load_file(tmp_path / "safetensors" / "clip.safetensors")):
        assert set(found) == {"features", "times"}
        np.testing.assert_array_equal(found["features"], rows)
        np.testing.assert_array_equal(found["times"], times)
    assert len(rows) == len(times) == 5


def test_equal_names_do_not_collide(run: Callable[..., str], write_clip: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_videos(write_clip, tmp_path, "a/x.mp4", "a/x.mkv", "b/x.mp4", "b/y.mp4")
    run(folder)
    assert features(tmp_path / "out") == {"a/x.mp4.npy", "a/x.mkv.npy", "b/x.npy", "b/y.npy"}
    assert [row["file"] for row in index(tmp_path / "out")] == sorted(features(tmp_path / "out"))
    # One argument more, or less, below the same folder.
    run(folder / "a", folder / "b" / "y.mp4", "--output", tmp_path / "some")
    assert features(tmp_path / "some") == {"a/x.mp4.npy", "a/x.mkv.npy", "b/y.npy"}
    paths = ["/v/x.mp4", "/v/x.avi", "/v/x.mp4.mkv", "/v/x"]
    assert name_files(paths, "/v", "npy") == ["x.mp4.npy", "x.avi.npy", "x.mp4.mkv.npy", "x.npy"]
    assert name_files(["/v/c.d/2.5 m"], "/v", "npz") == ["c.d/2.5 m.npz"]


def test_lists_name_videos(run: Callable[..., str], write_clip: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_videos(write_clip, tmp_path, "a/x.mp4", "a/y.mp4", "z.mp4")
    (tmp_path / "plain.txt").write_text("a/x.mp4\na/y.mp4\n")
    (tmp_path / "sections.csv").write_text("path,label,start,stop\na/x.mp4,0,0,1\na/x.mp4,1,1,1.5\n")
    run(tmp_path / "plain.txt", tmp_path / "sections.csv", "--root", folder)
    assert features(tmp_path / "out") == {"a/x.npy", "a/y.npy"}
    assert index(tmp_path / "out")[0]["last"] == "1.6"  # the whole video, once
    assert "is a stream, a camera or a pipe" in run("0", code=2)
    assert "is not a folder" in run(folder, "--root", tmp_path / "none", code=2)
    assert "is not a file" in run(tmp_path / "none.txt", code=2)
    assert "leave it out" in run(folder, "--root", folder, code=2)


def test_what_is_done_and_whole_is_kept(
    run: Callable[..., str], write_clip: Callable[..., Path], tmp_path: Path
) -> None:
    folder, out = make_videos(write_clip, tmp_path, "a.mp4", "b.mp4", "c.mp4", "d.mp4"), tmp_path / "out"
    run(folder)
    first = files_of(out)
    os.truncate(out / "a.npy", 100)
    (out / "records" / "b.npy.json").write_text("{")
    (out / ".c.npy.12345678.tmp").write_text("of a killed run")
    (out / "index.csv").unlink()
    (folder / "d.mp4").unlink()  # its features stay
    inode = (out / "c.npy").stat().st_ino
    assert "2 of 4 videos are done already" in run(*(folder / f"{name}.mp4" for name in "abcd"))
    assert files_of(out) == first
    assert (out / "c.npy").stat().st_ino == inode
    write_clip(make_frames(30), "videos/c.mp4")
    run(folder)
    assert {name for name, content in files_of(out).items() if content != first[name]} == {
        *("c.npy", "records/c.npy.json", "index.csv", "index.json")
    }
    assert [row["file"] for row in index(out)] == ["a.npy", "b.npy", "c.npy", "d.npy"]


def test_other_settings_and_other_videos_are_refused(
    run: Callable[..., str], streaming: Path, write_clip: Callable[..., Path], tmp_path: Path
) -> None:
    folder, out = make_videos(write_clip, tmp_path, "a/x.mp4", "b/x.mp4"), tmp_path / "out"
    run(folder / "a")
    first = files_of(out)
    for words, named in (
        (["--layer", "logits"], "layer pooled (now logits)"),
        (["--step", "0.32"], "step None (now 0.32)"),
        (["--window", "1"], "window None (now 1.0)"),
        (["--format", "npz"], "format npy (now npz)"),
        (["--set", "TEST.CROPS=1"], "TEST.CROPS 3 (now 1)"),
        (["--precision", "bf16"], "precision fp32 (now bf16)"),
    ):
        assert named in run(folder / "a", *words, code=2)
    assert "weights " in run(folder / "a", code=2, weights=streaming)
    assert "b/x.mp4; give another --output" in run(folder / "b", code=2)
    assert files_of(out) == first
    assert "a.txt and no settings.json" in run(folder, "--output", write_text(tmp_path / "own" / "a.txt"), code=2)


def write_text(path: Path) -> Path:
    """Write a file, and return its folder."""
    path.parent.mkdir()
    path.write_text("mine")
    return path.parent


def test_a_video_that_cannot_be_read_is_a_row(
    run: Callable[..., str], write_clip: Callable[..., Path], tmp_path: Path
) -> None:
    folder, out = make_videos(write_clip, tmp_path, "a.mp4", "b.mp4", "z.mp4"), tmp_path / "out"
    content = (folder / "b.mp4").read_bytes()
    (folder / "b.mp4").write_bytes(content[: len(content) // 2])
    said = run(folder, tmp_path / "videos" / "gone.mp4", code=1)
    assert "2 videos, 7 rows" in said
    assert "; 2 could not be read: see " in said
    rows = {row["file"]: row for row in index(out)}
    assert features(out) == {"a.npy", "z.npy"}
    assert rows["gone.npy"]["error"] == "no such file"
    assert rows["b.npy"]["error"]
    assert (rows["b.npy"]["rows"], rows["b.npy"]["first"], rows["a.npy"]["error"]) == ("0", "", "")
    (folder / "b.mp4").write_bytes(content)
    assert "2 of 3 videos are done already" in run(folder)
    assert features(out) == {"a.npy", "b.npy", "z.npy"}


def test_features_that_are_not_finite_are_refused(
    run: Callable[..., str], checkpoint: Path, write_clip: Callable[..., Path], tmp_path: Path
) -> None:
    model = Predictor.load(checkpoint).model
    torch.nn.init.constant_(model.norm.weight, 3e38)  # finite itself
    save_weights(tmp_path / "large.safetensors", model, NAMES, {"DATA.STRIDE": 2})
    said = run(write_clip(make_frames(40)), code=1, weights=tmp_path / "large.safetensors")
    assert "are not finite; use --precision fp32 or other weights" in said
    assert features(tmp_path / "out") == set()


@pytest.mark.parametrize("layer", ["pooled", "semantic", "logits", "base"])
def test_streamed_windows_have_the_same_features(
    run: Callable[..., str],
    streaming: Path,
    write_clip: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layer: str,
) -> None:
    video = write_clip(make_frames(76))
    monkeypatch.setattr("stvit_video.inference.predictor.PIECE_FRAMES", 32)  # several parts
    words = [video, "--window", "0.8", "--step", "0.16", "--layer", layer]
    assert "streamed: 15 of 15 windows" in run(*words, weights=streaming)
    load = Predictor.__init__

    def without_stream(self: Predictor, *arguments: object, **settings: object) -> None:
        load(self, *arguments, **settings)
        self.group = None

    monkeypatch.setattr(Predictor, "__init__", without_stream)
    run(*words, "--output", tmp_path / "windows", weights=streaming)
    rows, expected = (np.load(tmp_path / name / "clip.npy") for name in ("out", "windows"))
    np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))
    assert rows.ndim == (3 if layer == "semantic" else 2)
    assert np.abs(rows - rows[0]).max() > 0.01


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_memory_does_not_grow_with_a_video(tmp_path: Path, kind: str) -> None:
    def windows() -> Iterator[Window | None]:
        for i in range(2000):
            yield Window(torch.full((16, 192), float(i)), Span(i, i + 1), 0.0, 0.0, fps=25.0)
        yield None

    folder = FeatureFolder(tmp_path, {}, kind)
    tracemalloc.start()  # NumPy copies 16 MB at a time into an .npz
    folder.write("/v/long.mp4", f"long.{kind}", windows(), lambda fps: (1.0, 1.0))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 18e6 < 24e6 < (tmp_path / f"long.{kind}").stat().st_size
    rows = np.load(tmp_path / f"long.{kind}")
    np.testing.assert_array_equal((rows if kind == "npy" else rows["features"])[:, 3, 5], np.arange(2000))


def command(checkpoint: Path, folder: Path, output: Path, *launcher: str) -> list[str]:
    words = [str(folder), "--checkpoint", str(checkpoint), "--output", str(output), "--step", "0.2"]
    return [sys.executable, *launcher, "-m", "stvit_video.extract", *words]


def make_many(write_clip: Callable[..., Path], tmp_path: Path, count: int) -> Path:
    """Write videos in three folders, one of which cannot be read."""
    folder = make_videos(write_clip, tmp_path, *(f"{i % 3}/{i:02}.mp4" for i in range(count)), count=60)
    (folder / "0" / "00.mp4").write_bytes(b"no video")
    return folder


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


@pytest.mark.long
def test_killed_five_times_it_ends_with_the_same_files(
    checkpoint: Path, write_clip: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_many(write_clip, tmp_path, 40)
    whole = command(checkpoint, folder, tmp_path / "whole")
    assert subprocess.run(whole, env=ENVIRONMENT, timeout=300).returncode == 1
    expected = files_of(tmp_path / "whole")
    killed, rng, done = command(checkpoint, folder, tmp_path / "killed"), random.Random(0), [0]
    for _ in range(5):
        process = subprocess.Popen(killed, env=ENVIRONMENT, start_new_session=True)
        while len(features(tmp_path / "killed")) <= done[-1]:  # each time it gets somewhere
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        done.append(len(features(tmp_path / "killed")))
    assert done[-1] < 39
    assert subprocess.run(killed, env=ENVIRONMENT, timeout=300).returncode == 1
    assert files_of(tmp_path / "killed") == expected
    assert len(features(tmp_path / "killed")) == 39


@pytest.mark.long
def test_several_processes_write_the_same_files(
    checkpoint: Path, write_clip: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_many(write_clip, tmp_path, 7)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    for count in (1, 2, 3):
        start = [*launcher, str(count)] if count > 1 else []
        words = command(checkpoint, folder, tmp_path / str(count), *start)
        done = subprocess.run(words, env=ENVIRONMENT, timeout=300, capture_output=True)
        assert done.returncode == 1, done.stderr.decode()
        assert done.stdout.decode().count("6 videos, ") == 1
    expected = files_of(tmp_path / "1")
    assert len(expected) == 6 + 7 + 3  # features, records, and what is about all
    for count in ("2", "3"):
        assert files_of(tmp_path / count) == expected
