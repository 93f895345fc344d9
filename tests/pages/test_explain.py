"""Explanations agree with the computation of the model."""

import numpy as np
import pytest
import torch
from torch import nn

from stvit_video.models import create_model
from stvit_video.pages.explain import explain, grad_cam, trajectories


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("stvit_vit_sample_patch8", (8, 64)),
        ("vit_sample_patch8", (8, 64)),
        ("stvit_vit_sample_patch8", (1, 64)),
        ("stvit_swin_tiny", (4, 56)),
        ("swin_tiny", (4, 56)),
        ("stvit_r_swin_small", (4, 56)),
    ],
)
def test_explanations_add_up(name: str, sizes: tuple[int, int]) -> None:
    frames, side = sizes
    preset = {} if name.startswith(("vit", "swin")) or frames == 1 else {"preset": "fast"}
    model = create_model(name, num_frames=frames, image_size=side, num_classes=7, **preset).eval()
    nn.init.normal_(model.head.proj.bias)
    clip = torch.randn(3, frames, side, side)
    with torch.no_grad():
        logits, seen = model(clip.unsqueeze(0), return_intermediates=True)
    found = explain(model, clip, target=3)
    np.testing.assert_allclose(found.probabilities, logits[0].softmax(dim=0), atol=1e-5)
    bias = model.head.proj.bias.detach()
    score = (logits[0, 3] - logits[0].mean()) - (bias[3] - bias.mean())
    assert found.contributions.sum() == pytest.approx(score.item(), abs=1e-4)
    assert 0 <= found.grad_cam.min() <= found.grad_cam.max() <= 1
    if "stvit" not in name:
        assert found.assignment is None
        assert found.drawn is found.owners is found.recovery is None
        assert any("no semantic tokens" in line for line in found.absent)
        return
    assert found.regions is not None
    assert len(found.assignment) == np.prod(found.regions)
    np.testing.assert_allclose(found.assignment.reshape(len(found.assignment), -1), seen.assignment[0], atol=1e-6)
    assert found.drawn.mean() == pytest.approx(1, abs=1e-5)
    assert (found.recovery is not None) == ("_r_" in name)
    if found.recovery is not None:
        np.testing.assert_allclose(found.recovery.sum(axis=-1), 1, atol=1e-5)
        groups = found.recovery.shape[-1] // (found.regions[1] * found.regions[2])
        own = found.recovery.reshape(found.regions[0], -1, groups, found.recovery.shape[-1] // groups).sum(axis=-1)
        np.testing.assert_allclose(own, np.broadcast_to(np.eye(groups)[:, None], own.shape), atol=1e-5)


@pytest.mark.parametrize("reducer", ["random", "mean", "tome", "dynamicvit", "ats", "spot"])
def test_tokens_without_a_grid_are_shown_at_their_image_tokens(reducer: str) -> None:
    sizes = {"num_frames": 8, "image_size": 64, "num_classes": 7, "regions": (4, 2, 2)}
    model = create_model("stvit_vit_sample_patch8", **sizes, reducer=reducer).eval()
    clip = torch.randn(3, 8, 64, 64)
    with torch.no_grad():
        logits, seen = model(clip.unsqueeze(0), return_intermediates=True)
    found = explain(model, clip, target=3)
    grid = (4, 2, 2) if reducer == "mean" else (4, 8, 8)
    assert found.attention.shape == grid
    gone = (seen.assignment[0].sum(dim=0) == 0).numpy().reshape(4, 8, 8)
    assert gone.any() == (reducer not in ("mean", "tome"))
    if reducer in ("tome", "ats"):
        assert any("one token only" in line for line in found.absent)
    else:
        assert found.contributions.shape == grid
        assert found.contributions.sum() == pytest.approx((logits[0, 3] - logits[0].mean()).item(), abs=1e-4)
    if grid == (4, 8, 8):
        assert (found.attention[gone] == 0).all()
        assert (found.attention[~gone] > 0).all()


def test_absent_parts_are_reported() -> None:
    swin = create_model("swin_tiny", num_frames=2, image_size=56, num_classes=3)
    found = explain(swin, torch.randn(3, 2, 56, 56))
    assert found.attention is None
    assert any("inside windows" in line for line in found.absent)
    pooled = create_model("vit_sample_patch8", num_frames=8, image_size=64, num_classes=3, fc_norm=True)
    found = explain(pooled, torch.randn(3, 8, 64, 64))
    assert found.contributions is None
    assert any("one token only" in line for line in found.absent)
    assert found.attention.mean() == pytest.approx(1, abs=1e-5)


def test_grad_cam_agrees_with_differences_of_the_score() -> None:
    torch.manual_seed(1)
    tail = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 1)).double()
    features = torch.randn(1, 10, 6, dtype=torch.float64, requires_grad=True)

    def score(x: torch.Tensor) -> torch.Tensor:
        return tail(x).mean()

    steps = 1e-6 * torch.eye(6, dtype=torch.float64)
    weights = torch.stack([(score(features + step) - score(features - step)) / 2e-6 for step in steps]) / 10
    expected = (features[0] @ weights).relu()
    found = grad_cam(score(features), features)
    torch.testing.assert_close(found, (expected / expected.max()).float(), rtol=1e-4, atol=1e-6)


def test_trajectories_are_where_the_weight_is() -> None:
    assignment = np.full((8, 4, 6, 6), 1e-6)  # 2 x 2 regions, each for two frames; the region's number chooses the row
    for token in range(8):
        for moment in range(4):
            assignment[token, moment, 1 + token % 4, 1 + moment] = 0.5
    ways = trajectories(assignment, (2, 2, 2))
    assert ways.shape == (4, 4, 2)
    expected_x = np.broadcast_to((np.arange(4) + 1.5) / 6, (4, 4))
    np.testing.assert_allclose(ways[..., 0], expected_x, atol=1e-3)
    np.testing.assert_allclose(ways[..., 1], expected_x.T, atol=1e-3)
