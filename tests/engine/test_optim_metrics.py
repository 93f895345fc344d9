"""Optimiser groups, the schedule's closed form, and accuracy."""

import math

import pytest
import torch

from stvit_video.config import load_config
from stvit_video.data.ledger import Failure
from stvit_video.engine.evaluate import _join
from stvit_video.engine.metrics import Predictions, correct_at
from stvit_video.engine.optim import build_optimizer, build_scheduler
from stvit_video.errors import UsageError
from stvit_video.models import create_model
from tests.conftest import REPOSITORY


def config(*overrides: str) -> object:
    return load_config(REPOSITORY / "configs" / "sample_stvit.yaml", overrides)


def test_every_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    model = create_model("stvit_vit_sample_patch8", num_frames=8, image_size=64, num_classes=8, offsets=True)
    groups = build_optimizer(config("OPTIM.BACKBONE_SCALE", "0.1", "OPTIM.LR", "0.5"), model).param_groups
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    named = {name: settings[id(parameter)] for name, parameter in model.named_parameters()}
    for name in ("pos_embed", "time_embed", "stgm.global_centres", "norm.weight", "blocks.0.attn.qkv.bias"):
        assert named[name] == (pytest.approx(0.05), 0.0), name
    assert named["blocks.0.attn.qkv.weight"] == (pytest.approx(0.05), 0.05)
    assert named["head.proj.weight"] == (0.5, 0.05)
    assert named["head.proj.bias"] == (0.5, 0.0)
    decaying = [parameter for group in groups if group["weight_decay"] for parameter in group["params"]]
    assert all(parameter.ndim > 1 for parameter in decaying)


@pytest.mark.parametrize("warmup", [0, 2, 10])
def test_schedule_is_a_line_then_a_cosine(warmup: int) -> None:
    cfg = config("TRAIN.EPOCHS", "10", "OPTIM.WARMUP_EPOCHS", str(warmup), "OPTIM.LR", "0.5")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = build_scheduler(cfg, optimizer, steps_per_epoch=6)
    for step in range(60):
        place = (step + 0.5) / 60
        share = warmup / 10
        if place < share:
            expected = place / share
        else:
            expected = 0.5 * (1 + math.cos(math.pi * (place - share) / (1 - share)))
        assert scheduler.get_last_lr()[0] == pytest.approx(0.5 * expected, abs=1e-6)
        optimizer.step()
        scheduler.step()


def test_top_k_and_confusion() -> None:
    scores = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7], [0.5, 0.4, 0.1]])
    labels = torch.tensor([0, 2, 2, 1])
    assert [correct_at(scores, labels, k) for k in (1, 2, 3, 5)] == [2, 4, 4, 4]
    predictions = Predictions(scores, labels, torch.arange(4), total=5, failures=[])
    assert (predictions.top(1), predictions.top(5), predictions.coverage) == (50.0, 100.0, 0.8)
    assert predictions.confusion().tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 1]]
    assert predictions.loss == pytest.approx(-sum(map(math.log, (0.6, 0.3, 0.7, 0.4))) / 4)


def test_shares_of_processes_are_joined_in_list_order_and_checked() -> None:
    def row(*indices: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        places = torch.tensor(indices)
        return places, places % 3, torch.eye(3)[places % 3]

    failure = Failure("v.mp4", "test", "decord", "broken", "")
    predictions = _join([([row(0, 1), row(4)], []), ([row(2)], [failure])], total=5)
    assert predictions.indices.tolist() == [0, 1, 2, 4]
    assert predictions.top(1) == 100
    assert predictions.coverage == 0.8
    with pytest.raises(AssertionError, match="counted twice"):
        _join([([row(0, 1)], []), ([row(1)], [])], total=3)
    with pytest.raises(AssertionError, match="lost"):
        _join([([row(0)], [])], total=2)
    with pytest.raises(UsageError, match=r"None of the 1 videos could be read.*v\.mp4: broken"):
        _join([([], [failure])], total=1)
