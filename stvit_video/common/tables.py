"""Rows as aligned text and as CSV."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence

from tabulate import tabulate


def format_table(headers: Sequence[str], rows: Iterable[Sequence[object]], *, style: str = "plain") -> str:
    """Return rows of text under their headers: the first column to the left, the others to the right.

    ``style`` is one of tabulate's, such as ``plain`` or ``github`` (Markdown). Cells are shown as they are given, so
    numbers are to be formatted first. Raises nothing: a table without rows is its headers.
    """
    rows = [list(map(str, row)) for row in rows]
    align = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(rows, list(headers), tablefmt=style, colalign=align if rows else None, disable_numparse=True)


def to_csv(rows: Iterable[Mapping[str, object]], columns: Sequence[str]) -> bytes:
    """Return rows as a CSV file with a header; paths that are not UTF-8 are written as the bytes that they are."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(columns))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")
