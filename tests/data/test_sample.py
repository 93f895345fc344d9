"""The sample sets: deterministic, completed after an interruption, and with motions that no single frame shows."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stvit_video.common.errors import UsageError
from stvit_video.data import sample, sprites
from stvit_video.data.decode.frames import open_video
from stvit_video.data.lists.class_names import read_classes
from tests.common.test_locks import forked
from tests.conftest import read_list

SPEC = sample.Spec(clips=(16, 8, 8), stills=(8, 8))
HARD = sample.Spec(clips=(16, 16, 16), name="sample_hard")


def digest(root: Path) -> str:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(p.relative_to(root)).encode() + p.read_bytes() for p in files)).hexdigest()


@pytest.mark.parametrize("spec", [SPEC, HARD], ids=lambda spec: spec.name)
def test_the_seed_determines_all_bytes(spec: sample.Spec, tmp_path: Path) -> None:
    for name, one, workers in (("a", spec, 1), ("b", spec, 2), ("c", replace(spec, seed=1), 2)):
        sample.prepare(tmp_path / name, one, workers=workers, progress=False)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


def test_layout_lists_and_files_agree(small_set: Path) -> None:
    for labels, names in (("motion", sprites.MOTIONS), ("shape", sprites.SHAPES)):
        assert tuple(read_classes(small_set / labels / "classes.txt").names) == names
        for split, count in zip(sample.SPLITS, (32, 16, 16), strict=True):
            videos = read_list(small_set / labels / f"{split}.csv", small_set)
            assert len(videos) == count
            assert all(Path(video.path).is_file() for video in videos)
    reader = open_video(read_list(small_set / "motion" / "train.csv", small_set)[0].path)
    assert reader.length == sprites.FRAMES
    assert reader.frames(np.array([0])).shape == (1, sprites.SIDE, sprites.SIDE, 3)
    assert sorted(path.name for path in (small_set / "stills" / "train").iterdir()) == sorted(sprites.SHAPES)


def test_the_hard_set_is_balanced(tmp_path: Path) -> None:
    sample.prepare(tmp_path, HARD, progress=False)
    assert tuple(read_classes(tmp_path / "motion_shape" / "classes.txt").names) == sprites.CLASSES
    for split in sample.SPLITS:
        videos = read_list(tmp_path / "motion_shape" / f"{split}.csv", tmp_path)
        assert sorted(video.label for video in videos) == list(range(16))
    reader = open_video(videos[0].path)
    assert reader.length == sprites.FRAMES
    assert not list(tmp_path.rglob("*.png"))
    with pytest.raises(UsageError, match="holds the sample set"):
        sample.prepare(tmp_path, SPEC)


def test_records_without_a_name_are_accepted(tmp_path: Path) -> None:
    sample.prepare(tmp_path, SPEC, progress=False)
    record = json.loads((tmp_path / "sample.json").read_text())
    assert record.pop("name") == "sample"
    (tmp_path / "sample.json").write_text(json.dumps(record))
    sample.prepare(tmp_path, SPEC, progress=False)


def test_interrupted_generation_is_completed(tmp_path: Path) -> None:
    root = tmp_path / "set"
    code = f"from stvit_video.data import sample; sample.prepare({str(root)!r}, sample.Spec((400, 8, 8), (8, 8)))"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(root.glob("videos/*_00020.mp4")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    written = set(root.glob("videos/*.mp4"))
    assert 0 < len(written) < 416
    assert not (root / "complete").exists()
    before = {path: path.stat().st_mtime_ns for path in written}
    sample.prepare(root, sample.Spec((400, 8, 8), (8, 8)), progress=False)
    assert len(list(root.glob("videos/*.mp4"))) == 416
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    sample.prepare(tmp_path / "whole", sample.Spec((400, 8, 8), (8, 8)), progress=False)
    assert {p.name: p.read_bytes() for p in root.glob("videos/*.mp4")} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").glob("videos/*.mp4")
    }


def test_lost_and_empty_files_are_generated_again(tmp_path: Path) -> None:
    root = tmp_path / "set"
    sample.prepare(root, SPEC, progress=False)
    whole = digest(root)
    (root / "videos" / "train_00003.mp4").unlink()
    (root / "videos" / "test_00001.mp4").write_bytes(b"")
    sample.prepare(root, SPEC, progress=False)
    assert digest(root) == whole


def test_other_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.mp4").touch()
    with pytest.raises(UsageError, match="holds no sample set"):
        sample.prepare(tmp_path, SPEC)
    (tmp_path / "other").mkdir()
    for content in (json.dumps({"seed": 3}), '{"seed":'):
        (tmp_path / "other" / "sample.json").write_text(content)
        with pytest.raises(UsageError, match="holds the sample set"):
            sample.prepare(tmp_path / "other", SPEC)
    with pytest.raises(UsageError, match="cannot be written"):
        sample.prepare(tmp_path / "holiday.mp4" / "set", SPEC)


def states(motion: str, time_step: int, count: int = 1500) -> np.ndarray:
    """Return x, y, angle and log-radius of ``count`` sprites in one frame, each scaled to 0 to 1."""
    rows = []
    for i in range(count):
        state = sprites.trajectory(motion, np.random.default_rng([7, sprites.MOTIONS.index(motion), i]))
        log_radius = np.log(state.radius / sprites.MIN_RADIUS) / np.log(sprites.MAX_RADIUS / sprites.MIN_RADIUS)
        row = (state.x / sprites.SIDE, state.y / sprites.SIDE, state.angle / (2 * np.pi), log_radius)
        rows.append([values[time_step] for values in row])
    return np.array(rows)


@pytest.mark.parametrize("time_step", [0, 10, 19])
@pytest.mark.parametrize("motion", sprites.MOTIONS)
def test_single_frames_have_the_same_distribution_in_every_class(motion: str, time_step: int) -> None:
    """Kolmogorov's distance to the uniform distribution, at its 0.1 % critical value, for each quantity."""
    values = np.sort(states(motion, time_step), axis=0)
    uniform = (np.arange(len(values)) + 0.5)[:, None] / len(values)
    assert np.abs(values - uniform).max() < 1.95 / np.sqrt(len(values))


