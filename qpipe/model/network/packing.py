"""A model as bytes, and back: a small graph file, one blob per tensor, one blob of encodings.

The bytes depend on the content alone: initializers, value infos, attributes, opsets and metadata are written
in the order of their names, nodes in the graph's order, and nothing says who wrote them. So equal models have
equal blobs in every process, and two models that share a tensor share its blob.

    graph            ONNX, opset 21; a tensor above 1 KB says `location=<its name>` and holds no data
    tensor/<name>    the raw little-endian bytes of that tensor
    encodings        safetensors: `<value>.scale` (float32) and `<value>.zero_point` (int32)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir

from qpipe.errors import InputError
from qpipe.model.network.facts import NAMES, Facts, facts_from

if TYPE_CHECKING:
    from pathlib import Path

    from qpipe.numerics.grid import Encoding

FORMAT = 1
INLINE_BYTES = 1024
"""Tensors of at most this size stay in the graph: onnxruntime's shape inference needs them there."""
ALIGNMENT = 4096


def tensor_bytes(tensor: ir.TensorProtocol) -> memoryview:
    """The raw little-endian bytes of `tensor`, without a copy where numpy holds them contiguously."""
    if tensor.dtype.bitwidth < 8:
        return memoryview(tensor.tobytes())
    array = np.asarray(tensor.numpy(), order="C")
    return array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")


def write_data(tensors: Mapping[str, ir.TensorProtocol], path: Path) -> dict[str, int]:
    """Put the tensors into a file beside a graph, one after another, each on a page of its own, so that onnxruntime can
    map them; where each begins."""
    offsets = {}
    with path.open("wb") as file:
        for name in sorted(tensors):
            offsets[name] = -(-file.tell() // ALIGNMENT) * ALIGNMENT
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


def graph_proto(
    model: ir.Model, inline_bytes: int | None = INLINE_BYTES
) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    """The model in its deterministic form, and the tensors left out of it (None: everything stays inline)."""
    outside: dict[str, ir.TensorProtocol] = {}
    initializers = {}
    for name, value in sorted(model.graph.initializers.items()):
        tensor = value.const_value
        assert tensor is not None
        text = tensor.dtype == ir.DataType.STRING  # has no raw bytes
        if inline_bytes is not None and not text and tensor.nbytes > inline_bytes:
            outside[name] = tensor
            shape = ir.Shape(tensor.shape.numpy())
            tensor = ir.ExternalTensor(name, None, tensor.nbytes, tensor.dtype, shape=shape, name=name)
        else:
            tensor = _plain(tensor, name)
        initializers[name] = _With(value, const_value=tensor)
    # Not a clone with other tensors: that takes longer than all the rest.
    graph = _With(model.graph, initializers=initializers)
    proto = ir.serde.serialize_model_into(onnx.ModelProto(), _With(model, graph=graph))
    _sort_fields(proto)
    return proto, outside


class _With:
    """What stands for `inner` where it is written, with some things other than its own."""

    def __init__(self, inner: Any, **given: Any) -> None:
        self.__dict__.update(given)
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._inner)


def _plain(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """`tensor` as raw data under `name`: the same numbers may come as float_data, and with any name."""
    if tensor.dtype == ir.DataType.STRING:
        return tensor
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)


def _sort_fields(proto: onnx.ModelProto) -> None:
    proto.producer_name, proto.producer_version, proto.doc_string = "", "", ""
    _sort(proto.opset_import, lambda item: item.domain)
    _sort(proto.metadata_props, lambda item: item.key)
    graphs = [proto.graph]
    while graphs:
        graph = graphs.pop()
        graph.doc_string = ""
        _sort(graph.value_info, lambda item: item.name)
        _sort(graph.metadata_props, lambda item: item.key)
        for info in [*graph.input, *graph.output, *graph.value_info]:
            info.doc_string = ""
            _sort(info.metadata_props, lambda item: item.key)
        for node in graph.node:
            node.doc_string = ""
            _sort(node.attribute, lambda item: item.name)
            _sort(node.metadata_props, lambda item: item.key)
            for attribute in node.attribute:
                attribute.doc_string = ""
                graphs += list(attribute.graphs)
                if attribute.type == onnx.AttributeProto.GRAPH:
                    graphs.append(attribute.g)


def _sort(field: Any, key: Callable[[Any], str]) -> None:
    field.sort(key=key)


