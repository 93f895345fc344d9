"""Signals that ask a run to stop: they set a flag, and the run ends at its next step with nothing lost."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

EXIT_STOPPED = 75  # "try again later": the same command continues
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(Exception):
    """A run ended on a signal, after a checkpoint of its last step."""

    def __init__(self, received: str | None, step: int) -> None:
        self.received, self.step = received, step
        super().__init__(f"stopped by {received or 'a signal to another process'} after step {step}")


class StopSignals:
    """While entered, SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGUSR2 only set ``received``; a second one exits at once.

    The handler does nothing else: no file, no other process, no GPU is touched inside it.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader's worker: its parent decides
            return
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number).name
