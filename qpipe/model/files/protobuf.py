"""ONNX messages written tensor by tensor: protobuf itself would hold all of them in memory, twice."""

from __future__ import annotations

from typing import Any, BinaryIO

import onnx
import onnx_ir as ir

from qpipe.model.network.packing import tensor_bytes


def write_whole(proto: onnx.ModelProto, tensors: dict[str, ir.TensorProtocol], file: BinaryIO) -> None:
    """The message `proto` with the data of `tensors` in it, tensor by tensor: protobuf alone would hold all of them,
    twice. Used up: the initializers of `proto` go.

    Source: protobuf's encoding; a message is its fields in any order, each a tag and, for bytes and messages, a length.
    """
    initializers = list(proto.graph.initializer)
    headers = []
    for initializer in initializers:
        if initializer.name in tensors:
            initializer.ClearField("external_data")
            initializer.ClearField("data_location")
        headers.append(initializer.SerializeToString(deterministic=True))
    sizes = [tensors[i.name].nbytes if i.name in tensors else None for i in initializers]
    starts = [b"" if size is None else _field(onnx.TensorProto, "raw_data", size) for size in sizes]
    bodies = [len(h) + len(s) + (size or 0) for h, s, size in zip(headers, starts, sizes, strict=True)]
    prefixes = [_field(onnx.GraphProto, "initializer", body) for body in bodies]
    del proto.graph.initializer[:]
    graph = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")
    file.write(proto.SerializeToString(deterministic=True))
    file.write(_field(onnx.ModelProto, "graph", len(graph) + sum(map(len, prefixes)) + sum(bodies)))
    file.write(graph)
    for initializer, *parts in zip(initializers, prefixes, headers, starts, strict=True):
        file.writelines(parts)
        if initializer.name in tensors:
            file.write(tensor_bytes(tensors[initializer.name]))


def _field(message: Any, name: str, length: int) -> bytes:
    """What stands in front of a field of `length` bytes: its number, its wire type (2), and the length, as varints."""
    return _varint(message.DESCRIPTOR.fields_by_name[name].number << 3 | 2) + _varint(length)


def _varint(number: int) -> bytes:
    """7 bits a byte, the lowest first; the highest bit says that more follow."""
    digits = []
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])
