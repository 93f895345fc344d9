"""Errors that a user can cause, as opposed to bugs."""

import difflib
import errno
import re
from collections.abc import Collection

# System errors on which the user has to act: they are printed as one line.
FILESYSTEM_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
}

# System errors for lack of something that is not a file's, and what it is.
SHORTAGES = {
    errno.ENOMEM: "memory",
    errno.EMFILE: "open files (ulimit -n)",
    errno.ENFILE: "open files of the whole machine",
    errno.EAGAIN: "processes or threads (ulimit -u, or the container's pids.max)",
}
# Of a GPU, of torch on the CPU, of the loader of shared libraries.
NO_MEMORY = "out of memory|can't allocate memory|failed to map segment"


class UsageError(ValueError):
    """Wrong use or configuration; the message says what was given, what is allowed and what to do.

    The command line prints it as one line and exits with code 2.
    """


class RunFailure(RuntimeError):
    """A run cannot continue for an external reason, which the message gives in one line; exit code 1."""

    goes_on = False  # whether the same command continues once the reason is gone


class Stopped(Exception):
    """A run was stopped by a signal; ``reached`` says how far it got, and all of that is saved."""

    def __init__(self, received: str | None, reached: str) -> None:
        by = received or "a signal to another process"
        super().__init__(f"stopped by {by} after {reached}; all of it is kept")


def describe_shortage(error: BaseException) -> str | None:
    """Return what the machine is short of, where an error says so; None for any other error."""
    text = first_line(error)
    if "No usable temporary directory" in text:
        return f"{text}; set TMPDIR to a folder that can be written to"
    number = error.errno if isinstance(error, OSError) else None
    if "can't start new thread" in text:
        number = errno.EAGAIN
    elif isinstance(error, MemoryError) or re.search(NO_MEMORY, text):
        number = errno.ENOMEM
    return f"out of {SHORTAGES[number]} ({text})" if number in SHORTAGES else None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(name: str, known: Collection[str]) -> str:
    """Return " Did you mean X?" for the ``known`` name closest to ``name``, or an empty string."""
    match = [] if name in known else difflib.get_close_matches(name, list(known), n=1, cutoff=0.67)  # above gpu and cpu
    return f" Did you mean {match[0]}?" if match else ""
