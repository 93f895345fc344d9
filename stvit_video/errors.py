"""The errors a user can cause, apart from the ones that would be our own mistake."""

import argparse
import difflib
import errno
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

# What the system says where the user, not this program, has to act: nothing else is turned into one line.
FILESYSTEM_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
}


class UsageError(ValueError):
    """Wrong use or configuration: the message says what was given, what is allowed and what to do.

    The command line prints it as one line and exits with code 2.
    """


class RunFailure(RuntimeError):
    """A run that cannot go on, for a reason outside this program that the message names in one line; exit code 1."""


class Stopped(Exception):
    """A run ended on a signal; all that it had done, which ``reached`` says, is kept."""

    def __init__(self, received: str | None, reached: str) -> None:
        super().__init__(f"stopped by {received or 'a signal to another process'} after {reached}")


def try_folder(folder: Path) -> None:
    """Make a folder, and write to it, before the work whose result it is to hold. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Turn what the file system refuses of --output into an error of the user's."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"--output {output} cannot be written ({error.strerror}); give another folder.") from error


def prepare_folder(folder: Path) -> None:
    """Do as ``try_folder`` for a folder of any option. Raises UsageError."""
    try:
        try_folder(folder)
    except OSError as error:
        raise UsageError(
            f"folder {folder} cannot be written to ({error.strerror}); set its permissions, free space or give another."
        ) from error


def nearest(name: str, known: list[str]) -> str:
    """Return ``name``'s closest match among ``known`` as a question, or an empty string."""
    match = [] if name in known else difflib.get_close_matches(name, known, n=1, cutoff=0.67)  # gpu is no cpu
    return f" Did you mean {match[0]}?" if match else ""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, which ends in what to write: ``form``, after the program's name."""

    def __init__(self, *, prog: str, form: str, description: str) -> None:
        super().__init__(prog=prog, description=description)
        self.form = form

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; use: {self.prog} {self.form} (--help says more)")


def run_command(
    command: Callable[[Sequence[str] | None], int],
    arguments: Sequence[str] | None,
    *,
    stopped: str = "stopped",
    stopped_code: int = 130,
    again: str = "",
) -> int:
    """Call what a ``main`` does with its arguments, and return its exit code; what the user can mend is one line.

    That is 2 after ``error: ...`` on stderr for a UsageError and for FILESYSTEM_ERRORS, the latter ending in ``again``:
    what the same command then does. Ctrl-C is ``stopped_code``, after ``stopped`` on stderr. All else is raised, with
    its traceback: it is our mistake, and the exit code is then 1. ``command`` is to parse the arguments too.
    """
    try:
        return command(arguments)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in FILESYSTEM_ERRORS:
            raise
        remedies = ["free space, set its permissions or choose another folder", *([again] if again else [])]
        print(
            f"error: {error.filename or 'a file of the run'} cannot be written or read ({error.strerror}); "
            f"{'; '.join(remedies)}.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        return stopped_code
