"""Labs for the crash tests, and the count of what was tried."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from tests.trust.conftest import lab

__all__ = ["lab"]


@pytest.fixture
def crash_report(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Iterator[Counter[str]]:
    """Counts of a test: shown with -s, summed up at the end of the session, kept in the JUnit report."""
    counts: Counter[str] = Counter()
    yield counts
    print(f"\n{request.node.name}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    record_property("crash", dict(counts))
