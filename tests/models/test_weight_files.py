"""Checkpoint files as users have them: prefixes, wrappers, harmless extras, shards; and what is refused."""

import collections
import datetime
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stvit_video.common.errors import UsageError
from stvit_video.config import load_config
from stvit_video.models import create_model, load_pretrained
from stvit_video.models.weights.files import Checkpoint, read_metadata
from stvit_video.models.weights.report import Build
from stvit_video.runs.preflight import build_weights

State = dict[str, Tensor]


def build(**overrides: object) -> nn.Module:
    settings = {"num_frames": 1, "image_size": 32, "num_classes": 5, "dim": 48, "num_heads": 3, "depth": 2}
    return create_model("vit_tiny_patch16", **{**settings, **overrides})


@pytest.fixture(scope="module")
def state() -> State:
    settings: dict = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    settings.update(class_token=False, global_pool="avg", fc_norm=False)
    return timm.create_model("vit_tiny_patch16_224", **settings).state_dict()


def check_loaded(source: object, state: State) -> list[str]:
    """Load all of ``state`` from a source, and return the notes."""
    model = build()
    report = load_pretrained(model, source)
    assert torch.equal(model.blocks[1].mlp.fc2.weight, state["blocks.1.mlp.fc2.weight"])
    assert torch.equal(model.head.proj.weight, state["head.weight"])
    return report.notes


PREFIXES = ("model.", "net.", "encoder.", "_orig_mod.", "module._orig_mod.model.", "timm_model.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_prefix_is_stripped(prefix: str, state: State) -> None:
    check_loaded({prefix + name: value for name, value in state.items()}, state)


@pytest.mark.parametrize("outer", ["", "model."])
def test_a_classifier_beside_the_backbone_is_found(outer: str, state: State) -> None:
    named = {f"{outer}{'' if name.startswith('head.') else 'backbone.'}{name}": state[name] for name in state}
    check_loaded(named, state)


def test_names_of_compiled_blocks_are_those_of_the_blocks(state: State) -> None:
    check_loaded({name.replace("blocks.1.", "blocks.1._orig_mod."): value for name, value in state.items()}, state)


def test_what_stands_beside_a_network_does_no_harm(state: State) -> None:
    averaged = {"n_averaged": torch.tensor(3), **{f"module.{name}": value for name, value in state.items()}}
    assert check_loaded(averaged, state) == []
    metric = {"best.value": torch.tensor(float("inf")), **{f"model.{name}": value for name, value in state.items()}}
    assert check_loaded(metric, state) == ["1 keys outside the network dropped (best.value)"]
    callbacks = {"Checkpoint": {"score": torch.tensor(3.0)}}
    assert check_loaded({"state_dict": state, "callbacks": callbacks}, state) == []


def test_an_archive_of_other_files_is_said_to_be_one(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "weights.pth", "w") as archive:
        archive.writestr("folder/readme.txt", "text")
    with pytest.raises(UsageError, match=r"zip archive of other files.*give the file of weights itself"):
        load_pretrained(build(), tmp_path / "weights.pth")


WRAPPERS = ("model_state", "model_state_dict", "model_ema", "teacher", "target_encoder", "network_of_mine")


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_any_wrapper_is_opened(wrapper: str, state: State, tmp_path: Path) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}
    content = {wrapper: state, "optimizer": optimizer, "epoch": 3}
    torch.save(content, tmp_path / "weights.pth")
    check_loaded(tmp_path / "weights.pth", state)
    check_loaded(content, state)


@pytest.mark.parametrize(
    ("taken", "other"), [("model", "model_ema"), ("teacher", "student"), ("target_encoder", "encoder")]
)
@pytest.mark.parametrize("flat", [True, False])
def test_a_choice_of_networks_is_named(taken: str, other: str, flat: bool, state: State, tmp_path: Path) -> None:
    wrong = {name: value + 1 for name, value in state.items()}
    content: dict = {other: wrong, taken: state}
    if flat:
        content = {f"{place}.{name}": value for place, inner in content.items() for name, value in inner.items()}
    torch.save(content, tmp_path / "weights.pth")
    assert f"{taken} taken, not {other}" in check_loaded(tmp_path / "weights.pth", state)[0]


def test_an_unclear_choice_is_refused(state: State, tmp_path: Path) -> None:
    torch.save({"first": state, "second": state}, tmp_path / "weights.pth")
    with pytest.raises(UsageError, match="several networks: first, second"):
        load_pretrained(build(), tmp_path / "weights.pth")
    flat = {f"{place}.{name}": value for place in ("first", "second") for name, value in state.items()}
    with pytest.raises(UsageError, match="several networks: first, second"):
        load_pretrained(build(), flat)


