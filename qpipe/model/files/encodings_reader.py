"""AIMET's encodings files (0.6.1, 1.0.0, 2.0.0) read: the grids that someone else, or `encodings_file`, wrote.

    0.6.1, 1.0.0    offset = qmin - zero_point: symmetric grids are read as signed codes around 0, others as
                    unsigned ones with zero_point = -offset; the numbers that the grid holds are the same.
                    A weight with offsets qmin and qmin + 1 has signed codes, mirrored where it is qmin + 1
    2.0.0           output_dtype, y_scale and y_zero_point as ONNX has them

What the older formats leave out follows from the model: the axis of the channels is that of the weight's outputs.
Entries of 32 bits (biases) and of floats are passed over: biases have the scale s_x * s_w anyway. Grids of weights come
frozen: whoever gives a file wants these.

Source: the AIMET documentation, "Encoding Format Specification".
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from qpipe.errors import InputError
from qpipe.model.network.network import Network, value_names
from qpipe.model.structure.operands import Operand, find_operands
from qpipe.numerics.grid import Encoding, broadcast

N = TypeVar("N", bound=Network)
Entry = Mapping[str, Any]
Named = Iterator[tuple[str, Entry]]
_SHOWN = 5
_LONGEST = 40
"""Characters of what a file says that a message repeats."""


def with_encodings_file(model: N, path: Path) -> N:
    """`model` with exactly the grids in the file, those of weights frozen. Raises InputError as
    `read_encodings` does."""
    return model.with_encodings(read_encodings(model, path)).with_facts(came_quantized=True)


def read_encodings(model: Network, path: Path) -> dict[str, Encoding]:
    """The grids in the file at `path`, by the names of values of `model`. Raises InputError for a file that is none,
    for names that the model has not, and for grids that do not fit its tensors."""
    document = _document(path)
    try:
        entries = list(_FORMATS[document["version"]](document))
    except ValueError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    _refuse_unknown(model, [name for name, _ in entries], path)
    operands = first_operands(model)
    found: dict[str, Encoding] = {}
    for name, entry in entries:
        try:
            if name in found:
                raise ValueError("it is there twice.")
            encoding = read_entry(entry, _shape(model, name), operands.get(name))
        except (ValueError, OverflowError) as error:
            raise InputError(f"{path}: the encoding of '{name}' cannot be read: {error}") from error
        if encoding is not None:
            found[name] = encoding
    return found


def first_operands(model: Network) -> dict[str, Operand]:
    """The first use of each weight, whose axes the older formats mean."""
    return {operand.weight: operand for operand in reversed(find_operands(model))}


def read_entry(entry: Entry, shape: tuple[int, ...] | None, operand: Operand | None) -> Encoding | None:
    """The grid that one entry of the formats 1.0.0 or 2.0.0 says of a weight of `shape`, or of an activation (None);
    None where it is one of floats or of 32 bits. Raises ValueError where it does not fit."""
    if _is_float(entry) or _bitwidth(entry) == 32:
        return None
    encoding = _from_onnx(entry) if "output_dtype" in entry else _from_offsets(entry, shape, operand)
    if shape is None and encoding.axis is not None:
        raise ValueError("activations are quantized per tensor.")
    if shape is not None:
        broadcast(encoding, shape)
    mirrored = shape is not None and encoding.signed and _has_mirrored(encoding.zero_point)
    symmetric = encoding.symmetric or mirrored
    return replace(encoding, symmetric=symmetric, frozen=shape is not None, free_sign=mirrored)


def _has_mirrored(zero_point: Any) -> bool:
    """Whether signed codes with these zero points are mirrored in places, and otherwise symmetric."""
    return bool(np.all((zero_point == 0) | (zero_point == -1)) and np.any(zero_point == -1))


def _shape(model: Network, name: str) -> tuple[int, ...] | None:
    tensor = model.graph.initializers[name].const_value if name in model.params else None
    return None if tensor is None else tuple(int(size) for size in tensor.shape.numpy())


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist. Give the path of an encodings file.") from error
    except RecursionError as error:
        raise InputError(f"{path} is no encodings file: it is nested too deeply.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no encodings file: {error}.") from error
    version = document.get("version") if isinstance(document, dict) else None
    if not isinstance(version, str) or version not in _FORMATS:
        raise InputError(
            f"{path} is no encodings file that can be read: its version is {_said(version)}; "
            f"{', '.join(_FORMATS)} are known."
        )
    return dict(document)


def _refuse_unknown(model: Network, names: list[str], path: Path) -> None:
    known = set(value_names(model.graph))
    unknown = [name for name in names if name not in known]
    if not unknown:
        return
    close = difflib.get_close_matches(unknown[0], sorted(known), 1, 0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
    raise InputError(
        f"{path} has encodings for {len(unknown)} of {len(names)} names that the model has not: "
        f"{', '.join(map(repr, unknown[:_SHOWN]))}{more}{hint} Names are those of the values in the ONNX graph."
    )


def _part(value: Any, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
    """`value[key]`, or the default where that is given. Raises ValueError where it is missing or no `kind`."""
    if not isinstance(value, dict):
        raise ValueError(f"where '{key}' should be found is {_said(value)}.")
    found = value.get(key, default)
    if found is None and default is None:
        raise ValueError(f"it has no '{key}'.")
    if not isinstance(found, kind) or (isinstance(found, bool) and kind is int):
        raise ValueError(f"its '{key}' is {_said(found)}.")
    return found


def _said(value: Any) -> str:
    """`value` in a message."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**_LONGEST else "a number of many digits"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _sides(document: Entry, kind: type) -> Iterator[Any]:
    for side in ("activation_encodings", "param_encodings"):
        yield _part(document, side, kind, kind())


