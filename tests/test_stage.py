"""A function's signature as ports, params and outputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import pytest

from qpipe.language.catalog import schema
from qpipe.stage import NULL, REQUIRED, Context, Port, Range, Samples, Scores, describe_function, stage

if TYPE_CHECKING:
    from qpipe.model import Model


class Split(NamedTuple):
    train: Samples
    test: Samples


def tuned(
    model: Model,
    data: Samples | None,
    extra: list[Scores],
    choice: Scores | None = None,
    *,
    iterations: Annotated[int, Range(ge=1)] = 10,
    scheme: str,
    ctx: Context = NULL,
) -> Model:
    """Tunes."""
    return model


def test_ports_params_and_outputs_are_read_off_the_signature() -> None:
    found = describe_function(tuned, 1, {"data": "calibration"}, False)
    assert found.ports == {
        "model": Port("model", "Model", face=True),
        "data": Port("data", "Samples", optional=True),
        "extra": Port("extra", "Scores", many=True),
        "choice": Port("choice", "Scores", optional=True),
    }
    assert list(found.params) == ["iterations", "scheme"]
    assert found.params["scheme"].default is REQUIRED
    assert found.outputs == {"model": "Model"}
    assert found.takes_context
    assert found.summary == "Tunes."


def test_who_asks_for_a_model_has_all_of_it_in_the_key_and_who_asks_for_a_network_has_that() -> None:
    def faced(models: list["Model"]) -> Scores:  # noqa: UP037  # no import says where the name comes from
        return Scores({"score": len(models)})

    def plain(model: "Network | None" = None) -> "Network":  # type: ignore[name-defined]  # noqa: F821, UP037
        return model

    face, network = (describe_function(each, 1, {}, False) for each in (faced, plain))
    assert face.ports == {"models": Port("models", "Model", many=True, face=True)}
    assert face.modules == (__name__, "qpipe.model.model")
    assert network.ports == {"model": Port("model", "Model", optional=True)}
    assert network.modules == (__name__, "qpipe.model.network.network")
    assert network.outputs == {"model": "Model"}


def test_a_named_tuple_gives_several_outputs() -> None:
    def split(data: Samples) -> Split:
        return Split(data, data)

    found = describe_function(split, 1, {}, False)
    assert found.outputs == {"train": "Samples", "test": "Samples"}
    assert found.unpack(Split("a", "b")) == {"train": "a", "test": "b"}  # type: ignore[arg-type]


def test_the_decorated_function_stays_the_function() -> None:
    @stage(version=3)
    def double(scores: Scores) -> Scores:
        return Scores({"score": 2 * scores.values["score"]})

    assert double(Scores({"score": 2})).values["score"] == 4
    assert double.__stage__.version == 3  # type: ignore[attr-defined]


def test_the_schema_holds_every_name_once_with_its_default() -> None:
    found = schema(describe_function(tuned, 1, {"data": "calibration", "scheme": "${scheme}"}, False))
    assert found == {
        "uses": "tuned",
        "enabled": True,
        "model": "???",
        "data": "calibration",
        "extra": "???",
        "choice": None,
        "iterations": 10,
        "scheme": "${scheme}",
    }


def test_a_return_type_that_is_no_kind_is_refused() -> None:
    def wrong(scores: Scores) -> int:
        return 1

    with pytest.raises(TypeError, match="returns <class 'int'>"):
        describe_function(wrong, 1, {}, False)


def test_the_seed_of_a_context_depends_on_names_alone() -> None:
    assert Context().seed("conv1") == Context().seed("conv1") != Context().seed("conv2")


def test_a_param_that_is_text_or_a_path_is_refused() -> None:
    """Nothing would tell whether the file's content counts."""

    def either(*, source: str | Path = "x") -> Scores:
        return Scores({})

    with pytest.raises(TypeError, match="'source' takes text and paths"):
        stage(version=1)(either)


def test_the_meaning_of_a_param_is_the_clauses_that_name_it() -> None:
    def mend(model: Model, *, limit: int = 1, mode: str = "a", rest: int = 0) -> Model:
        """The model, mended with `limit`.

        `limit` samples count, evenly spread; `mode: b` takes 0.5 of them. Both
        need `limit`. Errors: InputError for a `rest` that is wrong.
        """
        return model

    described = describe_function(mend, 1, {}, False)
    assert described.meaning("limit") == "limit samples count, evenly spread; Both need limit"
    assert described.meaning("mode") == "mode: b takes 0.5 of them"
    assert described.meaning("rest") == ""