@pytest.mark.parametrize("zipped", [True, False])
def test_values_that_run_no_code_may_stand_beside_the_weights(zipped: bool, state: State, tmp_path: Path) -> None:
    extra = {
        "numbers": [
            np.float64(1),
            np.float32(1),
            np.int64(3),
            np.bool_(True),
            np.str_("a"),
            np.datetime64("2020-01-01"),
        ],
        "arrays": [np.zeros(3), np.array(["a", None], dtype=object)],
        "paths": [Path("/a/b"), tmp_path],
        "containers": [collections.defaultdict(list, a=[1]), collections.deque([1]), {1, 2}, frozenset([1]), range(3)],
        "time": [datetime.datetime.now(), datetime.timedelta(1)],
    }
    torch.save({"model": state, "extra": extra}, tmp_path / "weights.pth", _use_new_zipfile_serialization=zipped)
    check_loaded(tmp_path / "weights.pth", state)


def test_the_bytes_decide_and_not_the_suffix(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "really_safetensors.pth")
    torch.save(state, tmp_path / "really_torch.safetensors")
    torch.save(state, tmp_path / "no_suffix")
    for path in tmp_path.iterdir():
        check_loaded(path, state)
    header = {"name": "vit_tiny_patch16", **dict.fromkeys(("arguments", "classes", "views"), "{}")}
    save_file(state, tmp_path / "own.bin", metadata=header)
    assert read_metadata(tmp_path / "own.bin")["name"] == "vit_tiny_patch16"
    assert read_metadata(tmp_path / "really_torch.safetensors") == {}


def write_shards(state: State, folder: Path, form: str) -> Path:
    """Write a state dict as two shards and their index; return the index."""
    stem, suffix = ("model", ".safetensors") if form == "safetensors" else ("pytorch_model", ".bin")
    places = {name: f"{stem}-0000{1 + i % 2}-of-00002{suffix}" for i, name in enumerate(state)}
    for shard in set(places.values()):
        tensors = {name: state[name] for name in state if places[name] == shard}
        save_file(tensors, folder / shard) if suffix == ".safetensors" else torch.save(tensors, folder / shard)
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_shards_are_read_by_their_index_or_folder_and_refused_alone(form: str, state: State, tmp_path: Path) -> None:
    index = write_shards(state, tmp_path, form)
    check_loaded(index, state)
    check_loaded(tmp_path, state)
    shard = sorted(tmp_path.glob("*-of-*"))[0]
    with pytest.raises(UsageError, match=rf"one shard of several; give .*{index.name}"):
        load_pretrained(build(), shard)
    renamed = shard.rename(tmp_path / f"renamed{shard.suffix}")
    with pytest.raises(UsageError, match="not beside it"):
        load_pretrained(build(), index)
    with pytest.raises(UsageError, match=r"lacks \d+ tensors|MIN_COVERAGE|is not known"):
        load_pretrained(build(), renamed)


def test_an_index_that_promises_too_much_or_leaves_its_folder_is_refused(state: State, tmp_path: Path) -> None:
    index = write_shards(state, tmp_path, "safetensors")
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**places, "absent": places["head.bias"]}}))
    with pytest.raises(UsageError, match=r"lists 1 tensors that its shards lack \(absent\)"):
        load_pretrained(build(), index)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(places, f"../{tmp_path.name}/{places['head.bias']}")}))
    with pytest.raises(UsageError, match="not beside it"):
        load_pretrained(build(), index)


SPOILS: dict[str, tuple[Callable[[State], State], str]] = {
    "cut short": (lambda s: dict(list(s.items())[:-6]), r"lacks \d+ tensors.*norm\.weight"),
    "no last bias": (lambda s: {k: v for k, v in s.items() if k != "head.bias"}, r"lacks 1 tensors.*head\.proj\.bias"),
    "one block less": (
        lambda s: {k: v for k, v in s.items() if "blocks.1" not in k},
        r"lacks 12.*depth 1, this model 2",
    ),
    "one bias less": (lambda s: {k: v for k, v in s.items() if k != "blocks.1.attn.qkv.bias"}, r"lacks 1 .*qkv\.bias"),
    "no positions": (lambda s: {k: v for k, v in s.items() if k != "pos_embed"}, "no table of positions"),
    "normed queries": (lambda s: {**s, "blocks.1.attn.q_norm.weight": torch.ones(16)}, r"blocks\.1\.attn\.q_norm"),
    "one block more": (
        lambda s: {**s, **{k.replace("blocks.1", "blocks.2"): v for k, v in s.items() if "blocks.1" in k}},
        r"depth 3, this model 2",
    ),
    "not a number": (lambda s: {**s, "norm.weight": s["norm.weight"] * float("nan")}, r"not finite.*norm\.weight \(48"),
    "infinite": (lambda s: {**s, "pos_embed": s["pos_embed"] / 0}, r"not finite .*pos_embed"),
    "overflow": (lambda s: {**s, "norm.bias": torch.full((48,), 1e300, dtype=torch.float64)}, "not finite"),
    "quantised": (lambda s: {**s, "head.weight": s["head.weight"].to(torch.int8)}, r"head\.weight is quantised"),
    "adapters": (lambda s: {**s, "blocks.0.attn.qkv.lora_A.default.weight": torch.ones(2, 48)}, "merge them first"),
    "adapters of PEFT": (lambda s: {**s, "base_model.model.blocks.0.attn.qkv.ia3_l": torch.ones(48)}, "merge them"),
    "one scale less": (
        lambda s: {
            **s,
            **{f"blocks.{block}": torch.ones(48) for block in ("0.ls1.gamma", "0.ls2.gamma", "1.ls1.gamma")},
        },
        r"3 tensors in its blocks .*blocks\.0\.gamma_1",
    ),
    "a scalar for a norm": (lambda s: {**s, "blocks.0.norm1.weight": torch.tensor(1.0)}, r"width 1, this model 48"),
    "grey": (lambda s: {**s, "patch_embed.proj.weight": torch.ones(48, 1, 16, 16)}, r"lacks 1 .*patch_embed\.proj"),
    "SwiGLU": (
        lambda s: (
            {k.replace("fc1", "weights_in"): v for k, v in s.items() if "fc2" not in k}
            | {f"blocks.{i}.ls2.gamma": torch.ones(48) for i in range(2)}
        ),
        r"lacks 8 .*mlp\.fc1",
    ),
    "other patches": (lambda s: {**s, "patch_embed.proj.weight": torch.ones(48, 3, 8, 8)}, "patches of 8x8 pixels"),
}


