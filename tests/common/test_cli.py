"""Exit codes: errors of the user are one line and code 2, bugs keep their traceback."""

import errno
import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from stvit_video.common.cli import EXIT_STOPPED, Parser, number, run_command
from stvit_video.common.errors import FILESYSTEM_ERRORS, RunFailure, Stopped, UsageError, find_nearest
from stvit_video.config.schema import BY_NAME
from stvit_video.models import list_models


def raising(error: BaseException) -> Callable[[Sequence[str] | None], int]:
    def command(arguments: Sequence[str] | None) -> int:
        raise error

    return command


@pytest.mark.parametrize("code", [0, 1, 3])
def test_command_gets_its_arguments_and_its_exit_code_is_returned(
    code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[Sequence[str] | None] = []

    def command(arguments: Sequence[str] | None) -> int:
        given.append(arguments)
        return code

    assert run_command(command, ["a", "b"]) == run_command(command, None) == code
    assert given == [["a", "b"], None]
    assert capsys.readouterr() == ("", "")


def test_wrong_use_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(raising(UsageError("x is 3; give 4.")), None) == 2
    assert capsys.readouterr() == ("", "error: x is 3; give 4.\n")


@pytest.mark.parametrize("number", sorted(FILESYSTEM_ERRORS))
def test_file_system_errors_are_one_line_with_a_remedy(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    why = os.strerror(number)
    remedy = "free space, set its permissions or choose another folder"
    assert run_command(raising(OSError(number, why, "/a/b")), None) == 2
    assert capsys.readouterr().err == f"error: /a/b cannot be written or read ({why}); {remedy}.\n"
    assert run_command(raising(OSError(number, why)), None, again="it goes on") == 2
    said = f"error: a file of the run cannot be written or read ({why}); {remedy}; it goes on.\n"
    assert capsys.readouterr() == ("", said)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
def test_a_full_disk_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def command(arguments: Sequence[str] | None) -> int:
        return Path("/dev/full").write_text("x")

    assert run_command(command, None) == 2
    assert f"({os.strerror(errno.ENOSPC)})" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "open files (ulimit -n)"),
        (BlockingIOError(errno.EAGAIN, "no fork"), "processes or threads"),
        (RuntimeError("can't start new thread"), "processes or threads"),
        (MemoryError(), "memory (MemoryError)"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 20 MiB\nIf reserved"),
            "memory (CUDA out of memory. Tried",
        ),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "memory (libtorch"),
    ],
    ids=repr,
)
def test_what_the_machine_is_short_of_is_one_line(
    error: Exception, lacks: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(raising(error), None, again="it goes on") == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: out of {lacks}")
    assert said.endswith("or raise the limit; it goes on.\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "error", [OSError(errno.EBADF, "closed"), FileNotFoundError(2, "x"), ValueError("x"), RuntimeError("x")], ids=repr
)
def test_bugs_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        run_command(raising(error), None)
    assert caught.value is error


def test_ctrl_c_prints_the_given_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(raising(KeyboardInterrupt()), None) == 130
    assert run_command(raising(KeyboardInterrupt()), None, stopped="gone", stopped_code=1) == 1
    assert capsys.readouterr() == ("", "stopped\ngone\n")


def test_stopped_and_failed_runs_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(raising(Stopped("SIGTERM", "step 3")), None, again="it goes on") == EXIT_STOPPED
    assert run_command(raising(RunFailure("rank 1 is missing")), None) == 1
    said = "stopped by SIGTERM after step 3; all of it is kept; it goes on\nerror: rank 1 is missing\n"
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--steps", "0"], "--steps 0 is out of range; give 1 to 1,000; use: python -m a.b FILE (--help says more)"),
        (["--share", "inf"], "--share inf is out of range; give a number from 0 on; use:"),
        (["--share", "nan"], "--share nan is out of range"),
        (["--steps", "1.5"], "invalid int value: '1.5'"),
    ],
)
def test_options_take_numbers_in_their_range(words: list[str], says: str) -> None:
    parser = Parser("Do it: ``python -m a.b FILE``.\n\nThe rest is help.")
    parser.add_argument("--steps", type=number(int, 1, 1_000))
    parser.add_argument("--share", type=number(float, 0))
    assert parser.parse_args(["--steps", "1000", "--share", "0.5"]) == Namespace(steps=1000, share=0.5)
    with pytest.raises(UsageError) as error:
        parser.parse_args(words)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    {
        "TRAIN.LR": ["OPTIM.LR"],
        "MODEL.FRAMES": ["DATA.FRAMES"],
        "LR": ["OPTIM.LR"],
        "--lr": ["OPTIM.LR"],
        "LEARNING_RATE": ["OPTIM.LR"],
        "epochs": ["TRAIN.EPOCHS"],
        "OPTIM.EPOCS": ["TRAIN.EPOCHS"],
        "TRAIN.WORKERS": ["DATA.WORKERS"],
        "NUM_WORKERS": ["DATA.WORKERS"],
        "TRAIN.BATCH": ["TRAIN.BATCH_SIZE"],
        "BATCH_SIZE": ["TEST.BATCH_SIZE", "TRAIN.BATCH_SIZE"],
        "DATA_ROOT": ["DATA.ROOT"],
        "NONSENSE": [],
    }.items(),
)
def test_keys_are_suggested_by_their_last_part(name: str, meant: list[str]) -> None:
    assert find_nearest(name, BY_NAME) == meant


@pytest.mark.parametrize(
    ("name", "meant"),
    {
        "stvit_vit_tiny": ["stvit_vit_tiny_patch16"],
        "STViT-ViT-Tiny": ["stvit_vit_tiny_patch16"],
        "vit_small_patch16_224": ["vit_small_patch16"],
        "deit_small_patch16_224": ["vit_small_patch16"],
        "swin_t": ["swin_tiny"],
        "swin_base_patch4_window7_224": ["swin_base"],
        "stvit_swin_t": ["stvit_swin_tiny"],
        "vit_b_16": ["vit_base_patch16"],
        "stvit_tiny": ["stvit_swin_tiny", "stvit_vit_tiny_patch16"],
        "resnet50": [],
    }.items(),
)
def test_models_are_suggested_by_their_family(name: str, meant: list[str]) -> None:
    assert find_nearest(name, list_models()) == meant


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [("gpu", "auto cpu cuda", []), ("Running", "walking running", ["running"]), ("1", "10 11 2", []), ("", "a", []),
     ("b", "balanced", []),
     ("check_videos", "check-videos", ["check-videos"]), ("cpu", "cpu", [])],
)  # fmt: skip
def test_what_is_no_likeness_is_not_suggested(name: str, known: str, meant: list[str]) -> None:
    assert find_nearest(name, known.split()) == meant


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--kind", "train", "--lr", "3"], "unrecognized arguments: --lr. Did you mean OPTIM.LR? Use: python -m a.b"),
        (["--kind", "train", "--stpes=3"], "Did you mean --steps?"),
        (["--kind", "modle"], "Did you mean model?"),
        (["--kidn", "model"], "required: --kind, and --kidn is no option. Did you mean --kind? Use: python -m a.b"),
    ],
)
def test_options_and_choices_are_suggested(words: list[str], says: str) -> None:
    parser = Parser("Do it: ``python -m a.b [KEY VALUE]``.", ["OPTIM.LR"])
    parser.add_argument("--steps")
    parser.add_argument("--kind", choices=("model", "train"), required=True)
    parser.add_argument("overrides", nargs="*")
    with pytest.raises(UsageError) as error:
        parser.parse_intermixed_args(words)
    assert says in str(error.value)
