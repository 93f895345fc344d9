"""Why a run ends early: signals, which set a flag until the next step, so that nothing is lost; and divergence."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from stvit_video.common.errors import RunFailure
from stvit_video.runtime.signals import STOP_SIGNALS

EXIT_STOPPED = 75  # "try again later": the same command continues
ECHO_S = 1.0  # for a signal that comes both from the scheduler and from the launcher


class Diverged(RunFailure):
    """Training cannot go on: too many steps had a loss or gradients that are not finite."""


class StopSignals:
    """While entered, SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGUSR2 only set ``received``.

    The same one again exits at once, and so does Ctrl-C after another: someone does not want to wait.
    A process that was ``launched`` lets a second pass for echoes, since launchers pass on what it has had
    already. Another kind is what a scheduler sends next, and changes nothing. The handler does nothing else: no file,
    no other process, no GPU is touched inside it.
    """

    def __init__(self, launched: bool) -> None:
        self.received: str | None = None
        self._echo_s = ECHO_S if launched else 0.0
        self._seen: dict[int, float] = {}  # when each kind came first
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
        now = time.monotonic()
        if number == signal.SIGINT or number in self._seen:
            earlier = self._seen.get(number, min(self._seen.values(), default=now))
            if self._seen and now - earlier >= self._echo_s:
                os._exit(128 + number)
        self._seen.setdefault(number, now)
        self.received = self.received or signal.Signals(number).name
