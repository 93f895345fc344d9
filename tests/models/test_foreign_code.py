"""Models as other people's code sees them: hooks, adapters, pruning, quantisation, any precision.

Each is compared with the same function of plain layers: adapters that PEFT merges, weights that pruning leaves.
"""

import copy
import warnings
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn.quantized.dynamic import Linear as Int8Linear
from torch.ao.quantization import quantize_dynamic
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

from stvit_video.models import create_model
from stvit_video.models.reducers import GRID_REDUCERS, REDUCERS

VIT = {"dim": 24, "num_heads": 3, "depth": 4, "base_depth": 1, "image_size": 64, "num_frames": 4}
DENSE_VIT = {key: value for key, value in VIT.items() if key != "base_depth"}
SWIN = {"dim": 12, "depths": (2, 1, 4, 1), "num_heads": (1, 2, 3, 4), "image_size": 56, "window": (2, 3, 3)}
SWIN |= {"num_frames": 8}
MASKS = {"pooling": "mask", "offsets": True, "global_centres": True, "preset": "fast"}
MODELS = [
    pytest.param(name, settings, id="-".join([name.rpartition("_")[0], settings.get("reducer", "")]).strip("-"))
    for name, settings in [
        ("vit_tiny_patch16", DENSE_VIT),
        *(("stvit_vit_tiny_patch16", {**VIT, "reducer": reducer, "regions": (2, 2, 2)}) for reducer in REDUCERS[1:]),
        ("stvit_vit_tiny_patch16", {**VIT, **MASKS, "reducer": "stgm"}),
        ("swin_tiny", SWIN),
        *(("stvit_swin_tiny", {**SWIN, "reducer": reducer, "regions": (2, 2, 2)}) for reducer in GRID_REDUCERS[1:]),
        ("stvit_swin_tiny", {**SWIN, **MASKS, "reducer": "stgm", "regions": (2, 2, 2)}),
        ("stvit_r_swin_small", {**SWIN, "units": 1, "regions": (2, 2, 2)}),
    ]
]
each_model = pytest.mark.parametrize(("name", "settings"), MODELS)


def build(name: str, settings: dict) -> nn.Module:
    """Return a model none of whose weights is zero, so that none can be left out unseen."""
    model = create_model(name, num_classes=7, **settings)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def draw(model: nn.Module, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *model.input_size)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def infer(model: nn.Module, clips: Tensor) -> Tensor:
    with torch.no_grad():
        return model(clips)


def projections(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv3d)}


def chooses(settings: dict) -> bool:
    """Return whether tokens are chosen by what they are: rounding may then choose another."""
    return settings.get("reducer") in ("tome", "dynamicvit", "ats", "spot")


def decisions(settings: dict, mode: str) -> set[str]:
    """Return the layers that only choose tokens in evaluation, which has no gradient."""
    if mode == "training" or settings.get("reducer") not in ("dynamicvit", "spot"):
        return set()
    return {f"reducer.{name}" for name in ("embed.1", "observe.1", "decide.0", "decide.2", "decide.4")}


@each_model
@pytest.mark.parametrize("mode", ["inference", "gradients", "training"])
def test_every_layer_fires_its_hooks(name: str, settings: dict, mode: str) -> None:
    model, forward, backward = build(name, settings).train(mode == "training"), Counter(), set()
    clips, names = draw(model), {module: name for name, module in model.named_modules()}
    # A reducer that merges inside blocks calls their steps, so these blocks and their attention are no calls.
    inside = model.blocks[1:3] if settings.get("reducer") == "tome" else []
    silent = {module for block in inside for module in (block, block.attn)}
    expected = {m for m in names if m not in silent and not isinstance(m, nn.ModuleList)}
    assert expected >= {module for module in names if not list(module.children())}

    def run() -> Tensor:
        torch.manual_seed(1)
        with torch.set_grad_enabled(mode != "inference"):
            return model(clips.requires_grad_(mode != "inference"))

    plain = run().detach()
    with register_module_forward_hook(lambda module, *_: forward.update([module])):
        close(run().detach(), plain)
    missing, strangers = expected - set(forward), set(forward) - set(names)  # the latter stand for the former
    assert {id(module._forward_hooks) for module in missing} <= {id(module._forward_hooks) for module in strangers}
    forward.clear()
    for module in expected:
        module.register_forward_hook(lambda module, *_: forward.update([module]))
    close(run().detach(), plain)
    assert not {names[module] for module in expected - set(forward)}
    if not chooses(settings):  # which see a block's attention before it
        assert {forward[part] for block in model.transformer_blocks() for part in (block.attn.qkv, block.mlp)} == {1}
    if mode != "inference":
        for layer in projections(model).values():
            layer.register_full_backward_hook(lambda module, *_: backward.add(module))
        run().square().sum().backward()
        assert {names[m] for m in projections(model).values() if m not in backward} <= decisions(settings, mode)


