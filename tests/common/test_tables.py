"""Tables as text and as CSV."""

from stvit_video.common.tables import format_table, to_csv


def test_columns_are_aligned_and_cells_stay_as_given() -> None:
    lines = format_table(["name", "top-1"], [["a", "9.50"], ["longer", "100.00"]]).splitlines()
    assert lines == ["name      top-1", "a          9.50", "longer   100.00"]


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
