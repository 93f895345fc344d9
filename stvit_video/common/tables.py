"""Rows as aligned text and as CSV."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence

from tabulate import tabulate


def format_table(
    headers: Sequence[str], rows: Iterable[Sequence[object]], *, style: str = "plain", left: int = 1
) -> str:
    """Return a table as text, with the first ``left`` columns aligned left and the others right.

    ``style`` is a format of tabulate, such as ``plain`` or ``pipe`` (Markdown). Cells are not reformatted, so format
    numbers first.
    """
    rows = [list(map(str, row)) for row in rows]
    align = ["left"] * left + ["right"] * (len(headers) - left)
    return tabulate(rows, list(headers), tablefmt=style, colalign=align if rows else None, disable_numparse=True)


def to_csv(rows: Iterable[Mapping[str, object]], columns: Sequence[str]) -> bytes:
    """Return rows as a CSV file with a header; file names that are not UTF-8 keep their bytes."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(columns))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


def three_digits(value: float) -> str:
    """Return a number of GFLOPs or the like with three significant digits, never as a power of ten."""
    return f"{float(f'{value:.3g}'):,.10g}"
