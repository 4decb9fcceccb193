"""What is known of a graph before it runs: its constants as Python and torch have them, and what the CPU computes."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from qpipe.model.network.invariants import constant_of

_HOST_OUTPUT = frozenset({"Shape", "Size", "Range", "ConstantOfShape"})
_LARGEST_HOST_CONSTANT = 64


def host_values(graph: ir.Graph) -> set[ir.Value]:
    """The values that follow from shapes and small constants alone; they are computed on the CPU."""
    host: set[ir.Value] = set()
    for node in graph:
        if node.op_type in _HOST_OUTPUT or stays(node, host):
            host.update(node.outputs)
    return host


def stays(node: ir.Node, host: set[ir.Value]) -> bool:
    """Whether a node's inputs are host values and constants small enough to be written into the code."""
    given = [value for value in node.inputs if value is not None]
    return any(value in host for value in given) and all(value in host or _small(value) for value in given)


def _small(value: ir.Value) -> bool:
    """Integers and single numbers; a float vector is a parameter, and stays one."""
    array = constant_of(value)
    if array is None:
        return False
    return array.size <= (_LARGEST_HOST_CONSTANT if array.dtype.kind in "iub" else 1)


def statistics(graph: ir.Graph) -> set[ir.Value]:
    """Running means and variances."""
    found = (node.inputs[3:5] for node in graph if node.op_type == "BatchNormalization")
    return {value for pair in found for value in pair if value is not None}


def literal(data: Any) -> Any:
    """Lists as tuples, at every depth: fx wants immutable arguments."""
    return tuple(literal(item) for item in data) if isinstance(data, list) else data


def tensor_of(array: np.ndarray[Any, Any] | None) -> torch.Tensor:
    """A copy of `array`; bfloat16 and 8-bit floats, which numpy borrows from ml_dtypes, go through their bits."""
    assert array is not None
    if array.dtype.name in _BORROWED:
        bits = torch.tensor(array.view(f"u{array.dtype.itemsize}").view(f"i{array.dtype.itemsize}"))
        return bits.view(_BORROWED[array.dtype.name])
    return torch.tensor(array)


def taken_in(value: Any, device: torch.device | str) -> Any:
    """An input, an array or a tensor, as a module on `device` takes it; text, which torch does not know, as it is."""
    if isinstance(value, np.ndarray):
        return value if value.dtype.kind in "OU" else tensor_of(value).to(device)
    return value.to(device)


def array_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The other way: `tensor`, on the CPU, as numpy has it."""
    name = next((name for name, dtype in _BORROWED.items() if dtype == tensor.dtype), None)
    if name is None:
        return np.asarray(tensor.numpy())
    bits = tensor.contiguous().view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int8)
    return np.asarray(bits.numpy()).view(np.dtype(getattr(ml_dtypes, name)))


def output_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """An output, on the CPU, as sessions give it: bfloat16 as float32."""
    return array_of(tensor.float() if tensor.dtype == torch.bfloat16 else tensor)


_BORROWED = {
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz,
    "float8_e5m2": torch.float8_e5m2,
    "float8_e5m2fnuz": torch.float8_e5m2fnuz,
}
"""The types that numpy has by the name of ml_dtypes'."""


def shared_tensor_of(array: np.ndarray[Any, Any] | None) -> torch.Tensor:
    """`array` itself as a tensor, not to be written to; a copy where torch cannot take it as it is."""
    if array is None or array.dtype.name in _BORROWED or not array.flags.c_contiguous or not array.ndim:
        return tensor_of(array)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is read-only, as is meant here
        return torch.from_numpy(array)


def keywords(attribute: ir.Attr) -> list[tuple[str, Any]]:
    """The keyword arguments for one attribute: a tensor of one number becomes the number and its type."""
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return [(attribute.name, tensor.numpy().reshape(-1)[0].item()), ("dtype", int(tensor.dtype))]
    value = attribute.value
    if isinstance(value, (list, tuple)):
        value = tuple(v.decode() if isinstance(v, bytes) else v for v in value)
    return [(attribute.name, value.decode() if isinstance(value, bytes) else value)]


@lru_cache(maxsize=4096)
def host_constant(data: Any, dtype: torch.dtype) -> torch.Tensor:
    """A small constant of shape arithmetic, on the CPU; the same tensor each time, never written to."""
    with torch.inference_mode(False):  # whoever asks first, it may be kept for a gradient later
        return torch.tensor(data, dtype=dtype)


def to_device(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """x where `like` lives."""
    return x.to(like.device)
