"""Token reducers: one set of tests over all, and for each its definition."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvit_video.common.errors import UsageError
from stvit_video.config.schema import BY_NAME
from stvit_video.models import create_model, load_pretrained
from stvit_video.models.arguments import SemanticArguments
from stvit_video.models.cost import count_gflops, count_training_memory
from stvit_video.models.reducers import REDUCERS, create_reducer
from stvit_video.models.reducers.comparison import match, merge, sample, significance
from stvit_video.models.reducers.interface import key_bias, mean_token

NAME = "stvit_vit_tiny_patch16"
SHRUNK = {
    "num_frames": 8,
    "image_size": 80,
    "num_classes": 7,
    "dim": 48,
    "depth": 6,
    "num_heads": 3,
    "regions": (2, 3, 2),
}
GRID, TOKENS, LEFT = (4, 5, 5), 100, 12
OTHERS, LEARNED = REDUCERS[1:], ("dynamicvit", "spot")


def build(reducer: str, **overrides: object) -> nn.Module:
    """Return a model without zero weights, so that each of them has an effect."""
    model = create_model(NAME, **{**SHRUNK, "reducer": reducer, **overrides})
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def draw(model: nn.Module, count: int = 3) -> Tensor:
    return torch.randn(count, 3, *model.input_size)


def reduce(model: nn.Module, x: Tensor, past: list | None = None) -> object:
    """Run a model's reducer alone on image tokens."""
    blocks = list(model.blocks[model.base_depth : model.base_depth + model.stgm_depth])
    return model.token_reducer(x, blocks, past or [(model.blocks[0], x), (model.blocks[1], x)], True)


def run(blocks: list, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


# --- all of them


@pytest.mark.parametrize("settings", [{}, {"base_attention": "joint"}, {"preset": "fast"}, {"fc_norm": True}])
@pytest.mark.parametrize("reducer", REDUCERS)
def test_clips_of_a_batch_are_independent(reducer: str, settings: dict) -> None:
    model = build(reducer, **settings)
    clips = draw(model)
    with torch.no_grad():
        logits, intermediates = model(clips, return_intermediates=True)
        assert logits.shape == (3, 7)
        assert logits.std() > 0.05
        assert torch.equal(model(clips), logits)
        for i in range(3):
            assert (model(clips[i : i + 1]) - logits[i]).abs().max() < 1e-4
    assert intermediates.tokens["semantic"].shape == (3, LEFT, 48)
    assert model.token_counts() == (TOKENS, LEFT)
    assert intermediates.assignment.shape == (3, LEFT, TOKENS)
    assert (intermediates.assignment >= 0).all()
    assert (intermediates.assignment.sum(dim=2) < 1 + 1e-5).all()
    for stage, x in intermediates.tokens.items():
        assert x.shape[1] == math.prod(intermediates.grids[stage])


@pytest.mark.parametrize("reducer", REDUCERS)
def test_a_model_is_rebuilt_from_its_name_and_arguments(reducer: str) -> None:
    model = build(reducer)
    again = create_model(model.name, **model.arguments).eval()
    again.load_state_dict(model.state_dict())
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}
    assert {model.layer_id(name) for name, _ in model.named_parameters()} == set(range(SHRUNK["depth"] + 2))
    clips = draw(model)
    with torch.no_grad():
        assert torch.equal(again(clips), model(clips))


@pytest.mark.parametrize("reducer", REDUCERS)
def test_every_parameter_learns_and_grad_checkpointing_changes_nothing(reducer: str) -> None:
    model = build(reducer).train()
    clips, gradients = draw(model), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        model(clips).square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.isfinite().all(), name
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("reducer", REDUCERS)
def test_autocast_stays_near(reducer: str) -> None:
    model = build(reducer)
    clips = draw(model)
    with torch.no_grad():
        expected = model(clips)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            logits = model(clips).float()
        model.train()(clips).float().sum().backward()
    # A token at the edge of a choice may fall to the other side.
    assert 0 < (logits - expected).abs().max() < 0.3 * expected.abs().max()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("reducer", OTHERS)
