"""The ViT family: one set of tests over all models, timm and the paper's figures as oracles."""

import pytest
import timm
import torch

from stvit_video.common.errors import UsageError
from stvit_video.models import create_model, list_models, load_pretrained
from stvit_video.models.cost import count_gflops

# Small enough to run in a moment: the code paths are those of the named sizes.
SHRUNK = {"dim": 48, "num_heads": 3, "depth": 8, "patch_size": 16}
IMAGE = 112  # 7 x 7 tokens: the map needs padding


def build(name: str, **overrides: object) -> torch.nn.Module:
    sizes = {"num_frames": 1, "image_size": IMAGE, "num_classes": 10, **SHRUNK, **overrides}
    model = create_model(name, **sizes).eval()
    # A trained model has no zeros: draw what starts as zero, so that a test cannot pass because of it.
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


VARIANTS = [
    pytest.param(name, settings, id=f"{name}-{'-'.join(f'{k}={v}' for k, v in settings.items())}")
    for name, settings in [
        ("vit_small_patch16", {}),
        ("vit_small_patch16", {"base_attention": "frame"}),
        *[("stvit_vit_small_patch16", {"pooling": pooling}) for pooling in ("mask", "max", "mean")],
        *[("stvit_vit_small_patch16", {"pooling": pooling, "offsets": True}) for pooling in ("mask", "max", "mean")],
        *[("stvit_vit_small_patch16", {"preset": "fast", "pooling": pooling}) for pooling in ("mask", "max", "mean")],
        ("stvit_vit_small_patch16", {"preset": "fast", "offsets": True}),
        ("stvit_vit_small_patch16", {"base_attention": "joint"}),
        ("stvit_vit_small_patch16", {"base_attention": "joint", "preset": "fast"}),
        ("stvit_vit_small_patch16", {"stgm_depth": 3, "global_centres": False}),
        ("stvit_vit_small_patch16", {"stgm_depth": 4, "first_residual": False, "frames_per_centre": 4}),
        ("stvit_vit_small_patch16", {"base_depth": 6}),
        ("stvit_vit_small_patch16", {"preset": "fast", "reducer": "mean"}),
        ("stvit_vit_small_patch16", {"streaming": True}),
        ("stvit_vit_small_patch16", {"streaming": True, "preset": "fast", "offsets": True}),
        ("stvit_vit_small_patch16", {"streaming": True, "preset": "fast", "reducer": "mean"}),
    ]
]