def pack(
    model: ir.Model, encodings: Mapping[str, Encoding], metadata: Mapping[str, Any], facts: Facts
) -> tuple[dict[str, Any], dict[str, bytes | memoryview]]:
    """`(meta, blobs)`: meta is JSON, with the facts among the metadata; the blobs are named as in this module's
    docstring."""
    proto, outside = graph_proto(model)
    blobs: dict[str, bytes | memoryview] = {"graph": proto.SerializeToString(deterministic=True)}
    for name in sorted(outside):
        blobs[f"tensor/{name}"] = tensor_bytes(outside[name])
    meta: dict[str, Any] = {
        "format": FORMAT,
        "metadata": json.loads(json.dumps({**metadata, **facts.to_json()}, sort_keys=True)),
        "encodings": {name: _grid(encodings[name]) for name in sorted(encodings)},
    }
    if encodings:
        blobs["encodings"] = _encoding_arrays(encodings)
    return meta, blobs


def _grid(encoding: Encoding) -> dict[str, Any]:
    free = {"free_sign": True} if encoding.free_sign else {}  # left out else: others keep their bytes
    return free | {
        "bitwidth": encoding.bitwidth,
        "signed": encoding.signed,
        "symmetric": encoding.symmetric,
        "axis": encoding.axis,
        "block_size": encoding.block_size,
        "frozen": encoding.frozen,
    }


def _encoding_arrays(encodings: Mapping[str, Encoding]) -> bytes:
    from safetensors.numpy import save

    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for name in sorted(encodings):
        arrays[f"{name}.scale"] = np.asarray(encodings[name].scale, "<f4", order="C")
        arrays[f"{name}.zero_point"] = np.asarray(encodings[name].zero_point, "<i4", order="C")
    return bytes(save(arrays))


def unpack(
    meta: Mapping[str, Any], read: Callable[[str], memoryview]
) -> tuple[ir.Model, dict[str, Encoding], dict[str, Any], Facts]:
    """What `pack` was given, its tensors views of the buffers that `read` returns. InputError for another format."""
    if meta.get("format") != FORMAT:
        raise InputError(
            f"A packed model of format {meta.get('format')!r} was found; this version reads format {FORMAT}. "
            "Import the model again."
        )
    proto = onnx.ModelProto.FromString(bytes(read("graph")))
    if not proto.graph.output:
        raise InputError("A packed model has a graph without outputs; it was not written here.")
    model = ir.from_proto(proto)
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = attached(value.const_value, read(f"tensor/{name}"))
    _refuse_external(model)
    encodings = _encodings(meta["encodings"], read) if meta["encodings"] else {}
    metadata = {name: value for name, value in meta["metadata"].items() if name not in NAMES}
    return model, encodings, metadata, facts_from(meta["metadata"])


def _refuse_external(model: ir.Model) -> None:
    """Raise InputError for data that would come from a file: whoever made the graph up may have named any."""
    tensors = [
        value.const_value
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    ]
    for graph in model.graphs():
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR:
                    tensors.append(attribute.as_tensor())
                elif attribute.type == ir.AttributeType.TENSORS:
                    tensors.extend(attribute.as_tensors())
    for tensor in tensors:
        if isinstance(tensor, ir.ExternalTensor):
            raise InputError(
                f"A packed model refers to the file {str(tensor.location)!r}; none is ever read."
            )


def attached(tensor: ir.ExternalTensor, data: memoryview) -> ir.TensorProtocol:
    """A tensor whose bytes are elsewhere, with these bytes."""
    shape, dtype, name = tensor.shape, tensor.dtype, tensor.name
    if dtype.bitwidth < 8:
        return ir.PackedTensor(np.frombuffer(data, dtype=np.uint8), dtype, shape=shape, name=name)
    array = np.frombuffer(data, dtype=dtype.numpy()).reshape(shape.numpy())
    return ir.Tensor(array, dtype=dtype, name=name)


def _encodings(grids: Mapping[str, Any], read: Callable[[str], memoryview]) -> dict[str, Encoding]:
    from safetensors.numpy import load

    from qpipe.numerics.grid import Encoding

    arrays = load(bytes(read("encodings")))
    return {
        name: Encoding(scale=arrays[f"{name}.scale"], zero_point=arrays[f"{name}.zero_point"], **grid)
        for name, grid in grids.items()
    }
