"""The argument parser and the exit codes of all commands."""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from math import inf
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any, NoReturn, TextIO, cast

from stvit_video.common.errors import FILESYSTEM_ERRORS, RunFailure, Stopped, UsageError, describe_shortage, nearest
from stvit_video.common.text import PrintableStream, printable

PROGRAM = "stvit-video"  # the console command, which has every other command as a subcommand
EXIT_STOPPED = 75  # EX_TEMPFAIL: the same command continues
EXIT_NO_READER = 141  # as a shell has it for a program that SIGPIPE ended
EXIT_TERMINATED = 143  # and for one that SIGTERM ended
SHORTAGE_ADVICE = "use a smaller batch, clip or model, fewer workers, or raise the limit"


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError with one line.

    ``about`` is the docstring of a command's module; what it puts in double backquotes first is the command's form.
    ``words`` are names that may stand on the command line beside options: configuration keys.
    """

    def __init__(self, about: str | None, words: Iterable[str] = ()) -> None:
        found = re.search("``(.+?)``", about or "", re.DOTALL)
        form = as_called(" ".join(found[1].split())) if found else None  # python -OO leaves docstrings out
        plain = argparse.RawDescriptionHelpFormatter
        super().__init__(usage=form, description=(about or "").replace("``", ""), formatter_class=plain)
        self.words = words
        self.given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.given = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def format_help(self) -> str:
        return as_called(super().format_help())

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (\S+): (?=\S+ is out of range)", r"\1 ", message)
        meant = ""
        if wrong := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            meant = nearest(wrong[1], [*self._option_string_actions, *self.words])
        elif wrong := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            meant = nearest(wrong[1], re.findall(r"[\w-]+", wrong[2]))
        elif "arguments are required" in message:  # said before what is not known, such as --chekpoint
            options = [word.partition("=")[0] for word in self.given if word.startswith("--")]
            unknown = [
                word for word in options if not any(known.startswith(word) for known in self._option_string_actions)
            ]
            if unknown:
                message += f", and {unknown[0]} is no option"
                meant = nearest(unknown[0], self._option_string_actions)
        use = f".{meant} Use" if meant else "; use"
        raise UsageError(f"{message}{use}: {self.usage or self.prog} (--help says more)")


def called_as() -> str:
    """Return how this command was called, without its name; empty where its module or a script was called itself."""
    program = Path(sys.argv[0])
    if program.name == PROGRAM:
        return PROGRAM
    return "python -m stvit_video" if program.parts[-2:] == ("stvit_video", "__main__.py") else ""


def as_called(text: str) -> str:
    """Return a text whose commands, ``python -m stvit_video.NAME``, have the form in which this one was called."""
    prefix = called_as()
    if not prefix:
        return text
    text = text.replace("python slurm/submit.py", f"{prefix} slurm")
    return re.sub(r"python -m stvit_video\.(\w+)", lambda found: f"{prefix} {found[1].replace('_', '-')}", text)


def number(kind: type[int] | type[float], least: float, most: float = inf) -> Callable[[str], float]:
    """Return the ``type`` of an option that takes numbers from ``least`` to ``most``; none takes infinity."""

    def convert(text: str) -> float:
        value = kind(text)
        if not least <= value <= most or value == inf:
            allowed = f"a number from {least} on" if most == inf else f"{least} to {most:,}"
            raise argparse.ArgumentTypeError(f"{text} is out of range; give {allowed}")
        return value

    convert.__name__ = kind.__name__  # argparse names it where the text is no such number
    return convert


def run_command(
    command: Callable[[Sequence[str] | None], int],
    arguments: Sequence[str] | None = None,
    *,
    stopped: str = "stopped",
    stopped_code: int = 130,
    again: str = "",
) -> int:
    """Call ``command``, which parses and runs its arguments, and return its exit code.

    UsageError and FILESYSTEM_ERRORS give exit code 2, RunFailure gives 1, and Stopped EXIT_STOPPED, each with one line
    on stderr; ``again`` says what the same command does next time. Ctrl-C gives ``stopped_code`` and the line
    ``stopped``. Output that no one reads any longer, as with ``| head``, ends the command without a word, with
    EXIT_NO_READER. Other errors are raised: they are bugs, so their traceback is kept, and the exit code is 1.
    SIGTERM, where the command does not take it itself, is as Ctrl-C, with EXIT_TERMINATED.
    Names of files and classes that the command prints cannot move the cursor or clear the screen (PrintableStream).
    """
    _open_closed_streams()
    with ExitStack() as stack:
        for redirect, stream in ((redirect_stdout, sys.stdout), (redirect_stderr, sys.stderr)):
            if not isinstance(stream, PrintableStream):
                stream = stream or stack.enter_context(open(os.devnull, "w"))  # some libraries need one
                needed = redirect is redirect_stdout
                stack.enter_context(redirect(cast(TextIO, PrintableStream(stream, needed))))
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and current_thread() is main_thread():
            signal.signal(signal.SIGTERM, _terminate)
            stack.callback(signal.signal, signal.SIGTERM, signal.SIG_DFL)
        code = _run(command, arguments, stopped, stopped_code, f"; {again}" if again else "")
        if cast(PrintableStream, sys.stderr).failure is not None:
            _drop(sys.stderr)
        return code


class _Terminated(KeyboardInterrupt):
    """SIGTERM was received: what Ctrl-C cleans up or keeps is cleaned up or kept here too."""


def _terminate(number: int, frame: object) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
    raise _Terminated


def _open_closed_streams() -> None:
    """Open the null device as each standard stream that is closed; else pipes to processes would get their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number
            if number == 0:
                sys.stdin = None  # as Python has it for one that was closed from the start


