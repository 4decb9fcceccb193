"""Every mutant fits the source, and names tests that there are; whether they notice it, `make mutants` says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants.mutant import Mutant, read_tables

ROOT = Path(__file__).parents[1]
MUTANTS = read_tables()


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_mutant_fits_the_source_and_names_tests_that_there_are(mutant: Mutant) -> None:
    mutant.applied(ROOT)
    for test in mutant.tests:
        path, *names = test.partition("[")[0].split("::")
        source = (ROOT / path).read_text(encoding="utf-8")
        for name in names:
            assert f"def {name}(" in source or f"class {name}" in source, test