def _by_name(document: Entry) -> Named:
    """0.6.1: a list of entries per tensor, one for each channel."""
    for side in _sides(document, dict):
        for name in side:
            yield name, one_entry(_part(side, name, list))


def one_entry(channels: list[Any]) -> Entry:
    """What the entries of one tensor's channels in 0.6.1 say, as an entry of 1.0.0. Raises ValueError for none."""
    if not channels:
        raise ValueError("a list of its grids is empty.")
    first = channels[0]
    return {
        "bw": _part(first, "bitwidth", int),
        "dtype": _part(first, "dtype", str),
        "is_sym": str(_part(first, "is_symmetric", (bool, str), False)) == "True",
        "enc_type": "PER_TENSOR" if len(channels) == 1 else "PER_CHANNEL",
        "scale": [_part(channel, "scale", (int, float), 0) for channel in channels],
        "offset": [_part(channel, "offset", (int, float), 0) for channel in channels],
    }


def _listed(document: Entry) -> Named:
    """1.0.0: a list of entries per side."""
    for side in _sides(document, list):
        for entry in side:
            yield _part(entry, "name", str), entry


def _onnx_terms(document: Entry) -> Named:
    """2.0.0: one list."""
    for entry in _part(document, "encodings", list, []):
        yield _part(entry, "name", str), entry


_FORMATS: dict[str, Callable[[Entry], Named]] = {
    "0.6.1": _by_name,
    "1.0.0": _listed,
    "2.0.0": _onnx_terms,
}


def _is_float(entry: Entry) -> bool:
    key = "output_dtype" if "output_dtype" in entry else "dtype"
    return "float" in str(_part(entry, key, str, "int")).lower()


def _bitwidth(entry: Entry) -> int:
    if "output_dtype" not in entry:
        bitwidth = _part(entry, "bw", int)
    else:
        dtype = _part(entry, "output_dtype", str)
        digits = dtype.removeprefix("u").removeprefix("int")
        bitwidth = int(digits) if digits.isdecimal() and len(digits) < 3 else 0
    if bitwidth not in range(2, 33):
        raise ValueError(f"it has {_said(entry.get('output_dtype', bitwidth))} for codes of 2 to 32 bits.")
    return int(bitwidth)


