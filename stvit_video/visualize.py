"""Show what a model saw in a video: ``python -m stvit_video.visualize VIDEO --checkpoint RUN|FILE [--output FOLDER]``.

FOLDER gets ``report.html``, one file that works from a disk without a network, ``overlays.png`` and ``overlays.mp4``:
what each semantic token draws on and where it moves, its part in the head's score, and Grad-CAM. Of a long video one
clip is shown: the middle one, or the one from ``--start`` seconds on. Exit codes: 0 done; 2 wrong use.
"""

import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from stvit_video.common.cli import Parser, number, run_command
from stvit_video.common.errors import UsageError
from stvit_video.common.files import nearest_path
from stvit_video.common.hub import check_exists
from stvit_video.data.decode.pictures import is_pattern


def visualize(arguments: Sequence[str] | None) -> int:
    """Parse the arguments, explain a clip and write the results; return the exit code. Raises UsageError."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("video", type=Path, metavar="VIDEO", help="a video, an image or a folder of images")
    add("--checkpoint", required=True, metavar="RUN|FILE", help="folder of a run, or a .safetensors of one")
    add("--output", type=Path, metavar="FOLDER", help="default: visualize/NAME OF THE VIDEO")
    add("--start", type=number(float, 0), metavar="SECONDS", help="where the clip starts (default: in the middle)")
    add("--class", dest="label", metavar="NAME", help="class to explain (default: the most likely one)")
    words = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(words)
    if not options.video.exists() and not is_pattern(str(options.video)):
        remedy = f"give a video, an image or a folder of images.{nearest_path(options.video)}"
        raise UsageError(f"VIDEO {options.video} does not exist; {remedy}")
    check_exists(options.checkpoint)
    from stvit_video.pages.clip_page import write_clip_page

    output = options.output or Path("visualize") / options.video.stem
    command = shlex.join(["python", "-m", "stvit_video.visualize", *words])
    print(write_clip_page(options.video, options.checkpoint, output, options.start, options.label, command))
    return 0


main = partial(run_command, visualize, stopped="stopped before the end")


if __name__ == "__main__":
    sys.exit(main())
