"""Published layouts: each conversion against the network it comes from, or against names and shapes written out."""

import re

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from stvit_video.common.errors import UsageError
from stvit_video.models import create_model, load_pretrained
from stvit_video.models.weights.layouts import from_swin, recognise
from stvit_video.models.weights.resize import interleaved_sines, resample_bias, split_positions
from tests.models.weights import perturb


def swin(frames: int = 1, **overrides: object) -> torch.nn.Module:
    return create_model("swin_tiny", **{"num_frames": frames, "image_size": 224, "num_classes": 12, **overrides}).eval()


def microsoft_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a Swin of this package as Microsoft's repository has it, with the buffers its files carry."""
    state = {name.replace("head.proj.", "head."): value for name, value in state.items()}
    for name in [name for name in state if name.endswith("relative_position_bias_table")]:
        state[name.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.int64)
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    if state["patch_embed.proj.weight"].shape[2] == 1:
        state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].squeeze(2)
    return state


def test_timm_swin_is_equal() -> None:
    oracle = perturb(timm.create_model("swin_tiny_patch4_window7_224", num_classes=12))
    model = swin()
    load_pretrained(model, oracle.state_dict(), min_coverage=1.0)
    image = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert (model(image.unsqueeze(2)) - oracle(image)).abs().max() < 2e-5


def test_microsoft_swin_and_video_swin() -> None:
    source = perturb(swin())
    state = microsoft_names(source.state_dict())
    assert recognise(state, "")[0].name == "Swin"
    target = swin()
    report = load_pretrained(target, state, min_coverage=1.0)
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in source.state_dict().items())
    assert sorted(report.keys["unused"]) == sorted(report.dropped)
    assert len(report.dropped) == 13

    video = perturb(swin(32))
    published = {f"backbone.{name}": value for name, value in microsoft_names(video.state_dict()).items()}
    for name in ("weight", "bias"):
        published[f"cls_head.fc_cls.{name}"] = published.pop(f"backbone.head.{name}")
    assert recognise(published, "")[0].name == "Video Swin"
    target = swin(32)
    load_pretrained(target, published, min_coverage=1.0)
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in video.state_dict().items())


def test_swin_into_semantic_tokens_reports_unused_biases() -> None:
    """What an image checkpoint has no use for is named; all that the model has is covered."""
    model = create_model("stvit_swin_tiny", num_frames=4, image_size=224, num_classes=12)
    report = load_pretrained(model, microsoft_names(swin().state_dict()), min_coverage=1.0)
    tables = [name for name in report.keys["unused"] if name.endswith("bias_table")]
    assert sorted(tables) == [
        f"layers.{place}.attn.relative_position_bias_table"
        for place in ("2.blocks.4", "2.blocks.5", "3.blocks.0", "3.blocks.1")
    ]
    assert any("4 position bias tables unused" in note for note in report.notes)
    assert set(report.keys["inflated"]) >= {
        "patch_embed.proj.weight",
        "layers.0.blocks.0.attn.relative_position_bias_table",
    }


def test_bias_tables_of_other_reach() -> None:
    table = torch.arange(3 * 5 * 5, dtype=torch.float32).reshape(75, 1)
    longer, status = resample_bias(table, (5, 5, 5), image=False)
    assert status == "interpolated"
    assert torch.equal(longer.reshape(5, 25), table.reshape(3, 25)[[0, 0, 1, 2, 2]])
    image, _ = resample_bias(table, (1, 5, 5), image=False)
    assert torch.equal(image, table[25:50])  # offset 0 in time
    inflated, status = resample_bias(image, (15, 5, 5), image=True)
    assert status == "inflated"
    assert torch.equal(inflated.reshape(15, 25), image.reshape(1, 25).expand(15, 25))
    wide, status = resample_bias(torch.full((13 * 13, 3), 0.7), (1, 23, 23), image=True)
    assert status == "interpolated"
    torch.testing.assert_close(wide, torch.full((23 * 23, 3), 0.7))
    # An image's 15 x 15 table for windows of 3: its 225 entries are no 9 frames of 5 x 5.
    ramp = torch.arange(15.0).repeat(15, 1).reshape(225, 1)
    narrow, _ = resample_bias(ramp, (1, 5, 5), image=True)
    torch.testing.assert_close(narrow.reshape(5, 5)[2], torch.tensor([1.0, 4.0, 7.0, 10.0, 13.0]), atol=0.1, rtol=0)
    video, status = resample_bias(torch.rand(15 * 13 * 13, 3), (15, 9, 9), image=False)
    assert (tuple(video.shape), status) == ((15 * 81, 3), "interpolated")
    assert resample_bias(torch.zeros(10, 1), (1, 5, 5), image=True) == (None, "wrong shape")


