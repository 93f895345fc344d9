"""Reducers in windowed models, which need one token for each region."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stvit_video.models import create_model, load_pretrained
from stvit_video.models.arguments import SemanticArguments
from stvit_video.models.cost import count_gflops
from stvit_video.models.reducers import GRID_REDUCERS, create_reducer
from stvit_video.models.swin import SemanticStage

NAMES = ["stvit_swin_tiny", "stvit_r_swin_small"]
SHRUNK = {"dim": 24, "depths": (2, 2, 6, 2), "num_heads": (1, 2, 4, 8)}
SIZES = {"num_frames": 8, "image_size": 160, "num_classes": 7, **SHRUNK}
REGIONS = (4, 6, 6)  # of a 4 x 10 x 10 map of 2 x 2 windows
OTHERS = GRID_REDUCERS[1:]


def build(name: str, reducer: str, **overrides: object) -> nn.Module:
    units = {"units": 1} if "_r_" in name else {}
    model = create_model(name, **{**SIZES, **units, "reducer": reducer, **overrides})
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def the_stage(model: nn.Module) -> SemanticStage:
    return next(stage for stage in model.layers if isinstance(stage, SemanticStage))


def test_regions_must_divide_the_frames_for_recovery() -> None:
    """Image tokens attend to the semantic tokens of their own frames."""
    for reducer in GRID_REDUCERS:
        with pytest.raises(ValueError, match=r"3 regions do not divide the 4 token frames .*; allowed: \[1, 2, 4\]"):
            build("stvit_r_swin_small", reducer, regions=(3, 6, 6))


class Idle(nn.Module):
    """A block that returns its input."""

    def forward(self, x: torch.Tensor, key_bias: None = None) -> torch.Tensor:
        return x


@pytest.mark.parametrize("settings", [{}, {"preset": "fast"}, {"regions": (2, 5, 4)}])
@pytest.mark.parametrize("reducer", GRID_REDUCERS)
@pytest.mark.parametrize("name", NAMES)
def test_clips_of_a_batch_are_independent(name: str, reducer: str, settings: dict) -> None:
    if reducer == "stgm" and "regions" in settings:
        settings = {"regions": (2, 4, 6)}  # its windows all have as many centres
    model = build(name, reducer, **settings)
    clips = torch.randn(2, 3, *model.input_size)
    with torch.no_grad():
        logits, seen = model(clips, return_intermediates=True)
        assert logits.shape == (2, 7)
        assert logits.std() > 0.02
        for i in range(2):
            assert (model(clips[i : i + 1]) - logits[i]).abs().max() < 1e-4
    tokens = math.prod(the_stage(model).regions)
    assert model.token_counts() == (400, tokens)
    assert seen.assignment.shape == (2, tokens, 4 * 10 * 10)
    assert (seen.assignment.sum(dim=2) < 1 + 1e-5).all()
    assert (seen.assignment.sum(dim=2) > 0).all()
    if "_r_" not in name:
        assert seen.tokens["stage3"].shape[1] == tokens


@pytest.mark.parametrize("reducer", OTHERS)
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns_and_the_model_is_rebuilt(name: str, reducer: str) -> None:
    model = build(name, reducer).train()
    model(torch.randn(2, 3, *model.input_size)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    again = create_model(model.name, **model.arguments).eval()
    again.load_state_dict(model.state_dict())
    clips = torch.randn(1, 3, *model.input_size)
    with torch.no_grad():
        assert torch.equal(again(clips), model.eval()(clips))
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}
    assert {model.layer_id(name) for name, _ in model.named_parameters()} == set(range(sum(model.depths) + 2))


@pytest.mark.parametrize("reducer", OTHERS)
def test_the_dense_baselines_weights_fit(reducer: str) -> None:
    image_model = create_model("swin_tiny", **{**SIZES, "num_frames": 1})
    model = build("stvit_swin_tiny", reducer)
    report = load_pretrained(model, image_model.state_dict())
    assert not report.keys["new"]
    assert not report.keys["wrong shape"]
    assert all("relative_position" in key for key in report.keys["unused"])  # of blocks on tokens that have no window
    assert count_gflops(model, model.input_size) < count_gflops(build("stvit_swin_tiny", "stgm"), model.input_size)


def test_mean_is_adaptive_pooling() -> None:
    generator = the_stage(build("stvit_swin_tiny", "mean")).generators[0]
    x = torch.randn(2, 400, 96)
    maps = x.transpose(1, 2).reshape(2, 96, 4, 10, 10)
    expected = F.adaptive_avg_pool3d(maps, REGIONS).flatten(2).transpose(1, 2)
    torch.testing.assert_close(generator(x, [Idle()]).tokens, expected)


@pytest.mark.parametrize(("grid", "regions"), [((4, 10, 10), REGIONS), ((4, 7, 5), (2, 3, 5)), ((1, 3, 3), (1, 1, 2))])
def test_random_keeps_one_token_of_each_region_and_may_keep_any(grid: tuple, regions: tuple) -> None:
    cuts = [[i * length // count for i in range(count + 1)] for length, count in zip(grid, regions, strict=True)]
    cells = [list(itertools.pairwise(axis)) for axis in cuts]
    numbers = torch.arange(grid[0] * grid[1] * grid[2]).reshape(grid)
    members = [
        set(numbers[t[0] : t[1], h[0] : h[1], w[0] : w[1]].flatten().tolist()) for t, h, w in itertools.product(*cells)
    ]
    assert sum(map(len, members)) == numbers.numel()
    reducer = create_reducer(SemanticArguments(reducer="random"), 1, 1, grid, regions, window=(1, 2, 2))
    x = numbers.reshape(1, -1, 1).expand(400, -1, -1).float()  # tokens that carry their number
    drawn = reducer.train()(x, [Idle()]).tokens.squeeze(-1).long().T
    for own, region in zip(drawn, members, strict=True):
        assert set(own.tolist()) == region
    kept = reducer.eval()(x, [Idle()], return_assignment=True)
    assert (kept.tokens == kept.tokens[:1]).all()
    assert torch.equal((kept.assignment @ x), kept.tokens)
    assert torch.equal(
        reducer.kept, create_reducer(SemanticArguments(reducer="random"), 1, 1, grid, regions, window=(1, 2, 2)).kept
    )