def _numbers(entry: Entry, key: str, kind: type[np.generic]) -> npt.NDArray[Any]:
    """The array at `key`. Raises ValueError where it is none of numbers."""
    try:
        array = np.asarray(_part(entry, key, (int, float, list)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its '{key}' is no array of numbers.") from error
    whole = np.issubdtype(kind, np.integer)
    if array.dtype.kind not in "iuf" or (whole and not bool(np.all(np.abs(array) <= 2**31))):
        raise ValueError(f"its '{key}' is no array of {'whole ' if whole else ''}numbers of that size.")
    with np.errstate(over="ignore"):
        return array.astype(kind)


def _from_onnx(entry: Entry) -> Encoding:
    signed = not _part(entry, "output_dtype", str).startswith("u")
    bitwidth, scale = _bitwidth(entry), _numbers(entry, "y_scale", np.float32)
    given = {"y_zero_point": entry.get("y_zero_point") or 0}
    zero_point = np.broadcast_to(_numbers(given, "y_zero_point", np.int64), scale.shape)
    middle = 0 if signed else 1 << (bitwidth - 1)
    axis = _part(entry, "axis", int) if scale.ndim else None
    block = _part(entry, "block_size", int) if entry.get("block_size") is not None else None
    return Encoding(bitwidth, signed, bool(np.all(zero_point == middle)), scale, zero_point, axis, block)


def _from_offsets(entry: Entry, shape: tuple[int, ...] | None, operand: Operand | None) -> Encoding:
    kind, bitwidth = _part(entry, "enc_type", str), _bitwidth(entry)
    if kind not in ("PER_TENSOR", "PER_CHANNEL", "PER_BLOCK"):
        raise ValueError(f"enc_type {_said(kind)[1:-1]} is not known; PER_TENSOR, PER_CHANNEL and PER_BLOCK are.")
    scale = _numbers(entry, "scale", np.float32)
    offset = np.broadcast_to(_numbers(entry, "offset", np.int64), scale.shape)
    qmin = -(1 << (bitwidth - 1))
    symmetric = bool(entry.get("is_sym")) and bool(np.all(offset == qmin))
    signed = symmetric or (shape is not None and _has_mirrored(qmin - offset))
    zero_point = qmin - offset if signed else -offset
    axis = block = None
    if kind == "PER_TENSOR":
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    elif shape is None:
        raise ValueError("activations are quantized per tensor.")
    elif kind == "PER_CHANNEL":
        axis = _channel_axis(scale.size, shape, operand)
    else:
        block = _part(entry, "block_size", int)
        axis = 1 if operand is None or operand.inner_axis is None else operand.inner_axis
        scale, zero_point = (_in_blocks(array, shape, axis, block) for array in (scale, zero_point))
    return Encoding(bitwidth, signed, symmetric, scale, zero_point, axis, block)


def _channel_axis(count: int, shape: tuple[int, ...], operand: Operand | None) -> int:
    """The axis that has `count` channels: that of the outputs where it fits, else the first that does."""
    own = [operand.channel_axis] if operand is not None and operand.channel_axis is not None else []
    for axis in [*own, *range(len(shape))]:
        if shape[axis] == count:
            return int(axis)
    raise ValueError(f"{count} scales fit no axis of the shape {shape}.")


def _in_blocks(array: Any, shape: tuple[int, ...], axis: int, block: int) -> Any:
    """The flat list, channel by channel, in the tensor's shape with the axis counted in blocks."""
    if block < 1 or axis >= len(shape):
        raise ValueError(f"blocks of {_said(block)} do not fit the shape {shape}.")
    blocks = [-(-size // block) if i == axis else size for i, size in enumerate(shape)]
    if axis == 0 and len(shape) > 1:
        blocks[0], blocks[1] = blocks[1], blocks[0]
    if array.size != int(np.prod(blocks)):
        raise ValueError(f"{array.size} scales do not fit the shape {shape} in blocks of {block}.")
    whole = array.reshape(blocks)
    return whole.swapaxes(0, 1) if axis == 0 and len(shape) > 1 else whole
