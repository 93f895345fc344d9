"""The argument parser and the exit codes of all commands."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from stvit_video.common.errors import FILESYSTEM_ERRORS, UsageError


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError with one line; ``form`` shows the expected arguments."""

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
    """Call ``command``, which parses and runs its arguments, and return its exit code.

    UsageError and FILESYSTEM_ERRORS give exit code 2 and one line on stderr; for the latter, ``again`` says what the
    same command does next time. Ctrl-C gives ``stopped_code`` and the line ``stopped``. Other errors are raised: they
    are bugs, so their traceback is kept, and the exit code is 1.
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
