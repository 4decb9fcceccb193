"""Things that were joined have one leader, against networkx."""

from __future__ import annotations

import numpy as np
import pytest
from networkx.utils import UnionFind

from qpipe.model.structure.families import Joined


@pytest.mark.parametrize("seed", range(20))
def test_the_same_things_go_together(seed: int) -> None:
    rng = np.random.default_rng(seed)
    joined: Joined[int] = Joined()
    wanted = UnionFind(range(60))
    for _ in range(40):
        first, *others = (int(each) for each in rng.integers(0, 60, rng.integers(1, 4)))
        joined.join(first, others)
        wanted.union(first, *others)
    found: dict[int, set[int]] = {}
    for thing in range(60):
        found.setdefault(joined.leader(thing), set()).add(thing)
    assert sorted(map(sorted, found.values())) == sorted(map(sorted, wanted.to_sets()))


def test_the_leader_of_the_first_leads_all() -> None:
    joined: Joined[str] = Joined()
    joined.join("a", ["b"])
    joined.join("c", ["d"])
    joined.join("d", ["b"])
    assert {joined.leader(each) for each in "abcd"} == {"c"}
    assert joined.leader("alone") == "alone"


def test_a_long_chain_is_shortened() -> None:
    joined: Joined[int] = Joined()
    for each in range(100_000):
        joined.join(each + 1, [each])  # each leader in turn gets one above it
    assert joined.leader(0) == 100_000
    assert all(joined.leader(each) == 100_000 for each in range(100_000))
