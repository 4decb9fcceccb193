"""Which earlier result a node is held against, and how long it will take: one cache serves many projects."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qpipe.artifacts.artifact import save
from qpipe.artifacts.kinds import Scores
from qpipe.cache.store import Store
from qpipe.keys.hashing import digest
from qpipe.plan.history import expected, expected_s, previous_key, ran_before, rebuild, remember
from qpipe.plan.verdicts import artifact_json
from tests.toy import Toy

HERE, THERE = "/one/project", "/another/project"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "cache") as opened:
        yield opened


def ingredients(**params: Any) -> dict[str, Any]:
    return {"stage": "cle", "code": "c", "libraries": {}, "params": params, "ports": {}}


def ran(store: Store, folder: str | None, duration_s: float = 1.0, sizes: Any = None, **params: Any) -> str:
    """A result of the node `cle` that these params made in `folder`; its key."""
    of = ingredients(**params)
    key = digest("action", {**of, "project": folder})
    outputs = {"scores": artifact_json(save(Scores({"score": 1.0}), store))}
    provenance = {"node": "cle", "duration_s": duration_s, **({} if sizes is None else {"sizes": sizes})}
    result = store.publish(key, {"outputs": outputs, "ingredients": of, "provenance": provenance})
    remember(store, key, result, folder)
    return key


def nearest(store: Store, **params: Any) -> str | None:
    return previous_key(store, "cle", "cle", ingredients(**params), HERE)


def test_the_result_of_this_project_goes_before_a_later_and_nearer_one_of_another(store: Store) -> None:
    own = ran(store, HERE, a=1, b=1)
    ran(store, THERE, a=2, b=3)
    assert nearest(store, a=2, b=2) == own


def test_of_this_projects_results_the_one_that_differs_least_is_taken_and_of_equals_the_last(store: Store) -> None:
    first = ran(store, HERE, a=1, b=1, c=1)
    second = ran(store, HERE, a=2, b=2, c=2)
    assert nearest(store, a=1, b=1, c=9) == first
    assert nearest(store, a=1, b=2, c=3) == second
    assert nearest(store, a=7, b=8, c=9) == second
    again = ran(store, HERE, a=1, b=1, c=1)
    assert again == first
    assert nearest(store, a=7, b=8, c=9) == first


def test_where_this_project_has_none_the_nearest_of_all_is_taken(store: Store) -> None:
    near = ran(store, THERE, a=1, b=1)
    ran(store, "/a/third", a=5, b=5)
    assert nearest(store, a=1, b=2) == near
    assert nearest(store, a=1, b=1) == near


def test_a_result_that_is_gone_is_passed_over_and_was_there(store: Store) -> None:
    kept, gone = ran(store, HERE, a=1), ran(store, HERE, a=2)
    store.forget(gone)
    assert nearest(store, a=2) == kept
    assert ran_before(store, "cle", "cle") == {kept, gone}
    store.forget(kept)
    assert nearest(store, a=2) is None


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ({"model": 1000, "data": 10}, 2.0),
        ({"model": 4000, "data": 10}, 8.0),  # four times the model
        ({"model": 4000, "data": 30}, 24.0),  # for three times the samples
        ({"model": 500, "data": 10}, 1.0),
        ({"model": 4000}, 8.0),  # what is not known counts as it was
        ({}, 2.0),
        ({"model": 10**9, "data": 10}, 200.0),  # farther off than sizes tell
    ],
)
def test_time_goes_by_size_where_it_is_known(store: Store, now: dict[str, int], expected: float) -> None:
    ran(store, THERE, 2.0, {"model": 1000, "data": 10}, a=1)
    assert expected_s(store, "cle", "cle", now, HERE) == pytest.approx(expected)


def test_time_is_taken_from_this_project_then_from_the_nearest_size_then_from_the_stage(store: Store) -> None:
    ran(store, THERE, 100.0, {"model": 10**6}, a=1)
    ran(store, THERE, 1.0, {"model": 10**3}, a=2)
    assert expected_s(store, "cle", "cle", {"model": 2000}, HERE) == pytest.approx(2.0)
    assert expected_s(store, "cle", "cle", {"model": 500_000}, HERE) == pytest.approx(50.0)
    ran(store, HERE, 7.0, {"model": 2000}, a=3)
    assert expected_s(store, "cle", "cle", {"model": 2000}, HERE) == pytest.approx(7.0)
    assert expected_s(store, "cle", "equalized", {"model": 2000}, HERE) == pytest.approx(7.0)
    assert expected_s(store, "bnf", "bnf", {"model": 2000}, HERE) is None


def test_memory_is_known_by_the_same_result_and_does_not_shrink_with_what_there_is_to_do(store: Store) -> None:
    key = ran(store, HERE, 2.0, {"model": 1000}, a=1)
    assert expected(store, "cle", "cle", {"model": 1000}, HERE) == (2.0, None), "it did not say"
    result = store.result(key)
    assert result is not None
    remember(store, key, {**result, "provenance": {**result["provenance"], "peak_rss_bytes": 3e9}}, HERE)
    for size, found in ((1000, (2.0, 3e9)), (2000, (4.0, 6e9)), (500, (1.0, 3e9))):
        assert expected(store, "cle", "cle", {"model": size}, HERE) == found
    rows = store.index.get("results", "cle/cle")
    store.index.set("results", "cle/cle", [row[:4] for row in rows])  # as the first versions wrote it
    assert expected(store, "cle", "cle", {"model": 1000}, HERE) == (2.0, None)


@pytest.mark.parametrize("row", [[1], "x", [["k", None, 1.0, {}]], [[64 * "a", None, "1", {}]], {"a": 1}, None, [[]]])
def test_a_history_that_somebody_else_wrote_is_none(store: Store, row: Any) -> None:
    store.index.set("results", "cle/cle", row)
    assert nearest(store, a=1) is None
    assert expected_s(store, "cle", "cle", {}, HERE) is None


def test_a_history_that_is_told_again_keeps_where_results_ran(store: Store) -> None:
    own = ran(store, HERE, 3.0, {"model": 10}, a=1)
    ran(store, THERE, 5.0, {"model": 10}, a=2)
    rebuild(store, again=True)
    assert nearest(store, a=2) == own
    assert expected_s(store, "cle", "cle", {"model": 10}, HERE) == pytest.approx(3.0)


def test_plan_why_and_the_report_do_not_compare_with_another_projects_node(toy: Toy, tmp_path: Path) -> None:
    places = [tmp_path / "one", tmp_path / "two"]
    for place, value in zip(places, (1, 500), strict=True):
        place.mkdir()
        add = {"uses": "toy_add", "scores": "a", "amount": value}
        toy.pipeline({"a": {"uses": "toy_number", "value": value}, "b": add})
        assert toy.run("run", "run.workers=0", cwd=place).returncode == 0
    words = ["stages.a.value=1", "stages.b.amount=2"]
    plan = toy.run("plan", *words, cwd=places[0]).stdout
    assert "param amount: 1 -> 2" in plan
    assert "param amount: 500 -> 2" in toy.run("plan", "stages.b.amount=2", cwd=places[1]).stdout
    why = toy.run("why", "b", *words, cwd=places[0]).stdout
    assert "because param amount: 1 -> 2" in why
    assert "500" not in why
    assert toy.run("run", "run.workers=0", *words, cwd=places[0]).returncode == 0
    (page, *_) = sorted(places[0].glob("outputs/*/*/report.html"), key=lambda path: -path.stat().st_mtime_ns)
    assert "param amount: 1 -&gt; 2" in page.read_text()
