"""Progress display: a bar on a terminal, plain lines in a log file."""

import shutil
import sys
import time
from contextlib import AbstractContextManager

from tqdm import tqdm

from stvit_video.common.text import printable

PLAIN_LINE_SECONDS = 10.0
WIDE = 100  # terminal columns needed for a bar beside the figures


class Progress(AbstractContextManager["Progress"]):
    """A progress bar on a terminal; elsewhere a line every PLAIN_LINE_SECONDS. Silent unless ``enabled``."""

    def __init__(self, title: str, total: int, done: int = 0, *, enabled: bool = True) -> None:
        title = printable(title)
        self.title, self.total, self.done, self.first = title, total, done, done
        self.started = self.last_line = time.monotonic()
        on_terminal = sys.stderr.isatty()
        narrow = shutil.get_terminal_size().columns < WIDE
        self.plain = enabled and not on_terminal
        form = "{desc} {percentage:.0f} %, {remaining} left{postfix}" if narrow else None
        off = not (enabled and on_terminal)
        self.bar = tqdm(total=total, desc=title, initial=done, disable=off, bar_format=form)

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def advance(self, text: str = "") -> None:
        """Count one more step; ``text`` is shown beside the count."""
        self.done += 1
        text = printable(text)
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        now = time.monotonic()
        if self.plain and (now - self.last_line >= PLAIN_LINE_SECONDS or self.done == self.total):
            self.last_line = now
            left = (now - self.started) / (self.done - self.first) * (self.total - self.done)
            parts = (f"{self.title} {self.done}/{self.total}", text, f"eta {clock(left)}")
            print("  ".join(filter(None, parts)), flush=True)

    def note(self, text: str) -> None:
        """Print a separate line without breaking the bar."""
        if self.plain:
            print(text, flush=True)
        elif not self.bar.disable:
            self.bar.write(text, file=sys.stdout)


def clock(seconds: float) -> str:
    """Return seconds as h:mm:ss, or m:ss below an hour."""
    return tqdm.format_interval(round(seconds)).removeprefix("0")
