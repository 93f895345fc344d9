"""Text of unknown origin, such as file names, class names and logs, where it is shown or becomes part of something."""

import re

# Control characters, which move a terminal's cursor or end a line, those that reverse the direction of what follows,
# and the surrogates that stand for bytes of names that are not UTF-8.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object, kept: str = "") -> str:
    """Return ``text`` with each character that a terminal might obey as its escape; those ``kept`` stay."""
    return UNPRINTABLE.sub(lambda found: found[0] if found[0] in kept else repr(found[0])[1:-1], str(text))
