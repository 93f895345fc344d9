"""Cache blocking, compilation and export compute what the plain forward pass computes."""

import copy

import pytest
import torch

from stvit_video.models import cpu_inference, create_model, windows
from stvit_video.models.cost import count_gflops

SHRUNK_VIT = {"dim": 48, "num_heads": 3, "depth": 6, "image_size": 64}
SHRUNK_SWIN = {"dim": 24, "depths": (2, 2, 6, 2), "num_heads": (1, 2, 4, 8)}
VARIANTS = [
    pytest.param(name, frames, settings, id=f"{name}-{frames}-{'-'.join(f'{k}={v}' for k, v in settings.items())}")
    for name, frames, settings in [
        ("vit_tiny_patch16", 4, SHRUNK_VIT),
        ("stvit_vit_tiny_patch16", 8, {**SHRUNK_VIT, "preset": "fast"}),
        ("stvit_vit_tiny_patch16", 4, {**SHRUNK_VIT, "pooling": "max", "offsets": True}),
        ("swin_tiny", 1, {**SHRUNK_SWIN, "image_size": 224}),
        ("swin_tiny", 32, {**SHRUNK_SWIN, "image_size": 112}),
        ("swin_tiny", 20, {**SHRUNK_SWIN, "image_size": (112, 224), "window": (4, 7, 7)}),  # 10 token frames: 2, 4, 4
        ("swin_tiny", 16, {**SHRUNK_SWIN, "image_size": 100}),  # padded maps
        ("swin_tiny", 8, {**SHRUNK_SWIN, "image_size": 128, "window": (2, 4, 4), "window_frames": (1, 2, 2, 2)}),
        ("stvit_swin_tiny", 16, {**SHRUNK_SWIN, "image_size": 112, "preset": "fast"}),
        ("stvit_r_swin_small", 8, {**SHRUNK_SWIN, "image_size": 112, "units": 1}),
    ]
]

# One of each family, in which shifted windows, masks and merged frames occur: recording a graph takes seconds.
SHORT_SWIN = {**SHRUNK_SWIN, "depths": (2, 1, 4, 1), "image_size": 56, "window": (2, 3, 3)}
RECORDED = [
    pytest.param("vit_tiny_patch16", 4, SHRUNK_VIT, id="vit"),
    pytest.param("stvit_vit_tiny_patch16", 8, {**SHRUNK_VIT, "preset": "fast", "offsets": True}, id="stvit_vit"),
    pytest.param("swin_tiny", 8, {**SHORT_SWIN, "depths": (2, 1, 1, 1)}, id="swin"),
    pytest.param("stvit_swin_tiny", 8, {**SHORT_SWIN, "preset": "fast"}, id="stvit_swin"),
    pytest.param("stvit_r_swin_small", 8, {**SHORT_SWIN, "units": 1}, id="stvit_r_swin"),
]


def build(name: str, frames: int, settings: dict) -> torch.nn.Module:
    """Return a model none of whose weights is zero, so that none can be left out unseen."""
    model = create_model(name, **{"num_frames": frames, "num_classes": 7, **settings})
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def draw_clip(model: torch.nn.Module, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *model.input_size)


@pytest.mark.parametrize("piece", [cpu_inference.PIECE, 20000])
@pytest.mark.parametrize(("name", "frames", "settings"), VARIANTS)
def test_pieces_equal_the_whole(
    name: str, frames: int, settings: dict, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_inference, "PIECE", piece)
    model = build(name, frames, settings)
    clip = draw_clip(model)
    whole = model(clip).detach()  # with gradients every layer runs once, masks and all
    given = clip.clone()
    with torch.no_grad():
        got, intermediates = model(clip, return_intermediates=True)
        tokens = {stage: x.clone() for stage, x in intermediates.tokens.items()}
        again = model(clip)
    assert whole.std() > 0.05
    assert (got - whole).abs().max() < 1e-4
    assert torch.equal(again, got)
    assert torch.equal(clip, given)  # the input is not modified
    _, expected = model(clip, return_intermediates=True)
    for stage, x in expected.tokens.items():
        assert (tokens[stage] - x).abs().max() < 1e-3, stage


def test_pieces_in_half_precision() -> None:
    model = build("swin_tiny", 16, {**SHRUNK_SWIN, "image_size": 112})
    clip = draw_clip(model)
    with torch.no_grad():
        expected = model(clip)
        half = copy.deepcopy(model).to(torch.bfloat16)
        got = half(clip.to(torch.bfloat16)).float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            autocast = model(clip).float()
    for logits in (got, autocast):
        assert 0 < (logits - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("name", ["swin_tiny", "stvit_vit_tiny_patch16"])
def test_nothing_is_cached_across_weight_updates(name: str) -> None:
    settings = {**SHRUNK_SWIN, "image_size": 112} if "swin" in name else SHRUNK_VIT
    model, other = build(name, 4, settings), build(name, 4, settings)
    clip = draw_clip(model)
    with torch.inference_mode():
        before, expected = model(clip), other(clip)
    model.load_state_dict(other.state_dict())
    with torch.inference_mode():
        assert torch.equal(model(clip), expected)
    for parameter in model.parameters():  # as a moving average writes them, without autograd
        parameter.data.mul_(1.1)
    with torch.inference_mode():
        moved = model(clip)
    assert (before - expected).abs().max() > 1e-3
    assert (moved - expected).abs().max() > 1e-3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(clip).square().sum().backward()
    optimizer.step()
    with torch.inference_mode():
        assert (model(clip) - moved).abs().max() > 1e-4


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "frames", "settings"), RECORDED)
def test_compiles_without_a_graph_break(name: str, frames: int, settings: dict, training: bool) -> None:
    model = build(name, frames, settings).train(training)
    clip = draw_clip(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(clip), model(clip), atol=1e-4, rtol=1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize(("name", "frames", "settings"), RECORDED)
def test_exports_with_any_batch_size(name: str, frames: int, settings: dict) -> None:
    """No graph assigns to slices, which ONNX cannot express."""
    model = build(name, frames, settings)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        exported = torch.export.export(model, (draw_clip(model),), dynamic_shapes=({0: batch},))
        program = exported.module()
        operations = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
        assert "aten.scaled_dot_product_attention.default" in operations
        assert not [name for name in operations for word in ("scatter", "copy_", "index_put") if word in name]
        for count in (1, 3):
            clip = draw_clip(model, count)
            torch.testing.assert_close(program(clip), model(clip), atol=1e-4, rtol=1e-4)


def test_operations_are_counted_as_published() -> None:
    """Counted without cache blocking, with which shifted windows cost less than their masked form."""
    model = build("swin_tiny", 16, {**SHRUNK_SWIN, "image_size": 112})
    plain = build("swin_tiny", 16, {**SHRUNK_SWIN, "image_size": 112})
    for module in plain.modules():
        if isinstance(module, windows.WindowBlock):
            module.register_forward_hook(lambda *_: None)
    assert count_gflops(model, model.input_size) == count_gflops(plain, plain.input_size)
