"""One exporter a format: a model to a file, and the file to a function from clips to logits, to compare the two.

Beside the weights a file carries what its user needs to feed it, under "stvit_video": see ``describe``.
"""

import importlib.util
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stvit_video.common.errors import UsageError
from stvit_video.config.clip_settings import view_settings
from stvit_video.inference.load import Trained, open_checkpoint
from stvit_video.models import create_model
from stvit_video.runs.weights import save_weights

Run = Callable[[Tensor], Tensor]  # clips (B, 3, T, H, W) to logits (B, classes)
NOTE = "stvit_video.json"  # inside a torch.export archive
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Form:
    """A file format: how a model is written for batches of any size, or of ``batch`` clips, and how it is run again."""

    suffix: str
    about: str
    write: Callable[[Trained, Path, int | None], None]
    open: Callable[[Trained, Path], Run]


def describe(trained: Trained) -> dict[str, Any]:
    """Return what a user of an exported file needs: model, classes by logit, and how videos become its input."""
    return {
        "model": trained.model.name,
        "arguments": trained.model.arguments,
        "classes": trained.classes,
        "input": "clips, float32 (batch, 3, frames, height, width): RGB in 0 to 1, minus DATA.MEAN, over DATA.STD",
        "output": "logits, float32 (batch, classes)",
        "views": view_settings(trained.cfg),
    }


def trace(trained: Trained, batch: int | None) -> torch.export.ExportedProgram:
    """Return the model's graph for batches of any size, or of ``batch`` clips."""
    example = torch.zeros(batch or 2, 3, *trained.model.input_size)  # type: ignore[misc]
    free = ({0: torch.export.Dim("batch")},) if batch is None else None
    with torch.no_grad():
        return torch.export.export(trained.model, (example,), dynamic_shapes=free)


def write_program(trained: Trained, path: Path, batch: int | None) -> None:
    """Write a ``torch.export`` archive."""
    save_program(trained, trace(trained, batch), path)


