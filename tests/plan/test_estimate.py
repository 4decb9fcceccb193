"""What a plan says it will cost, against schedules worked out by hand and against what then runs."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from qpipe.plan.estimate import Task, makespan_s, remaining_s
from qpipe.report.text import duration
from tests.toy import Toy

CHAIN = {
    "a": {"uses": "toy_number", "value": 3},
    "b": {"uses": "toy_add", "scores": "a", "seconds": 0.2},
    "c": {"uses": "toy_sign", "scores": "b"},
    "d": {"uses": "toy_add", "scores": "c"},
}


def tasks(**said: tuple[float, str]) -> dict[str, Task]:
    """name=(seconds, "what it needs")."""
    return {name: Task(name, seconds, frozenset(needs)) for name, (seconds, needs) in said.items()}


def test_the_longest_way_bounds_what_workers_can_save() -> None:
    found = tasks(a=(2, ""), b=(3, "a"), c=(1, "a"), d=(4, "bc"), e=(5, ""))
    rest = remaining_s(found)
    assert rest == {"a": 9, "b": 7, "c": 5, "d": 4, "e": 5}
    assert makespan_s(found, rest, 1) == 15
    assert makespan_s(found, rest, 2) == 10  # a, e begin; b waits for a, c for a worker: e or b frees it at 5
    assert makespan_s(found, rest, 9) == 9


def test_the_schedule_is_never_better_than_the_best_nor_worse_than_twice_it() -> None:
    """Graham's bound for list scheduling, against all orders of small random graphs."""
    generator = random.Random(3)
    for _ in range(40):
        names = "abcdef"
        found = tasks(
            **{
                name: (generator.randint(1, 9), "".join(one for one in names[:i] if generator.random() < 0.3))
                for i, name in enumerate(names)
            }
        )
        best = min(_serial(found, order, 2) for order in itertools.permutations(names))
        assert best <= makespan_s(found, remaining_s(found), 2) <= 2 * best


def _serial(found: dict[str, Task], order: tuple[str, ...], workers: int) -> float:
    """The end of a schedule that takes the tasks in `order`, each on the worker that is free first."""
    free, ends = [0.0] * workers, dict[str, float]()
    for name in order:
        if not found[name].needs <= ends.keys():
            return float("inf")
        start = max([min(free), *(ends[need] for need in found[name].needs)])
        free[free.index(min(free))] = ends[name] = start + (found[name].expected_s or 0)
    return max(ends.values())


def test_the_plan_says_what_it_costs_and_what_the_cache_saves(toy: Toy) -> None:
    toy.pipeline(CHAIN)
    cold = toy.run("plan").stdout
    assert "never run, so without an estimate: a, b, c, d" in cold
    toy.run("run", "run.workers=0")
    assert "the cache saves" in toy.run("plan").stdout
    changed = toy.run("plan", "stages.b.amount=2").stdout
    took = toy.record()["nodes"]["b"]["duration_s"]
    assert re.search(rf"run +b +toy_add +~ {duration(took)} ", changed), changed
    assert re.search(r"wait +d +toy_add +~", changed)
    assert "of computing" in changed
    assert "the longest way" in changed
    assert "b -> c -> d" in changed


def test_a_node_that_never_ran_takes_what_its_stage_took(toy: Toy) -> None:
    toy.pipeline(CHAIN)
    toy.run("run", "run.workers=0")
    toy.pipeline({**CHAIN, "e": {"uses": "toy_add", "scores": "a", "amount": 9}})
    assert re.search(r"run +e +toy_add +~ \d+ ms +never run", toy.run("plan").stdout)


def test_without_its_index_the_cache_tells_the_times_from_its_results(toy: Toy) -> None:
    toy.pipeline(CHAIN)
    toy.run("run", "run.workers=0")
    (toy.folder / "cache" / "index").rename(toy.folder / "gone")
    plan = toy.run("plan", "stages.b.amount=2").stdout
    assert re.search(r"run +b +toy_add +~ [\d.]+ m?s +param amount: 1 -> 2", plan)


def test_what_several_trials_of_a_sweep_share_counts_once(toy: Toy) -> None:
    toy.pipeline(CHAIN)
    refused = toy.run("-m", "stages.d.amount=1,2,3", "run.max_misses=5")
    assert refused.returncode == 4
    assert "run.max_misses=5: 6 nodes would run, 5 of them only if their inputs change" in refused.stderr
    assert toy.calls() == []
    assert toy.run("-m", "stages.d.amount=1,2,3", "run.max_misses=6").returncode == 0
    assert len([name for name in toy.calls() if name != "tick"]) == 6


def test_max_misses_lets_through_what_it_allows_and_refuses_more_before_anything_runs(toy: Toy) -> None:
    toy.pipeline(CHAIN)
    assert toy.run("run", "run.workers=0", "run.max_misses=3").returncode == 4
    assert toy.calls() == []
    assert not (toy.folder / "outputs").exists()
    assert toy.run("run", "run.workers=0", "run.max_misses=4").returncode == 0
    toy.calls()
    assert toy.run("run", "run.workers=0", "run.max_misses=0").returncode == 0
    assert toy.run("plan", "run.max_misses=2", "stages.b.amount=2").returncode == 4
    assert toy.run("run", "run.workers=0", "run.max_misses=3", "stages.b.amount=2").returncode == 0
    assert [name for name in toy.calls() if name != "tick"] == ["add", "sign"]  # the bound was three


def test_a_spent_budget_ends_with_5_and_the_same_command_goes_on(toy: Toy) -> None:
    toy.pipeline(CHAIN)
    run = toy.run("run", "run.workers=0", "run.budget_s=0")
    assert run.returncode == 5
    assert "run.budget_s=0 is spent; 1 actions" in run.stderr
    assert toy.calls() == []
    slow = {**CHAIN, "b": {"uses": "toy_add", "scores": "a", "seconds": 2.2}}
    toy.pipeline(slow)
    assert toy.run("run", "run.workers=0", "run.budget_s=2").returncode == 5
    assert set(toy.calls()) == {"number", "add", "tick"}  # what was under way is finished and kept
    assert toy.record()["status"] == "budget_spent"
    assert {name: node["verdict"] for name, node in toy.record()["nodes"].items()} == {
        "a": "ran",
        "b": "ran",
        "c": "run",
        "d": "wait",
    }
    assert toy.run("run", "run.workers=0", "run.budget_s=60").returncode == 0
    assert toy.calls() == ["sign", "add"]
    assert toy.run("run", "run.workers=0", "run.budget_s=0").returncode == 0  # nothing has to begin


@pytest.mark.parametrize(
    ("option", "said"),
    [("max_misses=-1", "max_misses must be >= 0"), ("budget_s=-2", "budget_s must be >= 0")],
)
def test_a_bound_below_zero_is_refused(toy: Toy, option: str, said: str) -> None:
    toy.pipeline(CHAIN)
    run = toy.run("run", "run.workers=0", f"run.{option}")
    assert run.returncode == 2
    assert said in run.stderr
