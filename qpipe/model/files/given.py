"""What a user decides about a model's inputs before it is brought into form: a value, or the sizes of dimensions.

What follows from it is decided too: which branch an `If` takes, how often a `Loop` runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qpipe.errors import InputError

Array = np.ndarray[Any, np.dtype[Any]]
Size = int | str | None


def fix_inputs(model: ir.Model, values: Mapping[str, Any]) -> dict[str, Array]:
    """Make inputs constants, in place; the arrays by name. A number fills an input of any known shape.

    Raises InputError for a name that is no input, and for a value that the input cannot have."""
    fixed = {name: _as_input(_input(model, name), value) for name, value in values.items()}
    for name, array in fixed.items():
        value = _input(model, name)
        # A Constant rather than an initializer, which would count as one of the model's parameters.
        node = ir.node("Constant", [], {"value": ir.Tensor(array, name=name)})
        model.graph.inputs.remove(value)
        if value.is_initializer():
            del model.graph.initializers[name]
        node.outputs[0].type, node.outputs[0].shape = value.type, ir.Shape(array.shape)
        value.replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)
        first = next(iter(model.graph), None)
        if first is None:
            model.graph.append(node)
        else:
            model.graph.insert_before(first, node)
    return fixed


def fix_shapes(model: ir.Model, shapes: Mapping[str, Sequence[Size]]) -> None:
    """Give inputs a shape, in place: a number fixes a dimension, a name calls it so, None leaves it as it is.

    Raises InputError for a name that is no input, another number of dimensions, a size that the file contradicts."""
    for name, shape in shapes.items():
        value = _input(model, name)
        if value.shape is not None and len(value.shape) != len(shape):
            raise InputError(
                f"shapes: input '{name}' has {len(value.shape)} dimensions {_said(value.shape)}, not {len(shape)}."
            )
        old = list(value.shape) if value.shape is not None else [ir.SymbolicDim(None)] * len(shape)
        for axis, (mine, theirs) in enumerate(zip(old, shape, strict=True)):
            if isinstance(theirs, int) and theirs < 1:
                raise InputError(f"shapes: dimension {axis} of '{name}' has to be at least 1, got {theirs}.")
            if isinstance(mine, int) and isinstance(theirs, int) and 0 < mine != theirs:
                raise InputError(f"shapes: dimension {axis} of '{name}' is {mine} in the file, not {theirs}.")
        value.shape = ir.Shape([_fixed(mine, theirs) for mine, theirs in zip(old, shape, strict=True)])


def _fixed(mine: int | ir.SymbolicDim, theirs: Size) -> Size:
    if isinstance(mine, int) and mine > 0:
        return mine
    if theirs is not None:
        return theirs
    return None if isinstance(mine, int) else mine.value


def _input(model: ir.Model, name: str) -> ir.Value:
    found = next((value for value in model.graph.inputs if value.name == name), None)
    if found is None:
        listed = ", ".join(f"'{value.name}'" for value in model.graph.inputs)
        raise InputError(f"The model has no input '{name}'. Its inputs: {listed}.")
    return found


def _as_input(value: ir.Value, given: Any) -> Array:
    if value.dtype is None:
        raise InputError(f"inputs: the file does not say what type '{value.name}' has.")
    try:
        array = np.asarray(given)
        typed = array.astype(value.dtype.numpy())
    except (TypeError, ValueError) as error:
        raise InputError(f"inputs: '{value.name}' is {value.dtype.name.lower()}, got {given!r}.") from error
    if array.dtype.kind not in "biuf" or not np.array_equal(typed.astype(np.float64), array.astype(np.float64)):
        raise InputError(f"inputs: '{value.name}' is {value.dtype.name.lower()}, got {given!r}.")
    shape = list(value.shape) if value.shape is not None else list(array.shape)
    if array.ndim == 0 and all(isinstance(dim, int) and dim >= 0 for dim in shape):
        return np.full([int(dim) for dim in shape if isinstance(dim, int)], typed)
    fits = array.ndim == len(shape) and all(
        not isinstance(dim, int) or dim in (-1, size) for dim, size in zip(shape, array.shape, strict=True)
    )
    if not fits:
        raise InputError(
            f"inputs: '{value.name}' has the shape {_said(shape)}, got {given!r} of shape {list(array.shape)}."
        )
    return typed


def _said(shape: Iterable[int | ir.SymbolicDim]) -> str:
    return "[" + ", ".join("?" if not isinstance(dim, int) and dim.value is None else str(dim) for dim in shape) + "]"
