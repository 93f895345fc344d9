"""Benchmarks of models: what they compare, print and write, not how fast anything is."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from stvit_video import benchmark
from stvit_video.benchmarks import pipeline
from stvit_video.benchmarks.models import (
    FramesAsBatch,
    TimedModel,
    best_batch,
    build_peer,
    build_speeds,
    describe_speeds,
    peak_memory,
    plot_speeds,
)
from stvit_video.benchmarks.pipeline import run_through
from stvit_video.common.errors import UsageError
from stvit_video.config import load_config
from stvit_video.models.cost import count_operations
from tests.conftest import REPOSITORY

SAMPLE, FULL = (str(REPOSITORY / "configs" / f"sample_{name}.yaml") for name in ("stvit", "full"))
SMALL = ["DATA.FRAMES", "4", "DEVICE", "cpu"]


@pytest.mark.parametrize(("what", "precision"), [("model", "fp32"), ("model", "bf16"), ("train", "bf16")])
def test_models_side_by_side(what: str, precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, plot, results = tmp_path / "speed.json", tmp_path / "speed.png", tmp_path / "results.json"
    results.write_text('{"top1": 81.5}')
    words = ["--peer", "torchvision:swin3d_t", "--cfg", FULL, "--cfg", SAMPLE, "--rounds", "2", "--largest-batch", "2"]
    files = ["--output", str(output), "--plot", str(plot), "--results", str(results), "--results", str(results)]
    assert benchmark.main([what, *words, *files, "PRECISION", precision, *SMALL]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(output.read_text())
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert (figures["precision"], figures["training"], figures["top1"]) == (
        precision,
        what == "train",
        [None, 81.5, 81.5],
    )
    peer, full, ours = figures["models"]
    assert [peer["name"], full["name"], ours["name"]] == ["torchvision:swin3d_t", "sample_full", "sample_stvit"]
    assert peer["ratio"] == 1
    assert ours["gflops"] < full["gflops"] < peer["gflops"]
    for row in figures["models"]:
        assert row["name"] in printed
        assert row["input_size"] == [4, 64, 64]
        assert len(row["rates"]) == 2
        assert 0 < row["p50_ms"] <= row["p95_ms"] == sorted(row["latencies"])[int(0.95 * len(row["latencies"]))]
        assert row["ratio"] == pytest.approx(row["clips_per_second"] / peer["clips_per_second"])
        work = row["gflops"] * (3 if what == "train" else 1) * row["clips_per_second"]
        assert row["share"] == pytest.approx(work / figures["matrix_product_gmacs_per_second"])
    assert "not counted by fvcore in torchvision:swin3d_t: " in printed
    assert "softmax" in printed
    assert figures["environment"]["packages"]["torch"]


def test_rounds_run_all_models_and_ratios_are_to_the_first() -> None:
    calls: list[str] = []

    class Stub(TimedModel):
        def __call__(self, batch: int) -> float:
            calls.append(f"{self.name}{batch}")
            return {"a": 1.0, "b": 4.0}[self.name] * (batch**0.5 if batch < 4 else batch)

    models = [Stub(name, nn.Flatten(), (1, 2, 2)) for name in "ab"]
    for timed in models:
        timed.model.weight = nn.Parameter(torch.zeros(1))
    cfg = load_config(SAMPLE, ["DEVICE", "cpu"])
    a, b = build_speeds(cfg, models, training=False, rounds=3, largest_batch=64)["models"]
    assert calls[-12:] == ["a1", "a2", "b1", "b2"] * 3
    assert (a["batch"], b["batch"]) == (2, 2)
    assert b["ratio"] == pytest.approx(0.25)
    assert b["p50_ms"] == 4000
    assert a["clips_per_second"] == pytest.approx(2**0.5)


def test_best_batch() -> None:
    assert best_batch(lambda batch: 1.0 if batch <= 8 else batch / 8, 64) == 8
    assert best_batch(lambda batch: 1.0, 16) == 16
    assert best_batch(lambda batch: 2.0 if batch == 4 else 1.0, 16) == 16  # a size that was disturbed

    def short_of_memory(batch: int) -> float:
        if batch > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return 1.0

    assert best_batch(short_of_memory, 64) == 2
    with pytest.raises(RuntimeError, match="shape"):
        best_batch(lambda batch: (_ for _ in ()).throw(RuntimeError("shape")), 4)


def test_peak_memory_of_a_pass() -> None:
    def run(batch: int) -> float:
        torch.ones(batch * 50_000_000).sum()  # 0.2 GB each
        return 0.0

    one, two = (peak_memory(run, batch, torch.device("cpu")) for batch in (1, 2))
    assert one == pytest.approx(0.2, abs=0.02)
    assert two == pytest.approx(0.4, abs=0.04)


def test_held_memory_is_weights_and_optimiser_state() -> None:
    for training, copies in ((False, 1), (True, 3)):  # AdamW keeps two numbers a weight, and its count of steps
        timed = TimedModel("linear", nn.Sequential(nn.Flatten(), nn.Linear(3 * 32, 1000)), (2, 4, 4))
        timed.prepare(torch.device("cpu"), "fp32", "none", training)
        timed(1)
        assert timed.held() == pytest.approx(copies * 4 * 97_000 / 1e9, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "size", "takes"),
    [
        ("torchvision:mvit_v2_s", (8, 64, 64), (16, 224, 224)),
        ("pytorchvideo:mvit_base_16x4", (8, 64, 64), (16, 224, 224)),
        ("timm:vit_tiny_patch16_224", (3, 64, 96), (3, 64, 96)),
        ("stvit_video:stvit_vit_tiny_patch16:fast", (4, 64, 64), (4, 64, 64)),
    ],
)
def test_peers_take_clips(name: str, size: tuple[int, int, int], takes: tuple[int, int, int]) -> None:
    peer = build_peer(name, size)
    assert peer.input_size == takes
    with torch.inference_mode():
        assert peer.model.eval()(torch.zeros(1, 3, *takes)).shape == (1, 400)


def test_frames_as_batch_averages_logits() -> None:
    model = FramesAsBatch(nn.Flatten())
    clip = torch.randn(2, 3, 5, 4, 4)
    torch.testing.assert_close(model(clip), clip.mean(dim=2).flatten(1))


def test_uncounted_operations_are_listed() -> None:
    gflops, unsupported = count_operations(nn.Sequential(nn.Conv3d(3, 8, 1), nn.GELU(), nn.GELU()), (2, 4, 4))
    assert unsupported == {"aten::gelu": 2}
    assert gflops == pytest.approx(3 * 8 * 32 / 1e9)


def test_share_of_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def batches():
        for _ in range(9):
            now[0] += 3.0
            yield 4

    def work(clips: int) -> int:
        now[0] += 1.0
        return clips

    assert run_through(batches(), work) == (1.0, 0.75)


def test_end_to_end(
    small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []  # what that does is tested elsewhere
    monkeypatch.setattr(pipeline, "compile_model", lambda model, extent: compiled.append(extent))
    output = tmp_path / "flow.json"
    words = f"DATA.ROOT {small_set} TRAIN.BATCH_SIZE 2 TEST.BATCH_SIZE 1 TEST.CLIPS 1 --clips 8 --rounds 1"
    how = ["DEVICE", "cpu", "COMPILE", "blocks"]
    arguments = ["e2e", "--cfg", SAMPLE, "DATA.GENERATE", "", *how, *words.split(), "--output", str(output)]
    assert benchmark.main(arguments) == 0
    assert compiled == ["blocks"]
    content = json.loads(output.read_text())
    assert (content["device"], content["precision"], content["compiled"]) == ("cpu", "fp32", "blocks")
    flows = content["flows"]
    assert [(flow["what"], flow["workers"]) for flow in flows] == [
        (what, workers) for what in ("inference", "training") for workers in (1, 2, 4)
    ]
    for flow in flows:
        assert flow["clips_per_second"][0] > 0
        assert 0 <= flow["waiting"][0] < 1
    said = capsys.readouterr().out
    assert said.count("%") == 6
    assert re.search(r"stvit_vit_sample_patch8, 0\.\d{3} GFLOPs a clip, cpu, fp32, blocks compiled: from video", said)


def test_picture_and_table_of_speeds(tmp_path: Path) -> None:
    figures = {"input_size": (1, 2, 2), "gflops": 2.0, "unsupported": {}, "batch": 1, "memory": None, "share": 0.0}
    times = {"rates": [1.0, 2.0, 3.0], "clips_per_second": 2.0, "p50_ms": 1.0, "p95_ms": 1.0, "ratio": 1.0}
    rows = [{"name": name, **figures, **times} for name in "ab"]
    for accuracies in ([None, None], [80.0, None]):
        plot_speeds(rows, accuracies, tmp_path / "x.png")
        assert (tmp_path / "x.png").stat().st_size > 5000
    conditions = {"device": "cpu", "precision": "fp32", "compiled": "none", "training": False}
    table = describe_speeds({**conditions, "matrix_product_gmacs_per_second": 10.0, "models": rows}).splitlines()
    assert table[0].endswith("multiply-adds/s; clips of 1x2x2")
    assert table[2].split() == [
        "a",
        "2.00",
        "1.00",
        "1.00",
        "1",
        "2.00",
        "1.00",
        "to",
        "3.00",
        "0.00",
        "-",
        "1.00",
    ]
    rows[1] |= {
        "gflops": 0.0803,
        "input_size": (16, 224, 224),
        "name": "timm:vit_small_patch16_224, 16 frames as a batch",
    }
    table = describe_speeds({**conditions, "matrix_product_gmacs_per_second": 10.0, "models": rows})
    assert "0.0803" in table.split()
    assert "16x224x224" in table.split()
    assert max(map(len, table.splitlines()[1:4])) <= 100


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model", "--cfg", SAMPLE, "--peer", "torchvision:swin3d_x"], "Did you mean swin3d_"),
        (["model", "--cfg", SAMPLE, "--peer", "torchvison:swin3d_t"], "Did you mean torchvision?"),
        (["model", "--cfg", SAMPLE, "--peer", "swin3d_t"], "write LIBRARY:MODEL"),
        (["model", "--cfg", SAMPLE, "--peer", "torchvision:s3d"], "choose one of mvit_v1_b"),
        (["model", "--cfg", SAMPLE, "--peer", "torchvision"], "write LIBRARY:MODEL, as torchvision:swin3d_t."),
        (["model", "--cfg", SAMPLE, "--peer", "stvit_video:stvit_swin_tiny:"], "ends in a colon"),
        (["model", "--cfg", SAMPLE, "--peer", "timm:resnet50"], "no such ViT"),
        (["model", "--cfg", SAMPLE, "--peer", "pytorchvideo:slow_r50"], "choose one of mvit_base_16x4"),
        (["model", "--cfg", SAMPLE, "--peer", "stvit_video:stvit_swin_tiny:quick"], "paper, fast, balanced"),
        (["model", "--cfg", SAMPLE, "--rounds", "0"], "--rounds 0 is out of range; give a number from 1 on"),
        (["model", "--cfg", SAMPLE, "--plot", "/nowhere/x.png"], "/nowhere is not a folder"),
        (["model", "--cfg", SAMPLE, "--plot", "x.txt"], "is no .png file"),
        (["train", "--cfg", SAMPLE, "--results", "/nowhere.json"], "holds no top1"),
        (["train", "--cfg", SAMPLE, "--results", "a", "--results", "b"], "give one for each --cfg"),
        (["e2e", "--cfg", SAMPLE, "--cfg", FULL], "takes one --cfg"),
        (["e2e", "--cfg", SAMPLE, "--peer", "pytorchvideo"], "loader takes pytorchvideo"),
        (["loader", "--cfg", SAMPLE, "--peer", "torchvision:swin3d_t"], "loader takes pytorchvideo"),
        (["model", "--peer", "torchvision:swin3d_t"], "arguments are required: --cfg"),
    ],
)
def test_wrong_use_is_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("extent", "said"), [("none", "eager"), ("blocks", "blocks compiled"), ("model", "compiled")])
def test_compile_key(
    extent: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda model, **how: compiled.append((type(model).__name__, how)))
    output = tmp_path / "speed.json"
    words = ["--cfg", SAMPLE, "--rounds", "1", "--largest-batch", "1", "--output", str(output)]
    assert benchmark.main(["model", *words, "COMPILE", extent, *SMALL]) == 0
    expected = {"none": [], "blocks": 8 * ["Block"], "model": ["VisionTransformer"]}[extent]
    assert compiled == [(name, {"dynamic": False, "mode": "default"}) for name in expected]
    assert f"inference: cpu, fp32, {said}; a matrix" in capsys.readouterr().out
    assert json.loads(output.read_text())["compiled"] == extent


def test_compile_blocks_refuses_peers(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--cfg", SAMPLE, "--peer", "torchvision:swin3d_t", "COMPILE", "blocks", *SMALL]
    assert benchmark.main(["model", *words]) == 2
    assert "blocks of torchvision:swin3d_t are not known here; use COMPILE model" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("what", ["model", "e2e", "engine"])
def test_missing_gpu_is_refused(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([what, "--cfg", SAMPLE, "DEVICE", "cuda"]) == 2
    assert "0 GPUs are visible" in capsys.readouterr().err


def test_impossible_size_is_refused() -> None:
    with pytest.raises(UsageError, match="positive multiple"):
        build_peer("stvit_video:vit_tiny_patch16", (4, 60, 60))
