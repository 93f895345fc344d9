"""Watching a camera, stream or pipe: decisions as they come, how late they are, and what was dropped."""

import argparse
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stvit_video.data.decode.types import DecodeError
from stvit_video.data.streams import STDIN
from stvit_video.inference.prediction import Prediction, Window
from stvit_video.inference.predictor import Predictor
from stvit_video.inference.segments import smooth

WINDOW_S = 2.0
RECENT = 10_000  # decisions whose latencies count


@dataclass
class Watched(Prediction):
    """The decisions on a live source. They are only counted, so that memory does not grow, unless they are ``kept``."""

    kept: bool = False
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT), repr=False)  # seconds
    dropped: int = 0  # windows, as the network was slower than the source
    _count: int = 0
    _short: int = 0
    _seconds: tuple[float, float] = (0.0, 0.0)

    def add(self, window: Window) -> None:
        """Count a decision that was told just now."""
        self.latencies.append(time.monotonic() - window.arrived)
        self.dropped = window.number - self._count
        self._count, self._short = self._count + 1, self._short + window.is_short
        self._seconds = self._seconds[0] + window.decode_s, self._seconds[1] + window.model_s
        if self.kept:
            self.windows.append(window)

    @property
    def count(self) -> int:
        return self._count

    @property
    def short(self) -> int:
        return self._short

    @property
    def decode_s(self) -> float:
        return self._seconds[0]

    @property
    def model_s(self) -> float:
        return self._seconds[1]

    def figures(self) -> dict[str, Any]:
        """Return the latency of decisions in seconds, from when their last frame arrived, and what was dropped."""
        p50, p95 = np.quantile(self.latencies, (0.5, 0.95)).tolist() if self.latencies else (None, None)
        return {"latency": {"p50": p50, "p95": p95}, "dropped": self.dropped}

    def describe(self) -> str:
        """Return ``figures`` as a line; empty without any decision."""
        if not self.latencies:
            return ""
        p50, p95 = (1000 * value for value in self.figures()["latency"].values())
        late = f"; {self.dropped:,} windows dropped, as the network is slower: raise --step" if self.dropped else ""
        return f"latency from a window's last frame to its result: {p50:.0f} ms (p50), {p95:.0f} ms (p95){late}"


def describe_stream(predictor: Predictor) -> str:
    """Return how often a stream decides, and on what; empty where windows of seconds are scored."""
    if not predictor.streams_live:
        return ""
    frames, length = predictor.views.frames, predictor.input.sampler.describe()[0]
    return (
        f" by a stream, which computes each frame once: a decision at every {predictor.group} sampled frames (or "
        f"--step) on the last {frames}, a clip of {length} in place of --window"
    )


def watch(
    predictor: Predictor,
    result: Watched,
    options: argparse.Namespace,
    describe: Callable[[Sequence[Window]], str],
) -> None:
    """Score a stream window by window until it ends, --seconds have passed or the user presses Ctrl-C."""
    print(f"watching{describe_stream(predictor)}; Ctrl-C ends", flush=True)
    result.kept = options.output is not None
    length, limits = options.window or WINDOW_S, {"seconds": options.seconds, "reconnect": options.reconnect}
    try:
        windows = predictor.watch(result.path, window=length, step=options.step, **limits)
        for window in smooth(windows, options.smooth):
            print(describe([window]), flush=True)
            result.add(window)
        if not result.count:  # a stream that is shorter than a window is one; of a stream's samples there is no part
            result.error = f"ended before there were frames for a clip of {predictor.input.sampler.describe()[0]}"
    except DecodeError as error:
        is_piped = result.path == STDIN
        result.error = error.message + ("; without --window, it is read as a file" if is_piped else "")
    except KeyboardInterrupt:
        print()
        if not result.count:
            raise