def test_compiled_blocks_give_the_same(reducer: str) -> None:
    model = build(reducer).train(reducer in LEARNED)
    clips = draw(model)
    torch.manual_seed(1)
    expected = model(clips).detach()
    for block in model.transformer_blocks():
        block.compile(backend="eager")
    torch.manual_seed(1)
    torch.testing.assert_close(model(clips).detach(), expected, atol=1e-4, rtol=1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize("reducer", REDUCERS)
def test_costs_are_below_the_dense_baselines(reducer: str) -> None:
    model = build(reducer)
    full = create_model(
        "vit_tiny_patch16", **{key: value for key, value in SHRUNK.items() if key != "regions"}, base_attention="joint"
    )
    assert count_gflops(model, model.input_size) < 0.8 * count_gflops(full, full.input_size)
    dense = count_training_memory(full, full.input_size)
    assert (count_training_memory(model, model.input_size) < 0.85 * dense) == (reducer not in LEARNED)
    copy.deepcopy(model)  # with what training has left in it


@pytest.mark.parametrize("reducer", REDUCERS)
def test_an_image_checkpoint_fits(reducer: str) -> None:
    sizes = {key: value for key, value in SHRUNK.items() if key != "regions"}
    image_model = create_model("vit_tiny_patch16", **{**sizes, "num_frames": 1})
    model = build(reducer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_pretrained(model, image_model.state_dict())
    own = {name for name in before if name.startswith(("reducer.", "stgm."))}
    assert set(report.keys["new"]) == own
    assert not report.keys["unused"]
    assert not report.keys["wrong shape"]
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in own)
    assert bool(own) == (reducer in ("stgm", *LEARNED))


@pytest.mark.parametrize("reducer", OTHERS)
def test_auxiliary_loss_is_given_once_and_in_training_only(reducer: str) -> None:
    model = build(reducer)
    model(draw(model))
    assert model.auxiliary_loss() is None
    model.train()(draw(model))
    loss = model.auxiliary_loss()
    assert (loss is not None) == (reducer in LEARNED)
    assert model.auxiliary_loss() is None
    if loss is not None:
        loss.backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in model.reducer.parameters())
    model(draw(model))
    model.eval()(draw(model))
    assert model.auxiliary_loss() is None


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        (NAME, {"reducer": "tom"}, "stgm, random, mean, tome, dynamicvit, ats, spot"),
        (NAME, {"reducer": "mean", "pooling": "max"}, "has no pooling, which reducer 'stgm' has"),
        (NAME, {"reducer": "ats", "regions": (2, 9, 2)}, "9 regions over 4 tokens of height"),
        (NAME, {"reducer": 3}, "reducer 3 is unknown; choose one of stgm, random"),
        ("vit_tiny_patch16", {"reducer": "mean"}, "use stvit_vit_tiny_patch16"),
        (
            "stvit_swin_tiny",
            {"reducer": "tome"},
            "need a grid of tokens, so reducer 'tome' cannot apply; choose one of stgm, random, mean",
        ),
        ("stvit_swin_tiny", {"reducer": "mean", "pooling": "max"}, "has no pooling, which reducer 'stgm' has"),
        ("stvit_swin_tiny", {"reducer": "random", "regions": (5, 3, 3)}, "5 regions over 4 tokens of time"),
        ("stvit_swin_tiny", {"reducer": "tom"}, "reducer 'tom' is unknown; choose one of stgm, random, mean"),
        ("swin_tiny", {"reducer": "mean"}, "use stvit_swin_tiny"),
    ],
)
def test_wrong_arguments_are_named_with_what_is_allowed(name: str, arguments: dict, says: str) -> None:
    with pytest.raises(UsageError) as error:
        create_model(name, num_frames=8, image_size=64, num_classes=7, **arguments)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_the_configuration_offers_the_reducers_that_there_are() -> None:
    assert BY_NAME["MODEL.REDUCER"].choices == REDUCERS


def test_a_reducer_that_cannot_apply_is_refused_by_the_command(
    small_run: Callable[..., list[str]], refused: Callable[[list[str]], str]
) -> None:
    assert "windows" in refused(small_run("MODEL.NAME", "stvit_swin_tiny", "MODEL.REDUCER", "tome"))
    assert "has no pooling" in refused(small_run("MODEL.REDUCER", "mean", "MODEL.POOLING", "max"))
    assert "stgm" in refused(small_run("MODEL.REDUCER", "tom"))


