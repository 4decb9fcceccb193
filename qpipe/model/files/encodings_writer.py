"""encodings.json: a model's grids in the formats of AIMET (0.6.1, 1.0.0, 2.0.0), which other tools read.

0.6.1 and 1.0.0 write a grid by its first code, counted from zero: offset = qmin - zero_point, so -128 for a
symmetric int8, and -zero_point for an unsigned type. 2.0.0 speaks ONNX: output_dtype, y_scale, y_zero_point.
Names are those of the values in the ONNX graph. Biases are listed with their int32 grids. The older formats do not say
along which axis scales run: what a reader would take for another grid is refused.

Source: the AIMET documentation, "Encoding Format Specification", and the files that AIMET 2 writes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from qpipe.errors import InputError
from qpipe.model.files.encodings_reader import first_operands, one_entry, read_entry
from qpipe.model.qdq.bias import bias_scale, effective_encodings, quantized_biases
from qpipe.numerics.grid import Encoding, spread

if TYPE_CHECKING:
    from qpipe.model.network.network import Network

Version = Literal["0.6.1", "1.0.0", "2.0.0"]


def write_encodings(model: Network, path: Path, version: Version = "1.0.0") -> None:
    """Writes the grids of `model` as JSON to `path`, a tensor a line, each made when its turn comes: a scale of a
    block takes many times its bytes as an object of Python. Raises InputError for another version, for what 0.6.1
    cannot express, and for a grid that would be read back as another one."""
    document = _document(model, version)
    _refuse_unreadable(model, version)
    with path.open("w", encoding="utf-8") as file:
        for i, (key, value) in enumerate(document.items()):
            file.write(f"{',' if i else '{'}\n  {json.dumps(key)}: ")
            file.writelines(_lines(value))
        file.write("\n}\n")


def _lines(value: Any) -> Iterator[str]:
    """`value` as JSON, each entry of an iterator (a list) or an object on a line of its own."""
    if isinstance(value, Iterator):
        edges, entries = "[]", (json.dumps(entry) for entry in value)
    elif isinstance(value, dict):
        edges, entries = "{}", (f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items())
    else:
        yield json.dumps(value)
        return
    begun = False
    for entry in entries:
        yield f"{',' if begun else edges[0]}\n    {entry}"
        begun = True
    yield f"\n  {edges[1]}" if begun else edges


def _document(model: Network, version: Version) -> dict[str, Any]:
    """The JSON value that the format `version` prescribes, sorted by name; its lists of grids are iterators.

    How the ranges were found is said where the model's metadata have `quant_scheme`. Raises InputError for
    another version, and where 0.6.1 is asked for block scales, which it cannot express.
    """
    if version not in get_args(Version):
        raise InputError(f"encodings.json has the versions {', '.join(get_args(Version))}, got {version!r}.")
    encodings = {**effective_encodings(model), **_bias_encodings(model)}
    params = {name: e for name, e in sorted(encodings.items()) if name in model.params}
    activations = {name: e for name, e in sorted(encodings.items()) if name not in model.params}
    if version == "2.0.0":
        listed = ({"name": name, **_onnx_terms(e)} for name, e in {**activations, **params}.items())
        return {"version": version, "encodings": listed}
    arguments = _quantizer_args(params, activations)
    if "quant_scheme" in model.metadata:
        arguments["quant_scheme"] = model.metadata["quant_scheme"]
    if version == "1.0.0":
        return {
            "version": version,
            "activation_encodings": ({"name": name, **_aimet_1_0_0(e)} for name, e in activations.items()),
            "param_encodings": ({"name": name, **_aimet_1_0_0(e)} for name, e in params.items()),
            "quantizer_args": arguments,
            "excluded_layers": [],
        }
    return {
        "version": version,
        "activation_encodings": {name: _aimet_0_6_1(name, e) for name, e in activations.items()},
        "param_encodings": {name: _aimet_0_6_1(name, e) for name, e in params.items()},
        "quantizer_args": arguments,
    }


def _refuse_unreadable(model: Network, version: Version) -> None:
    """Raises InputError for a grid that a reader of `version` takes for another one."""
    operands, encodings = first_operands(model), effective_encodings(model)
    for name, e in sorted(encodings.items()) if version != "2.0.0" else ():
        entry = _aimet_1_0_0(e) if version == "1.0.0" else one_entry(_aimet_0_6_1(name, e))
        shape = model.params[name].shape if name in model.params else None
        try:
            found = read_entry(entry, shape, operands.get(name))
        except ValueError:
            found = None
        if found is None or not _same_numbers(e, found, shape or ()):
            raise InputError(
                f"encodings.json {version} does not say that the scales of '{name}' run along axis {e.axis}: they "
                "would be read as those of another. Use encodings_format 2.0.0."
            )


def _same_numbers(a: Encoding, b: Encoding, shape: tuple[int, ...]) -> bool:
    """Whether both hold the same numbers at each place of a tensor of `shape`."""
    pairs = [(a.scale, b.scale), (_offset(a), _offset(b))]
    if (a.axis, a.block_size) != (b.axis, b.block_size):
        pairs = [(spread(x, a, shape), spread(y, b, shape)) for x, y in pairs]
    return a.bitwidth == b.bitwidth and all(bool(np.all(x == y)) for x, y in pairs)


def _bias_encodings(model: Network) -> dict[str, Encoding]:
    """The int32 grids of the biases; a bias that serves several layers has no grid of its own to be listed."""
    encodings = effective_encodings(model)
    biases = list(quantized_biases(model).values())
    uses = Counter(bias.name for bias in biases)
    found = {}
    for bias in biases:
        if uses[bias.name] == 1:
            scale = bias_scale(encodings[bias.input], encodings[bias.weight], bias.repeats)
            axis = model.param(bias.name).ndim - 1 if scale.ndim else None
            found[bias.name] = Encoding(32, True, True, scale, np.zeros(scale.shape, np.int32), axis)
    return found


def _offset(e: Encoding) -> Any:
    """The number of steps from 0 to the first code: 0 or below."""
    return e.qmin - e.zero_point.astype(np.int64)


def _is_symmetric(e: Encoding) -> bool:
    return bool(np.all(_offset(e) == -(2 ** (e.bitwidth - 1))))


def _aimet_0_6_1(name: str, e: Encoding) -> list[dict[str, Any]]:
    """One entry per tensor or per channel."""
    if e.block_size is not None:
        raise InputError(
            f"encodings.json 0.6.1 cannot express the block scales of '{name}'. Use 1.0.0 or 2.0.0."
        )
    steps = e.qmax - e.qmin
    pairs = zip(e.scale.reshape(-1).tolist(), _offset(e).reshape(-1).tolist(), strict=True)
    return [
        {
            "bitwidth": e.bitwidth,
            "dtype": "int",
            "is_symmetric": str(_is_symmetric(e)),
            "max": (offset + steps) * scale,
            "min": offset * scale,
            "offset": offset,
            "scale": scale,
        }
        for scale, offset in pairs
    ]


def _aimet_1_0_0(e: Encoding) -> dict[str, Any]:
    """Scales and offsets as lists; of blocks those of the first channel first."""
    scale, offset = e.scale, _offset(e)
    if e.block_size is not None and e.axis == 0:
        scale, offset = scale.swapaxes(0, 1), offset.swapaxes(0, 1)
    entry = {
        "enc_type": e.granularity.upper(),
        "dtype": "INT",
        "bw": e.bitwidth,
        "is_sym": _is_symmetric(e),
        "scale": scale.reshape(-1).tolist(),
        "offset": offset.reshape(-1).tolist(),
    }
    return entry if e.block_size is None else {**entry, "block_size": e.block_size}


def _onnx_terms(e: Encoding) -> dict[str, Any]:
    """ONNX's own words; zero points that are all 0 are left out."""
    entry: dict[str, Any] = {
        "output_dtype": f"{'int' if e.signed else 'uint'}{e.bitwidth}",
        "y_scale": e.scale.tolist(),
    }
    if np.any(e.zero_point):
        entry["y_zero_point"] = e.zero_point.tolist()
    if e.axis is not None:
        entry["axis"] = e.axis
    if e.block_size is not None:
        entry["block_size"] = e.block_size
    return entry


def _quantizer_args(params: dict[str, Encoding], activations: dict[str, Encoding]) -> dict[str, Any]:
    """What holds for most tensors of the model."""
    weights = [e for e in params.values() if e.bitwidth != 32]
    return {
        "activation_bitwidth": _commonest([e.bitwidth for e in activations.values()], 32),
        "dtype": "int",
        "is_symmetric": _commonest([_is_symmetric(e) for e in weights], True),
        "param_bitwidth": _commonest([e.bitwidth for e in weights], 32),
        "per_channel_quantization": any(e.axis is not None for e in weights),
    }


def _commonest(values: list[Any], default: Any) -> Any:
    """The most frequent of `values`; the first of several equally frequent ones."""
    return Counter(values).most_common(1)[0][0] if values else default