@pytest.mark.parametrize("frames", [2, 8, 16])
@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_a_still_clip_is_an_image(name: str, settings: dict, frames: int) -> None:
    image_model = build(name, **settings)
    video_model = create_model(name, num_frames=frames, image_size=IMAGE, num_classes=10, **SHRUNK, **settings).eval()
    report = load_pretrained(video_model, image_model.state_dict(), min_coverage=1.0)
    assert not any(report.keys[status] for status in ("new", "unused", "wrong shape"))
    image = torch.randn(2, 3, 1, IMAGE, IMAGE)
    with torch.no_grad():
        expected = image_model(image)
        got = video_model(image.expand(-1, -1, frames, -1, -1))
    assert expected.std() > 0.05
    assert (got - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", [name for name in list_models() if "sample" not in name])
def test_named_models_keep_a_still_clip_an_image(name: str) -> None:
    """The shipped sizes, from an image model's weights, at the smallest input they take."""
    image_model = create_model(name, num_frames=1, image_size=64, num_classes=10).eval()
    video_model = create_model(name, num_frames=4, image_size=64, num_classes=10).eval()
    load_pretrained(video_model, image_model.state_dict(), min_coverage=1.0)
    image = torch.randn(1, 3, 1, 64, 64)
    with torch.no_grad():
        difference = video_model(image.expand(-1, -1, 4, -1, -1)) - image_model(image)
    assert difference.abs().max() < 1e-4


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_dense_baseline_equals_timm(size: str) -> None:
    oracle = timm.create_model(
        f"vit_{size}_patch16_224", class_token=False, global_pool="avg", fc_norm=False, num_classes=1000
    ).eval()
    for parameter in oracle.parameters():  # no zero bias, no unit norm: each must reach its place
        parameter.data += 0.1 * torch.randn_like(parameter)
    model = create_model(f"vit_{size}_patch16", num_frames=1, image_size=224, num_classes=1000).eval()
    report = load_pretrained(model, oracle.state_dict(), min_coverage=0.99)
    assert report.keys["new"] == ["time_embed"]
    image = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = oracle(image)
        assert expected.std() > 0.5
        assert (model(image.unsqueeze(2)) - expected).abs().max() < 2e-4


@pytest.mark.parametrize(
    ("settings", "published"),
    [
        ({}, 1.91),
        ({"base_depth": 3}, 1.56),
        ({"base_depth": 8}, 3.30),
        ({"stgm_depth": 3}, 1.97),
        ({"stgm_depth": 4}, 2.03),
    ],
)
def test_gflops_of_the_paper(settings: dict, published: float) -> None:
    model = create_model("stvit_vit_small_patch16", num_frames=1, image_size=224, num_classes=1000, **settings)
    assert count_gflops(model, (1, 224, 224)) == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_share_of_the_dense_baselines_gflops(size: str) -> None:
    cost = {
        name: count_gflops(create_model(name, num_frames=1, image_size=224, num_classes=1000), (1, 224, 224))
        for name in (f"stvit_vit_{size}_patch16", f"vit_{size}_patch16")
    }
    saved = 1 - cost[f"stvit_vit_{size}_patch16"] / cost[f"vit_{size}_patch16"]
    assert 100 * saved == pytest.approx(58, abs=1)


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_interface_of_the_engine(name: str, settings: dict) -> None:
    model = create_model(name, num_frames=4, image_size=IMAGE, num_classes=10, **SHRUNK, **settings)
    names = [parameter for parameter, _ in model.named_parameters()]
    assert model.no_weight_decay() <= set(names)
    depths = {parameter: model.layer_id(parameter) for parameter in names}
    assert set(depths.values()) == set(range(SHRUNK["depth"] + 2))
    assert depths["patch_embed.proj.weight"] == 0
    assert depths["blocks.3.attn.qkv.weight"] == 4
    assert depths["head.proj.weight"] == SHRUNK["depth"] + 1
    again = create_model(model.name, **model.arguments)
    again.load_state_dict(model.state_dict())

    clip = torch.randn(2, 3, 4, IMAGE, IMAGE)
    model.eval()
    with torch.no_grad():
        logits, intermediates = model(clip, return_intermediates=True)
        torch.testing.assert_close(again.eval()(clip), logits)
    for stage, tokens in intermediates.tokens.items():
        t, h, w = intermediates.grids[stage]
        assert tokens.shape == (2, t * h * w, SHRUNK["dim"])
    assert (intermediates.assignment is None) == name.startswith("vit")
    reduced = model.token_counts()[1]
    assert reduced is None or intermediates.tokens["semantic"].shape[1] == reduced


@pytest.mark.parametrize("settings", [{}, {"streaming": True, "preset": "fast"}], ids=str)
def test_every_parameter_learns_and_grad_checkpointing_changes_nothing(settings: dict) -> None:
    model = create_model(
        "stvit_vit_small_patch16", num_frames=8, image_size=IMAGE, num_classes=10, **SHRUNK, offsets=True, **settings
    )
    clip = torch.randn(2, 3, 8, IMAGE, IMAGE)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(clip).square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        if "offset_norm" not in name:  # behind a projection that starts at zero
            assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


def test_semantic_tokens_see_motion_that_the_frame_model_cannot() -> None:
    clip = torch.randn(1, 3, 8, 64, 64)
    reversed_pairs = clip.reshape(1, 3, 4, 2, 64, 64).flip(3).reshape(clip.shape)
    model = create_model("stvit_vit_sample_patch8", num_frames=8, image_size=64, num_classes=8).eval()
    with torch.no_grad():
        assert (model(clip) - model(reversed_pairs)).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("stvit_vit_smal_patch16", {}, "Did you mean stvit_vit_small_patch16"),
        ("stvit_vit_small_patch16", {"preset": "quick"}, "paper, fast, balanced"),
        ("stvit_vit_small_patch16", {"pool": "max"}, "Did you mean pooling"),
        ("stvit_vit_small_patch16", {"pooling": "median"}, "mask, max, mean"),
        ("stvit_vit_small_patch16", {"base_depth": 11}, "allowed: 1 to 10"),
        ("stvit_vit_small_patch16", {"stgm_depth": 5}, "allowed: a whole number from 2 to 4"),
        ("stvit_vit_small_patch16", {"regions": (1, 9, 4)}, "allowed for this height"),
        ("stvit_vit_small_patch16", {"image_size": 100}, "not a positive multiple of the patch's 16"),
        ("stvit_vit_small_patch16", {"num_frames": 3}, "not a positive multiple of the patch's 2"),
        ("stvit_vit_small_patch16", {"base_attention": "window"}, "frame, joint"),
        ("vit_small_patch16", {"preset": "fast"}, "use stvit_vit_small_patch16"),
        ("vit_small_patch16", {"dim": 100}, "divisible"),
        ("vit_small_patch16", {"num_heads": (3, 6, 12, 24)}, "allowed: a whole number from 1 on"),
        ("swin_tiny", {"num_heads": 3}, "allowed: 4 whole numbers from 1 on"),
    ],
)
def test_wrong_arguments_are_named_with_what_is_allowed(name: str, arguments: dict, says: str) -> None:
    sizes = {"num_frames": 1, "image_size": 224, "num_classes": 10, **arguments}
    with pytest.raises(UsageError) as error:
        create_model(name, **sizes)
    assert says in str(error.value)


def test_wrong_input_is_named_with_what_the_model_takes() -> None:
    model = create_model("vit_tiny_patch16", num_frames=8, image_size=64, num_classes=10)
    with pytest.raises(ValueError, match=r"\(B, 3, 8, 64, 64\)"):
        model(torch.zeros(1, 3, 4, 64, 64))


def test_list_models_filters_by_pattern() -> None:
    assert list_models("stvit_vit_*_patch16") == [f"stvit_vit_{size}_patch16" for size in ("base", "small", "tiny")]
