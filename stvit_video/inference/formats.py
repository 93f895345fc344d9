"""The file formats of ``stvit_video.export``: how each is written, and how it is run again to compare the two.

Graphs carry what their user needs to feed them, as JSON under "stvit_video": see ``describe``.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stvit_video.common.errors import RunFailure, UsageError
from stvit_video.common.files import whole_file
from stvit_video.data.decode.types import DecodeError
from stvit_video.inference.load import Trained
from stvit_video.inference.predictor import Predictor
from stvit_video.models import create_model
from stvit_video.models.weights.files import read_checkpoint
from stvit_video.runs.checkpoint import save_weights

Forward = Callable[[Tensor], Tensor]  # clips (B, 3, T, H, W) to logits (B, classes)
NOTE = "stvit_video.json"  # inside a torch.export archive
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TRIED_BATCHES = (1, 3)  # for files that take any batch


def describe(trained: Trained) -> dict[str, Any]:
    """Return what a user of an exported graph needs: model, classes by logit, and how videos become its input."""
    return {
        "model": trained.model.name,
        "arguments": trained.model.arguments,
        "classes": trained.classes,
        "input": "clips, float32 (batch, 3, frames, height, width): RGB in 0 to 1, minus DATA.MEAN, over DATA.STD",
        "output": "logits, float32 (batch, classes)",
        "activation": "sigmoid" if trained.multi_label else "softmax",  # to probabilities
        "views": trained.input.settings,
    }


def trace(trained: Trained, batch: int | None) -> torch.export.ExportedProgram:
    """Return the model's graph for ``batch`` clips, or for batches of any size."""
    example = torch.zeros(batch or 2, 3, *trained.model.input_size)  # type: ignore[misc]
    shapes = ({0: torch.export.Dim("batch")},) if batch is None else None
    with torch.no_grad():
        return torch.export.export(trained.model, (example,), dynamic_shapes=shapes)