@pytest.mark.parametrize(
    ("name", "settings", "targets"),
    [
        *(pytest.param(*model.values, "all-linear", id=model.id) for model in MODELS),
        (
            "stvit_vit_tiny_patch16",
            {**VIT, "preset": "fast"},
            ["qkv", "proj", "fc1", "fc2"],
        ),  # and stem, head
        ("swin_tiny", SWIN, ["qkv", "proj", "fc1", "fc2", "reduction"]),
    ],
)
def test_adapters_act_as_when_they_are_merged(name: str, settings: dict, targets: str | list[str]) -> None:
    peft = pytest.importorskip("peft")
    model = build(name, settings)
    clips, plain, names = draw(model), list(model.modules()), list(model.state_dict())
    before = infer(model, clips)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    adapters = [parameter for name, parameter in adapted.named_parameters() if "lora_" in name]
    assert targets != "all-linear" or len(adapters) == 2 * len([m for m in plain if isinstance(m, nn.Linear)])
    adapted.train()(clips).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in adapters)
    found, with_gradients = infer(adapted.eval(), clips), adapted(clips)
    close(with_gradients, found)
    assert (found - before).abs().max() > 0.01
    merged = adapted.merge_and_unload()
    assert list(merged.state_dict()) == names
    close(infer(merged, clips), found)


@each_model
def test_pruned_and_parametrised_layers_act_as_plain_ones(name: str, settings: dict) -> None:
    model = build(name, settings)
    clips, names = draw(model), set(model.state_dict())
    before = infer(model, clips)
    for change, undo in ((halve, prune.remove), (double_norm, remove_parametrizations)):
        for layer in projections(model).values():
            change(layer)
        found, with_gradients = infer(model, clips), model(clips)
        for layer in projections(model).values():
            undo(layer, "weight")
        assert set(model.state_dict()) == names
        after = infer(model, clips)
        close(found, after)
        close(with_gradients, after)
        assert (after - before).abs().max() > 0.01
        before = after


def halve(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)
    layer.weight_orig.data *= 1.5  # as a step of training changes it


def double_norm(layer: nn.Module) -> None:
    weight_norm(layer).parametrizations.weight.original0.data *= 2


@each_model
def test_int8_layers_stay_near(name: str, settings: dict) -> None:
    model = build(name, settings)
    clips = draw(model, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        small = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not [layer for layer in small.modules() if isinstance(layer, nn.Linear)]
    assert [layer for layer in small.modules() if isinstance(layer, Int8Linear)]
    expected, found = infer(model, clips), infer(small, clips)
    assert found.isfinite().all()
    assert 0 < (found - expected).square().mean().sqrt() < (0.5 if chooses(settings) else 0.1) * expected.std()


@each_model
def test_every_precision_gives_the_same(name: str, settings: dict) -> None:
    model = build(name, settings)
    clips = draw(model)
    expected = infer(model, clips)
    double = copy.deepcopy(model).double()
    close(infer(double, clips.double()).float(), expected)
    half = copy.deepcopy(model).bfloat16()
    assert 0 < (infer(half, clips.bfloat16()) - expected).abs().max() < 0.05 * expected.abs().max()
    # Where anything is rounded to single precision, difference quotients of so small a step are noise.
    x, step = clips.double().requires_grad_(), 1e-6 * torch.randn_like(clips.double())
    (gradient,) = torch.autograd.grad(double(x).sum(), x)
    quotient = (infer(double, x + step) - infer(double, x - step)).sum() / 2
    assert float((gradient * step).sum()) == pytest.approx(float(quotient), rel=1e-6, abs=1e-13)
    for trained in (double, half):
        x = clips.to(next(trained.parameters()).dtype)
        trained.train()(x).float().square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.parameters())
