"""The errors a user can cause, apart from the ones that would be our own mistake."""

import difflib
import errno

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


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(name: str, known: list[str]) -> str:
    """Return ``name``'s closest match among ``known`` as a question, or an empty string."""
    match = [] if name in known else difflib.get_close_matches(name, known, n=1, cutoff=0.67)  # gpu is no cpu
    return f" Did you mean {match[0]}?" if match else ""
