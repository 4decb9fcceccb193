"""The float model whose values a tuned one is to give: it has to compute the same ones under the same names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qpipe.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Collection

    from qpipe.model.network.network import Network

REWRITING = ("prepare", "bnf", "cle", "hbf")
"""Whose reports in the metadata tell that float values were moved, and by how much."""


def reference_of(
    model: Network, float_model: Network | None, weights: Collection[str], values: Collection[str], stage: str
) -> Network:
    """`float_model`, or the model itself, whose float weights are there unless they were tuned.

    `weights` are the initializers that are learned, `values` those that are held against float's. Errors: InputError,
    one line for the node `stage`, where the float weights are gone, or those of another model.
    """
    if float_model is None:
        tuned = [name for name in weights if model.encodings[name].frozen]
        if tuned:
            raise InputError(
                f"{stage}.float_model: '{tuned[0]}' was tuned before, so its float values are gone, got none. Give "
                f"the model that the tuning started from: {stage}: {{float_model: start}}."
            )
        return model
    for name in weights:
        why = _unlike(model, float_model, name)
        if why:
            raise InputError(
                f"{stage}.float_model: '{name}' {why}. Give the model that the tuning started from, after all that "
                "moves float weights (cle, bnf)."
            )
    _refuse_other_values(model, float_model, values, stage)
    return float_model


def _unlike(model: Network, reference: Network, name: str) -> str | None:
    """What tells that the weight `name` of `reference` is not the float one of `model`."""
    if name not in reference.graph.initializers:
        return "is not there"
    weight, tuned = reference.param(name), model.param(name)
    if weight.shape != tuned.shape:
        return f"has the shape {list(weight.shape)}, in the tuned model {list(tuned.shape)}"
    encoding = reference.encodings.get(name)
    if encoding is not None and encoding.frozen:
        return "was tuned there too"
    away = float(np.square(tuned - weight, dtype=np.float64).sum())
    if away > float(np.square(weight, dtype=np.float64).sum()):
        return "lies further from the tuned one than 0 does"
    return None


def _refuse_other_values(model: Network, reference: Network, wanted: Collection[str], stage: str) -> None:
    for name in REWRITING:
        if model.metadata.get(name) != reference.metadata.get(name):
            raise InputError(
                f"{stage}.float_model: it did not go through the same '{name}' as the model, so the values inside "
                "are others. Give the model that the tuning started from."
            )
    values = {str(output.name) for node in reference.graph for output in node.outputs}
    values |= {spec.name for spec in reference.inputs}
    for name in wanted:
        if name not in values:
            raise InputError(
                f"{stage}.float_model: it has no value '{name}', which is held against its own. Give the model that "
                "the tuning started from."
            )