def save_program(trained: Trained, program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a graph as a ``torch.export`` archive."""
    torch.export.save(program, path, extra_files={NOTE: json.dumps(describe(trained))})


def open_program(trained: Trained, path: Path) -> Run:
    """Return what an archive computes."""
    return torch.export.load(path).module()


def write_onnx(trained: Trained, path: Path, batch: int | None) -> None:
    """Write an ONNX file with the input ``clips`` and the output ``logits``."""
    save_onnx(trained, trace(trained, batch), path)


def save_onnx(trained: Trained, program: torch.export.ExportedProgram, path: Path, optimize: bool = True) -> None:
    """Write a graph as an ONNX file with the input ``clips`` and the output ``logits``.

    Without ``optimize`` the graph is left with what runtimes remove by themselves, which takes about half the time.
    """
    # ONNX has no adaptive pooling in 3-D; attention is written out, as converters disagree on the fused one's layout.
    table = torch.export.default_decompositions()
    table[torch.ops.aten.adaptive_max_pool3d.default] = lambda x, size: (_pool(x, size, Tensor.amax), None)
    table[torch.ops.aten._adaptive_avg_pool3d.default] = lambda x, size: _pool(x, size, Tensor.mean)
    with sdpa_kernel(SDPBackend.MATH):
        program = program.run_decompositions(table)
    free = ({0: "batch"},) if program.range_constraints else None  # the name of a batch of any size
    made = torch.onnx.export(
        program,
        input_names=["clips"],
        output_names=["logits"],
        dynamic_shapes=free,
        dynamo=True,
        verbose=False,
        optimize=optimize,
    )
    assert made is not None
    made.model.metadata_props["stvit_video"] = json.dumps(describe(trained))
    made.save(path, external_data=False)


def _pool(x: Tensor, size: tuple[int, ...], reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Pool maps (..., T, H, W) to ``size`` as adaptive pooling does, one axis after the other."""
    for axis, count in zip((-3, -2, -1), size, strict=True):
        length = x.shape[axis]
        edges = [(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]
        x = torch.stack([reduce(x.narrow(axis, start, stop - start), axis) for start, stop in edges], axis)
    return x


def open_onnx(trained: Trained, path: Path) -> Run:
    """Return what an ONNX file computes, by ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its advice on its own folding is nothing to act on
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda clips: torch.from_numpy(session.run(["logits"], {"clips": clips.numpy()})[0])


def write_safetensors(trained: Trained, path: Path, batch: int | None) -> None:
    """Write weights, model, classes and views in one file, complete for ``--checkpoint``."""
    save_weights(path, trained.model, trained.classes, view_settings(trained.cfg))


def open_safetensors(trained: Trained, path: Path) -> Run:
    """Return what the model does that the file builds by itself."""
    with tempfile.TemporaryDirectory() as folder:  # away from a config.yaml, and under a name that says what it is
        lone = Path(folder) / "model.safetensors"
        lone.symlink_to(path.resolve())
        return open_checkpoint(lone).model


def write_state_dict(trained: Trained, path: Path, batch: int | None) -> None:
    """Write the weights alone, by name."""
    torch.save(trained.model.state_dict(), path)


def open_state_dict(trained: Trained, path: Path) -> Run:
    """Return what the same network does with the file's weights."""
    model: nn.Module = create_model(str(trained.model.name), **trained.model.arguments)  # type: ignore[arg-type]
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


FORMATS = {
    "torch-export": Form(".pt2", "a graph for PyTorch, without this package", write_program, open_program),
    "onnx": Form(".onnx", "a graph for ONNX Runtime and others", write_onnx, open_onnx),
    "safetensors": Form(".safetensors", "for --checkpoint, complete", write_safetensors, open_safetensors),
    "state-dict": Form(".pth", "weights by name, for torch.load", write_state_dict, open_state_dict),
}


def check_packages(name: str) -> None:
    """Raise UsageError where a format needs packages that are not installed."""
    missing = [package for package in ONNX_PACKAGES if importlib.util.find_spec(package) is None]
    if name == "onnx" and missing:
        raise UsageError(f"--format onnx needs {', '.join(missing)}; pip install {' '.join(missing)}.")


BATCHES = (1, 3)  # that a file for any batch is tried with


def real_clips(trained: "Trained", video: str | None) -> "Iterator[tuple[str, Tensor]]":
    """Yield the views (V, 3, T, H, W) of a video, as its test sees it."""
    if video is None:
        return
    from stvit_video.data.decode.types import DecodeError
    from stvit_video.inference.predictor import build_predictor

    try:
        yield video, build_predictor(trained, "cpu", "fp32").clips(video)
    except DecodeError as error:
        raise UsageError(f"--clip {error}; give a video that can be read.") from error


def compare(trained: "Trained", run: "Run", batch: int | None, clips: "Sequence[tuple[str, Tensor]]") -> float:
    """Print the largest differences between the file's logits and the model's, and return the largest of all."""
    import torch

    generator = torch.Generator().manual_seed(0)
    size = trained.model.input_size
    sources = list(clips)
    for count in BATCHES if batch is None else (batch,):
        sources.insert(0, ("random clips", torch.randn(count, 3, *size, generator=generator)))  # type: ignore[misc]
    worst = 0.0
    for name, given in sources:
        for part in _batches(given, batch):
            with torch.no_grad():
                expected, got = trained.model(part), run(part)
            if got.shape != expected.shape:
                raise RuntimeError(f"the file gives {tuple(got.shape)} for {tuple(expected.shape)}")
            difference = float((got - expected).abs().max())
            worst = max(worst, difference) if difference == difference else float("nan")
            print(
                f"  {name}, batch {len(part)}: differs by {difference:.1e} at most, "
                f"logits from {expected.min():.2f} to {expected.max():.2f}",
                flush=True,
            )
            if worst != worst:
                return worst
    return worst


def _batches(clips: "Tensor", batch: int | None) -> "Iterator[Tensor]":
    """Yield all clips, in batches of a fixed size where that is asked for, the last one filled up from the first."""
    if batch is None:
        yield clips
        return
    for start in range(0, len(clips), batch):
        chosen = itertools.islice(itertools.cycle(range(len(clips))), start, start + batch)
        yield clips[list(chosen)]