def _run(
    command: Callable[[Sequence[str] | None], int],
    arguments: Sequence[str] | None,
    stopped: str,
    stopped_code: int,
    goes_on: str,
) -> int:
    """Call ``command`` as ``run_command`` says; ``goes_on`` ends the line of an error after which it can go on."""
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # of the package's beginning
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return command(arguments)
        finally:  # also after --help, which raises SystemExit, and passes over what it cannot write
            cast(PrintableStream, sys.stdout).check()
    except UsageError as error:
        code, line = 2, f"error: {error}"
    except RunFailure as error:
        code, line = 1, f"error: {error}{goes_on if error.goes_on else ''}"
    except Stopped as error:
        code, line = EXIT_STOPPED, f"{error}{goes_on}"
    except (OSError, MemoryError, RuntimeError, ImportError) as error:
        if error is cast(PrintableStream, sys.stdout).failure:
            _drop(sys.stdout)
            if isinstance(error, BrokenPipeError):
                return EXIT_NO_READER
            _say(f"error: standard output cannot be written ({error.strerror}); send it elsewhere{goes_on}.")
            return 2
        if (shortage := describe_shortage(error)) is not None:
            _say(f"error: {shortage}; {SHORTAGE_ADVICE}{goes_on}.")
            return 1
        if not isinstance(error, OSError) or error.errno not in FILESYSTEM_ERRORS:
            raise
        what = f"{error.filename or 'a file of the run'} cannot be written or read ({error.strerror})"
        code, line = 2, f"error: {what}; free space, set its permissions or choose another folder{goes_on}."
    except KeyboardInterrupt as error:
        if sys.stderr.isatty():
            _say("")  # after the ^C that a terminal shows
        code, line = EXIT_TERMINATED if isinstance(error, _Terminated) else stopped_code, stopped
    _say(line)
    return code


def _say(line: str) -> None:
    """Print a line on stderr; ends of lines in it are escaped, so that it stays one."""
    print(printable(as_called(line)), file=sys.stderr, flush=True)


def _drop(stream: TextIO) -> None:
    """Have nothing of a stream written any longer: Python would try again at exit, and end with another code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    cast(PrintableStream, stream).failure = None