def test_larger_windows_take_an_image_checkpoint() -> None:
    model = create_model("swin_tiny", num_frames=1, image_size=384, num_classes=12, window=(8, 12, 12))
    report = load_pretrained(model, swin().state_dict(), min_coverage=1.0)
    assert len(report.keys["interpolated"]) == 12


def test_deit_distillation_and_layer_scale() -> None:
    state = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=10).state_dict()
    model = create_model("vit_tiny_patch16", num_frames=1, image_size=224, num_classes=10)
    report = load_pretrained(model, state)
    assert set(report.dropped) == {"cls_token", "dist_token", "head_dist.weight", "head_dist.bias"}
    assert torch.equal(model.pos_embed, state["pos_embed"][:, 2:])

    settings = {"class_token": False, "global_pool": "avg", "fc_norm": False, "init_values": 0.5, "num_classes": 10}
    oracle = perturb(timm.create_model("vit_tiny_patch16_224", depth=3, **settings))
    model = create_model("vit_tiny_patch16", num_frames=1, image_size=224, num_classes=10, depth=3).eval()
    report = load_pretrained(model, oracle.state_dict(), min_coverage=0.99)
    assert any("6 layer scales" in note for note in report.notes)
    image = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert (model(image.unsqueeze(2)) - oracle(image)).abs().max() < 2e-5


def test_timm_vit_with_its_norm_after_the_pooling() -> None:
    oracle = perturb(timm.create_model("vit_tiny_patch16_224", depth=3, class_token=False, global_pool="avg"))
    sizes = {"num_frames": 1, "image_size": 224, "num_classes": 1000, "depth": 3}
    equal = create_model("vit_tiny_patch16", **sizes, fc_norm=True).eval()
    assert not load_pretrained(equal, oracle.state_dict(), min_coverage=0.99).notes
    image = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert (equal(image.unsqueeze(2)) - oracle(image)).abs().max() < 2e-5
    other = create_model("vit_tiny_patch16", **sizes)
    assert any("fc_norm=True" in note for note in load_pretrained(other, oracle.state_dict()).notes)


def videomae_state(oracle: torch.nn.Module, kernel: Tensor) -> dict[str, Tensor]:
    """Rename timm's ViT as VideoMAE has it: queries and values with a bias of their own, keys without."""
    state = {}
    for name, value in oracle.state_dict().items():
        if name.endswith("qkv.bias"):
            q, k, v = value.chunk(3)
            assert not k.any()
            state[name.replace("qkv.bias", "q_bias")], state[name.replace("qkv.bias", "v_bias")] = q, v
        elif name != "pos_embed":
            state[name] = value
    state["patch_embed.proj.weight"] = kernel
    return state