def test_the_stgm_is_the_default_and_keeps_its_parameter_names() -> None:
    for name, prefix in ((NAME, "stgm."), ("stvit_swin_tiny", "layers.2.generators.0.")):
        sizes = {"num_frames": 4, "image_size": 64, "num_classes": 7, "pooling": "mask", "global_centres": True}
        model, plain = create_model(name, **sizes, reducer="stgm"), create_model(name, **sizes)
        assert list(model.state_dict()) == list(plain.state_dict())
        own = {key.removeprefix(prefix) for key in model.state_dict() if key.startswith(prefix)}
        assert own >= {"global_centres", "pooling.mask_conv.weight", "pooling.mask_proj.weight"}


# --- what each is defined to do


def test_random_is_fixed_in_evaluation_and_differs_by_clip_in_training() -> None:
    model = build("random")
    x, blocks = torch.randn(3, TOKENS, 48), list(model.blocks[2:4])
    kept = model.reducer.kept
    assert len(set(kept.tolist())) == LEFT
    assert torch.equal(kept, build("random").reducer.kept)
    torch.testing.assert_close(reduce(model, x).tokens, run(blocks, x[:, kept]))
    drawn = reduce(model.train(), x).assignment.argmax(dim=2)
    assert (drawn.diff(dim=1) > 0).all()
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn, reduce(model, x).assignment.argmax(dim=2))


def test_mean_is_adaptive_pooling() -> None:
    model = build("mean")
    x = torch.randn(3, TOKENS, 48)
    pooled = F.adaptive_avg_pool3d(x.transpose(1, 2).reshape(3, 48, *GRID), (2, 3, 2)).flatten(2).transpose(1, 2)
    reduced = reduce(model, x)
    torch.testing.assert_close(reduced.tokens, run(list(model.blocks[2:4]), pooled))
    torch.testing.assert_close(reduced.assignment @ x, pooled)


@pytest.mark.parametrize("left", [100, 99, 60, 12, 1])
def test_merging_keeps_sizes_and_means(left: int) -> None:
    class Idle(nn.Module):
        """A block that does nothing, with the tokens as keys."""

        def attend(self, x: Tensor, key_bias: Tensor | None) -> tuple[Tensor, Tensor]:
            return x, x

        def mlp_residual(self, x: Tensor) -> Tensor:
            return x

    x = torch.randn(3, TOKENS, 8)
    reducer = create_reducer(SemanticArguments(reducer="tome"), 8, 1, (1, 1, TOKENS), (1, 1, left))
    reduced = reducer(x, [Idle(), Idle()], return_assignment=True)
    assert reduced.tokens.shape == (3, left, 8)
    assert (reduced.weights >= 1).all()
    assert torch.equal(reduced.weights.sum(dim=1), torch.full((3,), float(TOKENS)))
    torch.testing.assert_close(reduced.assignment @ x, reduced.tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mean_token(reduced.tokens, reduced.weights)[:, 0], x.mean(dim=1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((reduced.assignment * reduced.weights.unsqueeze(2)).sum(dim=1), torch.ones(3, TOKENS))


def test_matching_joins_the_most_similar_pairs_of_the_two_sets() -> None:
    keys = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [-1.0, 0.0], [0.5, -0.9]]])
    groups = match(keys, 2)  # 0 to 1 and 2 to 3; 4 has nothing like it
    assert groups.tolist() == [[0, 0, 1, 1, 2, 3]]
    (merged,), sizes = merge([keys], torch.tensor([[3.0, 1, 1, 1, 1, 1]]), groups, 4)
    assert sizes.tolist() == [[4, 2, 1, 1]]
    torch.testing.assert_close(merged[0, 0], torch.tensor([0.975, 0.025]))


@pytest.mark.parametrize("depth", [2, 3])
def test_merging_equal_tokens_changes_nothing(depth: int) -> None:
    """Every pair of columns is equal: with proportional attention the merged clip is the whole one."""
    sizes = {**SHRUNK, "image_size": (80, 64), "base_attention": "joint", "stgm_depth": depth}
    model = build("tome", **{**sizes, "regions": (4, 5, 2)})
    x = torch.randn(2, 40, 48).repeat_interleave(2, dim=1)
    whole = run(list(model.blocks[2 : 2 + depth]), x)
    reduced = reduce(model, x)
    assert (reduced.weights == 2).all()
    assert (reduced.tokens.repeat_interleave(2, dim=1) - whole).abs().max() < 1e-4


