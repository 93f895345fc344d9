"""The signals that ask a run to stop, and the processes that ignore them or end with their parent."""

import ctypes
import signal
import sys

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def end_with_parent(number: signal.Signals) -> None:
    """Have Linux send this process ``number`` when its parent dies, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def ignore_stop_signals() -> None:
    """Ignore STOP_SIGNALS, in this process and in those that it starts: the parent process decides when to stop.

    A terminal or a scheduler signals all processes at once, but the parent still needs the results of this one until
    the end of its current step.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
