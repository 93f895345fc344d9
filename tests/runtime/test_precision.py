"""Precision, compilation and activation checkpointing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from stvit_video import run
from stvit_video.common.errors import UsageError
from stvit_video.models import create_model
from stvit_video.runtime.parallel import compile_model
from stvit_video.runtime.precision import autocast, set_precision
from tests.training.test_train import weights_after_an_epoch

CPU = torch.device("cpu")


def test_autocast_dtype() -> None:
    layer, seen = torch.nn.Linear(4, 4), []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    for precision in ("fp32", "tf32", "bf16", "fp16"):
        with autocast(CPU, precision):
            layer(torch.randn(2, 4))
    assert seen == [torch.float32, torch.float32, torch.bfloat16, torch.float16]


def test_tf32_is_set_only_for_tf32() -> None:
    gpu = torch.device("cuda")
    for precision, allowed in (("tf32", True), ("fp32", False), ("bf16", False)):
        set_precision(gpu, precision)
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == allowed
    with pytest.raises(UsageError, match="tf32 on a CPU"):
        set_precision(CPU, "tf32")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_weights_in_fp32(small_run: Callable[..., list[str]], precision: str) -> None:
    whole, half = weights_after_an_epoch(small_run()), weights_after_an_epoch(small_run("PRECISION", precision))
    assert half["head.proj.weight"].dtype == torch.float32
    assert 0 < (half["head.proj.weight"] - whole["head.proj.weight"]).abs().max() < 0.01


def test_activation_checkpointing_changes_nothing(small_run: Callable[..., list[str]]) -> None:
    dropout = ["MODEL.DROPOUT", "0.2", "MODEL.DROP_PATH", "0.2"]
    whole = weights_after_an_epoch(small_run(*dropout))
    again = weights_after_an_epoch(small_run(*dropout, "MODEL.GRAD_CHECKPOINTING", "True"))
    assert all(torch.equal(again[name], value) for name, value in whole.items())


@pytest.mark.parametrize("extent", ["blocks", pytest.param("model", marks=pytest.mark.long)])
def test_compiled_model_trains_to_the_same_weights(
    small_run: Callable[..., list[str]], extent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the backend aot_eager: code generation is torch's to test."""
    compiled, compile_in_place = [], torch.nn.Module.compile

    def compile_lightly(module: torch.nn.Module) -> None:
        compiled.append(type(module).__name__)
        compile_in_place(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_lightly)
    whole = weights_after_an_epoch(small_run())
    assert compiled == []
    found = weights_after_an_epoch(small_run("COMPILE", extent))
    assert len(compiled) == (1 if extent == "model" else 8)
    assert found.keys() == whole.keys()
    assert max((found[name] - value).abs().max() for name, value in whole.items()) < 1e-4


@pytest.mark.long
def test_every_block_is_compiled_in_training_and_evaluation() -> None:
    """torch runs a function uncompiled after 8 recompilations; the blocks of a Swin need more."""
    ran: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        return lambda *arguments: ran.append("compiled") or graph(*arguments)

    shape = {"dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 1, 2, 2), "num_classes": 3}
    model = create_model("swin_tiny", num_frames=4, image_size=32, **shape)
    compile_model(model, "blocks", backend=backend)
    for training in (True, False):
        model.train(training)
        with torch.set_grad_enabled(training):
            model(torch.randn(2, 3, 4, 32, 32))
    torch.compiler.reset()
    assert len(ran) >= 2 * len(list(model.transformer_blocks()))


def test_unsupported_options_on_a_cpu_are_one_line(
    small_run: Callable[..., list[str]], refused: Callable[[list[str]], str]
) -> None:
    assert "choose fp32 or bf16" in refused(small_run("DEVICE", "cpu", "PRECISION", "tf32"))
    assert "set COMPILE blocks" in refused(small_run("COMPILE", "model", "PARALLEL.STRATEGY", "fsdp"))
    assert run.main(small_run("PRECISION", "fp8")) == 2