def save_program(trained: Trained, program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a graph as a ``torch.export`` archive."""
    torch.export.save(program, path, extra_files={NOTE: json.dumps(describe(trained))})


def save_onnx(trained: Trained, program: torch.export.ExportedProgram, path: Path, optimize: bool = True) -> None:
    """Write a graph as an ONNX file from ``clips`` to ``logits``; without ``optimize``, in half the time."""
    # ONNX has no adaptive pooling in 3-D. Fused attention is decomposed, as converters disagree on its layout.
    table = torch.export.default_decompositions()
    table[torch.ops.aten.adaptive_max_pool3d.default] = lambda x, size: (_pool(x, size, Tensor.amax), None)
    table[torch.ops.aten._adaptive_avg_pool3d.default] = lambda x, size: _pool(x, size, Tensor.mean)
    # The converter for torch 2.11 takes no memory_format.
    table[torch.ops.aten.full_like.default] = lambda x, value, **_: x.new_full(x.shape, value)
    with sdpa_kernel(SDPBackend.MATH):
        program = program.run_decompositions(table)
    made = torch.onnx.export(
        program,
        input_names=["clips"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},) if program.range_constraints else None,
        dynamo=True,
        verbose=False,
        optimize=optimize,
    )
    assert made is not None
    made.model.metadata_props["stvit_video"] = json.dumps(describe(trained))
    made.save(path, external_data=False)


def _pool(x: Tensor, size: tuple[int, ...], reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Pool maps (..., T, H, W) to ``size`` as adaptive pooling does, one axis at a time."""
    for axis, count in zip((-3, -2, -1), size, strict=True):
        length = x.shape[axis]
        edges = [(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]
        x = torch.stack([reduce(x.narrow(axis, start, stop - start), axis) for start, stop in edges], axis)
    return x


def open_onnx(trained: Trained, path: Path) -> Forward:
    """Run an ONNX file with ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: its warnings on constant folding need no action
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda clips: torch.from_numpy(session.run(["logits"], {"clips": clips.numpy()})[0])


def open_weights(trained: Trained, path: Path) -> Forward:
    """Load weights into a new network: that which a ``.safetensors`` names itself, or else one like the model's."""
    checkpoint = read_checkpoint(path)
    saved: dict[str, Any] = {"name": trained.model.name, "arguments": trained.model.arguments}
    saved = checkpoint.metadata if path.suffix == ".safetensors" else saved
    model = create_model(saved["name"], **saved["arguments"])
    model.load_state_dict(checkpoint.tensors)
    return model.eval()


@dataclass(frozen=True)
class ExportFormat:
    """How a model is written and run."""

    write: Callable[[Trained, Path, int | None], None]  # for batches of that many clips, or of any size
    open: Callable[[Trained, Path], Forward]


FORMATS = {
    "torch-export": ExportFormat(
        lambda t, path, batch: save_program(t, trace(t, batch), path),
        lambda _, path: torch.export.load(path).module(),
    ),
    "onnx": ExportFormat(lambda t, path, batch: save_onnx(t, trace(t, batch), path), open_onnx),
    "safetensors": ExportFormat(  # with model, classes and views: complete for --checkpoint
        lambda t, path, _: save_weights(path, t.model, t.classes, t.input.settings, t.multi_label), open_weights
    ),
    "state-dict": ExportFormat(lambda t, path, _: torch.save(t.model.state_dict(), path), open_weights),
}


def export_model(
    trained: Trained, output: Path, format_name: str, batch: int | None, limit: float, video: str | None
) -> None:
    """Write a model to ``output`` and compare the file's logits with the model's; print both.

    They are compared on random clips and on the views of ``video``. Raises UsageError where that cannot be read, and
    RunFailure where logits differ by more than ``limit``: no file is left then.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (3, *trained.model.input_size)  # type: ignore[misc]
    counts = TRIED_BATCHES if batch is None else (batch,)
    clips = [("random clips", torch.randn(count, *shape, generator=generator)) for count in counts]
    if video is not None:
        try:
            clips.append((video, Predictor(trained, device="cpu", precision="fp32").clips(video)))
        except DecodeError as error:
            raise UsageError(f"--clip {error}; give a video that can be read.") from error
    started = time.perf_counter()
    with whole_file(output, output.suffix) as temporary:
        FORMATS[format_name].write(trained, temporary, batch)
        size = temporary.stat().st_size / 1e6
        seconds = time.perf_counter() - started
        batches = "any batch" if batch is None else f"batches of {batch}"
        print(f"{format_name}: {size:.1f} MB in {seconds:.1f} s, for {batches}")
        worst = compare(trained, FORMATS[format_name].open(trained, temporary), batch, clips)
        if not worst <= limit:  # also NaN
            raise RunFailure(f"differs by {worst:.1e}, above --limit {limit:g}; no file is left.")
    print(f"equal within {limit:g}: {output}", flush=True)


@torch.no_grad()
def compare(trained: Trained, forward: Forward, batch: int | None, clips: Sequence[tuple[str, Tensor]]) -> float:
    """Print the largest difference of logits for each batch, and return the largest of all, or NaN."""
    differences = []
    for name, given in clips:
        if batch is not None:  # fill the last batch up with the first clips
            given = given[torch.arange(-(-len(given) // batch) * batch) % len(given)]
        for part in given.split(batch or len(given)):
            expected = trained.model(part)
            found = forward(part)
            if found.shape != expected.shape:
                raise RuntimeError(f"the file gives {tuple(found.shape)} for {tuple(expected.shape)}")
            differences.append((found - expected).abs().max())
            print(
                f"  {name}, batch {len(part)}: differs by {differences[-1]:.1e} at most, "
                f"logits from {expected.min():.2f} to {expected.max():.2f}",
                flush=True,
            )
    return float(torch.stack(differences).max())
