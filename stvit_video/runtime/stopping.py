"""Why a run ends early, a signal or divergence; and processes that ignore signals or end with their parent."""

import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import ExitStack
from types import FrameType

from stvit_video.common.errors import RunFailure

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
ECHO_S = 1.0  # within which a repeated signal is taken for the same one, sent by scheduler and launcher
PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Diverged(RunFailure):
    """Too many steps had a loss or gradients that are not finite."""


class StopSignals(ExitStack):
    """A context in which SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGUSR2 only set ``received``, the first one's name.

    The same signal again, or Ctrl-C after another one, exits at once. In a process that was ``launched`` by torchrun or
    a scheduler, a repetition within ECHO_S is ignored: launchers pass on a signal that the process already has. A
    signal of another kind is a scheduler's next warning and changes nothing.
    """

    def __init__(self, launched: bool) -> None:
        super().__init__()
        self.received: str | None = None
        self._echo_s = ECHO_S if launched else 0.0
        self._first_seen: dict[int, float] = {}
        self._process = os.getpid()

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            for number in STOP_SIGNALS:
                self.callback(signal.signal, number, signal.signal(number, self._handle))
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Only note the signal: files, other processes and the GPU may be in any state now.
        if os.getpid() != self._process:  # a loader worker, which inherited the handler
            return
        now = time.monotonic()
        if number == signal.SIGINT or number in self._first_seen:
            earlier = self._first_seen.get(number, min(self._first_seen.values(), default=now))
            if self._first_seen and now - earlier >= self._echo_s:
                os._exit(128 + number)
        self._first_seen.setdefault(number, now)
        self.received = self.received or signal.Signals(number).name


def end_with_parent(number: signal.Signals) -> None:
    """Have Linux send this process ``number`` when its parent dies, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def ignore_stop_signals() -> None:
    """Ignore STOP_SIGNALS, in this process and in those that it starts.

    A terminal or a scheduler signals all processes at once, but the parent needs this one until it stops itself.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
