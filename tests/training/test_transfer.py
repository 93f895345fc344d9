"""Transfer without training: nearest neighbours and linear probe on random features, and the whole mode."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from stvit_video import run
from stvit_video.common.charts import plot_transfer
from stvit_video.config import load_config
from stvit_video.data.failures import Failure
from stvit_video.data.lists.videos import build_lists
from stvit_video.data.loader import build_test_loader
from stvit_video.data.workers import Loader
from stvit_video.evaluation.scores import Predictions, fingerprint, read_features, write_features
from stvit_video.models import create_model
from stvit_video.models.weights.files import read_checkpoint
from stvit_video.runs.checkpoint import save_weights
from stvit_video.runs.folder import RunFolder
from stvit_video.runs.log import read_metrics
from stvit_video.runtime.world import World
from stvit_video.training import transfer as transfer_module
from stvit_video.training.transfer import (
    build_image_model,
    build_rows,
    frame_probabilities,
    linear_probe,
    nearest_neighbours,
)
from tests.conftest import REPOSITORY, Killed

Arguments = Callable[..., list[str]]
MACRO = ("macro_top1", "macro_f1", "classes_without_videos")


def described(features: torch.Tensor, labels: torch.Tensor) -> Predictions:
    return Predictions(features, labels, torch.arange(len(labels)), len(labels))


def test_votes_are_weighted_by_similarity() -> None:
    angles = torch.tensor([0.0, 0.2, 0.5, 3.0])
    train = described(torch.stack([angles.cos(), angles.sin()], dim=1) * 7, torch.tensor([0, 1, 1, 2]))
    votes = nearest_neighbours(train, torch.tensor([[3.0, 0.0]]), classes=3, k=3, temperature=0.1)[0]
    similarity = angles[:3].cos()
    expected = ((similarity - 1) / 0.1).exp()
    torch.testing.assert_close(votes, torch.tensor([expected[0], expected[1] + expected[2], 0.0]))
    assert nearest_neighbours(train, torch.tensor([[3.0, 0.0]]), classes=3, k=50, temperature=0.1).argmax() == 1


def test_linear_probe_is_at_the_minimum_of_its_loss() -> None:
    """At the optimum of a regularised softmax regression, residuals and features balance the decay."""
    features, labels = torch.randn(60, 5), torch.randint(3, (60,))
    logits = linear_probe(described(features, labels), features, 3, weight_decay=0.01)
    standard = (features - features.mean(dim=0)) / features.std(dim=0)
    design = torch.cat([standard, torch.ones(60, 1)], dim=1)
    weight = torch.linalg.lstsq(design, logits).solution  # (6, 3), the fitted layer
    residual = (logits.softmax(dim=1) - torch.nn.functional.one_hot(labels, 3)) / 60
    gradient = design.T @ residual + 0.02 * torch.cat([weight[:5], torch.zeros(1, 3)])
    assert gradient.abs().max() < 1e-3


def test_scores_do_not_depend_on_the_chunk() -> None:
    train, features = described(torch.randn(50, 6), torch.randint(4, (50,))), torch.randn(2100, 6)
    whole = nearest_neighbours(train, features, 4, 5, 0.07)
    for start in (0, 1000, 2090):
        part = nearest_neighbours(train, features[start : start + 10], 4, 5, 0.07)
        torch.testing.assert_close(whole[start : start + 10], part)


def test_frames_are_classified_alone_and_averaged() -> None:
    model = image_model(5).eval()
    clips = torch.randn(2, 3, 4, 64, 64)
    with torch.no_grad():
        found = frame_probabilities(model, clips)
        expected = [
            torch.stack([model(clip[:, t : t + 1][None]).softmax(1)[0] for t in range(4)]).mean(0) for clip in clips
        ]
    torch.testing.assert_close(found, torch.stack(expected))


def test_top_5_of_three_classes_is_100_percent(tmp_path: Path) -> None:
    parts = {name: described(torch.randn(6, 4), torch.arange(6) % 3) for name in ("train_init", "test_init")}
    cfg = load_config(REPOSITORY / "configs" / "sample_transfer.yaml", ["MODEL.INIT", "image.pth"])
    rows = build_rows(SimpleNamespace(cfg=cfg, folder=RunFolder(tmp_path), classes=["a", "b", "c"]), parts)
    assert [row["top5"] for row in rows] == [100, 100]
    assert rows[0]["method"] == "k-nearest neighbours (k 6, temperature 0.07)"  # not the 20 that were asked for


def test_the_chart_is_1000_pixels_wide_and_cuts_nothing_off(tmp_path: Path) -> None:
    rows = [
        {"method": "random weights, k-nearest neighbours (k 20, temperature 0.07)", "weights": "random", "top1": 100.0},
        {"method": "fine-tuned (30 epochs)", "weights": "fine-tuned", "top1": 0.0},
    ]
    plot_transfer(rows, 0.25, tmp_path / "a.png")
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    assert picture.shape[1] == 1000
    for edge in (picture[:2], picture[-2:], picture[:, :2], picture[:, -2:]):
        assert (edge == 255).all()


def image_model(classes: int, frames: int = 1, **overrides: Any) -> torch.nn.Module:
    return create_model("stvit_vit_sample_patch8", num_frames=frames, image_size=64, num_classes=classes, **overrides)


def run_transfer(arguments: list[str], output: Path) -> dict[str, Any]:
    assert run.main(arguments) == 0
    return json.loads((output / "transfer.json").read_text())


def test_the_mode_scores_an_image_checkpoint_and_names_what_it_used(
    small_run: Arguments, refused: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(image_model(5).state_dict(), tmp_path / "image.pth")
    words = ["MODE", "transfer", "MODEL.INIT", str(tmp_path / "image.pth"), "TRANSFER.NEIGHBOURS", "3"]
    content = run_transfer(small_run(*words), tmp_path / "run")
    assert [row["method"].split(" (")[0] for row in content["rows"]] == [
        "k-nearest neighbours",
        "linear probe",
        "random weights, k-nearest neighbours",
        "random weights, linear probe",
    ]
    assert [row["weights"] for row in content["rows"]] == ["checkpoint", "checkpoint", "random", "random"]
    assert all(row["coverage"] == 1 and 0 <= row["top1"] <= row["top5"] <= 100 for row in content["rows"])
    said = capsys.readouterr().out
    assert "k 3, temperature 0.07" in said
    table = said[said.index("method (chance 12.5 %)") :].splitlines()
    assert len({len(line) for line in table[:5]}) == 1
    assert f"no image head: {tmp_path}/image.pth carries no class names\n" in said
    assert content["image_head"] == f"{tmp_path}/image.pth carries no class names"
    assert content["complete"] is True
    assert (tmp_path / "run" / "transfer.png").stat().st_size > 5000
    report = json.loads((tmp_path / "run" / "load_report.json").read_text())
    assert report["source"].endswith("image.pth")
    assert "head.proj.weight" in report["keys"]["new"]
    assert "holds results (transfer.json" in refused(small_run(*words))
    assert "needs a checkpoint" in refused(small_run("MODE", "transfer"))
    words += ["OVERWRITE", "True", "TRANSFER.RANDOM_BASELINE", "False"]
    assert len(run_transfer(small_run(*words), tmp_path / "run")["rows"]) == 2


def test_the_image_head_is_scored_where_the_classes_agree(
    small_run: Arguments, small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = (small_set / "shape" / "classes.txt").read_text().split()
    model, path = image_model(8).eval(), tmp_path / "image.safetensors"
    torch.nn.init.normal_(model.head.proj.weight)  # else one class is the best everywhere
    save_weights(path, model, classes)
    words = ["MODEL.INIT", str(path), "TRANSFER.RANDOM_BASELINE", "False", "TEST.CLIPS", "2"]
    arguments = small_run(*words, cfg="sample_transfer")
    content = run_transfer(arguments, tmp_path / "run")
    assert content["image_head"] is None
    first = content["rows"][0]
    assert first["method"] == "image head, averaged over frames"
    cfg, hits = load_config(arguments[1], arguments[2:]), 0
    loader = build_test_loader(cfg, World(0, 1, torch.device("cpu")), build_lists(cfg).videos("test"), clips=2)
    for i in range(16):
        batch = loader.collate_fn([loader.dataset[i]])
        frames = batch.make_clips().transpose(1, 2).flatten(0, 1)  # all frames of both views
        with torch.no_grad():
            hits += int(model(frames[:, :, None]).softmax(1).mean(0).argmax() == batch.labels[0])
    assert first["top1"] == 100 * hits / 16
    assert 0 < hits < 16


def test_an_image_head_that_does_not_apply_is_left_out_with_a_reason(small_set: Path, tmp_path: Path) -> None:
    classes = (small_set / "shape" / "classes.txt").read_text().split()
    path = tmp_path / "image.safetensors"
    cfg = load_config(
        REPOSITORY / "configs" / "sample_transfer.yaml", ["MODEL.INIT", str(path), "MODEL.REGIONS", "[8,4,4]"]
    )
    cases = {
        "has other classes (8 against 8; 'half-disc' where the data has 'disc')": (image_model(8), classes[::-1]),
        "has other classes (3 against 8; the first ones agree)": (image_model(3), classes[:3]),
        "is a model of 8 frames, not of images": (image_model(8, frames=8), classes),
        "stgm.pooling.mask_proj.weight (new)": (image_model(8, pooling="max", regions=(1, 4, 4)), classes),
        "trained with first_residual False, not None": (
            image_model(8, first_residual=False, regions=(1, 4, 4)),
            classes,
        ),
    }
    for says, (model, names) in cases.items():
        save_weights(path, model, names)
        found, reason = build_image_model(cfg, read_checkpoint(path), classes)
        assert found is None
        assert says in reason
        assert "\n" not in reason
    save_weights(path, image_model(8, regions=(1, 4, 4)), classes)
    assert build_image_model(cfg, read_checkpoint(path), classes)[1] == ""


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Titles of the passes over videos from now on; where the list has "stop", the test pass is interrupted."""
    titles: list[str] = []
    describe = transfer_module.describe_videos

    def watched(describer: Callable, loader: Loader, world: World, precision: str, title: str) -> Predictions:
        if "stop" in titles and title.startswith("test"):
            raise Killed
        titles.append(title)
        return describe(describer, loader, world, precision, title)

    monkeypatch.setattr(transfer_module, "describe_videos", watched)
    return titles


