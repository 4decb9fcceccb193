"""Every random graph: imported, folded, equalized, quantized, written and read, it computes what it did.

A search with new seeds: `pytest tests/model/test_random_graphs.py --hypothesis-profile=search`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings

from tests.model.graphs import Case, cases
from tests.model.properties import PROPERTIES

EXAMPLES = {"import": 40, "import_recent": 15, "gradients": 30, "stages": 60, "parity": 35, "round_trip": 25}
MANY = {"import": 140, "import_recent": 45, "gradients": 100, "stages": 200, "parity": 100, "round_trip": 80}


def search(name: str, examples: Mapping[str, int]) -> None:
    """Try the property `name` on that many graphs, or on as many as the profile says where it draws new ones."""
    check, strategy = PROPERTIES[name]

    @settings(
        max_examples=examples[name] if settings().derandomize else settings().max_examples,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    @given(strategy)
    def holds(drawn: Any) -> None:
        check(drawn)

    holds()


@pytest.mark.parametrize("name", PROPERTIES)
def test_random_graphs(name: str) -> None:
    search(name, EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROPERTIES)
def test_many_random_graphs(name: str) -> None:
    search(name, MANY)


def test_the_graphs_are_what_they_say() -> None:
    """Their outputs have the shapes that the pieces reckoned, and they have all kinds of nodes, opsets and names."""
    seen: set[str] = set()

    @settings(max_examples=150, suppress_health_check=list(HealthCheck))
    @given(cases())
    def look(case: Case) -> None:
        from tests.model.graphs import reference

        found = reference(case.proto, case.feeds)
        for output in case.proto.graph.output:
            dims = [dim.dim_value for dim in output.type.tensor_type.shape.dim]
            assert all(size in (0, actual) for size, actual in zip(dims, found[output.name].shape, strict=True))
        onnx.checker.check_model(case.proto)
        seen.update(node.op_type for node in case.proto.graph.node)
        seen.add(f"opset {case.proto.opset_import[0].version}")
        seen.add(f"{len(case.proto.graph.output)} outputs")
        assert all(np.isfinite(array).all() for array in case.feeds.values())

    look()
    wanted = {"Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "Clip", "PRelu", "Pad", "Softmax"}
    assert wanted <= seen
    assert len([item for item in seen if item.startswith("opset")]) >= 8
    assert {"1 outputs", "2 outputs"} <= seen
