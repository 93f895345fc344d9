"""The signals that ask a run to stop, which only its main processes answer."""

import ctypes
import signal
import sys

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


PR_SET_PDEATHSIG = 1  # of Linux's prctl


def end_with_parent(number: signal.Signals) -> None:
    """Have Linux send this process a signal when the one that started it dies, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def ignore_stop_signals() -> None:
    """Leave it to the parent process when to stop: it may still need what this one makes, up to its next step.

    What a terminal or a scheduler sends, it sends to every process. Processes that this one starts inherit it.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
