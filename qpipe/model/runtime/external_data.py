"""Tensors in a file beside the graph, each on a page of its own, so that onnxruntime can map them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir as ir

from qpipe.model.network.packing import tensor_bytes

_ALIGNMENT = 4096


def write_data(tensors: Mapping[str, ir.TensorProtocol], path: Path) -> dict[str, int]:
    """Put the tensors into a file one after another, each on a page of its own; where each begins."""
    offsets = {}
    with path.open("wb") as file:
        for name in sorted(tensors):
            offsets[name] = -(-file.tell() // _ALIGNMENT) * _ALIGNMENT
            file.seek(offsets[name])
            file.write(tensor_bytes(tensors[name]))
        file.flush()
        os.fsync(file.fileno())
    return offsets


def set_place(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Say where the data of an external tensor are."""
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
