# `make demo`: set up, then quantize the built-in model. `make test`: set up, then run the tests; `make test-slow`: those
# that take longer, such as whole networks and processes killed by the hundred; `make mutants`: whether the tests notice
# when one line of what must never be wrong is flipped.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# More than two cores: some tests wait, for processes that they kill, for leases that run out.
WORKERS ?= 3

.PHONY: demo test test-slow mutants lint types setup clean

demo: $(VENV)/.installed
	$(BIN)/qpipe

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow

mutants: $(VENV)/.installed-dev
	$(BIN)/python -m tests.mutants --workers $(WORKERS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy qpipe stages

setup: $(VENV)/.installed-dev

# The CPU build of torch is enough, and by far the smaller one: it is taken where the index offers it.
$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "qpipe needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "torch==2.13.0"

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	$(BIN)/python -m compileall -q qpipe stages conf
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	$(BIN)/python -m compileall -q qpipe stages conf
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) outputs build *.egg-info
