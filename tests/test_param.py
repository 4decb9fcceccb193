"""A value from a config against the type that a signature gives it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from qpipe.errors import ConfigError
from qpipe.param import Factory, Range, coerce, describe, factories_in


@dataclasses.dataclass(frozen=True)
class Grid:
    bitwidth: int
    kind: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        if self.bitwidth > 16:
            raise ValueError(f"bitwidth must be at most 16, got {self.bitwidth}.")


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, int, 1),
        (1, float, 1.0),
        (True, bool, True),
        ("x", str, "x"),
        (7, str, "7"),
        ("a/b", Path, Path("a/b")),
        (None, int | None, None),
        (3, int | None, 3),
        ([1, 2], tuple[float, ...], (1.0, 2.0)),
        ([20, 2], tuple[float, float], (20.0, 2.0)),
        ([1], list[int], [1]),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
        ("a", Literal["a", "b"], "a"),
        ({"bitwidth": 4}, Grid, Grid(4)),
        ("pkg.mod:function", Factory | None, "pkg.mod:function"),
        ("top1", Literal["top1"] | Factory, "top1"),
    ],
)
def test_a_fitting_value_becomes_one_of_the_type(value: Any, hint: Any, expected: Any) -> None:
    found = coerce(value, hint, "stages.x.p")
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "words"),
    [
        ("x", int, "stages.x.p: expected int, got 'x'"),
        (1.5, int, "expected int, got 1.5"),
        (True, int, "expected int, got True"),
        (True, float, "expected float, got True"),
        (1, bool, "expected bool, got 1"),
        (0, Annotated[int, Range(ge=1)], "stages.x.p: must be >= 1, got 0"),
        (2.0, Annotated[float, Range(gt=0, le=1)], "must be > 0 and <= 1, got 2.0"),
        (None, int, "expected int, got None"),
        ("gramm", Literal["gram", "gradient"], "Did you mean 'gram'?"),
        ([1], tuple[float, float], "expected 2 values, got 1"),
        ({"bitwidth": 4, "kin": "a"}, Grid, "no field 'kin' here. Did you mean 'kind'?"),
        ({}, Grid, "stages.x.p.bitwidth: missing"),
        ({"bitwidth": 32}, Grid, "stages.x.p: bitwidth must be at most 16, got 32."),
        ({"bitwidth": "4"}, Grid, "stages.x.p.bitwidth: expected int, got '4'"),
        ("", Path, "expected a path, got ''"),
        ("os.path", Factory, "expected 'module:function', got 'os.path'"),
        ("1bad:f", Factory, "expected 'module:function'"),
    ],
)
def test_anything_else_is_refused_with_address_and_value(value: Any, hint: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        coerce(value, hint, "stages.x.p")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_type_is_described_in_words() -> None:
    assert describe(Annotated[int, Range(ge=1)] | None) == "int >= 1 or null"
    assert describe(tuple[float, ...]) == "a list of float"


def test_a_factory_is_found_inside_a_union() -> None:
    assert list(factories_in("m:f", Factory | None)) == ["m:f"]
    assert list(factories_in("m:f", Literal["top1"] | Factory)) == ["m:f"]
    assert not list(factories_in("m:f", str | None))


def test_negative_zero_arrives_as_the_zero_that_its_key_says() -> None:
    assert math.copysign(1.0, coerce(-0.0, float, "x")) == 1.0
