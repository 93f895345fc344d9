"""The parser and the exit codes that every command shares."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from stvit_video.common.errors import FILESYSTEM_ERRORS, UsageError


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
