"""Text of unknown origin, such as file names, class names and logs, where it is shown or becomes part of something."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# Control characters, which move a terminal's cursor or end a line, those that reverse the direction of what follows or
# are not seen, and the surrogates that stand for bytes of names that are not UTF-8. The joiners U+200C and U+200D stay:
# names in Persian, in languages of India and with emoji need them, and they only change the form of their neighbours.
UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e007f\ud800-\udfff]"
)


def printable(text: object, kept: str = "") -> str:
    """Return ``text`` with each character that a terminal might obey as its escape; those ``kept`` stay."""
    return UNPRINTABLE.sub(lambda found: found[0] if found[0] in kept else repr(found[0])[1:-1], str(text))


class PrintableStream:
    """A text stream that writes each character that a terminal might obey, or that it cannot encode, as its escape.

    Lines and tabs stay, and so does a carriage return at either end of what is written, which a progress bar needs.
    What cannot be written raises OSError only where the stream is ``needed``; ``failure`` is the last such error.
    """

    def __init__(self, stream: TextIO, needed: bool = True) -> None:
        self.stream, self.needed = stream, needed
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        inner = text.strip("\r")
        encoding = self.stream.encoding or "utf-8"  # none of a stream in memory
        safe = printable(inner, "\n\t").encode(encoding, "backslashreplace").decode(encoding)
        if inner:
            safe = "\r" * text.startswith("\r") + safe + "\r" * text.endswith("\r")
        with self._noting_failure():
            self.stream.write(safe or text)
        return len(text)

    def flush(self) -> None:
        with self._noting_failure():
            self.stream.flush()

    def check(self) -> None:
        """Write what is left; raise the error of it, or of what was written before."""
        self.flush()
        if self.failure is not None:
            raise self.failure

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = error
            if self.needed:
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
