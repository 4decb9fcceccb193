"""AIMET's encodings files (0.6.1, 1.0.0, 2.0.0) read: the grids that someone else, or `encodings_file`, wrote.

    0.6.1, 1.0.0    offset = qmin - zero_point: symmetric grids are read as signed codes around 0, others as
                    unsigned ones with zero_point = -offset; the numbers that the grid holds are the same
    2.0.0           output_dtype, y_scale and y_zero_point as ONNX has them

What the older formats leave out follows from the model: the axis of the channels is that of the layer. Entries of
32 bits (biases) and of floats are passed over: biases have the scale s_x * s_w anyway. Grids of weights come frozen:
whoever gives a file wants these.

Source: the AIMET documentation, "Encoding Format Specification".
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from qpipe.errors import InputError
from qpipe.model.network.network import Network, value_names
from qpipe.model.structure.layers import Layer, find_layers
from qpipe.numerics.grid import Encoding, broadcast

N = TypeVar("N", bound=Network)
Named = Iterator[tuple[str, dict[str, Any]]]
_SHOWN = 5


def with_encodings_file(model: N, path: Path) -> N:
    """`model` with exactly the grids in the file, those of weights frozen. Raises InputError as
    `read_encodings` does."""
    return model.with_encodings(read_encodings(model, path)).with_facts(came_quantized=True)


def read_encodings(model: Network, path: Path) -> dict[str, Encoding]:
    """The grids in the file at `path`, by the names of values of `model`. Raises InputError for a file that is none,
    for names that the model has not, and for grids that do not fit its tensors."""
    document = _document(path)
    entries = list(_FORMATS[document["version"]](document))
    _refuse_unknown(model, [name for name, _ in entries], path)
    layers = {layer.weight: layer for layer in find_layers(model)}
    found = {}
    for name, entry in entries:
        if _is_float(entry) or _bitwidth(entry) == 32:
            continue
        try:
            found[name] = _encoding(model, name, entry, layers)
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path}: the encoding of '{name}' cannot be read: {error}") from error
    return found


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist. Give the path of an encodings file.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no encodings file: {error}.") from error
    version = document.get("version") if isinstance(document, dict) else None
    if version not in _FORMATS:
        raise InputError(
            f"{path} is no encodings file that can be read: its version is {version!r}; "
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


def _by_name(document: Mapping[str, Any]) -> Named:
    """0.6.1: a list of entries per tensor, one for each channel."""
    for side in ("activation_encodings", "param_encodings"):
        for name, channels in document.get(side, {}).items():
            first = channels[0]
            yield (
                name,
                {
                    "bw": first["bitwidth"],
                    "dtype": first["dtype"],
                    "is_sym": str(first.get("is_symmetric")) == "True",
                    "enc_type": "PER_TENSOR" if len(channels) == 1 else "PER_CHANNEL",
                    "scale": [channel.get("scale") for channel in channels],
                    "offset": [channel.get("offset") for channel in channels],
                },
            )


def _listed(document: Mapping[str, Any]) -> Named:
    """1.0.0: a list of entries per side."""
    for side in ("activation_encodings", "param_encodings"):
        for entry in document.get(side, []):
            yield entry["name"], entry


def _onnx_terms(document: Mapping[str, Any]) -> Named:
    """2.0.0: one list."""
    for entry in document.get("encodings", []):
        yield entry["name"], entry


_FORMATS: dict[str, Callable[[Mapping[str, Any]], Named]] = {
    "0.6.1": _by_name,
    "1.0.0": _listed,
    "2.0.0": _onnx_terms,
}


def _is_float(entry: Mapping[str, Any]) -> bool:
    return "float" in str(entry.get("output_dtype", entry.get("dtype", ""))).lower()


def _bitwidth(entry: Mapping[str, Any]) -> int:
    dtype = entry.get("output_dtype")
    return int(entry["bw"] if dtype is None else dtype.removeprefix("u").removeprefix("int"))


def _encoding(model: Network, name: str, entry: Mapping[str, Any], layers: Mapping[str, Layer]) -> Encoding:
    """One grid. Raises ValueError where it does not fit the tensor."""
    is_param = name in model.params
    shape = model.param(name).shape if is_param else None
    encoding = _from_onnx(entry) if "output_dtype" in entry else _from_offsets(entry, shape, layers.get(name))
    if shape is None and encoding.axis is not None:
        raise ValueError("activations are quantized per tensor.")
    if shape is not None:
        broadcast(encoding, shape)
    return Encoding(**{**_fields(encoding), "frozen": is_param})


def _fields(encoding: Encoding) -> dict[str, Any]:
    names = ("bitwidth", "signed", "symmetric", "scale", "zero_point", "axis", "block_size")
    return {name: getattr(encoding, name) for name in names}


def _from_onnx(entry: Mapping[str, Any]) -> Encoding:
    signed = not entry["output_dtype"].startswith("u")
    bitwidth, scale = _bitwidth(entry), np.asarray(entry["y_scale"], np.float32)
    zero_point = np.broadcast_to(np.asarray(entry.get("y_zero_point") or 0, np.int32), scale.shape)
    middle = 0 if signed else 1 << (bitwidth - 1)
    axis = entry.get("axis") if scale.ndim else None
    return Encoding(
        bitwidth, signed, bool(np.all(zero_point == middle)), scale, zero_point, axis, entry.get("block_size")
    )


def _from_offsets(entry: Mapping[str, Any], shape: tuple[int, ...] | None, layer: Layer | None) -> Encoding:
    kind, bitwidth = entry["enc_type"], _bitwidth(entry)
    if kind not in ("PER_TENSOR", "PER_CHANNEL", "PER_BLOCK"):
        raise ValueError(f"enc_type {kind} is not known; PER_TENSOR, PER_CHANNEL and PER_BLOCK are.")
    scale = np.asarray(entry["scale"], np.float32)
    offset = np.broadcast_to(np.asarray(entry["offset"], np.int64), scale.shape)
    symmetric = bool(entry.get("is_sym")) and bool(np.all(offset == -(1 << (bitwidth - 1))))
    zero_point = np.zeros(scale.shape, np.int32) if symmetric else -offset
    axis = block = None
    if kind == "PER_TENSOR":
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    elif shape is None:
        raise ValueError("activations are quantized per tensor.")
    elif kind == "PER_CHANNEL":
        axis = _channel_axis(scale.size, shape, layer)
    else:
        block, axis = int(entry["block_size"]), 1 if layer is None else 1 - layer.channel_axis
        scale, zero_point = (_in_blocks(array, shape, axis, block) for array in (scale, zero_point))
    return Encoding(bitwidth, symmetric, symmetric, scale, zero_point, axis, block)


def _channel_axis(count: int, shape: tuple[int, ...], layer: Layer | None) -> int:
    """The axis that has `count` channels: that of the layer's output where it fits, else the first that does."""
    order = [*([layer.channel_axis] if layer is not None else []), *range(len(shape))]
    for axis in order:
        if shape[axis] == count:
            return int(axis)
    raise ValueError(f"{count} scales fit no axis of the shape {shape}.")


def _in_blocks(array: Any, shape: tuple[int, ...], axis: int, block: int) -> Any:
    """The flat list, channel by channel, in the tensor's shape with the axis counted in blocks."""
    blocks = [-(-size // block) if i == axis else size for i, size in enumerate(shape)]
    if axis == 0:
        blocks[0], blocks[1] = blocks[1], blocks[0]
    if array.size != int(np.prod(blocks)):
        raise ValueError(f"{array.size} scales do not fit the shape {shape} in blocks of {block}.")
    whole = array.reshape(blocks)
    return whole.swapaxes(0, 1) if axis == 0 else whole
