"""Loading weights: every key is accounted for, no code runs, broken files give one-line errors."""

import argparse
import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from yacs.config import CfgNode

from stvit_video.common.errors import UsageError
from stvit_video.models import create_model, load_pretrained

NAME = "stvit_vit_sample_patch8"


def build(**overrides: object) -> torch.nn.Module:
    return create_model(NAME, **{"num_frames": 8, "image_size": 64, "num_classes": 8, **overrides})


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_saving_and_loading_keep_every_tensor(tmp_path: Path, suffix: str) -> None:
    source, target, path = build(), build(), tmp_path / f"weights{suffix}"
    save_file(source.state_dict(), path) if suffix == ".safetensors" else torch.save(source.state_dict(), path)
    report = load_pretrained(target, path, min_coverage=1.0)
    assert sorted(report.keys["loaded"]) == sorted(source.state_dict())
    assert report.coverage == 1.0
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value)


@pytest.mark.parametrize(
    "wrap",
    [lambda s: {"model": s}, lambda s: {"state_dict": {"model": {f"module._orig_mod.{k}": v for k, v in s.items()}}}],
)
def test_wrappers_and_prefixes_are_stripped(tmp_path: Path, wrap: object) -> None:
    torch.save(wrap(build().state_dict()), tmp_path / "weights.pth")
    assert load_pretrained(build(), tmp_path / "weights.pth").coverage == 1.0


def test_report_accounts_for_every_key_of_both_sides() -> None:
    state = build(num_frames=1).state_dict()
    state["extra"] = torch.zeros(3)
    model = build(image_size=96)
    report = load_pretrained(model, state)
    accounted = [name for names in report.keys.values() for name in names]
    assert sorted(accounted) == sorted(set(model.state_dict()) | {"extra"})
    assert report.keys["unused"] == ["extra"]
    assert set(report.keys["inflated"]) == {"patch_embed.proj.weight", "time_embed", "stgm.global_centres"}
    assert report.keys["interpolated"] == ["pos_embed"]
    assert all(status in str(report) for status in ("inflated", "interpolated", "unused"))


def test_video_to_video_with_more_frames_keeps_ends_of_the_time_embedding() -> None:
    source = build(num_frames=8)
    torch.nn.init.normal_(source.time_embed)
    target = build(num_frames=16)
    assert load_pretrained(target, source.state_dict(), min_coverage=1.0).keys["interpolated"]
    torch.testing.assert_close(target.time_embed[:, [0, -1]], source.time_embed[:, [0, -1]])


@pytest.mark.parametrize("name", [NAME, "swin_tiny", "stvit_r_swin_small"])
def test_motion_distinguishes_frames_and_keeps_still_clips(name: str) -> None:
    sizes = {"image_size": 64, "num_classes": 8}
    image_model = create_model(name, num_frames=1, **sizes).eval()
    blind, seeing = (create_model(name, num_frames=8, **sizes).eval() for _ in range(2))
    load_pretrained(blind, image_model.state_dict())
    report = load_pretrained(seeing, image_model.state_dict(), motion=1.0)
    assert any("differences between frames added" in note for note in report.notes)
    image, clip = torch.randn(1, 3, 1, 64, 64), torch.randn(1, 3, 8, 64, 64)
    with torch.no_grad():
        still = seeing(image.expand(-1, -1, 8, -1, -1))
        assert (still - image_model(image)).abs().max() < 1e-4
        # Two frames of a tubelet change places: an averaging kernel cannot know.
        swapped = clip[:, :, [1, 0, *range(2, 8)]]
        assert (blind(swapped) - blind(clip)).abs().max() < 1e-5
        assert (seeing(swapped) - seeing(clip)).abs().max() > 1e-4
    wider = create_model(name, num_frames=8, tubelet=4, **sizes)
    report = load_pretrained(wider, seeing.state_dict(), motion=1.0)  # it sees motion already
    assert not any("differences between frames" in note for note in report.notes)


def test_deit_class_token_is_dropped_with_a_note() -> None:
    oracle = timm.create_model("deit_tiny_patch16_224", num_classes=10)
    model = create_model("stvit_vit_tiny_patch16", num_frames=8, image_size=224, num_classes=10)
    report = load_pretrained(model, oracle.state_dict(), min_coverage=0.9)
    assert "class or distillation token(s) dropped" in str(report)
    assert torch.equal(model.pos_embed, oracle.pos_embed[:, 1:])
    assert {name for name in report.keys["new"] if not name.startswith("stgm.")} == {"time_embed"}
    assert report.keys["unused"] == report.dropped == ["cls_token"]


def test_another_class_count_needs_new_head() -> None:
    state = build(num_classes=5).state_dict()
    with pytest.raises(UsageError, match="another class count"):
        load_pretrained(build(), state)
    report = load_pretrained(build(), state, new_head=True)
    assert report.keys["new"] == ["head.proj.weight", "head.proj.bias"]


def test_low_coverage_lists_the_keys() -> None:
    state = {name: value for name, value in build().state_dict().items() if name.startswith("blocks.0")}
    with pytest.raises(UsageError, match=r"INIT_MIN_COVERAGE.*Not covered: pos_embed"):
        load_pretrained(build(), state)


