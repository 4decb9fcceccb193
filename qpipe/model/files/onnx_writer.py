"""Models as files that need nothing of qpipe to be read.

model.onnx              the QDQ form where there are encodings, else the float model
model.onnx.data         its tensors, where they come to more than protobuf's 2 GB
encodings.json          the grids (where there are encodings)
weights.safetensors     the float weights under torch's names and in torch's layout (where there are encodings)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from qpipe.model.network.invariants import PERMUTATION, SHAPE
from qpipe.model.network.packing import graph_proto, set_place, tensor_bytes, write_data

if TYPE_CHECKING:
    from qpipe.model.files.encodings_writer import Version
    from qpipe.model.network.network import Network

Array = npt.NDArray[Any]
LARGEST_INLINE_BYTES = 1_800_000_000
"""Above this the tensors go into a file of their own: protobuf ends at 2^31 bytes, the graph included."""


def save(model: Network, folder: Path, encodings_format: Version = "1.0.0") -> Path:
    """Write the files above into `folder`, made where it is missing; returns the path of model.onnx.

    Beside the model this takes memory for one tensor.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    write_deployed(model, path)
    if not model.encodings:
        return path
    from qpipe.model.files.encodings_writer import write_encodings

    write_encodings(model, folder / "encodings.json", encodings_format)
    write_safetensors(torch_weights(model), folder / "weights.safetensors")
    return path


def write_deployed(model: Network, path: Path) -> None:
    """Write the model in QDQ form, or in float where it has no encodings."""
    from qpipe.model.qdq.writer import qdq_model

    write_onnx(qdq_model(model) if model.encodings else model.ir, path)


def write_onnx(model: ir.Model, path: Path, largest_inline_bytes: int = LARGEST_INLINE_BYTES) -> None:
    """Write `model` as one file, or as two where its tensors come to more than `largest_inline_bytes`."""
    sizes = [value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value]
    proto, outside = graph_proto(model)
    _leave_out_what_is_inferred(proto)
    if sum(sizes) > largest_inline_bytes:
        data = path.with_name(path.name + ".data")
        offsets = write_data(outside, data)
        for tensor in proto.graph.initializer:
            if tensor.name in offsets:
                set_place(tensor, data.name, offsets[tensor.name], outside[tensor.name].nbytes)
        outside = {}
    with path.open("wb") as file:
        write_whole(proto, outside, file)


def _leave_out_what_is_inferred(proto: onnx.ModelProto) -> None:
    """Types and shapes of what standard operators give: every reader works them out, and in a small model they are a
    sixth of the file. What says more stays, such as how a parameter lies in torch."""
    others = {name for node in proto.graph.node if node.domain not in ("", "ai.onnx") for name in node.output}
    kept = [value for value in proto.graph.value_info if value.name in others or value.metadata_props]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)


def write_safetensors(arrays: Mapping[str, Array], path: Path) -> None:
    """float32 arrays as a safetensors file, one after another: the library copies all of them first.

    Source: the safetensors format, a header in JSON behind its length in 8 bytes, padded to 8, then the data.
    """
    header, end = {}, 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array, "<f4").reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def torch_weights(model: Network) -> dict[str, Array]:
    """The float initializers as a torch module has them: permutations and reshapes of the import undone, tied
    parameters under both names. Constants that the import named are among them. Views, where they can be."""
    weights: dict[str, Array] = {}
    for name, value in sorted(model.graph.initializers.items()):
        if value.dtype != ir.DataType.FLOAT:
            continue
        array = model.param(name)
        if PERMUTATION in value.metadata_props:
            array = array.transpose(np.argsort(json.loads(value.metadata_props[PERMUTATION])))
        if SHAPE in value.metadata_props:
            array = array.reshape(json.loads(value.metadata_props[SHAPE]))
        weights[name] = array
    for alias, name in model.facts.tied.items():
        if name in weights:
            weights[alias] = weights[name]
    return weights


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