def test_motions_change_the_named_quantity() -> None:
    def change(motion: str, quantity: str, period: float | None) -> np.ndarray:
        steps = np.diff(getattr(sprites.trajectory(motion, np.random.default_rng(3)), quantity))
        return steps if period is None else (steps + period / 2) % period - period / 2

    for motion, quantity, period, sign in (
        ("left", "x", 64, -1), ("right", "x", 64, 1), ("up", "y", 64, -1), ("down", "y", 64, 1),
        ("clockwise", "angle", 2 * np.pi, 1), ("counter-clockwise", "angle", 2 * np.pi, -1),
    ):  # fmt: skip
        assert (sign * change(motion, quantity, period) > 0).all()
    for motion, sign in (("growing", 1), ("shrinking", -1)):
        assert (
            sign * change(motion, "radius", None) > 0
        ).sum() >= sprites.FRAMES - 2  # at most one return to the start


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--seed", "-1"], "--seed -1 is out of range; give a number from 0 on"),
        (["--seed", "x"], "invalid int value: 'x'; use: python -m stvit_video.data.sample [--root FOLDER]"),
        (["--root", "file"], "file exists but holds no sample set"),
        (["--root", "file/set"], "file/set cannot be written (Not a directory)"),
        (["--root", "blocked"], "--root blocked cannot be written (File exists)"),
    ],
)
def test_wrong_use_is_one_line(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("blocked").mkdir()
    Path("blocked/videos").touch()
    Path("blocked/sample.json").write_text(json.dumps(asdict(sample.Spec())))
    assert sample.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert says in said


def test_clockwise_is_clockwise_on_the_screen() -> None:
    """A bar drawn at a small positive angle has its right end lower: on a screen, y points down."""
    still = sprites.trajectory("left", np.random.default_rng(0), frames=1)
    tilted = sprites.State(np.array([32.0]), np.array([32.0]), np.array([0.4]), still.radius * 0 + 24)
    picture = sprites.draw("bar", tilted, np.random.default_rng(0))[0].astype(float)
    flat = sprites.draw(
        "bar",
        sprites.State(tilted.x, tilted.y + 500, tilted.angle, still.radius * 0 + 0.01),
        np.random.default_rng(0),
    )
    cover = np.abs(picture - flat[0]).sum(axis=2) > 30
    rows, columns = np.nonzero(cover)
    assert np.corrcoef(rows, columns)[0, 1] > 0.3


@pytest.mark.parametrize("label", sprites.CLASSES)
def test_the_large_sprite_of_the_hard_set_moves_in_its_direction(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without other sprites and camera motion, it moves by half to one picture side, measured by its phase."""
    monkeypatch.setattr(sprites, "DISTRACTORS", 0)
    monkeypatch.setattr(sprites, "PAN", 0.0)
    frames = sprites.draw_hard(label, np.random.default_rng(5)).astype(float)
    cover = (np.abs(frames - np.median(frames, axis=0)).sum(axis=3) > 40).astype(float)
    waves = np.exp(2j * np.pi * (np.arange(sprites.SIDE) + 0.5) / sprites.SIDE)
    travelled = []
    for axis in (1, 2):  # y is summed away for x, and the other way round
        phases = np.unwrap(np.angle(cover.sum(axis=axis) @ waves)) / (2 * np.pi)
        travelled.append((phases[-1] - phases[0]) * sprites.FRAMES / (sprites.FRAMES - 1))
    along = np.dot(travelled, sprites.MOVES[label.split()[0]])
    assert 0.4 < along < 1.1
    assert abs(abs(travelled[0]) + abs(travelled[1]) - along) < 0.1


def test_clutter_moves_only_with_the_camera(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without sprites, each frame is a shifted copy of the first."""
    monkeypatch.setattr(sprites, "_add_sprite", lambda *_: None)
    frames = sprites.draw_hard("left ring", np.random.default_rng(2))
    moved = [np.roll(frames[0], (y, x), axis=(0, 1)) for y in range(-32, 32) for x in range(-32, 32)]
    places = [next(i for i, picture in enumerate(moved) if (picture == frame).all()) for frame in frames]
    assert len(set(places)) > 5


def test_a_one_frame_model_stays_at_chance() -> None:
    """A network trained on single frames of 2,048 videos does not recognise the motion of new ones."""

    def drawings(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        pictures = []
        for i in range(count):
            rng = np.random.default_rng([seed, i])
            motion, shape = sample.video_labels(i)
            state = sprites.trajectory(motion, rng)
            at = int(rng.integers(sprites.FRAMES))
            one = sprites.State(*(values[at : at + 1] for values in (state.x, state.y, state.angle, state.radius)))
            pictures.append(sprites.draw(shape, one, rng)[0, ::2, ::2])
        labels = torch.arange(count) % len(sprites.MOTIONS)
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 128 - 1, labels

    (x, y), (new_x, new_y) = drawings(0, 2048), drawings(1, 1024)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 5, stride=2), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 3, stride=2), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.LazyLinear(64), torch.nn.ReLU(), torch.nn.Linear(64, 8),
    )  # fmt: skip
    network(x[:2])
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(4):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = (network(new_x).argmax(dim=1) == new_y).float().mean().item()
    assert accuracy < 0.2


def test_a_set_that_another_process_generates_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "set"
    with forked(root / ".lock") as child:
        threading.Timer(0.5, os.kill, (child, signal.SIGKILL)).start()
        sample.prepare(root, sample.Spec((8, 8, 8), (8, 8)), workers=1, progress=False)
        holder = f"process {child} on {socket.gethostname()}"
        assert capsys.readouterr().out == f"waiting for {holder}, which generates {root}\n"
    assert sample.is_complete(root)