def test_features_are_cached_until_an_input_changes(
    small_run: Arguments, small_set: Path, tmp_path: Path, passes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    root, path = tmp_path / "set", tmp_path / "image.pth"
    shutil.copytree(small_set, root)
    (root / "videos" / "test_00003.mp4").write_bytes(b"broken")
    torch.save(image_model(8).state_dict(), path)
    words = ["MODE", "transfer", "MODEL.INIT", str(path), "TRANSFER.RANDOM_BASELINE", "False", "DATA.ROOT", str(root)]
    passes.append("stop")
    with pytest.raises(Killed):
        run.main(small_run(*words))
    passes.clear()
    first = run_transfer(small_run(*words), tmp_path / "run")
    assert passes == ["test list, init"]  # the other was whole when the run was killed
    failures = (tmp_path / "run" / "failures.csv").read_text()
    assert "test_00003.mp4,test" in failures

    def again(*more: str) -> list[str]:
        passes.clear()
        capsys.readouterr()
        again.content = run_transfer(small_run(*words, "OVERWRITE", "True", *more), tmp_path / "run")
        again.said = capsys.readouterr().out
        return [title.split()[0] for title in passes]

    assert again("TRANSFER.NEIGHBOURS", "2", "TRANSFER.TEMPERATURE", "0.5", "TRANSFER.WEIGHT_DECAY", "0.1") == []
    assert again.said.count("is used again") == 2
    assert "(k 2, temperature 0.5)" in again.content["rows"][0]["method"]
    assert (tmp_path / "run" / "failures.csv").read_text() == failures
    assert again.content["rows"][0]["coverage"] == 15 / 16
    assert "NEIGHBOURS: 2\n" in (tmp_path / "run" / "config.yaml").read_text()
    assert again() == []
    assert again.content == first
    assert again("DATA.STRIDE", "1") == ["train", "test"]
    assert again.said.count("is of another checkpoint, list or setting; computing it again") == 2
    shutil.copy(small_set / "videos" / "test_00003.mp4", root / "videos")
    assert again("DATA.STRIDE", "1") == ["test"]
    assert "videos that could not be read have changed" in again.said
    assert again.content["rows"][0]["coverage"] == 1
    torch.save(image_model(8).state_dict(), path)  # other weights under the same name
    assert again("DATA.STRIDE", "1") == ["train", "test"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "foreign", "empty"])