class Payload:
    """Runs code when it is unpickled, which must not happen."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.marker),))


def test_a_pickle_payload_is_refused_without_running(tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "weights.pth"
    torch.save({"model": build().state_dict(), "extra": Payload(marker)}, path)
    with pytest.raises(UsageError, match=r"needs code to load, which is refused \(posix\.mkdir\)"):
        load_pretrained(build(), path)
    assert not marker.exists()


@pytest.mark.parametrize("form", ["zip", "legacy", "listed"])
def test_no_form_of_payload_runs(tmp_path: Path, form: str) -> None:
    marker, path = tmp_path / "ran", tmp_path / "weights.pth"
    content = {
        "model": build().state_dict(),
        "extra": [{"deep": Payload(marker)}] if form == "listed" else Payload(marker),
    }
    torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    with pytest.raises(UsageError, match=r"refused \(posix\.mkdir\)"):
        load_pretrained(build(), path)
    assert not marker.exists()


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_files_give_one_line(tmp_path: Path, share: float, legacy: bool) -> None:
    path = tmp_path / "weights.pth"
    torch.save(build().state_dict(), path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[: max(100, int(share * path.stat().st_size))])
    with pytest.raises(UsageError, match=r"weights\.pth") as error:
        load_pretrained(build(), path)
    assert "\n" not in str(error.value)


def test_a_torchscript_archive_is_recognised(tmp_path: Path) -> None:
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "script.pth")
    with pytest.raises(UsageError, match="TorchScript") as error:
        load_pretrained(build(), tmp_path / "script.pth")
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("arguments", ["{oops", "[1, 2]", "null", '"abc"'])
def test_foreign_metadata_is_ignored(tmp_path: Path, arguments: str) -> None:
    save_file(build().state_dict(), tmp_path / "w.safetensors", metadata={"name": "x", "arguments": arguments})
    assert load_pretrained(build(), tmp_path / "w.safetensors").coverage == 1.0


def test_part_of_a_checkpoint_up_to_a_depth() -> None:
    source, target = build(), build()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    report = load_pretrained(target, source.state_dict(), depth=4, min_coverage=1.0)
    for name, value in target.state_dict().items():
        taken = target.layer_id(name) <= 4
        assert (name in report.keys["loaded"]) == taken
        assert torch.equal(value, (source.state_dict() if taken else before)[name]), name
    assert not report.keys["unused"]
    assert any("above depth 4 left out" in note for note in report.notes)


def broken_files(folder: Path) -> dict[str, bytes]:
    torch.save(build().state_dict(), folder / "whole.pth")
    save_file(build().state_dict(), folder / "whole.safetensors")
    return {
        "cut.pth": (folder / "whole.pth").read_bytes()[:100_000],
        "cut.safetensors": (folder / "whole.safetensors").read_bytes()[:100_000],
        "pointer.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "pointer.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "page.pth": b"<!DOCTYPE html><html><body>404: not found</body></html>",
        "page.safetensors": b"<!DOCTYPE html><html><body>404: not found</body></html>",
        "error.pth": b'{"error": "Access denied"}',
        "empty.pth": b"",
        "text.pth": pickle.dumps("text"),
        "number.pth": pickle.dumps({"model": 3}),
    }


WHAT_IT_IS = {
    "pointer": "Git-LFS pointer",
    "page": "web page",
    "error": "JSON",
    "empty": "is empty",
    "cut": "fetch it again",
}


def test_plain_containers_beside_the_weights_are_allowed(tmp_path: Path) -> None:
    """DeiT's and VideoMAE's files carry their command line, Swin's their configuration."""
    extra = {"args": argparse.Namespace(lr=0.1, name="x"), "config": CfgNode({"MODEL": CfgNode({"NAME": "swin"})})}
    torch.save({"model": build().state_dict(), **extra, "epoch": 3}, tmp_path / "weights.pth")
    assert load_pretrained(build(), tmp_path / "weights.pth").coverage == 1.0


def test_a_file_of_another_architecture_is_refused_and_changes_nothing() -> None:
    model = create_model("stvit_swin_tiny", num_frames=2, image_size=64, num_classes=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sources = {
        r"layout of its \d+ keys \(bn1\.bias.* is not known; allowed: stvit_video, ": torchvision.models.resnet18(),
        r"timm ViT layout\): only 0\.0 %": timm.create_model("vit_tiny_patch16_224"),
        r"stvit_video layout\): only": build(),
    }
    for said, source in sources.items():
        with pytest.raises(UsageError, match=said) as error:
            load_pretrained(model, source.state_dict())
        assert "\n" not in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_broken_files_give_one_line(tmp_path: Path) -> None:
    for name, content in broken_files(tmp_path).items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError) as error:
            load_pretrained(build(), tmp_path / name)
        assert name in str(error.value), name
        assert "\n" not in str(error.value), name
        assert WHAT_IT_IS.get(name.partition(".")[0], "") in str(error.value), name
    with pytest.raises(UsageError, match="is not a file"):
        load_pretrained(build(), tmp_path / "absent.pth")