@pytest.mark.parametrize("kind", SPOILS)
def test_parts_and_other_networks_are_refused(kind: str, state: State) -> None:
    spoil, said = SPOILS[kind]
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UsageError, match=said) as error:
        load_pretrained(model, spoil(state))
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_parts_are_taken_on_request(state: State) -> None:
    report = load_pretrained(build(depth=4), state, min_coverage=0.3)
    assert len([name for name in report.keys["new"] if name.startswith("blocks.")]) == 24
    assert load_pretrained(build(depth=4), state, depth=2).coverage > 0.99
    assert load_pretrained(build(depth=1), state, depth=1).coverage > 0.99


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("stvit_vit_small_patch16", {}, r"width 192, this model 384: use stvit_vit_tiny_patch16"),
        ("vit_small_patch16", {"depth": 6}, r"width 192, this model 384, depth 12, this model 6: use vit_tiny_patch16"),
        ("stvit_swin_tiny", {"dim": 24}, r"family vit, this model swin: use stvit_vit_tiny_patch16"),
    ],
)
def test_a_wrong_width_names_the_right_model(name: str, settings: dict, said: str) -> None:
    state = create_model("vit_tiny_patch16", num_frames=1, image_size=32, num_classes=5).state_dict()
    with pytest.raises(UsageError, match=said):
        load_pretrained(create_model(name, num_frames=1, image_size=32, num_classes=5, **settings), state)


def test_a_wrong_depth_of_swin_names_the_right_model_too() -> None:
    settings = {"embed_dim": 24, "depths": (2, 2, 8, 2), "num_classes": 5}
    state = timm.create_model("swin_tiny_patch4_window7_224", **settings).state_dict()
    model = create_model("swin_tiny", num_frames=1, image_size=224, num_classes=5, dim=24)
    said = r"depth 2-2-8-2, this model 2-2-6-2: use create_model\(..., dim=24, depths=\(2, 2, 8, 2\)\)"
    with pytest.raises(UsageError, match=said):
        load_pretrained(model, state)
    assert Build("swin", 96, (2, 2, 18, 2)).model("swin_tiny") == "swin_small"


def test_a_file_without_classifier_says_so(state: State) -> None:
    encoder = {name: value for name, value in state.items() if not name.startswith("head.")}
    assert "it has no classifier: the model's own starts anew" in load_pretrained(build(), encoder).notes


def test_earlier_checkpoints_in_the_form_of_videomae_keep_their_epsilon(tmp_path: Path) -> None:
    model = build(positions="clip", fc_norm=True)
    assert (model.norm.eps, model.arguments["norm_eps"], build().norm.eps) == (1e-5, 1e-5, 1e-6)
    earlier = {name: value for name, value in model.arguments.items() if name != "norm_eps"}
    header = {"name": model.name, "arguments": json.dumps(earlier), "classes": "null", "views": "null"}
    save_file(model.state_dict(), tmp_path / "earlier.safetensors", metadata=header)
    assert read_metadata(tmp_path / "earlier.safetensors")["arguments"]["norm_eps"] == 1e-6


@pytest.mark.parametrize("antialias", [True, False])
def test_a_key_chooses_how_positions_are_resampled(antialias: bool, state: State) -> None:
    words = ["MODEL.INIT_DEPTH", "null", "MODEL.INIT_MOTION", "0", "MODEL.INIT_ANTIALIAS", str(antialias)]
    cfg = load_config(Path(__file__).parents[2] / "configs" / "sample_stvit.yaml", words)
    by_key, by_argument = build(image_size=64), build(image_size=64)
    report = build_weights(cfg, by_key, Checkpoint("file", state, {}), [*"01234"])
    load_pretrained(by_argument, state, antialias=antialias)
    assert f"bicubic with{'' if antialias else 'out'} antialiasing" in "".join(report.notes)
    assert torch.equal(by_key.pos_embed, by_argument.pos_embed)
