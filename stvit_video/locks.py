"""Waiting for a lock that another process holds."""

import time
from collections.abc import Callable

POLL_S = 0.2


def wait_for_lock(take: Callable[[], None], patience: float, note: Callable[[], str]) -> bool:
    """Return whether ``take`` took a lock within ``patience`` seconds; ``note`` is printed once where that takes time.

    ``take`` is one of fcntl's, not blocking: it raises BlockingIOError or, as POSIX allows too, PermissionError while
    another process holds the lock. Other errors are raised.
    """
    until, told = time.monotonic() + patience, False
    while True:
        try:
            take()
            return True
        except (BlockingIOError, PermissionError):
            if time.monotonic() > until:
                return False
        if not told:
            print(note(), flush=True)
        told = True
        time.sleep(POLL_S)
