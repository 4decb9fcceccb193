"""Every mutant fits the source, and names tests that there are; whether they notice it, `make mutants` says."""

from __future__ import annotations

from pathlib import Path

from tests.mutants.mutant import read_tables

ROOT = Path(__file__).parents[1]


def test_every_mutant_fits_the_source_and_names_tests_that_there_are() -> None:
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    for mutant in read_tables().values():
        mutant.applied(ROOT)
        for test in mutant.tests:
            path, *names = test.partition("[")[0].split("::")
            for name in names:
                assert any(f"{kind} {name}" in sources[ROOT / path] for kind in ("def", "class")), test
