"""Weights as other libraries save them: outputs equal to theirs to 2e-5, or a reason why not.

The files are genuine: made by the libraries' own ``save_pretrained`` and ``state_dict``, of tiny networks.
"""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from stvit_video.common.errors import UsageError
from stvit_video.models import create_model, load_pretrained
from stvit_video.runs.checkpoint import check_all_loaded
from tests.models.weights import perturb

transformers = pytest.importorskip("transformers", reason="Hugging Face's transformers, of the extra 'test', is absent")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

EQUAL = 2e-5
VIT = {"dim": 48, "num_heads": 3, "depth": 2, "num_classes": 5}
HF = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 192, "num_labels": 5}
TIMM = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
SWIN = {"dim": 12, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4), "num_classes": 5}


def build(name: str, frames: int, size: int | tuple[int, int], **settings: object) -> nn.Module:
    return create_model(name, num_frames=frames, image_size=size, **settings).eval()


def largest_difference(model: nn.Module, x: Tensor, expected: Tensor) -> float:
    with torch.no_grad():
        got = model(x if x.ndim == 5 else x.unsqueeze(2))
    assert expected.std() > 0.03  # so that what is compared depends on the input
    return float((got - expected).abs().max())


LARGE = [
    pytest.param(patch, 224, frames, marks=[] if (patch, frames) == (16, 8) else pytest.mark.long)
    for patch, frames in product((14, 16), (8, 16, 32))
]
SMALL = [(patch, size, frames) for (patch, size), frames in product(((14, 112), (16, 112), (16, 160)), (8, 16, 32))]


@pytest.mark.parametrize(("patch", "size", "frames"), SMALL + LARGE)
def test_videomae_equals_hugging_face_at_any_grid(patch: int, size: int, frames: int, tmp_path: Path) -> None:
    config = transformers.VideoMAEConfig(**HF, image_size=size, patch_size=patch, num_frames=frames)
    oracle = perturb(transformers.VideoMAEForVideoClassification(config))
    oracle.save_pretrained(tmp_path)
    settings = {**VIT, "patch_size": patch, "positions": "clip", "fc_norm": True}
    model = build("vit_tiny_patch16", frames, size, **settings)
    report = load_pretrained(model, tmp_path, min_coverage=1.0)
    assert not report.differences
    clip = torch.randn(1, 3, frames, size, size)
    with torch.no_grad():
        expected = oracle(clip.transpose(1, 2)).logits
    assert largest_difference(model, clip, expected) < EQUAL


def test_videomae_in_memory_and_what_equality_needs() -> None:
    """transformers names weights otherwise in memory than in files; both are read."""
    config = transformers.VideoMAEConfig(**HF, image_size=64, num_frames=4)
    oracle = perturb(transformers.VideoMAEForVideoClassification(config))
    clip = torch.randn(1, 3, 4, 64, 64)
    with torch.no_grad():
        expected = oracle(clip.transpose(1, 2)).logits
    equal = build("vit_tiny_patch16", 4, 64, **VIT, positions="clip", fc_norm=True)
    assert not load_pretrained(equal, oracle.state_dict()).differences
    assert largest_difference(equal, clip, expected) < EQUAL
    other = build("vit_tiny_patch16", 4, 64, **VIT)
    report = load_pretrained(other, oracle.state_dict())
    assert "set MODEL.FC_NORM True MODEL.POSITIONS clip" in report.differences[0]
    with pytest.raises(UsageError, match=r"of another network than vit_tiny_patch16.*MODEL\.FC_NORM True"):
        check_all_loaded(report, other)


def test_first_token_classifiers_of_videomae_are_told_apart(tmp_path: Path) -> None:
    config = transformers.VideoMAEConfig(**HF, image_size=64, num_frames=4, use_mean_pooling=False)
    transformers.VideoMAEForVideoClassification(config).save_pretrained(tmp_path)
    model = build("vit_tiny_patch16", 4, 64, **VIT, positions="clip", fc_norm=True)
    assert "reads its first token" in load_pretrained(model, tmp_path).differences[0]


