"""What every built-in stage owes: types, documentation, a source, a test of its own, a schema that plans."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

from qpipe.language.catalog import MISSING, catalog, schema
from qpipe.param import coerce
from qpipe.stage import REQUIRED

ROOT = Path(__file__).parent.parent
STAGES = sorted(path.stem for path in (ROOT / "stages").glob("*.py") if not path.stem.startswith("_"))


@pytest.mark.parametrize("name", STAGES)
def test_its_file_says_what_it_assumes_and_where_it_comes_from(name: str) -> None:
    text = ast.get_docstring(ast.parse((ROOT / "stages" / f"{name}.py").read_text())) or ""
    assert "Assumes:" in text
    assert "Source:" in text


@pytest.mark.parametrize("name", STAGES)
def test_its_function_is_the_last_in_the_file_and_documented(name: str) -> None:
    functions = [
        node for node in ast.parse((ROOT / "stages" / f"{name}.py").read_text()).body if hasattr(node, "args")
    ]
    assert isinstance(functions[-1], ast.FunctionDef)
    assert functions[-1].name == name
    assert catalog()[name].summary


@pytest.mark.parametrize("name", STAGES)
def test_its_docstring_says_what_each_param_means(name: str) -> None:
    """`qpipe stages NAME` shows it."""
    stage = catalog()[name]
    for param in stage.params:
        assert len(stage.meaning(param).replace(param, "").split()) >= 2, param


@pytest.mark.parametrize("name", STAGES)
def test_its_defaults_are_of_the_types_that_it_declares(name: str) -> None:
    stage = catalog()[name]
    for param in stage.params.values():
        if param.default is not REQUIRED:
            written = schema(stage)[param.name] if param.name not in stage.config else param.default
            assert coerce(written, param.hint, param.name) == param.default


@pytest.mark.parametrize("name", STAGES)
def test_its_schema_is_plain_and_only_ports_and_required_params_are_missing(name: str) -> None:
    stage = catalog()[name]
    for key, value in schema(stage).items():
        if value == MISSING:
            required = key in stage.params and stage.params[key].default is REQUIRED
            assert required or (key in stage.ports and not stage.ports[key].optional)


NOT_HERE_YET = {"bias_correction"}
"""Techniques of plug-ins that built-in ones say an order about."""


@pytest.mark.parametrize("name", STAGES)
def test_the_orders_that_it_advises_against_name_stages_and_say_why(name: str) -> None:
    stage = catalog()[name]
    for orders in (stage.not_after, stage.not_before):
        assert set(orders) <= {*STAGES, *NOT_HERE_YET} - {name}
        assert all(len(why.split()) > 4 and not why.endswith(".") for why in orders.values())


@pytest.mark.parametrize("name", STAGES)
def test_it_has_a_test_file_of_its_own(name: str) -> None:
    assert (ROOT / "tests" / "stages" / f"test_{name}.py").exists()


@pytest.mark.parametrize("name", STAGES)
def test_it_stays_a_function_that_anyone_can_call(name: str) -> None:
    module = importlib.import_module(f"qpipe.stages.{name}")
    assert callable(getattr(module, name))
    assert getattr(module, name).__stage__.name == name
