"""A record.json that somebody edited: `qpipe report` and its like show it or say in one line what is wrong."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qpipe.cli.run_commands import show_report
from qpipe.errors import ConfigError
from qpipe.explain.past_runs import read_record
from qpipe.explain.shape import wrong
from tests.inprocess import carry_out, job
from tests.report.conftest import record as record_of_a_run
from tests.toy import Toy

NUMBERS = (-1, 10**400, float("nan"))
VALUES: tuple[Any, ...] = (None, True, *NUMBERS, "text", [], {}, [None], {"": None}, [[1]], [{"a": [1]}])
FULL = record_of_a_run.__wrapped__() if hasattr(record_of_a_run, "__wrapped__") else record_of_a_run()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything in it."""
    if path:
        yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


def of_each_kind(record: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Of places that are alike (the third step of the ladder, the second one), one each; of nodes, two."""
    seen: Counter[tuple[Any, ...]] = Counter()
    found = []
    for path in places(record):
        alike = (isinstance(key, int) or (i == 1 and path[0] == "nodes") for i, key in enumerate(path))
        kind = tuple("*" if each else key for each, key in zip(alike, path, strict=True))
        seen[kind] += 1
        if seen[kind] <= (2 if path[0] == "nodes" else 1):
            found.append(path)
    return found


def edited(record: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(record)
    place = changed
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return changed


def report_of(folder: Path, text: str) -> str:
    """What the command says: the closing table, or the one line of the mistake."""
    (folder / "record.json").write_text(text)
    try:
        return show_report([str(folder)])
    except ConfigError as error:
        said = str(error)
        assert "\n" not in said
        assert said.startswith(f"report: '{folder / 'record.json'}' is ")
        return said


@pytest.mark.parametrize("path", of_each_kind(FULL), ids=lambda path: ".".join(map(str, path)))
def test_a_field_of_another_type_or_none_is_shown_or_told_in_one_line(tmp_path: Path, path: tuple[Any, ...]) -> None:
    for value in (*VALUES, ...):
        assert report_of(tmp_path, json.dumps(edited(FULL, path, value)))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("totals", "ran"), "3", 'totals.ran: expected a number, got "3"'),
        (("ladder",), {}, "ladder: expected a list, got {}"),
        (("ladder", 0, "score"), "0.9", 'ladder[0].score: expected a number, got "0.9"'),
        (("nodes", "bnf", "notes"), "one", 'nodes.bnf.notes: expected a list, got "one"'),
        (("nodes", "bnf", "inputs"), [1], "nodes.bnf.inputs: expected a mapping, got [1]"),
        (("goal", "met"), "yes", 'goal.met: expected true or false, got "yes"'),
        (("command",), 5, "command: expected text or a list, got 5"),
        (("nodes", "bnf", "duration_s"), 10**400, "nodes.bnf.duration_s: expected a number, got 1000"),
    ],
)
def test_the_line_names_the_field_and_what_it_was_to_be(tmp_path: Path, path: Any, value: Any, said: str) -> None:
    found = report_of(tmp_path, json.dumps(edited(FULL, path, value)))
    assert f"is not as a run left it: {said}" in found
    assert found.endswith(". Mend it, or give another run.")


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "3", '"text"', "[" * 100_000, '{"a":' * 100_000),
        *('{"nodes": []}', '{"nodes": {}, "schema": "2"}', '{"nodes": {}, "schema": 99}'),
        '{"nodes": {"a": {"scores": {"x": ' + "[" * 900 + "]" * 900 + '}}}, "schema": 2}',
    ],
    ids=range(12),
)
def test_what_is_no_record_is_told_in_one_line(tmp_path: Path, text: str) -> None:
    assert report_of(tmp_path, text).startswith("report: ")


def test_bytes_that_are_no_text_and_a_folder_in_its_place_are_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ConfigError, match=r"^report: .* is not a record: [^\n]*$"):
        show_report([str(tmp_path)])
    with pytest.raises(ConfigError, match=r"^report: .* is not a record: Is a directory\. Give the folder of a run\.$"):
        read_record(tmp_path, "report")


def test_what_a_run_writes_is_of_the_shape(toy_stages: Toy, tmp_path: Path) -> None:
    after = {name: {"uses": f"toy_{name}", "scores": "a"} for name in ("boom", "files", "add")}
    stages = {"a": {"uses": "toy_number"}, **after}
    carry_out(job(tmp_path, stages))
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert wrong(record) is None
    assert wrong({"schema": 1, "nodes": {}}) is None
