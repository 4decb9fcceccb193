from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qpipe.report.terminal.table import paint, table, wrap


def test_columns_are_aligned() -> None:
    rows = [("step", "top1"), ("float", "98.12"), ("nearest", "4.5")]
    assert table(rows, 80, right=(1,)) == [["step      top1"], ["float    98.12"], ["nearest    4.5"]]


def test_the_flexible_column_wraps_to_the_width() -> None:
    lines = table([("run", "adaround", "one two three four five six")], 30, flexible=2)[0]
    assert lines == ["run  adaround  one two three", "               four five six"]


def test_one_line_cuts_instead() -> None:
    assert table([("run", "one two three four")], 20, flexible=1, max_lines=1) == [["run  one two thre..."]]


@given(
    st.lists(st.tuples(st.text("ab ", max_size=9), st.text("ab ", max_size=99)), max_size=5),
    st.integers(24, 90),
)
def test_no_line_is_wider_than_asked(rows: list[tuple[str, str]], width: int) -> None:
    lines = [line for row in table(rows, width, flexible=1) for line in row]
    assert all(len(line) <= width for line in lines)


def test_colour_only_where_asked() -> None:
    assert paint("x", "bold red", colour=True) == "\x1b[1;31mx\x1b[0m"
    assert paint("x", "bold red", colour=False) == "x"


def test_wrapping_nothing_gives_one_empty_line() -> None:
    assert wrap("", 20) == [""]
