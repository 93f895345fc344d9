"""Text files of other people: their encodings, and the names of files in them."""

import codecs
import contextlib
import json
import os
import re
import unicodedata
from pathlib import Path
from typing import Any

from stvit_video.common.errors import UsageError

MAX_BYTES = 2**30  # of a file; the largest published lists have a fifth of it
MAX_LINE = 131_072  # as of a field for Python's csv; a line of columns is held many times while it is read
HALF_LETTER = re.compile(r"\\u[dD][89a-fA-F]")  # an escape of UTF-16 that has to be one of two
WINDOWS = "cp1252"  # Western Europe's; a superset of Latin-1's printable characters


def read_lines(path: str | Path, what: str, form: str) -> list[str]:
    """Return a text file's lines, with their ends; UsageError, naming ``what`` it is and the ``form`` to give.

    Text is UTF-8, UTF-16 with its mark, as Windows writes it, or else of one byte a letter, as older lists are.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{what} {path} is not a file; give {form}.")
    try:
        with path.open("rb") as binary:
            start = binary.read(4096)
    except OSError as error:
        raise UsageError(f"{what} {path} cannot be read ({error.strerror}); give {form}.") from error
    is_utf16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if path.stat().st_size > MAX_BYTES:
        raise UsageError(f"{what} {path} has more than {MAX_BYTES:,} bytes; give {form}.")
    try:
        with path.open(encoding="utf-16" if is_utf16 else "utf-8-sig") as file:
            return list(file)  # line by line, so that a large binary file is refused at its first bytes
    except UnicodeError as error:
        problem = getattr(error, "reason", str(error))
        if not is_utf16 and not any(byte < 32 and byte not in b"\t\n\f\r\x1a" for byte in start):
            with contextlib.suppress(UnicodeError), path.open(encoding=WINDOWS) as file:
                return list(file)
        raise UsageError(f"{what} {path} is not UTF-8 text ({problem}); give {form}.") from error


def check_lengths(lines: list[str], source: str) -> list[str]:
    """Return lines that are read as columns, of a ``source``; UsageError where one has more than MAX_LINE letters."""
    for number, line in enumerate(lines, start=1):
        if len(line) > MAX_LINE:
            raise UsageError(f"{source}, line {number} has {len(line):,} letters; allowed: {MAX_LINE:,}. Correct it.")
    return lines


def parse_json(text: str) -> Any:
    """Return the content of a JSON text; ValueError where it is damaged or holds half a letter, RecursionError."""
    content = json.loads(text)
    if HALF_LETTER.search(text):  # or the first half of one
        json.dumps(content, ensure_ascii=False).encode()
    return content


def unquoted(text: str) -> str:
    """Return a text without the quotes around it, if there are any."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text


def find_file(root: str | Path, name: str) -> str:
    """Return the path of a file that a list names; relative names start from ``root``.

    Where there is no file of just this name, one with other slashes or with letters encoded in another way is taken.
    Plain names, which are nearly all, are not looked up.
    """
    path = os.path.join(root, name)
    if (name.isascii() and "\\" not in name) or os.path.lexists(path):
        return path
    for slashed in dict.fromkeys((name, name.replace("\\", "/"))):
        forms = [unicodedata.normalize(form, slashed) for form in ("NFC", "NFD")]
        with contextlib.suppress(UnicodeError):
            forms.append(os.fsdecode(slashed.encode(WINDOWS)))  # named by a system of that encoding
        for form in (slashed, *forms):
            if os.path.lexists(os.path.join(root, form)):
                return os.path.join(root, form)
    return os.path.join(root, name.replace("\\", "/"))
