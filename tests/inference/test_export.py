"""stvit_video.export: files compute the same logits as the model; otherwise no file is left."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest
import torch
from torch import nn

from stvit_video import export
from stvit_video.inference import formats as exporters
from stvit_video.inference.load import Trained, build_input, open_checkpoint
from stvit_video.models import create_model, list_models
from stvit_video.predict import Predictor
from stvit_video.runs.checkpoint import save_weights
from tests.conftest import REPOSITORY, data_config

SWIN = {"dim": 8, "num_heads": (1, 1, 2, 2), "image_size": 64}
VIT = {"dim": 16, "num_heads": 2, "patch_size": 8, "image_size": 48}
FAMILIES = {
    "vit": ("vit_tiny_patch16", {**VIT, "depth": 2}),
    "stvit_vit": ("stvit_vit_tiny_patch16", {**VIT, "depth": 4, "preset": "fast"}),
    "swin": ("swin_tiny", {**SWIN, "depths": (2, 1, 1, 1)}),
    "stvit_swin": ("stvit_swin_tiny", {**SWIN, "depths": (2, 1, 4, 1)}),
    "stvit_r_swin": ("stvit_r_swin_small", {**SWIN, "depths": (1, 1, 4, 1), "units": 1}),
}
REDUCED = {  # reducers that depend on the content, with operations that are hard to export
    name: ("stvit_vit_tiny_patch16", {**VIT, "depth": 4, "preset": "fast", "reducer": name}) for name in ("tome", "ats")
}
REDUCED["in windows"] = ("stvit_swin_tiny", {**SWIN, "depths": (1, 1, 4, 1), "reducer": "random"})


def tiny(family: str, folder: Path, small_set: Path, **overrides: object) -> Trained:
    """Write the run folder of a model with random weights, and open it."""
    name, settings = {**FAMILIES, **REDUCED}[family]
    torch.manual_seed(0)
    model = create_model(name, num_frames=4, num_classes=5, **{**settings, **overrides}).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_weights(folder / "model.safetensors", model, [*"abcde"])
    side = str(settings["image_size"])
    views = ["DATA.FRAMES", "4", "DATA.SIZE", side, "DATA.SHORT_SIDE", f"[{side},{side}]", "TEST.SHORT_SIDE", side]
    (folder / "config.yaml").write_text(data_config(small_set, *views, "TEST.CLIPS", "2").dump())
    return open_checkpoint(folder)


def check(trained: Trained, run: exporters.Forward, clips: torch.Tensor) -> None:
    with torch.no_grad():
        expected = trained.model(clips)
        other = trained.model(clips.flip(2))
    assert (expected - other).abs().max() > 1e-3  # what is compared depends on the clip
    assert (run(clips) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name in ("vit", "stvit_vit") else pytest.mark.long) for name in FAMILIES | REDUCED],
)
def test_graphs_of_every_family_compute_what_the_model_does(family: str, tmp_path: Path, small_set: Path) -> None:
    """Any batch: on random clips of three sizes and on a real video's."""
    trained = tiny(family, tmp_path, small_set)
    real = Predictor.load(tmp_path, device="cpu").clips(small_set / "videos" / "test_00000.mp4")
    assert len(real) == 2
    path = tmp_path / "model"
    program = exporters.trace(trained, None)
    exporters.save_program(trained, program, path.with_suffix(".pt2"))
    exporters.save_onnx(trained, program, path.with_suffix(".onnx"), optimize=False)
    for run in (
        exporters.FORMATS["torch-export"].open(trained, path.with_suffix(".pt2")),
        exporters.open_onnx(trained, path.with_suffix(".onnx")),
    ):
        for count in (1, 2, 5):
            check(trained, run, torch.randn(count, *real.shape[1:]))
        check(trained, run, real)


@pytest.mark.parametrize(
    "family",
    ["vit", "stvit_vit"]
    + [pytest.param("swin", marks=pytest.mark.long)]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("stvit_swin", "stvit_r_swin")],
)
def test_graphs_for_one_batch(family: str, tmp_path: Path, small_set: Path) -> None:
    check_one_batch(tiny(family, tmp_path, small_set), tmp_path / "model")


