"""Why a run ends early: signals, which set a flag until the next step, so that nothing is lost; and divergence."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from stvit_video.signals import STOP_SIGNALS

EXIT_STOPPED = 75  # "try again later": the same command continues
PATIENCE_S = 1.0


class Stopped(Exception):
    """A run ended on a signal; all that it had done, which ``reached`` says, is kept."""

    def __init__(self, received: str | None, reached: str) -> None:
        super().__init__(f"stopped by {received or 'a signal to another process'} after {reached}")


class Diverged(Exception):
    """Training cannot go on: too many steps had a loss or gradients that are not finite."""


class StopSignals:
    """While entered, SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGUSR2 only set ``received``; another Ctrl-C exits at once.

    Launchers pass signals on that the process has had already, and schedulers send one kind after another: only Ctrl-C,
    a second or more after the first signal, is someone who does not want to wait for the checkpoint.
    The handler does nothing else: no file, no other process, no GPU is touched inside it.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._at = 0.0
        self._before: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader's worker: its parent decides
            return
        if self.received is None:
            self.received, self._at = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._at >= PATIENCE_S:
            os._exit(128 + number)
