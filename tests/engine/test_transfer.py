"""Untrained transfer: both scores on made-up features, and the whole mode."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stvit_video import run
from stvit_video.engine.metrics import Predictions
from stvit_video.engine.transfer import linear_probe, nearest_neighbours
from stvit_video.models import create_model


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


def test_the_mode_scores_an_image_checkpoint_and_names_what_it_used(
    small_run: Callable[..., list[str]], refused: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image_model = create_model("stvit_vit_sample_patch8", num_frames=1, image_size=64, num_classes=5)
    torch.save(image_model.state_dict(), tmp_path / "image.pth")
    words = ["MODE", "transfer", "MODEL.INIT", str(tmp_path / "image.pth"), "TRANSFER.NEIGHBOURS", "3"]
    assert run.main(small_run(*words)) == 0
    content = json.loads((tmp_path / "run" / "transfer.json").read_text())
    assert [row["method"].split(" (")[0] for row in content["rows"]] == ["k-nearest neighbours", "linear probe"]
    assert all(row["coverage"] == 1 and 0 <= row["top1"] <= row["top5"] <= 100 for row in content["rows"])
    assert "k 3, temperature 0.07" in capsys.readouterr().out
    assert "holds results (transfer.json" in refused(small_run(*words))
    assert "needs a checkpoint" in refused(small_run("MODE", "transfer"))
