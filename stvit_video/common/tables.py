"""Rows as aligned text and as CSV."""

import csv
import io
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from tabulate import tabulate

from stvit_video.common.text import printable

WIDTH = 100  # of a plain table, in columns
GAP = 2  # between its columns, as tabulate has it
LEAST = 12  # columns of a name that is shortened
# The start of what spreadsheets compute, and of such text as to_csv writes it.
FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|-?inf", re.IGNORECASE)


def format_table(
    headers: Sequence[str], rows: Iterable[Sequence[object]], *, style: str = "plain", left: int = 1
) -> str:
    """Return a table as text, with the first ``left`` columns aligned left and the others right.

    ``style`` is a format of tabulate, such as ``plain`` or ``pipe`` (Markdown). Cells are not reformatted, so format
    numbers first. A plain table takes up to WIDTH columns: names in the ``left`` columns are wrapped or, where one word
    is too long, shortened in the middle; further columns that find no room follow below, behind the first again.
    """
    cells = [list(map(printable, row)) for row in rows]
    if style != "plain":
        align = ["left"] * left + ["right"] * (len(headers) - left)
        return tabulate(cells, list(headers), tablefmt=style, colalign=align if cells else None, disable_numparse=True)
    table = [list(headers), *cells]
    room = [max(len(row[column]) for row in table) for column in range(len(headers))]
    spare = WIDTH - sum(room) - GAP * (len(room) - 1)
    for column in sorted(range(left), key=lambda column: -room[column]):  # from the widest on
        fitting = max(min(room[column], LEAST), room[column] + min(0, spare))
        spare += room[column] - fitting
        room[column] = fitting
    if spare < 0:  # the table needs several parts, which have room for longer names
        room[:left] = [min(max(len(row[column]) for row in table), WIDTH // 3) for column in range(left)]
    fitted = [_fit([row[column] for row in table], room[column]) for column in range(left)]
    fitted += [[row[column] for row in table] for column in range(left, len(headers))]
    parts, chosen = [], list(range(left))
    for column in range(left, len(headers)):
        if len(chosen) > left and sum(room[one] + GAP for one in chosen) + room[column] > WIDTH:
            parts.append(chosen)
            chosen = list(range(left))
        chosen.append(column)
    return "\n\n".join(_align([fitted[column] for column in part], left) for part in [*parts, chosen])


def _align(columns: Sequence[Sequence[str]], left: int) -> str:
    """Return a plain table of columns, with GAP blanks between them."""
    align = ["left"] * left + ["right"] * (len(columns) - left)
    return tabulate(list(zip(*columns, strict=True)), tablefmt="plain", colalign=align, disable_numparse=True)


def _fit(cells: Sequence[str], room: int) -> list[str]:
    """Return cells of up to ``room`` columns, on several lines at blanks; different cells stay different."""
    half = room // 2
    words = [[word if len(word) <= room else f"{word[:half]}…{word[half + 1 - room :]}" for word in cell.split()]
             for cell in cells]  # fmt: skip
    if len({tuple(some) for some in words}) < len(set(cells)):
        words = [cell.split() for cell in cells]  # long words are broken
    return ["\n".join(textwrap.wrap(" ".join(some), room)) for some in words]


def three_digits(value: float, decimals: int = 0) -> str:
    """Return a number with three significant digits at least, and with so many ``decimals`` at least."""
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(decimals, digits)}f}"


def to_csv(rows: Iterable[Mapping[str, object]], columns: Sequence[str]) -> bytes:
    """Return rows as a CSV file with a header; file names that are not UTF-8 keep their bytes.

    Text that a spreadsheet would compute has a ``'`` before it, which ``read_csv`` takes away again.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(map(_as_text, columns))
    writer.writerows([_as_text(row.get(column, "")) for column in columns] for row in rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """Return the rows of a file of ``to_csv``, with "" for cells that are missing. Raises csv.Error and ValueError."""
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    plain = [[cell[1:] if cell[:1] == "'" and FORMULA.match(cell) else cell for cell in row] for row in [header, *rows]]
    return [dict(zip_longest(plain[0], row[: len(header)], fillvalue="")) for row in plain[1:] if row]


def _as_text(cell: object) -> object:
    return f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) and not NUMBER.fullmatch(cell) else cell
