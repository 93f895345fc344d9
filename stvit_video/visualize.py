"""What a model saw in a video: ``python -m stvit_video.visualize VIDEO --checkpoint RUN|FILE [--output FOLDER]``.

FOLDER gets ``report.html``, one file that works from a disk without a network, ``overlays.png`` and ``overlays.mp4``:
what each semantic token draws on and where it goes, what the head makes of it, and Grad-CAM. Of a long video one clip
is shown: the middle one, or that from ``--start`` seconds on. Exit codes: 0 done; 2 wrong use.
"""

import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from stvit_video.common.cli import Parser, run_command
from stvit_video.common.errors import UsageError, nearest
from stvit_video.common.files import try_folder, writing
from stvit_video.common.hub import check_exists


def build_parser() -> Parser:
    """Return the parser of this command's options."""
    parser = Parser(
        prog="python -m stvit_video.visualize",
        form="VIDEO --checkpoint RUN|FILE [--output FOLDER]",
        description="Show what a model saw in a video.",
    )
    parser.add_argument("video", type=Path, metavar="VIDEO", help="a video, an image or a folder of images")
    parser.add_argument(
        "--checkpoint", required=True, metavar="RUN|FILE", help="folder of a run, or a .safetensors of one"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: visualize/NAME OF THE VIDEO")
    parser.add_argument("--start", type=float, metavar="SECONDS", help="where the clip starts (default: in the middle)")
    parser.add_argument("--class", dest="label", metavar="NAME", help="class to explain (default: the likeliest)")
    return parser


def find_class(name: str | None, classes: Sequence[str]) -> int | None:
    """Return the number of a class given by name or number. Raises UsageError for one that is unknown."""
    if name is None:
        return None
    if name in classes:
        return list(classes).index(name)
    if name.isdecimal() and int(name) < len(classes):
        return int(name)
    shown = ", ".join(classes[:8]) + (" ..." if len(classes) > 8 else "")
    raise UsageError(
        f"--class {name} is unknown; give one of {shown}, or a number from 0 to {len(classes) - 1}."
        f"{nearest(name, list(classes))}"
    )


def check_output(output: Path, video: Path) -> None:
    """Make the output folder. Raises UsageError where it cannot be, or where a file in it is the video itself."""
    for name in ("report.html", "overlays.png", "overlays.mp4"):
        if video.exists() and (output / name).exists() and (output / name).samefile(video):
            raise UsageError(f"--output {output} would replace VIDEO {video} itself; give another folder.")
    with writing(output):
        try_folder(output)


def visualize(options: Namespace, command: str) -> str:
    """Explain a clip and write the results; return what to tell the user. Raises UsageError."""
    if options.start is not None and not 0 <= options.start < float("inf"):
        raise UsageError(f"--start {options.start:g} is no place in a video; give seconds from 0 on.")
    if not options.video.exists():
        raise UsageError(f"VIDEO {options.video} does not exist; give a video, an image or a folder of images.")
    check_exists(str(options.checkpoint))
    from stvit_video.common.files import write_atomically
    from stvit_video.inference.load import open_checkpoint
    from stvit_video.pages.clip import read_clip
    from stvit_video.pages.clip_page import Subject, clip_page, paint_layers
    from stvit_video.pages.explain import explain
    from stvit_video.pages.sheet import draw_sheet, write_panels

    output = options.output or Path("visualize") / options.video.stem
    trained = open_checkpoint(options.checkpoint)
    target = find_class(options.label, trained.classes)
    clip = read_clip(trained.cfg, options.video, options.start)
    check_output(output, options.video)
    explanation = explain(trained.model, clip.tensor, target)
    label, likeliest = trained.classes[explanation.target], int(explanation.probabilities.argmax())
    pictures = paint_layers(explanation, clip, label)
    answer = f"{trained.classes[likeliest]}, {100 * explanation.probabilities[likeliest]:.1f} %"
    name = str(trained.model.name)
    sheet = draw_sheet(
        pictures.layers,
        pictures.painted,
        explanation.regions,
        f"{name} in {options.video.name}: {answer}",
        pictures.labels,
    )
    subject = Subject(options.video.name, name, str(trained.weights), command, trained.note)
    with writing(output):
        movie = None
        if len(pictures.labels) > 1:
            write_panels(output / "overlays.mp4", pictures.layers, pictures.painted, pictures.seconds_a_frame)
            movie = (output / "overlays.mp4").read_bytes()
        write_atomically(output / "overlays.png", sheet)
        page = clip_page(subject, explanation, clip, trained.classes, pictures, movie)
        write_atomically(output / "report.html", page.encode())
    return "\n".join(
        [
            f"{options.video}: {answer}",
            *filter(None, [trained.note]),
            *explanation.absent,
            f"open {output / 'report.html'}",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Visualize a video from the command line; return the exit code."""
    return run_command(_main, arguments, stopped="stopped before the end")


def _main(arguments: Sequence[str] | None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    print(visualize(build_parser().parse_args(words), shlex.join(["python", "-m", "stvit_video.visualize", *words])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
