"""The Swin family: torchvision, published outputs, the paper's figures and the still clip as oracles."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from stvit_video.common.errors import UsageError
from stvit_video.models import create_model, load_pretrained
from stvit_video.models.cost import count_gflops, count_parameters
from tests.models.weights import perturb

SHRUNK = {"dim": 24, "depths": (2, 2, 6, 2), "num_heads": (1, 2, 4, 8)}
TWO_UNITS = {"depths": (2, 2, 12, 2), "units": 2}
GOLDEN = Path(__file__).parent / "golden"


VARIANTS = [
    pytest.param(name, size, settings, id=f"{name}-{size}-{'-'.join(f'{k}={v}' for k, v in settings.items())}")
    for name, size, settings in [
        ("swin_tiny", 224, {}),  # 56, 28, 14 and 7 tokens a side: no padding, shifted windows
        ("swin_tiny", 100, {}),  # 25, 13, 7, 4: padding everywhere
        ("swin_tiny", (72, 130), {"window": (4, 7, 7)}),
        ("swin_tiny", 100, {"window_fit": "timm"}),  # windows cut to the last map, padding after the shift
        ("stvit_swin_tiny", 250, {"window_fit": "timm"}),
        ("stvit_swin_tiny", 224, {}),
        ("stvit_swin_tiny", 224, {"preset": "fast"}),
        ("stvit_swin_tiny", 250, {"preset": "fast"}),  # 16 tokens a side in stage 3: windows of unequal reach
        ("stvit_swin_tiny", 100, {"pooling": "mask", "global_centres": True}),
        ("stvit_swin_tiny", 100, {"pooling": "mean", "preset": "fast", "global_centres": True}),
        ("stvit_swin_tiny", 160, {"pooling": "mask", "preset": "fast", "offsets": True, "stgm_depth": 3}),
        ("stvit_swin_tiny", 224, {"frames_per_centre": 4, "first_residual": False, "layer_scale": 0.3}),
        ("stvit_swin_tiny", 100, {"reducer": "mean", "frames_per_centre": 2}),
        ("stvit_r_swin_small", 224, {"units": 1}),
        ("stvit_r_swin_small", 100, {"reducer": "mean", "units": 1}),
        ("stvit_r_swin_small", 100, {**TWO_UNITS, "preset": "fast", "global_centres": True}),
        ("stvit_r_swin_small", 250, {"units": 1, "base_depth": 2, "stem": "patch", "frames_per_centre": 2}),
    ]
]


@pytest.mark.parametrize("frames", [2, 8, 16])
@pytest.mark.parametrize(("name", "size", "settings"), VARIANTS)
def test_a_still_clip_is_an_image(name: str, size: int | tuple[int, int], settings: dict, frames: int) -> None:
    check_still_clip(name, size, settings, frames)


@pytest.mark.parametrize("frames", [3, 18, 20])  # a repeated last frame; time windows that need padding, and shift
@pytest.mark.parametrize("name", ["swin_tiny", "stvit_swin_tiny", "stvit_r_swin_small"])
def test_a_still_clip_of_any_length_is_an_image(name: str, frames: int) -> None:
    check_still_clip(name, 100, {"units": 1} if "_r_" in name else {}, frames)


def check_still_clip(name: str, size: int | tuple[int, int], settings: dict, frames: int) -> None:
    sizes = {"image_size": size, "num_classes": 10, **SHRUNK, **settings}
    image_model = perturb(create_model(name, num_frames=1, **sizes))
    video_model = create_model(name, num_frames=frames, **sizes).eval()
    report = load_pretrained(video_model, image_model.state_dict(), min_coverage=1.0)
    assert not any(report.keys[status] for status in ("new", "unused", "wrong shape"))
    image = torch.randn(1, 3, 1, *image_model.input_size[1:])
    with torch.no_grad():
        expected = image_model(image)
        got = video_model(image.expand(-1, -1, frames, -1, -1))
        other = image_model(torch.randn_like(image))
    assert (other - expected).abs().max() > 0.02  # what is compared depends on the picture
    assert (got - expected).abs().max() < 1e-4


@pytest.mark.parametrize(("size", "side"), [("tiny", 224), ("small", 224), ("base", 224), ("tiny", 256), ("tiny", 200)])
def test_image_model_equals_torchvision(size: str, side: int) -> None:
    oracle = perturb(getattr(torchvision.models, f"swin_{size[0]}")(num_classes=20))
    model = create_model(f"swin_{size}", num_frames=1, image_size=side, num_classes=20).eval()
    load_pretrained(model, oracle.state_dict(), min_coverage=1.0)
    image = torch.randn(1, 3, side, side)
    with torch.no_grad():
        expected, got = oracle(image), model(image.unsqueeze(2))
    assert expected.std() > 0.1
    assert (got - expected).abs().max() < 2e-4


@pytest.mark.parametrize(("size", "frames", "side"), [("tiny", 32, 224), ("tiny", 8, 256)])
def test_video_model_equals_torchvision(size: str, frames: int, side: int) -> None:
    compare_with_swin3d(size, frames, side)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["small", "base"])
def test_larger_video_models_equal_torchvision(size: str) -> None:
    compare_with_swin3d(size, 32, 224)


def compare_with_swin3d(size: str, frames: int, side: int) -> None:
    oracle = perturb(getattr(torchvision.models.video, f"swin3d_{size[0]}")(num_classes=20))
    model = create_model(f"swin_{size}", num_frames=frames, image_size=side, num_classes=20).eval()
    load_pretrained(model, oracle.state_dict(), min_coverage=1.0)
    clip = torch.randn(1, 3, frames, side, side)
    with torch.no_grad():
        expected, got = oracle(clip), model(clip)
    assert expected.std() > 0.1
    assert (got - expected).abs().max() < 2e-4


def golden_weights(path: Path) -> dict[str, torch.Tensor]:
    """Make the weights of a golden file, under the published names, by the rule stated beside it."""
    state = {}
    for name, shape in json.loads(path.read_text())["state_dict"].items():
        if name.endswith(("relative_position_index", "attn_mask", "num_batches_tracked")):
            continue
        draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
        if name.endswith("running_var"):
            value = 1 + 0.1 * np.abs(draw)
        elif name.endswith("running_mean"):
            value = 0.1 * draw
        elif "layer_scale" in name:
            value = 0.5 + 0.1 * draw
        elif name.endswith(("relative_position_bias_table", "semantic_token2")):
            value = 0.5 * draw
        elif len(shape) == 1:
            value = 1 + 0.1 * draw if name.endswith("weight") else 0.02 * draw
        else:
            value = draw / np.sqrt(np.prod(shape[1:]))
        state[name] = torch.from_numpy(value.astype(np.float32))
    return state


GOLDEN_STAGES = {"patch_embed": "embed", "stage1": "merged1", "stage2": "merged2", "stage3": "merged3"}


@pytest.mark.parametrize(
    ("golden", "settings"),
    [
        ("stvit_r_swin_s", {}),
        ("stvit_r_swin_s_global_shortcut", {"global_centres": True, "first_residual": True}),
    ],
)
def test_released_stvit_r_outputs(golden: str, settings: dict) -> None:
    model = create_model("stvit_r_swin_small", num_frames=1, image_size=224, num_classes=1000, **settings).eval()
    report = load_pretrained(model, golden_weights(GOLDEN / f"{golden}.json"), min_coverage=1.0)
    assert not any(report.keys[status] for status in ("new", "unused", "wrong shape"))
    image = np.random.RandomState(0).standard_normal((2, 3, 224, 224)).astype(np.float32)
    with torch.no_grad():
        logits, seen = model(torch.from_numpy(image).unsqueeze(2), return_intermediates=True)
    expected = np.load(GOLDEN / f"{golden}.npz")
    assert np.abs(logits.numpy() - expected["logits"]).max() < 2e-4
    for theirs, ours in {**GOLDEN_STAGES, "stage4": "stage4"}.items():
        tokens = seen.tokens[ours].numpy()
        tokens = tokens[:, :: max(1, tokens.shape[1] // 16), :: max(1, tokens.shape[2] // 16)]
        assert np.abs(tokens - expected[theirs]).max() < 2e-4, theirs


@pytest.mark.parametrize(
    ("name", "gflops", "parameters"),
    [("swin_tiny", 4.51, 28.3), ("swin_small", 8.77, 49.6), ("stvit_r_swin_small", 5.64, 49.6)],
)
def test_published_image_figures(name: str, gflops: float, parameters: float) -> None:
    """STViT-R has 5.82 GFLOPs as published, with keys and values projected anew for each window that reads a token."""
    model = create_model(name, num_frames=1, image_size=224, num_classes=1000)
    assert count_gflops(model, (1, 224, 224)) == pytest.approx(gflops, rel=0.02)
    assert count_parameters(model) / 1e6 == pytest.approx(parameters, abs=0.05)


@pytest.mark.parametrize(("size", "saving"), [("tiny", 0.24), ("small", 0.25), ("base", 0.25)])
def test_paper_preset_saves_as_published_on_images(size: str, saving: float) -> None:
    image = {"num_frames": 1, "image_size": 224, "num_classes": 1000}
    semantic, full = (
        count_gflops(create_model(f"{family}_{size}", **image).to("meta"), (1, 224, 224))
        for family in ("stvit_swin", "swin")
    )
    assert 1 - semantic / full == pytest.approx(saving, abs=0.02)


@pytest.mark.parametrize(
    ("size", "published", "settings", "low", "high"),
    [
        ("tiny", 87.9, {}, 0.25, 0.29),
        ("small", 165.9, {}, 0.25, 0.29),
        ("tiny", 87.9, {"preset": "fast"}, 0.40, 0.60),
    ],
)
def test_presets_save_on_video(size: str, published: float, settings: dict, low: float, high: float) -> None:
    video = {"num_frames": 32, "image_size": 224, "num_classes": 400}
    full = count_gflops(create_model(f"swin_{size}", **video).to("meta"), (32, 224, 224))
    assert full == pytest.approx(published, rel=0.02)
    semantic = count_gflops(create_model(f"stvit_swin_{size}", **video, **settings).to("meta"), (32, 224, 224))
    assert low <= 1 - semantic / full <= high


def test_dense_maps_and_assignment() -> None:
    sizes = {"num_frames": 4, "image_size": (224, 250), "num_classes": 10, **SHRUNK}
    for name, settings in (("stvit_r_swin_small", {"units": 1}), ("stvit_swin_tiny", {"preset": "fast"})):
        model = create_model(name, **sizes, **settings).eval()
        with torch.no_grad():
            _, seen = model(torch.randn(2, 3, 4, 224, 250), return_intermediates=True)
        shapes = [tuple(seen.feature_map(f"stage{i}").shape) for i in (1, 2, 3, 4)]
        dense = [(2, 24, 2, 56, 63), (2, 48, 2, 28, 32), (2, 96, 2, 14, 16), (2, 192, 2, 7, 8)]
        semantic = [*dense[:2], (2, 96, 1, 6, 9), (2, 192, 1, 3, 5)]
        assert shapes == (dense if "_r_" in name else semantic)
        frames = seen.grids["stage3"][0] if "_r_" not in name else 2
        assert seen.assignment is not None
        assert seen.assignment.shape == (2, frames * 54, 2 * 14 * 16)
        sums = seen.assignment.sum(dim=2)
        assert (sums > 0).all()
        assert (sums < 1.0001).all()


def test_token_order_of_a_dense_map() -> None:
    """Token (row, column) of the embedding is the picture's patch there."""
    model = create_model("swin_tiny", num_frames=1, image_size=64, num_classes=3, **SHRUNK).eval()
    picture = torch.zeros(1, 3, 1, 64, 64)
    changed = picture.clone()
    changed[..., 8:12, 20:24] = 1.0
    with torch.no_grad():
        maps = [model(x, return_intermediates=True)[1].feature_map("embed") for x in (picture, changed)]
    differs = (maps[0] != maps[1]).any(dim=1)[0, 0].nonzero().tolist()
    assert differs == [[2, 5]]


