"""Predict the classes of videos: ``python -m stvit_video.predict VIDEO... --checkpoint RUN|FILE``.

VIDEO is a file, a folder (searched recursively), a quoted pattern, a camera number, or the address of a stream. "-" is
standard input: a file, which is copied to TMPDIR first, or with --window a stream. Videos are scored as MODE test
scores them: the same views, averaged. From Python:

    predictor = stvit_video.predict.Predictor.load("runs/sample_stvit")
    predictor("clip.mp4").top(3)  # [(class, probability), ...]; also for frames in memory

Exit codes: 0 all videos were scored; 1 some could not be read, or not copied for --annotate; 2 wrong use; 130 Ctrl-C,
after the results so far are written (0 for a camera or stream, which Ctrl-C ends).
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stvit_video.common.cli import Parser, number, run_command
from stvit_video.common.errors import UsageError
from stvit_video.common.hub import check_exists

if TYPE_CHECKING:
    from stvit_video.inference.prediction import Prediction, Window
    from stvit_video.inference.predictor import Predictor

__all__ = ["Prediction", "Predictor", "Window", "main"]
FORMATS = (".json", ".csv")


def __getattr__(name: str) -> Any:
    if name not in ("Prediction", "Predictor", "Window"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from stvit_video.inference import predictor  # imports torch, which --help and wrong options do not need

    return getattr(predictor, name)


def predict(arguments: Sequence[str] | None) -> int:
    """Parse the arguments, score the videos, print and write results; return the exit code. Raises UsageError."""
    parser = Parser(__doc__)
    add = parser.add_argument
    video = "file, folder (searched recursively), pattern ('clips/*.mp4'), camera number, stream address, pipe, -"
    add("videos", nargs="+", metavar="VIDEO", help=video)
    add("--checkpoint", required=True, metavar="RUN", help="folder of a trained run, or a .safetensors file of one")
    top = number(int, 1, 1_000_000)
    seconds = number(float, 0.01, 1e9)
    workers = number(int, 1, 1_000)
    add("--top", type=top, default=5, metavar="K", help="classes to print for each video (default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="write all results to a .json or .csv file")
    add("--annotate", type=Path, metavar="FOLDER", help="write MP4 copies with the classes drawn on them")
    add = parser.add_argument_group("long videos").add_argument
    add("--window", type=float, metavar="SECONDS", help="score each window of this length like a separate video")
    add("--step", type=float, metavar="SECONDS", help="between the starts of windows (default: --window)")
    stop = "stop watching a camera or stream after this time, its own or yours"
    add("--seconds", type=seconds, metavar="SECONDS", help=stop)
    again = "open a camera or address again, up to N times, when it ends or fails (default: %(default)s)"
    add("--reconnect", type=number(int, 0, 1_000_000), default=0, metavar="N", help=again)
    mean = "give each window the mean scores of the last N (default: %(default)s)"
    add("--smooth", type=number(int, 1, 10_000), default=1, metavar="N", help=mean)
    least = "least score of a class in the segments of a .json file (default: %(default)s)"
    add("--threshold", type=number(float, 0, 1), default=0.5, metavar="SCORE", help=least)
    add = parser.add_argument_group("how videos are scored").add_argument
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto (default): a GPU if there is one")
    add("--precision", choices=("fp32", "tf32", "bf16", "fp16"), help="default: that of the run")
    add("--workers", type=workers, default=1, metavar="N", help="files decoded in parallel (default: %(default)s)")
    setting = "override a setting of the run's test, for example TEST.CLIPS=1 (keys: python -m stvit_video.run --keys)"
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=setting)
    options = parser.parse_args(arguments)
    if options.output is not None and (options.output.suffix not in FORMATS or options.output.is_dir()):
        raise UsageError(f"--output {options.output}: give a file ending in {' or '.join(FORMATS)}.")
    if options.annotate is not None and options.annotate.exists() and not options.annotate.is_dir():
        raise UsageError(f"--annotate {options.annotate} is a file; give a folder for the MP4 copies.")
    check_exists(options.checkpoint)
    from stvit_video.data.windows import check_seconds

    try:
        check_seconds(options.window, options.step)
    except ValueError as error:
        raise UsageError(f"--{error}") from error
    from stvit_video.inference.predict_videos import predict_videos

    return predict_videos(options)


main = partial(run_command, predict)


if __name__ == "__main__":
    sys.exit(main())