def hugging_face(kind: str, **settings: object) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")
    suffix = "WithTeacher" if kind == "DeiT" else ""
    return perturb(getattr(transformers, f"{kind}ForImageClassification{suffix}")(config(**{**HF, **settings})))


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("antialias", [True, False])
def test_a_vit_of_hugging_face_without_class_token_is_equal(saved: bool, antialias: bool, tmp_path: Path) -> None:
    oracle = hugging_face("IJepa", image_size=64, patch_size=16)
    if saved:
        oracle.save_pretrained(tmp_path)
    model, larger = build("vit_tiny_patch16", 1, 64, **VIT), build("vit_tiny_patch16", 1, 96, **VIT)
    source = tmp_path if saved else oracle.state_dict()
    report = load_pretrained(model, source)
    assert (report.layout, report.differences) == ("Hugging Face ViT", [])
    # Positions of another size: Hugging Face resamples them without antialiasing, timm with it.
    report = load_pretrained(larger, source, antialias=antialias)
    assert f"bicubic with{'' if antialias else 'out'} antialiasing" in report.notes[0]
    image, large = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = oracle(image).logits
        resampled = oracle(large, interpolate_pos_encoding=True).logits
    assert largest_difference(model, image, expected) < EQUAL
    assert (largest_difference(larger, large, resampled) < EQUAL) == (not antialias)


@pytest.mark.parametrize("kind", ["ViT", "DeiT"])
def test_class_tokens_are_left_out_and_said_to_be(kind: str, tmp_path: Path) -> None:
    """All else is the source's: equal to the same weights in Hugging Face's network without class token."""
    source = hugging_face(kind, image_size=64, patch_size=16)
    source.save_pretrained(tmp_path)
    model = build("vit_tiny_patch16", 1, 64, **VIT)
    report = load_pretrained(model, tmp_path, min_coverage=0.99)
    assert "it has a class token, which no model here has" in report.differences[0]
    state = {name.replace(f"{kind.lower()}.", "ijepa."): value for name, value in source.state_dict().items()}
    state = {name.replace("cls_classifier.", "classifier."): value for name, value in state.items()}
    state["ijepa.embeddings.position_embeddings"] = state["ijepa.embeddings.position_embeddings"][:, -16:]
    oracle = hugging_face("IJepa", image_size=64, patch_size=16)
    oracle.load_state_dict({name: value for name, value in state.items() if name in oracle.state_dict()})
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = oracle(image).logits
    assert largest_difference(model, image, expected) < EQUAL


def test_dinov2_scales_are_multiplied_in_and_its_classifier_is_another(tmp_path: Path) -> None:
    settings = {name: value for name, value in HF.items() if name != "intermediate_size"}
    oracle = perturb(transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**settings, image_size=64)))
    oracle.save_pretrained(tmp_path)
    model = build("vit_tiny_patch16", 1, 56, **VIT, patch_size=14)
    with pytest.raises(UsageError, match="another class count"):
        load_pretrained(model, tmp_path)
    report = load_pretrained(model, tmp_path, new_head=True, min_coverage=0.99)
    assert "4 layer scales multiplied into the weights of their branch" in report.notes
    layer = oracle.dinov2.encoder.layer[1]
    scaled = layer.mlp.fc2.weight * layer.layer_scale2.lambda1.unsqueeze(1)
    torch.testing.assert_close(model.blocks[1].mlp.fc2.weight, scaled)


