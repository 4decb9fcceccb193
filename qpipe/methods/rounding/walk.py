"""The float and the quantized model walked side by side, layer by layer, for methods that tune weights in order.

Each stops in front of a layer, hands out what goes into it in both models, has the layer's weight replaced in
the quantized one, and goes on: later layers see what the tuned ones make of the data. A walk costs one
forward pass of each model, however many layers are tuned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch

from qpipe.errors import InputError
from qpipe.model.simulation.constants import taken_in
from qpipe.model.simulation.module import to_torch
from qpipe.model.simulation.samples import batches
from qpipe.model.simulation.stream import Stream
from qpipe.model.structure.channels import bias_vector, own_bias, set_bias
from qpipe.model.structure.layers import find_layers, refused_layers
from qpipe.numerics.grid import quantize_dequantize
from qpipe.numerics.learning.losses import squared_error

if TYPE_CHECKING:
    from torch import Tensor

    from qpipe.model.network.network import Network
    from qpipe.model.structure.layers import Layer
    from qpipe.numerics.grid import Encoding

Array = npt.NDArray[Any]
BATCH_SIZE = 32
"""Samples that run through a node at once. Fixed, so that results do not depend on a setting."""


@dataclass(frozen=True, eq=False)
class Rounded:
    """A weight on the grid of `encoding`, which is frozen; `bias` (O,) or None where it stays; JSON `report`."""

    weight: Array
    bias: Array | None
    encoding: Encoding
    report: dict[str, Any]


def tunable_layers(model: Network) -> tuple[tuple[Layer, ...], dict[str, str]]:
    """The layers whose weights may be tuned, in order, and the reason for each other one, by its name.

    A weight has to have a grid that is not frozen. One that several layers share is tuned where it is used first.
    """
    chosen: list[Layer] = []
    refused = refused_layers(model)
    first: dict[str, str] = {}
    for layer in find_layers(model):
        encoding = model.encodings.get(layer.weight)
        if encoding is None:
            refused[layer.name] = "its weight has no encoding"
        elif encoding.frozen:
            refused[layer.name] = "its weight was tuned before"
        elif layer.weight in first:
            refused[layer.name] = f"it shares the weight of '{first[layer.weight]}' and is tuned there"
        else:
            first[layer.weight] = layer.name
            chosen.append(layer)
    return tuple(chosen), refused


def with_biases(model: Network, layers: Sequence[Layer]) -> Network:
    """The model with a bias of its own for each of `layers`; a MatMul without one stays without."""
    editor = model.edit()
    for layer in layers:
        if layer.bias is not None or layer.op_type != "MatMul":
            own = own_bias(editor, layer)
            set_bias(editor, own, bias_vector(editor, own))
    return editor.model()


class Walk:
    """Where both models stand. `asymmetric` False walks the float model alone, and serves its inputs twice."""

    def __init__(
        self,
        model: Network,
        arrays: Mapping[str, Array],
        *,
        asymmetric: bool = True,
        device: str = "cpu",
    ) -> None:
        """Raises InputError for data that do not fit the model."""
        taken = (batch.arrays for batch in batches(model, arrays, BATCH_SIZE))
        data = [tuple(taken_in(array, "cpu") for array in batch) for batch in taken]
        self._float = Stream(to_torch(model, quantized=False, device=device), data)
        self._quantized = Stream(to_torch(model, device=device), data) if asymmetric else None
        self._reference: list[Any] | None = None

    def inputs(self, layer: Layer) -> tuple[list[Tensor], list[Tensor]]:
        """What goes into `layer` in the quantized and in the float model, a tensor per batch each."""
        self._float.advance(layer.name)
        x = self._float.value(layer.input)
        if self._quantized is None:
            return x, x
        self._quantized.advance(layer.name)
        return self._quantized.value(layer.input), x

    def output_error(self) -> float:
        """The squared error of the quantized model's outputs, as it stands, over the float model's squares.

        Runs what is left of both models, of the float one once. Errors: InputError where the float model walks alone.
        """
        if self._quantized is None:
            raise InputError("There is no quantized model to judge by: set asymmetric, or leave selective_update out.")
        if self._reference is None:
            self._reference = self._float.fork().finish()
        error = energy = 0.0
        for found, wanted in zip(self._quantized.fork().finish(), self._reference, strict=True):
            part, of = squared_error(found, wanted)
            error, energy = error + float(part), energy + float(of)
        return error / energy if energy > 0.0 else error

    def replace(self, layer: Layer, weight: Array, bias: Array | None, encoding: Encoding) -> None:
        """The quantized model goes on with this weight on this grid, and this bias unless it is None."""
        if self._quantized is None:
            return
        self._quantized.set_parameter(layer.weight, torch.tensor(weight))
        if bias is not None and layer.bias is not None:
            self._quantized.set_parameter(layer.bias, torch.tensor(bias))
        module = self._quantized.module
        quantizer: Any = module.get_submodule(module.meta["quantizers"][layer.weight])
        quantizer.set_encoding(encoding)


def round_in_order(
    model: Network,
    layers: Sequence[Layer],
    walk: Walk,
    tune: Callable[[int, Layer, list[Tensor], list[Tensor]], Rounded],
    *,
    note: Callable[[str], None],
    progress: Callable[[int, int, str], None],
    selective: bool = False,
) -> tuple[Network, dict[str, Any]]:
    """The model with the weights of `layers` rounded, frozen on their grids, and the report of each, by its name.

    `tune` gets a layer, its number, and what goes into it in the quantized and in the float model. Layers that keep
    nearest rounding are noted. `selective` keeps a tuned layer only where the model's outputs err less with it.
    """
    editor, reports = model.edit(), {}
    for index, layer in enumerate(layers):
        tuned = tune(index, layer, *walk.inputs(layer))
        if selective:
            tuned = _selected(model, layer, walk, tuned)
        walk.replace(layer, tuned.weight, tuned.bias, tuned.encoding)
        editor.set_param(layer.weight, tuned.weight)
        if tuned.bias is not None and layer.bias is not None:
            editor.set_param(layer.bias, tuned.bias.reshape(editor.param(layer.bias).shape))
        editor.encodings[layer.weight] = tuned.encoding
        reports[layer.name] = tuned.report
        if tuned.report["kept"] == "nearest":
            whose = "that of the model's outputs" if "outputs_before" in tuned.report else "its error"
            note(f"'{layer.name}' keeps nearest rounding: tuning did not lower {whose}.")
        progress(index + 1, len(layers), layer.name)
    return editor.model(), reports


def _selected(model: Network, layer: Layer, walk: Walk, tuned: Rounded) -> Rounded:
    """`tuned`, or nearest rounding where the model's outputs do not err less with it; the report has both errors."""
    weight, encoding = model.param(layer.weight), model.encodings[layer.weight]
    bias = None if layer.bias is None else model.param(layer.bias).reshape(-1)
    before = walk.output_error()
    walk.replace(layer, tuned.weight, tuned.bias, tuned.encoding)
    after = walk.output_error()
    report = {**tuned.report, "outputs_before": before, "outputs_after": after}
    if after < before:
        return replace(tuned, report=report)
    nearest, report["kept"] = quantize_dequantize(weight, encoding), "nearest"
    return Rounded(nearest, bias, replace(encoding, frozen=True), report)
