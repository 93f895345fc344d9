"""Write the features of long videos, one row for each window of time.

``python -m stvit_video.extract LIST|FOLDER|VIDEO... --checkpoint RUN --output DIR``

LIST is a .txt, .csv, .tsv, .json or .jsonl as a run takes it, or of paths alone; its videos are read whole, once each.
DIR gets a file for each video, with its path below the common folder of all; index.csv, a row for each video, also for
those that cannot be read; and index.json with the times of all rows. The same command goes on where an earlier one was
stopped; other settings need another DIR. Under torchrun or srun, the processes share the videos.

Exit codes: 0 all were read; 1 some could not be; 2 wrong use; 130 Ctrl-C.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from stvit_video.common.cli import Parser, number, run_command
from stvit_video.common.errors import UsageError
from stvit_video.common.hub import check_exists


def extract(arguments: Sequence[str] | None) -> int:
    """Parse the arguments and write the features; return the exit code. Raises UsageError."""
    parser = Parser(__doc__)
    add = parser.add_argument
    seconds, workers = number(float, 0.01, 1e6), number(int, 1, 1_000)
    add("videos", nargs="+", metavar="VIDEO", help="file, folder (searched recursively), pattern in quotes, or list")
    add("--checkpoint", required=True, metavar="RUN", help="folder of a trained run, or a .safetensors file of one")
    add("--output", type=Path, required=True, metavar="DIR", help="new, or of the same command before")
    add("--root", type=Path, metavar="FOLDER", help="where relative paths in lists start (default: beside the list)")
    add("--window", type=seconds, metavar="SECONDS", help="length of a window (default: that of the model's clip)")
    add("--step", type=seconds, metavar="SECONDS", help="between the starts of windows (default: --window)")
    layer = "pooled (default), what the classifier reads; semantic, all semantic tokens; logits; or NAME of a layer"
    add("--layer", default="pooled", metavar="NAME", help=layer)
    add("--format", default="npy", choices=("npy", "npz", "safetensors"), help="default: %(default)s")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto (default): a GPU if there is one")
    add("--precision", choices=("fp32", "tf32", "bf16", "fp16"), help="default: that of the run")
    add("--workers", type=workers, default=1, metavar="N", help="files decoded in parallel (default: %(default)s)")
    setting = "override a setting of the run's test, for example TEST.CLIPS=1 (keys: python -m stvit_video.run --keys)"
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=setting)
    options = parser.parse_args(arguments)
    if options.root is not None and not options.root.is_dir():
        raise UsageError(f"--root {options.root} is not a folder; give the one where the paths of lists start.")
    check_exists(options.checkpoint)
    from stvit_video.inference.extract_features import extract_features

    return extract_features(options)


STOPPED = "stopped; what is done is kept, and the same command goes on"
main = partial(run_command, extract, stopped=STOPPED)


if __name__ == "__main__":
    sys.exit(main())
