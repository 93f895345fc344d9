"""Optimiser groups, the schedule's closed form, and accuracy."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

from stvit_video.common.errors import UsageError
from stvit_video.config import load_config
from stvit_video.data.failures import Failure
from stvit_video.data.lists.annotations import Video
from stvit_video.evaluation.evaluate import _join
from stvit_video.evaluation.scores import Predictions
from stvit_video.models import create_model
from stvit_video.training.losses import balanced_weights, classification_loss
from stvit_video.training.optim import average_weights, build_optimizer, build_scheduler, freeze
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
    scheduler = build_scheduler(cfg, optimizer, steps_per_epoch=6, total=60)
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


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "stvit_vit_tiny_patch16"])
def test_layer_decay_equals_timm(name: str) -> None:
    """timm's groups for its own ViT, parameter by parameter.

    Not compared: the semantic tokens' centres, which timm has not, and the last norm, which it counts with the last
    block; BEiT and MAE, where the method is from, count it with the classifier, as is done here.
    """
    from timm import create_model as create_timm
    from timm.optim import param_groups_layer_decay

    peer = create_timm("vit_tiny_patch16_224", num_classes=5, class_token=False, global_pool="avg", fc_norm=False)
    model = create_model(name, num_frames=1, image_size=224, num_classes=5)
    theirs = param_groups_layer_decay(peer, weight_decay=0.05, layer_decay=0.75, no_weight_decay_list=("pos_embed",))
    scales = {id(p): (group["lr_scale"], group["weight_decay"]) for group in theirs for p in group["params"]}
    expected = {key: scales[id(p)] for key, p in peer.named_parameters() if not key.startswith("norm.")}
    ours = build_optimizer(config("OPTIM.LAYER_DECAY", "0.75", "OPTIM.LR", "1.0"), model).param_groups
    found = {id(p): (group["lr"], group["weight_decay"]) for group in ours for p in group["params"]}
    compared = 0
    for key, parameter in model.named_parameters():
        peer_key = key.replace("head.proj", "head")
        if peer_key in expected:
            assert found[id(parameter)] == pytest.approx(expected[peer_key]), key
            compared += 1
    assert compared == len(expected)


@pytest.mark.parametrize("name", ["swin_tiny", "stvit_swin_tiny", "stvit_r_swin_small"])
def test_layer_decay_falls_from_the_head_to_the_embedding(name: str) -> None:
    model = create_model(name, num_frames=1, image_size=224, num_classes=5)
    groups = build_optimizer(config("OPTIM.LAYER_DECAY", "0.5", "OPTIM.LR", "1.0"), model).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    named = {key: rates[id(parameter)] for key, parameter in model.named_parameters()}
    depth = len(model.transformer_blocks())
    assert named["head.proj.weight"] == 1
    embedding = {rate for key, rate in named.items() if key.startswith("patch_embed.")}
    assert embedding == {0.5 ** (depth + 1)}  # powers of two are exact
    for i, block in enumerate(model.transformer_blocks()):
        assert {rates[id(p)] for p in block.parameters()} == {0.5 ** (depth - i)}


def test_learning_rate_scales_with_the_batch() -> None:
    model = torch.nn.Linear(2, 2)
    model.no_weight_decay, model.layer_id = set, lambda name: 0
    words = ("OPTIM.LR", "0.001", "TRAIN.BATCH_SIZE", "64")
    for batch, expected in ((0, 0.001), (256, 0.00025), (16, 0.004)):
        groups = build_optimizer(config(*words, "OPTIM.LR_BATCH", str(batch)), model).param_groups
        assert groups[0]["lr"] == pytest.approx(expected)


def test_frozen_weights_are_not_trained_and_patterns_are_checked() -> None:
    model = create_model("stvit_vit_sample_patch8", num_frames=8, image_size=64, num_classes=8)
    freeze(model, ["patch_embed.*", "blocks.0.*", "*_embed"])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    starts = ("patch_embed.", "blocks.0.", "pos_embed", "time_embed")
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(starts)}
    grouped = {id(p) for group in build_optimizer(config(), model).param_groups for p in group["params"]}
    assert grouped == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    with pytest.raises(UsageError, match=r"'block.1.\*' matches no weight.*begin with blocks, head"):
        freeze(model, ["block.1.*"])
    with pytest.raises(UsageError, match="nothing to train"):
        freeze(model, ["*"])


@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_the_average_follows_its_closed_form(decay: float) -> None:
    """Decay min(d, (1 + n) / (10 + n)) after n updates; the first takes the weights as they are."""
    model = torch.nn.Linear(3, 2)
    average = average_weights(model, decay)
    expected = None
    for n in range(20):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 3))
        average.update_parameters(model)
        share = min(decay, (1 + n) / (10 + n))
        expected = model.weight.clone() if n == 0 else share * expected + (1 - share) * model.weight
        assert torch.allclose(average.module.weight, expected, atol=1e-6)


def test_top_k_and_confusion() -> None:
    scores = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7], [0.5, 0.4, 0.1]])
    labels = torch.tensor([0, 2, 2, 1])
    predictions = Predictions(scores, labels, torch.arange(4), total=5, failures=[])
    assert [predictions.top(k) for k in (1, 2, 3, 5)] == [50, 100, 100, 100]
    level = Predictions(torch.full((8, 8), 1 / 8), torch.arange(8), torch.arange(8), total=8)
    assert level.top(1) == level.figures()["macro_top1"] == 12.5, "of equal scores, each figure takes the first"
    assert predictions.coverage == 0.8
    assert predictions.confusion().tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 1]]
    assert predictions.loss == pytest.approx(-sum(map(math.log, (0.6, 0.3, 0.7, 0.4))) / 4)


@pytest.mark.parametrize(("videos", "classes", "left"), [(300, 7, -1), (40, 20, 3), (200, 9, 0), (6, 2, -1)])
def test_macro_figures_equal_torchmetrics(videos: int, classes: int, left: int) -> None:
    """Of the classes that have a video: one without, although predicted, is left out and counted."""
    scores, labels = torch.rand(videos, classes).softmax(dim=1), torch.randint(classes, (videos,))
    labels = labels.where(labels != left, 1)
    predictions = Predictions(scores, labels, torch.arange(videos), videos)
    there = labels.bincount(minlength=classes) > 0
    recall, f1, precision = (
        peer(scores, labels, classes, average=None)
        for peer in (multiclass_recall, multiclass_f1_score, multiclass_precision)
    )
    figures = predictions.figures()
    assert figures["macro_top1"] / 100 == pytest.approx(float(recall[there].mean()), abs=1e-6)
    assert figures["macro_f1"] / 100 == pytest.approx(float(f1[there].mean()), abs=1e-6)
    assert figures["classes_without_videos"] == int((~there).sum())
    if there.all():
        assert figures["macro_top1"] / 100 == pytest.approx(
            float(multiclass_accuracy(scores, labels, classes, average="macro")), abs=1e-6
        )
    rows = predictions.per_class([str(i) for i in range(classes)])
    predicted = scores.argmax(dim=1).bincount(minlength=classes)
    for i, row in enumerate(rows):
        for name, value, known in (("recall", recall, there), ("f1", f1, there), ("precision", precision, predicted)):
            assert row[name] == (pytest.approx(100 * float(value[i]), abs=1e-4) if known[i] else None)
        assert row["top1"] == row["recall"]


def listed(*labels: int) -> list[Video]:
    return [Video(str(i), label) for i, label in enumerate(labels)]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_are_those_of_torch(smoothing: float) -> None:
    weights = balanced_weights(listed(0, 0, 0, 0, 1, 1, 3, 3), 4, multi_label=False)
    assert weights.tolist() == pytest.approx([8 / 12, 8 / 6, 1, 8 / 6])
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 3, 3, 0, 1])
    each = F.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(classification_loss(logits, labels, smoothing, False, weights), each.mean())
    parts = [classification_loss(logits[i : i + 2], labels[i : i + 2], smoothing, False, weights) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(parts).mean(), each.mean())  # also of batches that a step adds up
    shares = torch.rand(6, 4).softmax(dim=1)  # of mixed clips
    expected = F.cross_entropy(logits, shares, weight=weights, label_smoothing=smoothing)
    torch.testing.assert_close(classification_loss(logits, shares, smoothing, False, weights), expected)


def test_class_weights_of_several_labels_weigh_positives() -> None:
    videos = [Video("", (*labels, -1)[0], labels=labels) for labels in ((0, 1), (0,), (0, 3), ())]
    weights = balanced_weights(videos, 5, multi_label=True)
    assert weights.tolist() == pytest.approx([1 / 3, 3, 1, 3, 1])
    logits, targets = torch.randn(4, 5), (torch.rand(4, 5) < 0.5).float()
    expected = F.binary_cross_entropy_with_logits(logits, 0.8 * targets + 0.1, pos_weight=weights)
    torch.testing.assert_close(classification_loss(logits, targets, 0.2, True, weights), expected)


def test_shards_are_joined_in_list_order_and_checked() -> None:
    def row(*indices: int) -> tuple[torch.Tensor, ...]:
        places = torch.tensor(indices)
        return places, places % 3, torch.eye(3)[places % 3], torch.ones(len(indices), 2)

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
