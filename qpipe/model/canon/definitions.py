"""Operators written out as what they mean: ONNX's own definition where it gives one, ours for two others.

    Attention, RMSNormalization, RotaryEmbedding, Swish, SwiGLU, LinearAttention, CausalConvWithState,
    NegativeLogLikelihoodLoss, SoftmaxCrossEntropyLoss, window functions, …     the definition in the schema
    CumProd            the product over a triangle of masks
    TensorScatter      ScatterElements at the write position plus 0, 1, …

ONNX's inliner is not used: it aborts on an optional input that is absent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from qpipe.errors import InputError
from qpipe.model.network.naming import assign_names
from qpipe.model.network.shapes import infer_shapes

_DOMAIN = "qpipe.definition"
_DEPTH = 8
"""Definitions that use operators with definitions; two levels were seen."""


def expand(model: ir.Model, version: int, stays: Callable[[ir.Node], bool]) -> ir.Model:
    """`model`, at opset `version`, with the nodes that may not stay replaced by their definitions, if any.

    It may be used up. Tensors are shared; names and metadata of what stays are kept."""
    for _ in range(_DEPTH):
        wanted = [node for node in _nodes(model) if _replaceable(node, version, stays)]
        if not wanted:
            break
        assign_names(model)
        infer_shapes(model)
        for number, node in enumerate(wanted):
            body = _definition(node, version)
            if body is None:
                continue
            node.domain, node.op_type = _DOMAIN, f"{node.op_type}_{number}"
            body.domain, body.name = node.domain, node.op_type
            body.opset_imports.clear()
            body.opset_imports.update(model.opset_imports)
            model.functions[body.identifier()] = body
        model.opset_imports[_DOMAIN] = 1
        model = common.InlinePass()(model).model
        model.functions.clear()
        model.opset_imports.pop(_DOMAIN, None)
    return model


def has_definition(op_type: str, version: int, domain: str = "") -> bool:
    """Whether `expand` can write the operator out."""
    if not domain and op_type in _OURS:
        return True
    found = schema(op_type, version, domain)
    return found is not None and (found.has_function or found.has_context_dependent_function)


def schema(op_type: str, version: int, domain: str = "") -> onnx.defs.OpSchema | None:
    """What the installed onnx knows of the operator at this version of the opset; None for nothing."""
    try:
        return onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    return (node for graph in model.graphs() for node in graph)


def _replaceable(node: ir.Node, version: int, stays: Callable[[ir.Node], bool]) -> bool:
    if node.domain == "ai.onnx.preview":
        return has_definition(node.op_type, 1, node.domain)
    return not node.domain and not stays(node) and has_definition(node.op_type, version)


def _definition(node: ir.Node, version: int) -> ir.Function | None:
    if not node.domain and node.op_type in _OURS:
        return _function(_OURS[node.op_type](node), node, version)
    found = schema(node.op_type, 1 if node.domain else version, node.domain)
    assert found is not None
    _write_defaults(node, found)
    if not found.has_context_dependent_function:
        newest = max((v for v in found.function_opset_versions if v <= version), default=None)
        data = None if newest is None else found.get_function_with_opset_version(newest)
    else:
        types = [_type(value) for value in node.inputs]
        versions = found.context_dependent_function_opset_versions
        newest = max((v for v in versions if v <= version), default=versions[0])
        try:
            data = found.get_context_dependent_function_with_opset_version(
                newest, ir.to_proto(node).SerializeToString(), types
            )
        except Exception as error:
            raise InputError(
                f"The model's node {node.name!r} ({node.op_type}) cannot be written in older operators, "
                f"probably since the types of its inputs are not known: {error}"
            ) from error
    if not data:
        return None
    proto = onnx.FunctionProto.FromString(data)
    for name in [name for name, attribute in node.attributes.items() if _is_graph(attribute)]:
        del node.attributes[name]  # the definition was made for this node and holds what it says
        proto.attribute[:] = [known for known in proto.attribute if known != name]
    del proto.output[len(node.outputs) :]
    made = {name for part in proto.node for name in part.output}
    for name in set(proto.output) - made:  # an optional output that the node does not have
        proto.node.add(op_type="Identity", input=proto.input[:1], output=[name])
    body: ir.Function = ir.from_proto(proto)
    return body


def _is_graph(attribute: ir.Attr) -> bool:
    return attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _type(value: ir.Value | None) -> bytes:
    if value is None or value.type is None:
        return b""
    info: onnx.ValueInfoProto = ir.serde.serialize_value(value)
    return bytes(info.type.SerializeToString())


def _write_defaults(node: ir.Node, found: onnx.defs.OpSchema) -> None:
    """Attributes left out are written: definitions refer to them, and inlining knows no defaults."""
    for name, attribute in found.attributes.items():
        if name not in node.attributes and attribute.default_value.type:
            node.attributes[name] = ir.from_proto(attribute.default_value)


def _function(text: str, node: ir.Node, version: int) -> ir.Function:
    """The function with the body `text`, whose inputs are x0, x1, … and whose output is y."""
    given = ", ".join(f"x{i}" for i in range(len(node.inputs)))
    source = f'<opset_import: ["" : {version}], domain: "{_DOMAIN}"> f ({given}) => (y) {{ {text} }}'
    body: ir.Function = ir.from_proto(onnx.parser.parse_function(source))
    return body


def _cum_prod(node: ir.Node) -> str:
    """y[i] = the product of x0[j] over the j that the running product at i along the axis x1 has seen."""
    exclusive, reverse = node.attributes.get_int("exclusive", 0), node.attributes.get_int("reverse", 0)
    compare = ("Less" if reverse else "Greater") + ("" if exclusive else "OrEqual")
    return f"""
        zero = Constant<value_int=0>() one = Constant<value_int=1>()
        first = Constant<value_ints=[0]>() second = Constant<value_ints=[1]>()
        third = Constant<value_ints=[2]>() open = Constant<value_ints=[-1]>()
        end = Constant<value_ints=[{1 << 30}]>() around = Constant<value_ints=[0, 3]>()
        shape = Shape(x0) rank = Shape(shape)
        far = Cast<to=7>(x1) flat = Reshape(far, open) axis = Mod(flat, rank) behind = Add(axis, second)
        left = Slice(shape, first, axis) n = Slice(shape, axis, behind) right = Slice(shape, behind, end)
        before = ReduceProd(left) after = ReduceProd(right)
        apart = Concat<axis=0>(before, second, n, after) each = Reshape(x0, apart)
        count = Squeeze(n, first) place = Range(zero, count, one)
        row = Unsqueeze(place, second) column = Unsqueeze(place, first)
        square = {compare}(row, column) mask = Unsqueeze(square, around)
        unit = Constant<value_float=1.0>() neutral = CastLike(unit, x0)
        factors = Where(mask, each, neutral)
        products = ReduceProd<keepdims=0>(factors, third)
        y = Reshape(products, shape)"""


def _tensor_scatter(node: ir.Node) -> str:
    """x0 (the cache) with x1 (the update) written from x2[batch] on, along `axis`."""
    rank = _rank(node)
    axis = node.attributes.get_int("axis", -2) % rank
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        others = ", ".join(str(i) for i in range(1, rank))
        begin = f"rest = Constant<value_ints=[{others}]>() begin = Unsqueeze(x2, rest)"
    else:
        begin = "begin = Constant<value_int=0>()"
    behind = ", ".join(str(i) for i in range(1, rank - axis))
    view = f"tail = Constant<value_ints=[{behind}]>() along = Unsqueeze(place, tail)"
    circular = node.attributes.get_string("mode", "linear") == "circular"
    around = "at = Mod(sum, size)" if circular else "at = Identity(sum)"
    return f"""
        zero = Constant<value_int=0>() one = Constant<value_int=1>() first = Constant<value_ints=[0]>()
        n = Shape<start={axis}, end={axis + 1}>(x1) count = Squeeze(n, first)
        size = Shape<start={axis}, end={axis + 1}>(x0)
        place = Range(zero, count, one) {view if behind else "along = Identity(place)"}
        {begin}
        sum = Add(begin, along) {around}
        shape = Shape(x1) index = Expand(at, shape)
        y = ScatterElements<axis={axis}>(x0, index, x1)"""


_OURS: dict[str, Callable[[ir.Node], str]] = {"CumProd": _cum_prod, "TensorScatter": _tensor_scatter}


def _rank(node: ir.Node) -> int:
    value = node.inputs[0]
    if value is None or value.shape is None:
        raise InputError(
            f"The number of dimensions that node {node.name!r} ({node.op_type}) gets is not known."
        )
    return len(value.shape)