@pytest.mark.parametrize("names", ["timm", "official"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224"])
def test_layer_scales_give_equal_outputs(name: str, names: str) -> None:
    """DeiT-III's own files say gamma_1 where timm says ls1.gamma."""
    settings = {
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,
        "init_values": 0.5,
        "no_embed_class": False,
    }
    oracle = perturb(timm.create_model(name, img_size=64, **TIMM, **settings))
    state = oracle.state_dict()
    if names == "official":
        state = {key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): state[key] for key in state}
    model = build("vit_tiny_patch16", 1, 64, **VIT)
    assert not load_pretrained(model, state).differences
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = oracle(image)
    assert largest_difference(model, image, expected) < EQUAL


@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_rectangular_positions_stay(name: str, token: bool) -> None:
    settings = {} if "distilled" in name else {"class_token": token, "global_pool": "avg", "fc_norm": False}
    oracle = timm.create_model(name, img_size=(32, 96), **TIMM, **settings)
    model = build("vit_tiny_patch16", 1, (32, 96), **VIT)
    report = load_pretrained(model, oracle.state_dict())
    assert "pos_embed" in report.keys["loaded"]
    assert torch.equal(model.pos_embed, oracle.pos_embed[:, -12:])


def test_a_bias_that_is_missing_is_no_bias_that_is_zero() -> None:
    """VideoMAE has no bias on any keys, so one key bias less is a part of another network."""
    state = hugging_face("IJepa", image_size=64, patch_size=16).state_dict()
    del state["ijepa.layers.1.attention.k_proj.bias"]
    with pytest.raises(UsageError, match=r"lacks 1 tensors .*blocks\.1\.attn\.qkv\.bias"):
        load_pretrained(build("vit_tiny_patch16", 1, 64, **VIT), state)


def test_positions_are_resampled_as_timm_does() -> None:
    settings = {"class_token": False, "global_pool": "avg", "fc_norm": False, "dynamic_img_size": True}
    oracle = perturb(timm.create_model("vit_tiny_patch16_224", img_size=64, **TIMM, **settings))
    for size in ((96, 96), (48, 112)):
        model = build("vit_tiny_patch16", 1, size, **VIT)
        load_pretrained(model, oracle.state_dict())
        image = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = oracle(image)
        assert largest_difference(model, image, expected) < EQUAL


@pytest.mark.parametrize("said", [True, False])
def test_positions_that_fit_two_grids(said: bool, tmp_path: Path) -> None:
    """16 positions are 4x4 or 2x8: config.json says it, and where it is absent the report does."""
    oracle = hugging_face("IJepa", image_size=(32, 128), patch_size=16)
    oracle.save_pretrained(tmp_path)
    if said:
        report = load_pretrained(build("vit_tiny_patch16", 1, 64, **VIT), tmp_path)
        assert "positions resampled from 2x8 to 4x4" in report.notes[0]
    model = build("vit_tiny_patch16", 1, (32, 128), **VIT)
    report = load_pretrained(model, tmp_path if said else oracle.state_dict())
    assert ("taken for the model's 2x8 tokens" in "".join(report.notes)) != said
    image = torch.randn(2, 3, 32, 128)
    with torch.no_grad():
        expected = oracle(image).logits
    assert largest_difference(model, image, expected) < EQUAL


def test_the_vit_of_torchvision() -> None:
    oracle = perturb(torchvision.models.VisionTransformer(64, 16, 2, 3, 48, 192, num_classes=5))
    model = build("vit_tiny_patch16", 1, 64, **VIT)
    report = load_pretrained(model, oracle.state_dict(), min_coverage=0.99)
    assert (report.layout, report.keys["wrong shape"]) == ("torchvision ViT", [])
    layer = oracle.encoder.layers[1]
    assert torch.equal(model.blocks[1].attn.qkv.weight, layer.self_attention.in_proj_weight)
    assert torch.equal(model.blocks[1].mlp.fc2.weight, layer.mlp[3].weight)
    assert torch.equal(model.pos_embed, oracle.encoder.pos_embedding[:, 1:])


def timm_swin(size: Any) -> nn.Module:
    settings = {"embed_dim": 12, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4), "num_classes": 5}
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=size, **settings)


def torchvision_swin(size: Any) -> nn.Module:
    return torchvision.models.SwinTransformer([4, 4], 12, [2, 2, 2, 2], [1, 2, 2, 4], [7, 7], num_classes=5)


def hugging_face_swin(size: Any) -> nn.Module:
    settings = {"embed_dim": 12, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4], "num_labels": 5}
    return transformers.SwinForImageClassification(transformers.SwinConfig(image_size=224, **settings))


SWINS = {"timm": timm_swin, "torchvision": torchvision_swin, "hugging_face": hugging_face_swin}
QUICK: list[tuple[str, Any, str, bool]] = [
    *(("timm", size, "timm", True) for size in (64, 112, (96, 160))),
    *(("timm", 112, "pad", False), ("timm", 224, "pad", True)),
    *(("torchvision", 112, "pad", True), ("torchvision", 112, "timm", False)),
    ("hugging_face", 200, "pad", True),  # it cannot run at 112 pixels itself
    ("hugging_face", (224, 256), "pad", False),
]
SLOWER: list[tuple[str, Any, str, bool]] = [
    *(("timm", size, "timm", True) for size in (100, 160, 224, 256)),
    ("timm", 256, "pad", False),
    *(("torchvision", size, "pad", True) for size in ((112, 224), 224, 256)),
    ("torchvision", 256, "timm", False),
    *(("hugging_face", size, "pad", True) for size in (224, 256)),
    ("hugging_face", 256, "timm", False),
]
CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.long) for case in SLOWER)]


@pytest.mark.parametrize(("source", "size", "fit", "equal"), CASES)
def test_swin_at_any_size_is_equal_or_says_what_it_takes(source: str, size: Any, fit: str, equal: bool) -> None:
    oracle = perturb(SWINS[source](size))
    model = build("swin_tiny", 1, size, **SWIN, window_fit=fit)
    report = load_pretrained(model, oracle.state_dict())
    if equal:
        check_all_loaded(report, model)
    image = torch.randn(1, 3, *model.input_size[1:])
    with torch.no_grad():
        expected = oracle(image)
    assert (largest_difference(model, image, getattr(expected, "logits", expected)) < EQUAL) == equal
    assert bool(report.differences) != equal
    remedy = f"MODEL.WINDOW_FIT {'pad' if fit == 'timm' else 'timm'}"
    if (source, fit) == ("hugging_face", "pad"):
        remedy = "a window covers one side"
    assert equal or remedy in "".join(report.differences)