def test_merged_tokens_count_by_their_size_in_attention() -> None:
    """Three equal tokens beside two others: one token of weight 3 stands for them."""
    block = build("tome").blocks[0]
    x = torch.randn(1, 3, 48)
    whole = block(x[:, [0, 0, 0, 1, 2]])[:, [0, 3, 4]]
    assert (block(x, None, key_bias(torch.tensor([[3.0, 1, 1]]))) - whole).abs().max() < 1e-5
    assert (block(x) - whole).abs().max() > 1e-3
    weights, _ = block.attention_probs(x, None, key_bias(torch.tensor([[3.0, 1, 1]])))
    repeated, _ = block.attention_probs(x[:, [0, 0, 0, 1, 2]])
    torch.testing.assert_close(weights[..., 0], repeated[:, :, [0, 3, 4], :3].sum(3))


@pytest.mark.parametrize("reducer", LEARNED)
def test_learned_pruning_keeps_the_best_in_evaluation(reducer: str) -> None:
    model = build(reducer)
    x = torch.randn(3, TOKENS, 48)
    past = [(model.blocks[0], torch.randn(12, 25, 48)), (model.blocks[1], torch.randn(12, 25, 48))]
    keep, drop = model.reducer.score(x, past).unbind(dim=2)
    reduced = reduce(model, x, past)
    assert reduced.weights is None
    for i in range(3):
        best = sorted(np.argsort(-(keep - drop)[i].detach().numpy())[:LEFT].tolist())
        torch.testing.assert_close(reduced.tokens[i : i + 1], run(list(model.blocks[2:4]), x[i : i + 1, best]))
        assert reduced.assignment[i].argmax(dim=1).tolist() == best


@pytest.mark.parametrize("reducer", LEARNED)
def test_a_clip_keeps_its_best_token_when_all_should_go(reducer: str) -> None:
    model = build(reducer).train()
    with torch.no_grad():
        model.reducer.decide[-1].bias.copy_(torch.tensor([-20.0, 20.0]))
    logits, intermediates = model(draw(model, 3), return_intermediates=True)
    assert intermediates.assignment.diagonal(dim1=1, dim2=2).sum(dim=1).tolist() == [1.0, 1.0, 1.0]
    logits.square().mean().backward()
    assert all(p.grad is None or p.grad.norm() < 1e3 for p in model.parameters())


@pytest.mark.parametrize("fc_norm", [False, True])
@pytest.mark.parametrize("reducer", LEARNED)
def test_tokens_dropped_in_training_have_no_effect(reducer: str, fc_norm: bool) -> None:
    model = build(reducer, fc_norm=fc_norm).train()
    clip = draw(model, 1)
    logits, intermediates = model(clip, return_intermediates=True)
    decided = intermediates.assignment[0].diagonal()
    assert set(decided.tolist()) == {0.0, 1.0}
    kept = decided.nonzero()[:, 0]
    tokens = run(list(model.blocks[2:]), intermediates.tokens["base"][:, kept])
    by_hand = model.norm(tokens.mean(dim=1)) if fc_norm else model.norm(tokens).mean(dim=1)
    assert (model.head(by_hand.unsqueeze(1)) - logits).abs().max() < 1e-5 * max(1, logits.abs().max())


@pytest.mark.parametrize("lean", [-2.0, 2.0])
@pytest.mark.parametrize("reducer", LEARNED)
def test_the_loss_pulls_the_kept_share_to_its_target(reducer: str, lean: float) -> None:
    model = build(reducer).train()
    bias = model.reducer.decide[-1].bias
    bias.data = torch.tensor([lean, -lean])
    _, intermediates = model(draw(model), return_intermediates=True)
    share = intermediates.assignment.diagonal(dim1=1, dim2=2).mean(dim=1)
    excess = share - LEFT / TOKENS
    assert ((excess > 0) == (lean > 0)).all()
    loss = model.auxiliary_loss()
    torch.testing.assert_close(loss, 2 * excess.square().mean())
    loss.backward()
    assert (bias.grad[0] - bias.grad[1]) * lean > 0  # a step against it evens the excess out


