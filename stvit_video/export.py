"""A trained model as a file to deploy: ``python -m stvit_video.export --checkpoint RUN --format F --output FILE``.

The file is opened again and its logits are compared with the model's own, on random clips and on those of ``--clip``.
Where they differ by more than ``--limit``, no file is left.

Exit codes: 0 written, and equal within the limit; 1 not equal; 2 wrong use.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from stvit_video.common.cli import Parser, run_command
from stvit_video.common.errors import UsageError
from stvit_video.common.files import prepare_folder
from stvit_video.common.hub import check_exists

SUFFIXES = {"torch-export": ".pt2", "onnx": ".onnx", "safetensors": ".safetensors", "state-dict": ".pth"}


def build_parser() -> Parser:
    """Return the parser of this command's options."""
    parser = Parser(
        prog="python -m stvit_video.export",
        form="--checkpoint RUN --format FORMAT [--output FILE]",
        description="Write a trained model as a file to deploy, and compare what the file computes with the model.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="folder of a trained run, or a .safetensors")
    parser.add_argument(
        "--format",
        required=True,
        choices=tuple(SUFFIXES),
        help="torch-export and onnx are graphs; safetensors is complete for this package; state-dict is weights alone",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: RUN's name with the format's ending")
    parser.add_argument(
        "--batch", default="any", metavar="N", help="clips a call, for graphs: any (default) or a number"
    )
    parser.add_argument("--clip", metavar="VIDEO", help="compare on this video too, besides random clips")
    parser.add_argument(
        "--limit", type=float, default=1e-4, help="largest difference of a logit that is allowed (default: %(default)g)"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the file to the Hugging Face hub afterwards")
    return parser


def export(arguments: Sequence[str] | None) -> int:
    """Parse the arguments, write the file and compare it; return the exit code. Raises UsageError."""
    options = build_parser().parse_args(arguments)
    batch = _check(options)
    check_exists(options.checkpoint)
    from stvit_video.common.hub import check_push, push
    from stvit_video.inference.formats import FORMATS, check_packages, compare, real_clips
    from stvit_video.inference.load import open_checkpoint

    check_packages(options.format)
    if options.push:
        check_push(options.push)
    trained = open_checkpoint(options.checkpoint)
    output = options.output or _default_output(trained.weights, options.format)
    if output.exists() and output.samefile(trained.weights):
        raise UsageError(f"--output {output} would replace the checkpoint itself; give another file.")
    prepare_folder(output.parent)
    print(f"{trained.model.name}, {len(trained.classes)} classes, from {trained.weights}", flush=True)
    clips = list(real_clips(trained, options.clip))
    temporary = output.with_name(f".{output.stem}.tmp{output.suffix}")
    form = FORMATS[options.format]
    started = time.perf_counter()
    try:
        form.write(trained, temporary, batch)
        size = temporary.stat().st_size / 1e6
        print(f"{options.format}: {size:.1f} MB in {time.perf_counter() - started:.1f} s, for {_batch_text(batch)}")
        worst = compare(trained, form.open(trained, temporary), batch, clips)
        if not worst <= options.limit:
            print(f"error: differs by {worst:.1e}, above --limit {options.limit:g}; no file is left.", file=sys.stderr)
            return 1
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"equal within {options.limit:g}: {output}", flush=True)
    if options.push:
        print(f"uploaded: {push(output, options.push)}")
    return 0


def _check(options: argparse.Namespace) -> int | None:
    """Return the batch, None for any; raise UsageError for options that cannot work."""
    suffix = SUFFIXES[options.format]
    if options.output is not None and (options.output.suffix != suffix or options.output.is_dir()):
        raise UsageError(f"--output {options.output}: give a file ending in {suffix} for --format {options.format}.")
    if not options.limit > 0:
        raise UsageError(f"--limit {options.limit:g} is out of range; give a number above 0, such as 1e-4.")
    if options.batch == "any":
        return None
    if not (options.batch.isascii() and options.batch.isdigit() and 1 <= int(options.batch[:6]) <= 4096):
        raise UsageError(f"--batch {options.batch} is out of range; give any, or 1 to 4,096.")
    return int(options.batch)


def _default_output(weights: Path, form: str) -> Path:
    stem = weights.absolute().parent.name if weights.name == "model.safetensors" else weights.stem
    return Path(f"{stem}{SUFFIXES[form]}")


def _batch_text(batch: int | None) -> str:
    return "any batch" if batch is None else f"batches of {batch}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Export from the command line; return the exit code."""
    warnings.filterwarnings("ignore")  # what the converters say of their own insides
    return run_command(export, arguments, stopped="stopped; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
