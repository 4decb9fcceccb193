"""Why a node runs, told by the real command line: every ingredient, every way up, and against what."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qpipe.keys.changes import Change, changes, listing
from tests.toy import FORMULA, Toy

CHAIN = {
    "a": {"uses": "toy_number", "value": 3},
    "b": {"uses": "toy_add", "scores": "a"},
    "c": {"uses": "toy_add", "scores": "b", "amount": 2},
    "d": {"uses": "toy_total", "scores": ["a", "c"]},
}


def test_a_changed_param_is_followed_from_its_root_down_to_the_node(toy: Toy) -> None:
    toy.pipeline(CHAIN)
    toy.run("run", "run.workers=0")
    said = toy.run("why", "d", "stages.b.amount=7").stdout
    assert "d: wait" in said
    assert (
        "because its input 'scores' changed (by way of c), because b runs with param amount: 1 -> 7" in said
    )
    assert re.search(r"d +input scores +\w{12}, \w{12} +not known yet", said)
    assert re.search(r"b +param amount +1 +7", said)
    assert not re.search(r"^  a ", said, re.M), "what did not change is not told"
    toy.run(
        "run", "run.workers=0", "stages.b.amount=7", "targets=[b]"
    )  # the cause lies behind: b hits now, d has not run with it
    assert "because b ran with param amount: 1 -> 7" in toy.run("why", "d", "stages.b.amount=7").stdout


def test_the_changed_module_the_changed_file_and_the_changed_library_are_named(toy: Toy) -> None:
    folder = toy.folder / "numbers"
    folder.mkdir()
    (folder / "one.txt").write_text("1")
    toy.pipeline({**CHAIN, "r": {"uses": "toy_read", "path": "numbers/one.txt"}})
    toy.run("run", "run.workers=0")
    toy.formula.write_text(FORMULA.replace("a + b", "b + a + 0"))
    (folder / "one.txt").write_text("2")
    said = toy.run("why", "r").stdout
    assert "param path: its content changed: file one.txt" in said
    assert re.search(r"module toy_formula +\w{12} +\w{12}", said)
    assert "module toy_stages" not in said
    said = toy.run("why", "d").stdout
    assert said.count("because code changed: module toy_formula (so in a, c, b)") == 1
    assert "code changed: module toy_formula" in toy.run("plan").stdout


def test_against_a_run_by_name_and_by_record_and_never_run_before(toy: Toy) -> None:
    toy.pipeline(CHAIN)
    assert "no earlier result is in the cache: nothing to compare with" in toy.run("why", "d").stdout
    toy.run("run", "run.workers=0")
    first = Path(toy.record()["run_dir"])
    toy.run("run", "run.workers=0", "stages.a.value=5")
    for name in (first.name, str(first / "record.json"), first.name[-4:], "last~1"):
        said = toy.run("why", "c", "--against", name, "stages.a.value=5").stdout
        assert "because a ran with param value: 3.0 -> 5.0" in said
    same = toy.run("why", "c", "--against=last", "stages.a.value=5").stdout
    assert "nothing in its key changed" in same
    toy.pipeline({**CHAIN, "new": {"uses": "toy_add", "scores": "d"}})
    assert (
        f"not in outputs/{first.parent.name}/{first.name}"
        in toy.run("why", "new", "--against", first.name).stdout
    )


def test_mistakes_are_one_line(toy: Toy) -> None:
    toy.pipeline(CHAIN)
    for words, said in (
        (("why", "dd"), "why: no node 'dd'. Did you mean 'd'?"),
        (("why", "d", "--against", "nope"), "why: no run 'nope'. Give the folder of a run"),
        (("why", "d", "--against"), "--against: has no value"),
        (("diff", "last"), "diff: takes two runs, got last."),
        (("diff", "last", "last~1"), "diff: no run 'last': outputs/ holds 0."),
    ):
        run = toy.run(*words)
        assert run.returncode == 2
        assert len(run.stderr.splitlines()) == 1
        assert said in run.stderr


def test_two_runs_side_by_side(toy: Toy) -> None:
    toy.pipeline({**CHAIN, "old": {"uses": "toy_sign", "scores": "a"}})
    toy.run("run", "run.workers=0", "run.threads=1")
    toy.pipeline({**CHAIN, "new": {"uses": "toy_sign", "scores": "c"}})
    toy.run("run", "run.workers=0", "run.threads=2", "stages.b.amount=7")
    found = toy.run("diff", "last~1", "last")
    assert found.returncode == 1, found.stderr
    text = found.stdout
    assert "only on the left: old" in text
    assert "only on the right: new" in text
    assert re.search(r"b +toy_add +\w{12} -> \w{12} +param amount: 1 -> 7", text)
    assert re.search(r"d +toy_total +\w{12} -> \w{12} +input 'scores' changed", text)
    assert not re.search(r"^  a  ", text.partition("\n  score")[0], re.M), "a is the same"
    assert re.search(r"d +9.0000 +15.0000 +\+6.0000", text)
    assert re.search(r"run.threads +1 +2", text)
    assert "2 nodes in one run only; 3 differ in key; 3 differ in output; 5 differ in score" in text
    told = json.loads(toy.run("diff", "last~1", "last", "--json").stdout)
    assert told["same"] is False
    assert told["only"] == [["old"], ["new"]]
    assert [node["node"] for node in told["nodes"] if node["own"]] == ["b"]
    assert toy.run("run", "run.workers=0", "run.threads=2", "stages.b.amount=7").returncode == 0
    same = toy.run("diff", "last~1", "last")
    assert same.returncode == 0
    assert "the same nodes, keys, outputs and scores" in same.stdout
    assert re.search(r"b +ran .* +hit \(was", same.stdout)


def test_a_long_way_is_cut_in_its_middle_and_the_table_ends(toy: Toy) -> None:
    links = {f"n{i}": {"uses": "toy_add", "scores": f"n{i - 1}"} for i in range(1, 80)}
    toy.pipeline({"n0": {"uses": "toy_number"}, **links})
    toy.run("run", "run.workers=0")
    said = toy.run("why", "n79", "stages.n0.value=2").stdout
    assert "(by way of n78 <- n77 <- n76 <- n75 <- 73 more <- n1), because n0 runs with param value: 1.0 -> 2.0" in said
    assert "and 20 more, of nodes farther up" in said


def test_nobody_reads_to_the_end(toy: Toy) -> None:
    toy.pipeline({f"n{i}": {"uses": "toy_number", "value": i} for i in range(40)})
    command = [sys.executable, "-u", *toy.command("why", "n1")[1:]]
    with subprocess.Popen(
        command,
        env=toy.environment,
        cwd=toy.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_a_file_that_is_no_record_is_refused(toy: Toy) -> None:
    toy.pipeline(CHAIN)
    (toy.folder / "x.json").write_text("{}")
    (toy.folder / "y.json").write_text('{"nodes": {}, "schema": 99}')
    assert "'x.json' is not the record of a run" in toy.run("diff", "x.json", "x.json").stderr
    assert "is of schema 99" in toy.run("diff", "y.json", "y.json").stderr


def ingredients(**changed: object) -> dict[str, object]:
    return {
        "format": 1,
        "stage": "s",
        "version": 1,
        "code": "c",
        "libraries": {},
        "params": {},
        "ports": {},
    } | changed


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"version": 1}, {"version": 2}, "version: 1 -> 2"),
        ({"libraries": {"torch": "2.9"}}, {"libraries": {"torch": "2.10"}}, 'library torch: "2.9" -> "2.10"'),
        (
            {"params": {"x": {"a": [1, {"b": 2}]}}},
            {"params": {"x": {"a": [1, {"b": 3}]}}},
            "param x.a[1].b: 2 -> 3",
        ),
        ({"params": {"x": None}}, {"params": {"x": {"content": "d"}}}, "param x: its content changed"),
        ({"params": {}}, {"params": {"x": 1}}, "param x: null -> 1"),
        ({"ports": {"m": ["d"]}}, {"ports": {"m": None}}, "input 'm' changed"),
    ],
)
def test_every_ingredient_has_its_sentence(
    before: dict[str, object], after: dict[str, object], said: str
) -> None:
    assert [change.sentence for change in changes(ingredients(**before), ingredients(**after))] == [said]


def test_a_factory_names_the_modules_and_libraries_it_is_built_on() -> None:
    before = {"params": {"f": {"function": "load", "code": "1"}}}
    after = {"params": {"f": {"function": "read", "code": "2"}}}
    old = {"1": listing({"my.data": "a" * 64, "my.gone": "b" * 64, "library numpy": "2.1"})}
    new = {"2": listing({"my.data": "c" * 64, "library numpy": "2.2"})}
    (change,) = changes(ingredients(**before), ingredients(**after), old, new)
    assert change.sentence == (
        "param f: its code changed: function (load -> read), library numpy (2.1 -> 2.2), module my.data, "
        "module my.gone removed"
    )


def test_a_listing_keeps_strange_names_apart_and_stops_where_it_would_outgrow_the_result() -> None:
    assert listing({"a\nb": "1" * 64, "a\\nb": None}) == "1111111111111111  a\\nb\n-  a\\\\nb"
    assert listing({str(i): "1" * 64 for i in range(3000)}) == ""
    assert changes(ingredients(code="1"), ingredients(code="2"), {"1": ""}, {"2": ""}) == [
        Change("code", "", "1", "2")
    ]


def test_a_removed_cache_leaves_the_run_to_compare_with(toy: Toy) -> None:
    """The record holds all that `why --against` needs."""
    toy.pipeline(CHAIN)
    toy.run("run", "run.workers=0")
    os.rename(toy.folder / "cache", toy.folder / "gone")
    toy.formula.write_text(FORMULA.replace("a + b", "b + a + 0"))
    said = toy.run("why", "c", "--against", "last").stdout
    assert "because code changed: module toy_formula" in said