@pytest.mark.parametrize(
    ("frames", "size", "reason"),
    [
        (2, 200, ""),
        (8, 112, "at least 193 pixels"),
        (7, 200, "tubelets"),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in ((8, 200, ""), (16, 224, ""), (32, 200, ""), (20, 200, "multiple of 16 frames"))
        ),
    ],
)
def test_video_swin_at_any_size_is_equal_or_says_what_it_takes(frames: int, size: int, reason: str) -> None:
    network = torchvision.models.video.SwinTransformer3d
    oracle = perturb(network([2, 4, 4], 12, [2, 2, 2, 2], [1, 2, 2, 4], [8, 7, 7], num_classes=5))
    model = build("swin_tiny", frames, size, **SWIN)
    report = load_pretrained(model, oracle.state_dict())
    clip = torch.randn(1, 3, frames, size, size)
    with torch.no_grad():
        expected = oracle(clip)
    assert (largest_difference(model, clip, expected) < EQUAL) == (not reason)
    assert reason in "".join(report.differences)
    assert bool(report.differences) == bool(reason)


def test_windows_of_another_size_are_said() -> None:
    """S3 has windows of 14 in its third stage: its tables are resampled, and its outputs are not reached."""
    settings = {"depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4), "num_classes": 5}
    oracle = timm.create_model("swin_s3_tiny_224", embed_dim=12, **settings)
    model = build("swin_tiny", 1, 224, **SWIN)
    assert "2 position bias tables resampled" in load_pretrained(model, oracle.state_dict()).differences[0]


LOOKALIKES = {
    "V-JEPA 2": lambda: transformers.VJEPA2Model(
        transformers.VJEPA2Config(
            **{"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "crop_size": 64},
            **{"pred_hidden_size": 48, "pred_num_attention_heads": 3, "pred_num_hidden_layers": 1},
        )
    ),
    "BEiT": lambda: hugging_face("Beit", image_size=64, patch_size=16),
    "six heads": lambda: hugging_face("IJepa", image_size=64, patch_size=16, num_attention_heads=6),
    "relu": lambda: hugging_face("IJepa", image_size=64, patch_size=16, hidden_act="relu"),
    "large epsilon": lambda: hugging_face("IJepa", image_size=64, patch_size=16, layer_norm_eps=1e-2),
    "patches of 8": lambda: hugging_face("IJepa", image_size=64, patch_size=8),
    "narrow MLPs": lambda: hugging_face("IJepa", image_size=64, patch_size=16, intermediate_size=96),
}


@pytest.mark.parametrize("kind", LOOKALIKES)
def test_other_networks_of_hugging_face_are_refused(kind: str, tmp_path: Path) -> None:
    LOOKALIKES[kind]().save_pretrained(tmp_path)
    model = build("vit_tiny_patch16", 1, 64, **VIT)
    before = model.state_dict()["pos_embed"].clone()
    with pytest.raises(UsageError) as error:
        load_pretrained(model, tmp_path)
    assert "\n" not in str(error.value)
    assert torch.equal(model.pos_embed, before)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("cait_xxs24_224", {"depth": 2, "depth_token_only": 1}),  # talking heads
        ("vit_base_patch16_rope_224", {"depth": 2}),  # rotary positions: V-JEPA 2's names too
        ("vit_betwixt_patch16_rope_reg4_gap_256", {"depth": 2}),
        ("vit_small_patch16_dinov3", {"depth": 2}),
        ("vit_relpos_small_patch16_224", {"depth": 2}),
        ("swinv2_tiny_window8_256", {"depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4)}),
    ],
)
def test_other_networks_of_timm_are_refused(name: str, settings: dict) -> None:
    swin = name.startswith("swin")
    settings = {"num_heads": 3, **settings}
    oracle = timm.create_model(name, embed_dim=12 if swin else 48, num_classes=5, **settings)
    model = build("swin_tiny", 1, 64, **SWIN) if swin else build("vit_tiny_patch16", 1, 224, **VIT)
    with pytest.raises(UsageError):
        load_pretrained(model, oracle.state_dict())


def test_adapters_are_refused_until_they_are_merged() -> None:
    peft = pytest.importorskip("peft", reason="PEFT, of the extra 'test', is absent")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(hugging_face("IJepa", image_size=64, patch_size=16), config)
    model = build("vit_tiny_patch16", 1, 64, **VIT)
    with pytest.raises(UsageError, match="merge them first"):
        load_pretrained(model, adapted.state_dict())
    merged = adapted.merge_and_unload().eval()
    load_pretrained(model, merged.state_dict())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = merged(image).logits
    assert largest_difference(model, image, expected) < EQUAL
