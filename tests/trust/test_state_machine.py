"""Random pipelines, edits, kills and losses, against an executor that keeps nothing.

What a run ends with always equals what plain functions make of the same pipeline; and no action runs more often than it
has distinct keys, not counting what was killed under way or taken out of the cache since.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from qpipe.cache.cleanup import collect
from qpipe.cache.store import Store
from tests.nursery import Nursery
from tests.trust.lab import Lab, blobs, flip

FORMULAS: dict[int, tuple[str, Callable[[float, float], float]]] = {
    0: ("def add(a, b):\n    return a + b\n", lambda a, b: a + b),
    1: ("def add(a, b):\n    # a comment\n    return (a + b)\n", lambda a, b: a + b),
    2: ("def add(a, b):\n    return a - b\n", lambda a, b: a - b),
    3: ("def add(a, b):\n    return a * b\n", lambda a, b: a * b),
}
Node = dict[str, Any]


def naive(nodes: dict[str, Node], formula: int, files: dict[str, str]) -> dict[str, float]:
    """The score of every node, computed by plain functions in the order of their declaration."""
    score: dict[str, float] = {}
    for name, node in nodes.items():
        match node["uses"]:
            case "toy_number":
                score[name] = float(node["value"])
            case "toy_read":
                score[name] = float(files[node["path"]])
            case "toy_add":
                score[name] = float(FORMULAS[formula][1](score[node["scores"]], node["amount"]))
            case "toy_sign":
                score[name] = 1.0 if score[node["scores"]] > 0 else -1.0
            case "toy_total":
                score[name] = float(sum(score[part] for part in node["scores"]))
    return score


class Cache(RuleBasedStateMachine):
    """One folder with its cache; pipelines of up to eight nodes, each wired to those before it."""

    nursery: Nursery
    """Set by the test that runs the machine."""

    def __init__(self) -> None:
        super().__init__()
        memory = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(prefix="qpipe-", dir=memory if memory.is_dir() else None))
        self.lab = Lab(self.folder / "lab", self.nursery)
        self.files = {"one.txt": "1", "two.txt": "2"}
        self.formula = 0
        self.nodes: dict[str, Node] = {}
        self.keys: set[str] = set()
        self.lost = 0
        self.executed = 0

    @initialize(seed=st.integers(0, 2**16))
    def begin(self, seed: int) -> None:
        for name, text in self.files.items():
            (self.lab.folder / name).write_text(text)
        self.write(seed)

    @rule(seed=st.integers(0, 2**16))
    def write_another_pipeline(self, seed: int) -> None:
        self.write(seed)
        self.run()

    def write(self, seed: int) -> None:
        rng = random.Random(seed)
        self.nodes = {"n0": {"uses": "toy_number", "value": rng.randrange(-3, 4)}}
        for i in range(1, rng.randrange(2, 8)):
            before = list(self.nodes)
            kind = rng.choice(("toy_number", "toy_read", "toy_add", "toy_add", "toy_sign", "toy_total"))
            node: Node = {"uses": kind}
            if kind == "toy_number":
                node["value"] = rng.randrange(-3, 4)
            elif kind == "toy_read":
                node["path"] = rng.choice(list(self.files))
            elif kind == "toy_total":
                node["scores"] = rng.sample(before, rng.randrange(1, len(before) + 1))
            else:
                node["scores"] = rng.choice(before)
            if kind == "toy_add":
                node["amount"] = rng.randrange(-2, 3)
            self.nodes[f"n{i}"] = node

    @rule(value=st.integers(-3, 3), pick=st.integers(0, 7))
    def edit_a_param(self, value: int, pick: int) -> None:
        name = list(self.nodes)[pick % len(self.nodes)]
        for param in ("value", "amount"):
            if param in self.nodes[name]:
                self.nodes[name][param] = value
        self.run()

    @rule(formula=st.sampled_from(sorted(FORMULAS)))
    def edit_the_code(self, formula: int) -> None:
        self.formula = formula
        self.lab.formula.write_text(FORMULAS[formula][0])
        self.run()

    @rule(name=st.sampled_from(["one.txt", "two.txt"]), value=st.integers(0, 3))
    def edit_an_input(self, name: str, value: int) -> None:
        self.files[name] = str(value)
        (self.lab.folder / name).write_text(str(value))
        self.run()

    @rule()
    def run(self) -> None:
        self.run_at_once(1)

    @rule()
    def run_beside_another(self) -> None:
        self.run_at_once(2)

    def run_at_once(self, count: int) -> None:
        children = [self.lab.begin(self.nodes, folder=f"run{i}") for i in range(count)]
        right = naive(self.nodes, self.formula, self.files)
        for i, child in enumerate(children):
            assert child.wait() == 0, child.text()
            nodes = self.lab.record_of(f"run{i}")["nodes"]
            assert {name: (node["scores"] or {}).get("score") for name, node in nodes.items()} == right
            self.keys |= {node["key"] for node in nodes.values()}
        self.executed += len(self.lab.calls())

    @rule(share=st.floats(0.0, 1.0))
    def run_and_kill(self, share: float) -> None:
        child = self.lab.begin(self.nodes)
        time.sleep(share * 0.15)
        child.kill()
        child.wait()
        calls = len(self.lab.calls())
        self.executed += calls
        self.lost += calls  # of their keys, the record that would tell them is not there

    @rule(seed=st.integers(0, 2**16))
    def lose_a_blob(self, seed: int) -> None:
        if found := blobs(self.lab.cache):
            path = random.Random(seed).choice(found)
            self.lost += sum(1 for result in self.results() if path.name in result["blobs"])
            path.unlink()

    @rule(seed=st.integers(0, 2**16))
    def turn_a_bit(self, seed: int) -> None:
        if found := blobs(self.lab.cache):
            path = random.Random(seed).choice(found)
            self.lost += sum(1 for result in self.results() if path.name in result["blobs"])
            flip(path)

    @rule(seed=st.integers(0, 2**16), damaged=st.booleans())
    def lose_a_result(self, seed: int, damaged: bool) -> None:
        found = sorted(self.lab.cache.glob("actions/*/*.json"))
        if found:
            path = random.Random(seed).choice(found)
            self.lost += 1
            flip(path) if damaged else path.unlink()

    @rule(everything=st.booleans())
    def collect_garbage(self, everything: bool) -> None:
        if self.lab.cache.exists():
            with Store(self.lab.cache) as store:
                removed = collect(store, older_than_s=-1.0 if everything else None)
            self.lost += removed.results

    @rule()
    def lose_the_index(self) -> None:
        shutil.rmtree(self.lab.cache / "index", ignore_errors=True)

    @invariant()
    def nothing_runs_twice(self) -> None:
        assert self.executed <= len(self.keys) + self.lost

    def results(self) -> list[dict[str, Any]]:
        store = Store(self.lab.cache, readonly=True)
        return [result for key in list(store.keys()) if (result := store.result(key)) is not None]

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def carry_out(nursery: Nursery, examples: int, steps: int, *phases: Phase) -> None:
    machine = type("Machine", (Cache,), {"nursery": nursery})
    profile = settings(
        max_examples=examples,
        stateful_step_count=steps,
        phases=(Phase.generate, *phases),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=profile)


def test_a_cache_never_differs_from_none(nursery: Nursery) -> None:
    carry_out(nursery, 10, 20)  # a failure is told as it came: to make it small takes minutes


@pytest.mark.slow
def test_a_cache_never_differs_from_none_for_long(nursery: Nursery) -> None:
    carry_out(nursery, 20, 40, Phase.shrink)
