"""Text files of other people: their encodings, and the names of files in them."""

import codecs
import contextlib
import os
import unicodedata
from pathlib import Path

from stvit_video.common.errors import UsageError

WINDOWS = "cp1252"  # Western Europe's; a superset of Latin-1's printable characters


def read_lines(path: str | Path, what: str, form: str) -> list[str]:
    """Return a text file's lines, with their ends; UsageError, naming ``what`` it is and the ``form`` to give.

    Text is UTF-8, UTF-16 with its mark, as Windows writes it, or else of one byte a letter, as older lists are.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{what} {path} is not a file; give {form}.")
    with path.open("rb") as binary:
        start = binary.read(4096)
    is_utf16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        with path.open(encoding="utf-16" if is_utf16 else "utf-8-sig") as file:
            return list(file)  # line by line, so that a large binary file is refused at its first bytes
    except UnicodeError as error:
        problem = getattr(error, "reason", str(error))
        if not is_utf16 and not any(byte < 32 and byte not in b"\t\n\f\r\x1a" for byte in start):
            with contextlib.suppress(UnicodeError), path.open(encoding=WINDOWS) as file:
                return list(file)
        raise UsageError(f"{what} {path} is not UTF-8 text ({problem}); give {form}.") from error


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
