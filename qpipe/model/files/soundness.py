"""Is an ONNX file a graph at all? Everything that is wrong with its structure, found in one pass.

onnx's own checker stops at the first defect, and names it in its own terms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx

from qpipe.errors import InputError


def refuse_broken(proto: onnx.ModelProto) -> None:
    """Raise one InputError that lists everything that `broken` finds."""
    clauses = broken(proto)
    if clauses:
        count = "one place" if len(clauses) == 1 else f"{len(clauses)} places"
        listed = "\n".join(f"  - {clause}" for clause in clauses)
        raise InputError(f"The model's graph is broken in {count}. Export it again.\n{listed}")


def broken(proto: onnx.ModelProto) -> list[str]:
    """The defects of the graph, one clause each: values that nothing produces or two nodes do, cycles, nodes
    that do not fit their operator's definition."""
    versions = {item.domain: item.version for item in proto.opset_import}
    version = versions.get("", versions.get("ai.onnx", 0))
    unreadable = [*_texts(proto.graph), *_tensors(proto.graph)]
    return unreadable or [*_recursion(proto), *_wiring(proto.graph, frozenset()), *_definitions(proto.graph, version)]


def _texts(graph: onnx.GraphProto) -> Iterator[str]:
    """Names that are no text: protobuf hands out the bytes where they are no UTF-8."""
    for index, node in enumerate(graph.node):
        names = [node.name, node.op_type, node.domain, *node.input, *node.output, *(a.name for a in node.attribute)]
        yield from (f"node {index}: {name!r} is no text" for name in names if isinstance(name, bytes))
        for part in _parts(node):
            yield from _texts(part)
    values = [value.name for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer)]
    dims = [
        dim.dim_param
        for value in (*graph.input, *graph.output, *graph.value_info)
        for dim in value.type.tensor_type.shape.dim
    ]
    yield from (f"the name {name!r} is no text" for name in [graph.name, *values, *dims] if isinstance(name, bytes))


def _tensors(graph: onnx.GraphProto) -> Iterator[str]:
    """Initializers that hold another number of elements than their shape has, or refer to a place that is none."""
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            for entry in tensor.external_data:
                if entry.key in ("offset", "length") and not str(entry.value).isdecimal():
                    yield f"initializer {tensor.name!r}: {entry.key} {entry.value!r} of its data is no number"
        elif tensor.HasField("raw_data") and tensor.data_type in _BITS:
            wanted = (math.prod(tensor.dims) * _BITS[tensor.data_type] + 7) // 8
            if min(tensor.dims, default=0) < 0 or len(tensor.raw_data) != wanted:
                shape = list(tensor.dims)
                yield f"initializer {tensor.name!r} of shape {shape} holds {len(tensor.raw_data)} bytes, not {wanted}"
    for node in graph.node:
        for part in _parts(node):
            yield from _tensors(part)


_BITS = {
    number: onnx.helper.tensor_dtype_to_np_dtype(number).itemsize * 8
    for number in onnx.TensorProto.DataType.values()
    if number not in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING)
    and not any(word in onnx.TensorProto.DataType.Name(number) for word in ("INT2", "INT4", "FLOAT4"))
}


def _parts(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs in a node's attributes."""
    given = (each for a in node.attribute for each in [*a.graphs, *([a.g] if a.HasField("g") else [])])
    return list(given)


def _recursion(proto: onnx.ModelProto) -> Iterator[str]:
    """Functions that call themselves, by themselves or by way of others."""
    calls = {(f.domain, f.name): {(n.domain, n.op_type) for n in f.node} for f in proto.functions}
    for start in calls:
        reached, pending = set[tuple[str, str]](), [start]
        while pending:
            fresh = (calls.get(pending.pop(), set()) & calls.keys()) - reached
            reached |= fresh
            pending += fresh
        if start in reached:
            yield f"the function {start[1]!r} calls itself"
            return


def _wiring(graph: onnx.GraphProto, outer: frozenset[str]) -> Iterator[str]:
    given = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    for sparse in graph.sparse_initializer:
        given.add(sparse.values.name)
        yield f"initializer {sparse.values.name!r} is sparse, which is not supported"
    producers: dict[str, str] = {}
    for index, node in enumerate(graph.node):
        for name in filter(None, node.output):
            if name in producers or name in given:
                yield f"value {name!r} is produced twice, the second time by {_title(node, index)}"
            producers[name] = _title(node, index)
    visible = outer | given | set(producers)
    for index, node in enumerate(graph.node):
        for name in dict.fromkeys(filter(None, node.input)):
            if name not in visible:
                yield f"{_title(node, index)} reads {name!r}, which nothing produces"
        for part in _parts(node):
            yield from _wiring(part, visible)
    yield from _cycle(graph, outer | given)
    outputs = [value.name for value in graph.output]
    for name in dict.fromkeys(outputs):
        if name not in visible:
            yield f"nothing produces the output {name!r}"
        if outputs.count(name) > 1:
            yield f"the output {name!r} is listed twice"


def _cycle(graph: onnx.GraphProto, known: frozenset[str]) -> Iterator[str]:
    """What is left once every node is taken away whose inputs are there."""
    produced = {name for node in graph.node for name in node.output if name}  # "" stands for what is left out
    waiting = {
        index: {name for name in node.input if name in produced and name not in known}
        for index, node in enumerate(graph.node)
    }
    readers: dict[str, list[int]] = {}
    for index, names in waiting.items():
        for name in names:
            readers.setdefault(name, []).append(index)
    ready = [index for index, names in waiting.items() if not names]
    done = set(ready)
    while ready:
        for name in graph.node[ready.pop()].output:
            for index in readers.get(name, ()):
                waiting[index].discard(name)
                if not waiting[index] and index not in done:
                    done.add(index)
                    ready.append(index)
    left = [_title(graph.node[index], index) for index in waiting if index not in done]
    if left:
        yield f"a cycle runs through, or leads to, {', '.join(left[:4])}{' …' if len(left) > 4 else ''}"


def _definitions(graph: onnx.GraphProto, version: int) -> Iterator[str]:
    for index, node in enumerate(graph.node):
        for part in _parts(node):
            yield from _definitions(part, version)
        if node.domain not in ("", "ai.onnx"):
            continue
        try:
            schema = onnx.defs.get_schema(node.op_type, version, "")
        except onnx.defs.SchemaError:
            continue  # an unknown operator is reported with the others that cannot be taken
        yield from (f"{_title(node, index)} {reason}" for reason in _misfits(node, schema))


def _misfits(node: onnx.NodeProto, schema: onnx.defs.OpSchema) -> Iterator[str]:
    if not schema.min_input <= len(node.input) <= schema.max_input:
        yield f"has {len(node.input)} inputs, {_range(schema.min_input, schema.max_input)} are allowed"
    if not schema.min_output <= len(node.output) <= schema.max_output:
        yield f"has {len(node.output)} outputs, {_range(schema.min_output, schema.max_output)} are allowed"
    given = {attribute.name for attribute in node.attribute}
    for name in sorted(given - set(schema.attributes)):
        yield f"has the attribute {name!r}, which its operator does not know"
    for name, attribute in sorted(schema.attributes.items()):
        if attribute.required and name not in given:
            yield f"lacks the attribute {name!r}"


def _range(least: int, most: int) -> str:
    return str(least) if least == most else f"{least} to {most}" if most < 1 << 16 else f"{least} or more"


def _title(node: onnx.NodeProto, index: int) -> str:
    """A node by its name, or by its place where it has none."""
    return f"node {node.name!r} (op {node.op_type})" if node.name else f"node {index} (op {node.op_type})"