def videomae_oracle(frames: int = 16, size: int = 224) -> tuple[torch.nn.Module, Tensor, Tensor, Tensor]:
    """A VideoMAE ViT put together from timm's blocks: network, tubelet kernel, a clip, and its logits."""
    settings = {"depth": 2, "class_token": False, "global_pool": "avg", "fc_norm": True, "num_classes": 7}
    oracle = perturb(timm.create_model("vit_tiny_patch16_224", img_size=size, **settings))
    for block in oracle.blocks:
        block.attn.qkv.bias.data[192:384] = 0
    kernel, clip = 0.05 * torch.randn(192, 3, 2, 16, 16), torch.randn(1, 3, frames, size, size)
    # The published table, as its authors' formula reads: position / 10000^(2 * (channel // 2) / channels).
    count = frames // 2 * (size // 16) ** 2
    table = np.array([[n / 10000 ** (2 * (c // 2) / 192) for c in range(192)] for n in range(count)])
    table[:, 0::2], table[:, 1::2] = np.sin(table[:, 0::2]), np.cos(table[:, 1::2])
    with torch.no_grad():
        tokens = F.conv3d(clip, kernel, oracle.patch_embed.proj.bias, stride=(2, 16, 16)).flatten(2).transpose(1, 2)
        for block in oracle.blocks:
            tokens = block(tokens + torch.from_numpy(table).float() if block is oracle.blocks[0] else tokens)
        logits = oracle.head(oracle.fc_norm(tokens.mean(dim=1)))
    return oracle, kernel, clip, logits


@pytest.mark.parametrize(("frames", "size"), [(16, 224), (8, 112)])
def test_fine_tuned_videomae_is_equal(frames: int, size: int) -> None:
    oracle, kernel, clip, expected = videomae_oracle(frames, size)
    settings = {"depth": 2, "positions": "clip", "fc_norm": True, "norm_eps": 1e-6}
    model = create_model("vit_tiny_patch16", num_frames=frames, image_size=size, num_classes=7, **settings).eval()
    report = load_pretrained(model, videomae_state(oracle, kernel), min_coverage=1.0)
    assert (report.layout, report.differences) == ("VideoMAE", [])
    assert not any(report.keys[status] for status in ("new", "unused", "wrong shape"))
    with torch.no_grad():
        assert (model(clip) - expected).abs().max() < 2e-5


def test_pre_trained_videomae_gives_its_encoder() -> None:
    oracle, kernel, *_ = videomae_oracle()
    encoder = {
        f"encoder.{re.sub('^fc_norm', 'norm', name)}": value
        for name, value in videomae_state(oracle, kernel).items()
        if not name.startswith("head.")
    }
    decoder = {"mask_token": torch.zeros(1, 1, 96), "decoder.head.weight": torch.zeros(9, 9)}
    converted = recognise({**encoder, **decoder}, "")[1]
    assert set(converted.dropped) == set(decoder)
    assert torch.equal(converted.state["norm.weight"], oracle.fc_norm.weight)
    model = create_model("stvit_vit_tiny_patch16", num_frames=8, image_size=112, num_classes=7, depth=8)
    with pytest.raises(UsageError, match="INIT_MIN_COVERAGE"):
        load_pretrained(model, {**encoder, **decoder}, new_head=True)  # two blocks for eight
    report = load_pretrained(model, {**encoder, **decoder}, new_head=True, min_coverage=0.2)
    assert {"pos_embed", "time_embed"} <= set(report.keys["interpolated"])


def test_the_split_of_clip_positions_is_exact_where_there_is_one() -> None:
    space, time = torch.randn(1, 12, 5), torch.randn(1, 3, 5)
    time -= time.mean(dim=1, keepdim=True)
    clip = (space.unsqueeze(1) + time.unsqueeze(2)).flatten(1, 2)
    for got, expected in zip(split_positions(clip, (3, 3, 4)), (space, time), strict=True):
        torch.testing.assert_close(got, expected)


def test_interleaved_sines_match_their_formula_to_the_last_position() -> None:
    table = interleaved_sines(1568, 768)
    assert table.shape == (1, 1568, 768)
    assert table[0, 1567, 10].item() == pytest.approx(np.sin(1567 / 10000 ** (10 / 768)), abs=1e-6)
    assert table[0, 1567, 11].item() == pytest.approx(np.cos(1567 / 10000 ** (10 / 768)), abs=1e-6)


def test_conversions_do_not_modify_their_source() -> None:
    state = microsoft_names(swin().state_dict())
    names, first = list(state), state["patch_embed.proj.weight"].clone()
    from_swin(state)
    assert list(state) == names
    assert torch.equal(state["patch_embed.proj.weight"], first)


def test_an_image_is_not_mistaken_for_a_clip_of_as_many_positions() -> None:
    """The 196 positions of a 224-pixel image are not 4 frames of 49 in a model of 8 frames of 112 pixels."""
    oracle = timm.create_model("deit_tiny_patch16_224", num_classes=7, depth=3)
    small = create_model("vit_tiny_patch16", num_frames=1, image_size=112, num_classes=7, depth=3).eval()
    video = create_model("vit_tiny_patch16", num_frames=8, image_size=112, num_classes=7, depth=3).eval()
    for model in (small, video):
        report = load_pretrained(model, oracle.state_dict())
        assert report.keys["interpolated"] == ["pos_embed"]
        assert report.keys["new"] == ["time_embed"]
    image = torch.randn(1, 3, 1, 112, 112)
    with torch.no_grad():
        assert (video(image.expand(-1, -1, 8, -1, -1)) - small(image)).abs().max() < 1e-4


@pytest.mark.parametrize("size", [(64, 144), (32, 128), 64, (144, 64)])
def test_clip_positions_keep_a_still_clip_an_image_on_any_frame(size: int | tuple[int, int]) -> None:
    settings = {"image_size": size, "num_classes": 7, "dim": 48, "num_heads": 3, "depth": 4, "positions": "clip"}
    image_model = perturb(create_model("vit_tiny_patch16", num_frames=1, **settings))
    video_model = create_model("vit_tiny_patch16", num_frames=4, **settings).eval()
    report = load_pretrained(video_model, image_model.state_dict(), min_coverage=1.0)
    assert "pos_embed" in report.keys["inflated"]
    image = torch.randn(1, *image_model.input_size[:0], 3, 1, *image_model.input_size[1:])
    with torch.no_grad():
        assert (video_model(image.expand(-1, -1, 4, -1, -1)) - image_model(image)).abs().max() < 1e-4


def test_centres_of_another_size_are_resampled() -> None:
    settings = {"num_frames": 1, "num_classes": 3, "global_centres": True, "dim": 24, "depths": (2, 2, 6, 2)}
    settings["num_heads"] = (1, 2, 4, 8)
    large = create_model("stvit_swin_tiny", image_size=224, **settings)
    torch.nn.init.constant_(large.layers[2].generators[0].global_centres, 0.7)
    small = create_model("stvit_swin_tiny", image_size=112, **settings)
    report = load_pretrained(small, large.state_dict(), min_coverage=1.0)
    assert report.keys["interpolated"] == ["layers.2.generators.0.global_centres"]
    centres = small.layers[2].generators[0].global_centres
    torch.testing.assert_close(centres, torch.full_like(centres, 0.7))


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_other_networks_with_the_same_names_are_refused(name: str) -> None:
    state = timm.create_model(name, depth=2).state_dict()
    model = create_model("vit_tiny_patch16", num_frames=1, image_size=224, num_classes=1000, depth=2)
    with pytest.raises(UsageError):
        load_pretrained(model, state)


def test_unknown_keys_are_noted() -> None:
    state = timm.create_model("vit_tiny_patch16_224", depth=3, pre_norm=True).state_dict()
    model = create_model("vit_tiny_patch16", num_frames=1, image_size=224, num_classes=1000, depth=3)
    assert "norm_pre" in "".join(load_pretrained(model, state).notes)


@pytest.mark.parametrize("damage", ["blocks.0.ls1.gamma", "pos_embed"])
def test_inconsistent_tensors_give_one_line(damage: str) -> None:
    state = timm.create_model("vit_tiny_patch16_224", depth=3, init_values=0.5).state_dict()
    state[damage] = torch.zeros(3)
    model = create_model("vit_tiny_patch16", num_frames=1, image_size=224, num_classes=1000, depth=3)
    with pytest.raises(UsageError, match="do not fit together"):
        load_pretrained(model, state)
