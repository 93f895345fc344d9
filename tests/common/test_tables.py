"""Tables as text and as CSV."""

import re

import pytest

from stvit_video.common.tables import format_table, three_digits, to_csv


def test_columns_are_aligned_and_cells_stay_as_given() -> None:
    lines = format_table(["name", "top-1"], [["a", "9.50"], ["longer", "100.00"]]).splitlines()
    assert lines == ["name     top-1", "a         9.50", "longer  100.00"]


def test_markdown() -> None:
    first, ruler, row = format_table(["a", "b"], [["1", "2"]], style="pipe").splitlines()
    assert first.split() == ["|", "a", "|", "b", "|"]
    assert set(ruler) <= set("|:-")
    assert row.split() == ["|", "1", "|", "2", "|"]


def test_no_rows() -> None:
    assert format_table(["a", "b"], []).split() == ["a", "b"]
    assert to_csv([], ["a", "b"]) == b"a,b\r\n"


def test_names_that_are_not_utf8_keep_their_bytes() -> None:
    assert (
        to_csv([{"path": b"caf\xe9,.mp4".decode("utf-8", "surrogateescape")}], ["path"])
        == b'path\r\n"caf\xe9,.mp4"\r\n'
    )


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("stvit_video:stvit_vit_small_patch16:balanced", 7),  # a benchmark's
        ("runs/2026/a folder with blanks/of experiments/stvit vit small/with seed", 2),  # a comparison's
        ("/mnt/" + "deep/" * 30 + "run", 1),
        ("x" * 300, 12),  # an array of jobs with many settings
        ("short", 25),
    ],
)
@pytest.mark.parametrize("left", [1, 2])
def test_plain_tables_fit_a_terminal_and_keep_every_figure(name: str, others: int, left: int) -> None:
    """Names that differ in one letter anywhere are told apart."""
    names = [name, f"{name}1", f"2{name}", f"{name[: len(name) // 2]}3{name[len(name) // 2 :]}"]
    headers = ["run", "kind of it"][:left] + [f"figure {i}" for i in range(others)]
    rows = [[one, "control of paper, balanced, fast"][:left] + [f"{i}{j}.25" for j in range(others)]
            for i, one in enumerate(names)]  # fmt: skip
    text = format_table(headers, rows, left=left)
    assert max(map(len, text.splitlines())) <= 100
    words = text.split()
    for row in rows:
        assert all(words.count(figure) == 1 for figure in row[left:])
    first, *parts = text.split("\n\n")
    blocks = re.split(r"^(?=\S.*(?:00|10|20|30)\.25)", first, flags=re.MULTILINE)[1:]
    shown = ["".join(line[: line.find(" " * 2)] if "  " in line else line for line in block.splitlines())
             for block in blocks]  # fmt: skip
    assert len(set(shown)) == len(names)
    if name == "short":
        assert parts
        assert "short1" in parts[0]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.339, "0.339"), (0.0803, "0.0803"), (57.04, "57.0"), (1234.5, "1,234"), (0.3, "0.300"), (0, "0")],
)
def test_figures_have_three_digits(value: float, shown: str) -> None:
    assert three_digits(value) == shown
    assert three_digits(16.107, 3) == "16.107"
