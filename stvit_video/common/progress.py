"""Progress display: a bar on a terminal, plain lines in a log file."""

import shutil
import sys
import time

from tqdm import tqdm

PLAIN_LINE_SECONDS = 10.0
WIDE = 100  # terminal columns needed for a bar beside the figures


class Progress:
    """A progress bar on a terminal; elsewhere a line every PLAIN_LINE_SECONDS. Silent unless ``enabled``."""

    def __init__(self, title: str, total: int, done: int = 0, *, enabled: bool = True) -> None:
        self.title, self.total, self.done, self.first = title, total, done, done
        self.started = self.last_line = time.monotonic()
        on_terminal = sys.stderr.isatty()
        self.plain = enabled and not on_terminal
        narrow = shutil.get_terminal_size().columns < WIDE
        self.bar = tqdm(
            total=total,
            desc=title,
            initial=done,
            disable=not (enabled and on_terminal),
            leave=True,
            bar_format="{desc} {percentage:.0f} %, {remaining} left{postfix}" if narrow else None,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def advance(self, text: str = "") -> None:
        """Count one more step; ``text`` is shown beside the count."""
        self.done += 1
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
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