def test_the_gradient_of_a_decision_is_that_of_the_attention() -> None:
    """The bias's gradient at 0 and at 1 against a difference quotient of the attention itself."""
    block = build("dynamicvit").blocks[0].double()
    x = torch.randn(1, 5, 48, dtype=torch.double)
    keep = torch.tensor([[1.0, 0, 1, 0, 1]], dtype=torch.double, requires_grad=True)
    block(x, None, key_bias(keep)).square().sum().backward()
    for i in range(5):
        step = torch.zeros(1, 5, dtype=torch.double)
        step[0, i] = 1e-10
        ahead = block(x, None, key_bias(keep.detach() + step)).square().sum()
        behind = block(x, None, key_bias(keep.detach() - step)).square().sum()
        assert keep.grad[0, i].item() == pytest.approx((ahead - behind).item() / 2e-10, rel=1e-2, abs=1e-2)


def test_sampling_is_inverse_transform_sampling() -> None:
    scores = torch.rand(4, TOKENS) ** 8
    scores /= scores.sum(dim=1, keepdim=True)
    chosen, weights = sample(scores, LEFT)
    for row, found, weight in zip(scores.double().numpy(), chosen, weights, strict=True):
        expected = np.searchsorted(np.cumsum(row), (np.arange(LEFT) + 0.5) / LEFT)
        assert found.tolist() == expected.tolist()
        assert found[weight > 0].tolist() == sorted(set(expected.tolist()))
    peaked = torch.full((1, TOKENS), 1e-6)
    peaked[0, [5, 50, 99]] = 1.0
    chosen, weights = sample(peaked / peaked.sum(), LEFT)
    assert chosen[weights > 0].tolist() == [5, 50, 99]
    assert weights.shape == (1, LEFT)


def test_adaptive_sampling_attends_to_all_image_tokens_and_drops_repeats() -> None:
    model = build("ats")
    x = 3 * torch.randn(1, TOKENS, 48)
    x[:, :50] = x[:, :1]
    first, second = model.blocks[2], model.blocks[3]
    q, k, v = (part[0] for part in first.attn.project(first.norm1(x), None))
    received = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(dim=2).mean(dim=1)
    scores = (received * v.norm(dim=2)).sum(dim=0)
    torch.testing.assert_close(significance(first, x)[0], scores / scores.sum())
    reducer = create_reducer(SemanticArguments(reducer="ats"), 48, 3, GRID, (4, 5, 4))  # 80 of 100: some are met twice
    reduced = reducer(x, [first, second], return_assignment=True)
    alive = reduced.weights[0] > 0
    assert 0 < alive.sum() < 80
    kept = reduced.assignment[0, alive].argmax(dim=1)
    by_hand = second(first(x)[:, kept])
    assert (reduced.tokens[:, alive] - by_hand).abs().max() < 1e-4
    assert (mean_token(reduced.tokens, reduced.weights)[:, 0] - by_hand.mean(dim=1)).abs().max() < 1e-4


def test_relevance_follows_the_attention_and_its_change() -> None:
    """SPOT sees the last two blocks: other tokens there, with the same ones behind them, give other scores."""
    model = build("spot")
    x, frames = torch.randn(2, TOKENS, 48), [torch.randn(8, 25, 48) for _ in range(3)]
    past = [(model.blocks[0], frames[0]), (model.blocks[1], frames[1])]
    scores = model.reducer.score(x, past)
    for changed in ([(model.blocks[0], frames[2]), past[1]], [past[0], (model.blocks[1], frames[2])]):
        assert (model.reducer.score(x, changed) - scores).abs().max() > 1e-3
    turned = [(block, tokens.flip(0)) for block, tokens in past]  # clips and frames in the other order
    flipped = model.reducer.score(x.flip(0).reshape(2, 4, 25, 48).flip(1).flatten(1, 2), turned)
    expected = scores.flip(0).reshape(2, 4, 25, 2).flip(1).flatten(1, 2)
    torch.testing.assert_close(flipped, expected, atol=1e-5, rtol=1e-5)