def test_training_contracts() -> None:
    """Every parameter has a depth and, where it decides, a gradient; recomputation changes nothing."""
    for name, settings in (("stvit_swin_tiny", {"global_centres": True}), ("stvit_r_swin_small", {"units": 1})):
        torch.manual_seed(0)
        model = create_model(name, num_frames=4, image_size=64, num_classes=5, **SHRUNK, **settings).train()
        clip = torch.randn(2, 3, 4, 64, 64)
        gradients = []
        for recompute in (False, True):
            model.set_grad_checkpointing(recompute)
            model.zero_grad()
            model(clip).square().sum().backward()
            gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == dict(model.named_parameters()).keys()
        assert all(torch.allclose(gradients[0][key], gradients[1][key], atol=1e-5) for key in gradients[0])
        depths = [model.layer_id(key) for key, _ in model.named_parameters()]
        assert min(depths) == 0
        assert max(depths) == sum(SHRUNK["depths"]) + 1
        assert model.layer_id("layers.2.blocks.0.norm1.weight") == 5
        exempt = model.no_weight_decay()
        assert exempt <= dict(model.named_parameters()).keys()
        assert any(key.endswith("relative_position_bias_table") for key in exempt)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("swin_tiny", {"image_size": 0}, "from 1 on"),
        ("swin_tiny", {"depths": (2, 2, 6)}, "4 whole numbers"),
        ("swin_tiny", {"base_depth": 2}, "stvit_swin_tiny"),
        ("swin_tiny", {"stem": "Conv"}, "patch, conv"),
        ("swin_tiny", {"windov": (8, 7, 7)}, "window"),
        ("stvit_swin_tiny", {"base_depth": 5}, "allowed: 1 to 4"),
        ("stvit_swin_tiny", {"units": 2}, "stvit_r"),
        ("stvit_swin_tiny", {"regions": (3, 6, 6)}, "allowed"),
        ("stvit_swin_tiny", {"regions": (1, 20, 6)}, "20 regions"),
        ("stvit_swin_tiny", {"regions": (1, 7, 6)}, r"7 regions over the 2 windows.*\[2, 4, 6\]"),
        ("stvit_swin_tiny", {"regions": (6, 6)}, "3 whole numbers"),
        ("stvit_swin_tiny", {"regions": (1, 0, 6)}, "3 whole numbers from 1 on"),
        ("stvit_swin_tiny", {"drop_path": 1.5}, "a number from 0 to 0.99"),
        ("stvit_swin_tiny", {"frames_per_centre": 0}, "from 1 on"),
        ("stvit_swin_tiny", {"offsets": "yes"}, "True or False"),
        ("stvit_swin_tiny", {"preset": "quick"}, "paper, fast"),
        ("swin_tiny", {"stem": "conv", "patch_size": 8}, "choose 4"),
        ("swin_tiny", {"init": "kaiming"}, "init 'kaiming' is unknown; choose one of normal, xavier"),
        ("swin_tiny", {"window": 7}, "3 whole numbers"),
        ("swin_tiny", {"num_heads": (5, 6, 12, 24)}, "divisible"),
        ("vit_tiny_patch16", {"patch_size": 0}, "from 1 on"),
        ("vit_tiny_patch16", {"num_frames": 4.5}, "whole number"),
        ("vit_tiny_patch16", {"image_size": (224,)}, "2 whole numbers"),
        ("vit_tiny_patch16", {"num_classes": 0}, "from 1 on"),
        ("vit_tiny_patch16", {"mlp_ratio": None}, "number"),
        ("stvit_r_swin_small", {"units": 4}, r"allowed: \[1, 2, 3, 6, 9, 18\]"),
        ("stvit_r_swin_small", {"units": 6}, "too short"),
        ("stvit_r_swin_tiny", {}, "stvit_r_swin_small"),
    ],
)
def test_wrong_arguments_are_refused(name: str, settings: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        create_model(name, **{"num_frames": 1, "image_size": 224, "num_classes": 10, **settings})


@pytest.mark.parametrize(("init", "bound"), [("normal", 2.0), ("xavier", (6 / (24 + 96)) ** 0.5)])
def test_weights_start_as_their_initialisation_says(init: str, bound: float) -> None:
    model = create_model("stvit_swin_tiny", num_frames=4, image_size=64, num_classes=100, init=init, **SHRUNK)
    weight = model.get_parameter("layers.0.blocks.0.mlp.fc1.weight")
    assert weight.abs().max() < bound
    assert weight.std().item() == pytest.approx(0.02 if init == "normal" else bound / 3**0.5, rel=0.05)
    assert model.head.proj.weight.std().item() == pytest.approx(0.02, rel=0.05)  # all classes about equally likely


@pytest.mark.parametrize("settings", [{}, {"pooling": "mask"}, {"offsets": True}, {"window": (4, 5, 3)}])
def test_any_image_size_works(settings: dict) -> None:
    for height in (4, 8, 30, 64, 113, 128, 144, 200, 240, 320, 513):
        sizes = {"num_frames": 3, "image_size": (height, 64), "num_classes": 3, **SHRUNK, **settings}
        model = create_model("stvit_swin_tiny", **sizes).eval()
        with torch.no_grad():
            assert model(torch.randn(1, 3, 3, height, 64)).isfinite().all(), height


@pytest.mark.parametrize("name", ["swin_tiny", "stvit_swin_tiny", "stvit_r_swin_small"])
def test_bf16_runs_in_bf16_and_stays_near(name: str) -> None:
    settings = {"units": 1} if "_r_" in name else {}
    model = perturb(create_model(name, num_frames=20, image_size=100, num_classes=10, **SHRUNK, **settings))
    clip, seen = torch.randn(1, 3, 20, 100, 100), []
    model.layers[2].blocks[-1].mlp.fc1.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.no_grad():
        expected = model(clip)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = model(clip).float()
    assert seen == [torch.float32, torch.bfloat16]
    assert (got - expected).abs().max() < 0.1 * expected.abs().max()


def test_input_of_another_size_is_refused() -> None:
    model = create_model("swin_tiny", num_frames=1, image_size=64, num_classes=3, **SHRUNK)
    with pytest.raises(ValueError, match="this model takes"):
        model(torch.randn(1, 3, 1, 96, 64))
