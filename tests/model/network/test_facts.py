"""Facts as JSON, and back."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qpipe.model.network.facts import Facts, Spread, facts_from


def test_what_is_as_it_always_is_takes_no_word() -> None:
    assert Facts().to_json() == {}
    assert facts_from({"notes": ["other entries"]}) == Facts()


def test_all_that_differs_comes_back_as_it_was() -> None:
    spread = Spread(np.array([0.1, -2.0]), np.array([1 / 3, 0.0]))
    facts = Facts("float", True, {"conv": spread}, {"head.weight": "table.weight"})
    again = facts_from(json.loads(json.dumps(facts.to_json())))
    assert (again.biases, again.came_quantized, again.tied) == ("float", True, {"head.weight": "table.weight"})
    np.testing.assert_array_equal(again.statistics["conv"].gamma, spread.gamma)
    np.testing.assert_array_equal(again.statistics["conv"].beta, spread.beta)


def test_biases_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match="int32 or float, got 'int16'"):
        Facts(biases="int16")  # type: ignore[arg-type]