def check_one_batch(trained: Trained, path: Path) -> None:
    traced = exporters.trace(trained, 3)
    exporters.save_program(trained, traced, path.with_suffix(".pt2"))
    exporters.save_onnx(trained, traced, path.with_suffix(".onnx"), optimize=False)
    program = exporters.FORMATS["torch-export"].open(trained, path.with_suffix(".pt2"))
    graph = exporters.open_onnx(trained, path.with_suffix(".onnx"))
    for run in (program, graph):
        check(trained, run, torch.randn(3, 3, *trained.model.input_size))
        with pytest.raises(Exception, match=r"(?i)shape|dimension|guard"):
            run(torch.randn(2, 3, *trained.model.input_size))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("stvit_vit", {"pooling": "max", "offsets": False}),
        ("stvit_vit", {"pooling": "mask", "offsets": True}),
        ("stvit_swin", {"pooling": "mean", "image_size": 224, "preset": "fast"}),  # windows that do not cover the map
        ("stvit_swin", {"pooling": "mask", "image_size": 100, "offsets": True}),
        ("stvit_r_swin", {"image_size": 250}),
        ("swin", {"image_size": 100}),
    ],
)
def test_graphs_of_other_settings(family: str, overrides: dict, tmp_path: Path, small_set: Path) -> None:
    name, settings = FAMILIES[family]
    torch.manual_seed(0)
    model = create_model(name, num_frames=4, num_classes=5, **{**settings, **overrides}).eval()
    trained = Trained(model, [*"abcde"], build_input(data_config(small_set)), tmp_path)
    for form, path in (("torch-export", tmp_path / "x.pt2"), ("onnx", tmp_path / "x.onnx")):
        exporters.FORMATS[form].write(trained, path, None)
        check(trained, exporters.FORMATS[form].open(trained, path), torch.randn(3, 3, *model.input_size))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, small_set: Path) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tiny("stvit_vit", folder, small_set)
    return folder


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    capsys.readouterr()
    assert export.main(list(words)) == code
    out, err = capsys.readouterr()
    if code:
        assert err.startswith("error: "), err
        assert err.count("\n") == 1, err
    return out + err


