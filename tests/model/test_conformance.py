"""All of ONNX's backend cases, against docs/conformance.md: none fails, and what passes does not regress."""

from __future__ import annotations

import onnx
import pytest

from tests.conformance import PAGE, page, results, whole_operators


@pytest.mark.slow
def test_every_case_passes_or_is_refused_as_the_page_says() -> None:
    found = results()
    failed = {f"{result.kind}/{result.name}": result.reason for result in found if result.outcome == "failed"}
    assert failed == {}
    assert len(found) > 1900
    assert all(result.reason for result in found if result.outcome == "not supported")
    counting, whole = whole_operators(found)
    assert len(whole) >= 0.95 * len(counting)
    committed = PAGE.read_text()
    if f"\nonnx {onnx.__version__}, opset " in committed:
        assert page(found) == committed, "python -m tests.conformance writes the page anew"
