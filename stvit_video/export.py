"""Export a trained model to a file: ``python -m stvit_video.export --checkpoint RUN --format F [--output FILE]``.

The file is opened again and its logits are compared with the model's, on random clips and on those of ``--clip``.
Where they differ by more than ``--limit``, no file is left.

Exit codes: 0 written, and equal within the limit; 1 not equal; 2 wrong use.
"""

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from stvit_video.common.cli import Parser, run_command
from stvit_video.common.errors import UsageError
from stvit_video.common.files import prepare_folder
from stvit_video.common.hub import check_exists, open_hub, push
from stvit_video.common.text import printable

SUFFIXES = {"torch-export": ".pt2", "onnx": ".onnx", "safetensors": ".safetensors", "state-dict": ".pth"}


def export(arguments: Sequence[str] | None) -> int:
    """Parse the arguments, write the file and compare it; return the exit code. Raises UsageError."""
    parser = Parser(__doc__)
    add = parser.add_argument
    formats = "torch-export, onnx: graphs; safetensors: complete for this package; state-dict: weights alone"
    add("--checkpoint", required=True, metavar="RUN", help="folder of a trained run, or a .safetensors")
    add("--format", required=True, choices=tuple(SUFFIXES), help=formats)
    add("--output", type=Path, metavar="FILE", help="default: RUN's name with the suffix of the format")
    add("--batch", default="any", metavar="N", help="clips that a graph takes in a call: any (default) or a number")
    add("--clip", metavar="VIDEO", help="compare on this video too, besides random clips")
    add("--limit", type=float, default=1e-4, help="largest allowed difference of a logit (default: %(default)g)")
    add("--push", metavar="OWNER/NAME", help="then upload the file to the Hugging Face hub")
    warnings.filterwarnings("ignore")  # of torch's converters, which need no action
    options = parser.parse_args(arguments)
    suffix = SUFFIXES[options.format]
    if options.output is not None and (options.output.suffix != suffix or options.output.is_dir()):
        raise UsageError(f"--output {options.output}: give a file ending in {suffix} for --format {options.format}.")
    if not options.limit > 0:
        raise UsageError(f"--limit {options.limit:g} is out of range; give a number above 0, such as 1e-4.")
    digits = options.batch.isascii() and options.batch.isdigit()
    if options.batch != "any" and not (digits and 1 <= int(options.batch[:6]) <= 4096):
        raise UsageError(f"--batch {options.batch} is out of range; give any, or 1 to 4,096.")
    check_exists(options.checkpoint)
    batch = None if options.batch == "any" else int(options.batch)
    from stvit_video.inference.formats import ONNX_PACKAGES, export_model
    from stvit_video.inference.load import open_checkpoint

    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if options.format == "onnx" and missing:
        raise UsageError(f"--format onnx needs {', '.join(missing)}; pip install {' '.join(missing)}.")
    if options.push:
        with open_hub(options.push):
            pass  # checked before the work
    trained = open_checkpoint(options.checkpoint)
    weights = trained.weights
    name = weights.absolute().parent.name if weights.name == "model.safetensors" else weights.stem
    output: Path = options.output or Path(f"{name}{suffix}")
    if output.exists() and output.samefile(weights):
        raise UsageError(f"--output {output} would replace the checkpoint itself; give another file.")
    prepare_folder(output.parent)
    print(f"{trained.model.name}, {len(trained.classes)} classes, from {printable(weights)}", flush=True)
    export_model(trained, output, options.format, batch, options.limit, options.clip)
    if options.push:
        print(f"uploaded: {push(output, options.push)}")
    return 0


main = partial(run_command, export, stopped="stopped; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
