"""One line flipped at a time, in a copy: whether the tests that hold it notice. `make mutants`; by hand, not in CI."""