@pytest.mark.long
def test_onnx_from_the_command_line_has_all_metadata(
    run_folder: Path, small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, clip = tmp_path / "new folder" / "modèle.onnx", str(small_set / "videos" / "test_00001.mp4")
    words = ["--checkpoint", str(run_folder), "--format", "onnx", "--output", str(output), "--clip", clip]
    text = said(capsys, *words)
    assert text.count("random clips, batch") == 2
    assert f"{clip}, batch 2: differs by" in text
    assert "equal within 0.0001" in text
    session = onnxruntime.InferenceSession(str(output), providers=["CPUExecutionProvider"])
    assert [(port.name, port.shape) for port in session.get_inputs()] == [("clips", ["batch", 3, 4, 48, 48])]
    assert [(port.name, port.shape) for port in session.get_outputs()] == [("logits", ["batch", 5])]
    note = json.loads(session.get_modelmeta().custom_metadata_map["stvit_video"])
    assert note["classes"] == [*"abcde"]
    assert note["views"]["DATA.MEAN"] == [0.485, 0.456, 0.406]
    assert [path.name for path in output.parent.iterdir()] == ["modèle.onnx"]


def test_a_torch_export_runs_without_this_package(run_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.pt2"
    assert export.main(["--checkpoint", str(run_folder), "--format", "torch-export", "--output", str(output)]) == 0
    code = (
        "import sys, json, torch\n"
        f"extra = {{'stvit_video.json': ''}}\nmodel = torch.export.load({str(output)!r}, extra_files=extra).module()\n"
        "logits = model(torch.ones(3, 3, 4, 48, 48))\n"
        "assert not any(name.startswith('stvit_video') for name in sys.modules)\n"
        "print(json.dumps([json.loads(extra['stvit_video.json'])['classes'], logits.tolist()]))"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    classes, logits = json.loads(result.stdout)
    assert classes == [*"abcde"]
    with torch.no_grad():
        expected = open_checkpoint(run_folder).model(torch.ones(3, 3, 4, 48, 48))
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=1e-4)


def test_exported_safetensors_need_nothing_beside_them(run_folder: Path, tmp_path: Path, small_set: Path) -> None:
    output = tmp_path / "alone.safetensors"
    assert export.main(["--checkpoint", str(run_folder), "--format", "safetensors", "--output", str(output)]) == 0
    video = small_set / "videos" / "test_00002.mp4"
    alone, whole = Predictor.load(output)(video), Predictor.load(run_folder)(video)
    assert torch.equal(alone.scores, whole.scores)
    assert alone.classes == whole.classes
    assert open_checkpoint(output).note == ""


def test_a_state_dict_is_read_by_torch_alone(run_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "weights.pth"
    assert export.main(["--checkpoint", str(run_folder), "--format", "state-dict", "--output", str(output)]) == 0
    found, model = torch.load(output, weights_only=True), open_checkpoint(run_folder).model
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_a_file_that_differs_is_not_left(
    wrong: float, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(trained: Trained, path: Path, batch: int | None) -> None:
        state = trained.model.state_dict()
        torch.save({**state, "head.proj.bias": state["head.proj.bias"] + wrong}, path)

    form = SimpleNamespace(write=spoil, open=exporters.open_weights)
    monkeypatch.setitem(exporters.FORMATS, "state-dict", form)
    output = tmp_path / "weights.pth"
    output.write_bytes(b"an earlier one")
    words = ["--checkpoint", str(run_folder), "--format", "state-dict", "--output", str(output)]
    assert "above --limit 0.0001; no file is left" in said(capsys, *words, code=1)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pth"]
    assert output.read_bytes() == b"an earlier one"  # not replaced by a wrong one
    if wrong == wrong:
        assert "equal within 0.01" in said(capsys, *words, "--limit", "0.01")


MISTAKES = [
    (["--format", "tflite"], "invalid choice: 'tflite'"),
    (["--format", "onnx", "--output", "model.pth"], "give a file ending in .onnx"),
    (["--format", "onnx", "--batch", "0"], "give any, or 1 to 4,096"),
    (["--format", "onnx", "--batch", "two"], "give any, or 1 to 4,096"),
    (["--format", "state-dict", "--limit", "0"], "give a number above 0"),
    (["--format", "state-dict", "--clip", "gone.mp4"], "--clip gone.mp4: no such file"),
    (["--format", "safetensors", "--output", "{run}/model.safetensors"], "would replace the checkpoint itself"),
    (["--format", "state-dict", "--push", "nobody"], "not of the form OWNER/NAME"),
    (
        ["--format", "state-dict", "--checkpoint", "hf://nobody"],
        "Hub repository 'nobody' is not of the form OWNER/NAME",
    ),
]


@pytest.mark.parametrize(("words", "expected"), MISTAKES, ids=lambda value: " ".join(value)[:40])
def test_mistakes_are_one_line(
    words: list[str], expected: str, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = [] if "--checkpoint" in words else ["--checkpoint", str(run_folder)]
    assert expected in said(capsys, *[word.format(run=run_folder) for word in words], *checkpoint, code=2)


def test_packages_that_are_missing_are_named(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporters, "ONNX_PACKAGES", ("onnx", "a_package_that_is_not_there"))
    words = ["--checkpoint", str(run_folder), "--format", "onnx"]
    assert "pip install a_package_that_is_not_there" in said(capsys, *words, code=2)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in said(
        capsys, "--checkpoint", "hf://me/model", "--format", "state-dict", code=2
    )


class Hub:
    """Replaces ``huggingface_hub``: a folder in place of the network."""

    class errors:
        HfHubHTTPError = LocalEntryNotFoundError = HFValidationError = type("HubError", (Exception,), {})

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> None:
        assert private
        assert exist_ok
        (self.folder / repository).mkdir(parents=True, exist_ok=True)

    def upload_file(self, *, path_or_fileobj: str, path_in_repo: str, repo_id: str) -> None:
        (self.folder / repo_id / path_in_repo).write_bytes(Path(path_or_fileobj).read_bytes())

    def hf_hub_download(self, repository: str, file: str) -> str:
        if not (self.folder / repository / file).is_file():
            raise Hub.errors.HfHubHTTPError("404: no such file\nand more")
        return str(self.folder / repository / file)


def test_what_is_pushed_to_the_hub_can_be_pulled(
    run_folder: Path,
    small_set: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(tmp_path / "hub"))
    output = str(tmp_path / "best one.safetensors")
    words = ["--checkpoint", str(run_folder), "--format", "safetensors", "--output", output, "--push", "me/model"]
    assert "uploaded: hf://me/model" in said(capsys, *words)
    video = small_set / "videos" / "test_00002.mp4"
    assert torch.equal(Predictor.load("hf://me/model")(video).scores, Predictor.load(run_folder)(video).scores)
    refused = said(capsys, "--checkpoint", "hf://me/other", "--format", "state-dict", code=2)
    assert "cannot be fetched (404: no such file)" in refused


def test_torch_hub_lists_models_alone() -> None:
    """torch.hub.list takes every public callable of the file for a model."""
    content = runpy.run_path(str(REPOSITORY / "hubconf.py"))
    listed = [name for name, value in content.items() if callable(value) and not name.startswith("_")]
    assert sorted(listed) == sorted([*list_models(), "trained"])


def test_torch_hub_builds_models_and_predictors(run_folder: Path) -> None:
    sizes = {"num_frames": 2, "image_size": 32, "num_classes": 7}
    for name in ("vit_tiny_patch16", "stvit_vit_sample_patch8"):
        model = torch.hub.load(str(REPOSITORY), name, source="local", **sizes)
        assert isinstance(model, nn.Module)
        assert model.name == name
        assert model(torch.zeros(1, 3, 2, 32, 32)).shape == (1, 7)
    predictor = torch.hub.load(str(REPOSITORY), "trained", str(run_folder), source="local", device="cpu")
    assert predictor.classes == [*"abcde"]