def test_a_damaged_cache_is_computed_again(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "features" / "test_init.pt"
    failures = [Failure("/nowhere/a.mp4", "test", "decord", "broken", "2026-01-01")]
    whole = Predictions(torch.randn(40, 8), torch.arange(40), torch.arange(40), 41, failures)
    assert read_features(path, "key") == (None, "")
    write_features(path, "key", whole)
    found, said = read_features(path, "key")
    assert said == f"{path} is used again"
    assert found is not None
    assert torch.equal(found.scores, whole.scores)
    assert torch.equal(found.labels, whole.labels)
    assert (found.total, found.failures) == (41, failures)
    assert read_features(path, "other")[0] is None
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    match damage:
        case "cut":
            path.write_bytes(content[:-100])
        case "flipped":
            path.write_bytes(content)
        case "text":
            path.write_text("<html>")
        case "foreign":
            save_file({"a": torch.zeros(3)}, path)
        case "empty":
            path.write_bytes(b"")
    found, said = read_features(path, "key")
    assert found is None
    assert f"{path} is damaged" in said
    assert "computing it again" in said
    assert "\n" not in said


def test_the_fingerprint_changes_with_every_input_of_features(small_run: Arguments) -> None:
    def key(*words: str, weights: str = "a", **overrides: Any) -> str:
        arguments = small_run(*words)
        cfg = load_config(arguments[1], arguments[2:])
        videos = build_lists(cfg).videos("test")
        loader = build_test_loader(cfg, World(0, 1, torch.device("cpu")), videos, clips=cfg.TEST.CLIPS)
        return fingerprint(image_model(8, **overrides), weights, loader.dataset, cfg.PRECISION, cfg.SEED)

    changes = (
        "DATA.FRAMES 4", "DATA.STRIDE 1", "DATA.SAMPLING uniform", "DATA.MEAN [0,0,0]", "DATA.STD [1,1,1]", "SEED 1",
        "TEST.SHORT_SIDE 72", "DATA.TEST_LIST shape/test.csv", "DATA.TEST_LIST motion/val.csv", "PRECISION bf16",
        "DATA.SIZE 32", "TEST.CLIPS 2",
    )  # fmt: skip
    keys = [key(), *(key(*words.split()) for words in changes), key(weights="b"), key(pooling="max")]
    assert len(set(keys)) == len(keys) == 15
    assert key("TRANSFER.NEIGHBOURS", "3", "DATA.WORKERS", "1", "TRAIN.EPOCHS", "9") == keys[0]


def test_fine_tuning_runs_last_and_resumes(
    small_set: Path,
    small_run: Arguments,
    refused: Callable,
    run_killed: Callable[[list[str], int], None],
    tmp_path: Path,
) -> None:
    torch.save(image_model(5).state_dict(), tmp_path / "image.pth")
    words = ["MODE", "transfer", "MODEL.INIT", str(tmp_path / "image.pth"), "TRANSFER.RANDOM_BASELINE", "False"]
    train_list = Path(shutil.copy(small_set / "motion" / "train.csv", tmp_path))
    words += ["TRANSFER.FINETUNE", "True", "TRAIN.EPOCHS", "2", "DATA.VAL_LIST", "", "DATA.TRAIN_LIST", str(train_list)]
    uneven = ["TRAIN.BATCH_SIZE", "9", "TRAIN.ACCUMULATE", "2"]
    assert "TRAIN.BATCH_SIZE 9 does not divide" in refused(small_run(*words, *uneven))
    assert not (tmp_path / "run").exists()
    run_killed(small_run(*words), 5)
    before = json.loads((tmp_path / "run" / "transfer.json").read_text())
    assert (before["complete"], len(before["rows"])) == (False, 2)
    checkpoints = list((tmp_path / "run" / "finetune" / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step_00000004.pt"]
    whole = train_list.read_text()
    train_list.write_text(whole.partition("\n")[2])
    assert "the training list has 31 videos, not 32" in refused(small_run(*words))  # before anything is computed
    assert json.loads((tmp_path / "run" / "transfer.json").read_text()) == before
    train_list.write_text(whole)
    content = run_transfer(small_run(*words, "TRANSFER.NEIGHBOURS", "7"), tmp_path / "run")
    steps = [row["step"] for row in read_metrics(tmp_path / "run" / "finetune" / "metrics.jsonl")]
    assert steps == [4, 8]  # the first epoch was not trained again
    assert content["complete"] is True
    results = json.loads((tmp_path / "run" / "finetune" / "results.json").read_text())
    assert content["rows"][2] == {
        "method": "fine-tuned (2 epochs)",
        "weights": "fine-tuned",
        **{name: results[name] for name in ("top1", "top5", *MACRO, "coverage")},
    }
    assert "(k 7," in content["rows"][0]["method"]
    assert "holds results (transfer.json" in refused(small_run(*words))


@pytest.mark.long
def test_two_processes_score_like_one(small_run: Arguments, tmp_path: Path) -> None:
    torch.save(image_model(5).state_dict(), tmp_path / "image.pth")
    words = ["MODE", "transfer", "MODEL.INIT", str(tmp_path / "image.pth"), "DEVICE", "cpu", "TEST.BATCH_SIZE", "3"]
    content = run_transfer(small_run(*words), tmp_path / "run")
    words += ["OUTPUT_DIR", str(tmp_path / "two")]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "stvit_video.run")
    result = subprocess.run(
        [sys.executable, *launcher, *small_run(*words)], capture_output=True, text=True, timeout=300, cwd=REPOSITORY
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "two" / "transfer.json").read_text()) == content
