"""torch's own database of operators, against docs/torch_operators.md: nothing comes out wrong, and nothing crashes."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from tests.torch_operators import PAGE, PARTS, TITLES, entries, part, results, row, versions

SLOW = [pytest.param(number, marks=pytest.mark.slow) for number in range(1, PARTS)]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [0, *SLOW])
def test_every_operator_is_imported_right_or_refused_as_the_page_says(number: int) -> None:
    found = results(part(number))
    assert {result.name: result.reason for result in found if result.outcome in ("wrong", "crashed")} == {}
    assert [result.name for result in found if result.exports] == []  # what torch exports right is taken
    assert all(result.reason for result in found if result.outcome == "refused")
    committed = PAGE.read_text()
    if f"\n{versions()}: " in committed:
        lines = set(committed.splitlines())
        new = [line for line in map(row, found) if line not in lines]
        assert new == [], "python -m tests.torch_operators writes the page anew"


def test_the_page_counts_the_lines_of_its_table() -> None:
    text = PAGE.read_text()
    rows = re.findall(r"^\| (\S+) \| ([a-z ]+) \|", text, re.M)
    rows = [(name, outcome) for name, outcome in rows if outcome in TITLES]
    counts = Counter(outcome for _, outcome in rows)
    assert f"**{len(rows)} entries, {', '.join(f'{counts[each]} {each}' for each in TITLES)}**" in text  # type: ignore[index]
    if f"\n{versions()}: " in text:
        assert {name for name, _ in rows} == {str(entry.formatted_name) for entry in entries()}
