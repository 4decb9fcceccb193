"""Is an ONNX file a graph at all? Everything that is wrong with its structure, found in one pass.

onnx's own checker stops at the first defect, and names it in its own terms.
"""

from __future__ import annotations

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
    return [*_wiring(proto.graph, frozenset()), *_definitions(proto.graph, version)]


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
        for attribute in node.attribute:
            for part in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
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
        for attribute in node.attribute:
            for part in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
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
