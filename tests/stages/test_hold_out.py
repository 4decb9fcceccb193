"""hold_out: two parts of the samples that share none, the same ones every time."""

from __future__ import annotations

import numpy as np
import pytest

from qpipe.stage import Samples
from qpipe.stages.hold_out import hold_out


def numbered(count: int, labels: bool = True) -> Samples:
    found = np.arange(count, dtype=np.float32)
    return Samples({"x": found[:, None], "y": -found}, np.arange(count) // 10 if labels else None)


def test_the_parts_share_no_sample_and_leave_none_out() -> None:
    tuning, held_out = hold_out(numbered(100))
    assert (len(tuning), len(held_out)) == (80, 20)
    together = [*tuning.arrays["x"][:, 0], *held_out.arrays["x"][:, 0]]
    assert sorted(together) == list(range(100))
    for part in (tuning, held_out):
        np.testing.assert_array_equal(part.arrays["y"], -part.arrays["x"][:, 0])
        np.testing.assert_array_equal(part.labels, part.arrays["x"][:, 0].astype(int) // 10)
        assert list(part.arrays["x"][:, 0]) == sorted(part.arrays["x"][:, 0])  # in their old order


@pytest.mark.parametrize("period", [2, 5, 10])
def test_classes_that_come_in_turns_are_on_both_sides(period: int) -> None:
    data = Samples({"x": np.zeros((200, 1), np.float32)}, np.arange(200) % period)
    for part in hold_out(data):
        assert set(part.labels) == set(range(period))


def test_the_seed_says_which() -> None:
    first, again, other = (hold_out(numbered(50, labels=False), seed=seed).held_out for seed in (3, 3, 4))
    assert first.labels is None
    np.testing.assert_array_equal(first.arrays["x"], again.arrays["x"])
    assert list(first.arrays["x"][:, 0]) != list(other.arrays["x"][:, 0])


def test_at_most_so_many_are_held_out() -> None:
    tuning, held_out = hold_out(numbered(100), share=0.5, limit=7)
    assert (len(tuning), len(held_out)) == (93, 7)


def test_of_a_handful_none_is_held_out_and_a_note_says_so(notes) -> None:
    data = numbered(15)
    parts = hold_out(data, ctx=notes)
    assert all(part is data for part in parts)
    assert "15 samples are too few" in notes.notes[0]
