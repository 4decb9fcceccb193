"""What the stages that learn part by part share: what is refused and noted, what the model says of it afterwards."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qpipe.errors import InputError
from qpipe.methods.learning.parts import Blocks, Part, find_parts, learnable_layers
from qpipe.methods.learning.reference import reference_of
from qpipe.methods.learning.stretch import groups
from qpipe.methods.learning.tune import Surroundings, Tuning, tune
from qpipe.methods.rounding.walk import with_biases
from qpipe.numerics.learning.cells import WIDEST, powers_of_two

if TYPE_CHECKING:
    import numpy as np

    from qpipe.model.network.network import Network

    Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Division:
    """How the network is divided; see `find_parts`."""

    blocks: Blocks = "auto"
    ops: Collection[str] | None = None
    together: int = 1


def learn_by_parts(
    stage: str,
    model: Network,
    float_model: Network | None,
    arrays: Mapping[str, Array],
    division: Division,
    tuning: Tuning,
    around: Surroundings,
) -> Network:
    """The model with its parts learned, and `metadata[stage]` with the report of each; a model that came quantized, and
    whose float weights nobody gives, as it is.

    Errors: InputError where nothing can be learned, for a float model of other values, and data that do not fit.
    """
    parts, left_out = find_parts(model, division.blocks, ops=division.ops, together=division.together)
    if parts and model.facts.came_quantized and float_model is None:
        around.note(f"The model came quantized, and its weights stay on their grids: {stage} leaves it as it is.")
        return model
    _refuse_nothing(stage, model, parts, left_out)
    _refuse_wide(stage, model, parts)
    weights = [name for part in parts for name in part.weights]
    values = [name for part in parts for name in (*part.inputs, part.output)]
    reference = reference_of(model, float_model, weights, values, stage)
    if tuning.begin == "gram" and tuning.begin_bias:
        model = with_biases(model, learnable_layers(model)[0])
        parts, _ = find_parts(model, division.blocks, ops=division.ops, together=division.together)
    tuned, reports = tune(model, reference, arrays, parts, tuning, around)
    for name, reason in left_out.items():
        around.note(f"'{name}' is not tuned: {reason}.")
    return tuned.with_metadata({stage: {"parts": reports, "not_tuned": left_out}})


def refuse_powers_of_two(stage: str, param: str, model: Network, names: Collection[str]) -> None:
    """Errors: InputError where any of these grids has scales that are all powers of two, which may not move."""
    found = [name for name in names if powers_of_two(model.encodings[name])]
    if found:
        raise InputError(
            f"{stage}.{param}: the scales of '{found[0]}' are powers of two, and would leave their grid, got true. "
            f"Leave it out: what may move does."
        )


def activations(model: Network) -> list[str]:
    """The activations whose grids may be learned, one of each group."""
    return list(groups(model))


def _refuse_nothing(stage: str, model: Network, parts: Sequence[Part], left_out: Mapping[str, str]) -> None:
    if parts:
        return
    found = "; ".join(f"'{name}': {reason}" for name, reason in left_out.items()) or "there is no layer"
    way_out = f"Leave '{stage}' out." if model.encodings else f"Put the stage 'calibrate' before '{stage}'."
    raise InputError(f"{stage}: no layer can be tuned: {found}. {way_out}")


def _refuse_wide(stage: str, model: Network, parts: Sequence[Part]) -> None:
    for part in parts:
        for name in part.weights:
            bits = model.encodings[name].bitwidth
            if bits > WIDEST:
                raise InputError(
                    f"{stage}: weights of at most {WIDEST} bits can be learned, '{name}' has {bits}. Give it fewer, or "
                    f"leave '{stage}' out."
                )
