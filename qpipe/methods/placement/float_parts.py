"""What stays in float whatever a target's table says of the operators: 8 bits lose too much there, or save nothing.

    v -> Add(v, mask) -> … -> Softmax           a decision, `decided`
    boxes, scores -> Concat -> the caller       what is joined as it leaves the model, `ending`
    v -> Add(v, layer) -> LayerNormalization    sums that normalizations alone read, the stream of a transformer, `sums`
    the input -> Conv -> x * x -> … -> Log      a spectrum, which the model takes of its input, `spectra`

**Sums.** A layer gives floats and a normalization takes them: a grid between costs two conversions and the small values
of a stream that has large ones, which the normalization makes large again.

**Spectra.** A logarithm makes of 100 dB what 8 bits hold evenly; in front of it they hold 48 dB, and a square between
halves that. What is sums and powers of the input up to a logarithm was mostly not learned, and is small.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import TYPE_CHECKING

import onnx_ir as ir

from qpipe.methods.placement.survival import MOVES, ONE_OF_MANY

if TYPE_CHECKING:
    from qpipe.model.structure.composite import Composite

_STARTS = frozenset({"Add", "Sub", "Where"})
_ON_THE_WAY = _STARTS | ONE_OF_MANY | MOVES | {"Mul", "Div", "Max", "Min", "Clip", "Cast"}
_DECISIONS = frozenset(
    {"Softmax", "LogSoftmax", "Hardmax", "ReduceLogSumExp", "ArgMax", "ArgMin", "TopK"}
    | {"Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"}
)
_ROOTS = frozenset({"Sqrt", "Reciprocal"})
"""What a normalization that is written out has."""
_FIXED = (
    (MOVES - ONE_OF_MANY)
    | {"Conv", "MatMul", "Gemm", "Add", "Sub", "Mul", "Div", "Neg", "Sum", "ReduceSum", "ReduceMean", "AveragePool"}
    | {"Pow", "Sqrt", "Abs", "Clip", "Max", "Cast", "Where", "ReduceL2", "ReduceSumSquare", "STFT", "DFT"}
)
"""What a spectrum is made of."""


def decided(graph: ir.Graph, share: Container[str]) -> set[ir.Node]:
    """The nodes that stay in float because all that they give ends in a decision: sums and masks, what is made of
    them on the way, and what only moves values (`share`) to them."""
    nodes, leading = list(graph), set[ir.Node]()
    for node in reversed(nodes):
        readers = _readers(node)
        if node.op_type in _ON_THE_WAY and readers and all(r.op_type in _DECISIONS or r in leading for r in readers):
            leading.add(node)
    found: set[ir.Node] = set()
    for node in nodes:
        before = {value.producer() for value in node.inputs if value is not None}
        if node in leading and (node.op_type in _STARTS or before & found):
            found.add(node)
    for node in reversed(nodes):
        if node in leading and node.op_type in share and _readers(node) & found:
            found.add(node)
    return found


def ending(graph: ir.Graph, op_types: Container[str], share: Container[str]) -> set[ir.Node]:
    """The nodes of `op_types` whose result only leaves the model, moved at most, and those of `share` that move it."""
    last, found = set[ir.Node](), set[ir.Node]()
    for node in reversed(list(graph)):
        if (node.op_type in share or node.op_type in op_types) and _readers(node) <= last:
            last.add(node)
    for node in graph:
        before = {value.producer() for value in node.inputs if value is not None}
        if node in last and (node.op_type in op_types or before & found):
            found.add(node)
    return found


def sums(graph: ir.Graph, norms: Container[str], composites: Iterable[Composite]) -> set[ir.Node]:
    """The Adds that nobody reads but normalizations, those of `norms` and those written out, and further such Adds."""
    inside = {
        node: composite.root
        for composite in composites
        if any(each.op_type in _ROOTS for each in composite.nodes)
        for node in composite.nodes
    }
    found: set[ir.Node] = set()
    for node in reversed(list(graph)):
        value = node.outputs[0]
        if node.op_type != "Add" or value.is_graph_output():
            continue
        readers = _readers(node)
        if readers and all(r.op_type in norms or r in found or inside.get(r) is value for r in readers):
            found.add(node)
    return found


def spectra(graph: ir.Graph, op_types: Container[str]) -> set[ir.Node]:
    """The nodes from the inputs up to those of `op_types`, where these are of fixed sums and powers of the inputs."""
    fixed, found = set[ir.Node](), set[ir.Node]()
    for node in graph:
        before = [value.producer() for value in node.inputs if value is not None and not value.is_initializer()]
        if all(each is None or each in fixed for each in before) and node.op_type in _FIXED and not _saturates(node):
            fixed.add(node)
        elif node.op_type in op_types and all(each in fixed for each in before):
            found.add(node)
    pending = list(found)
    while pending:
        for value in pending.pop().inputs:
            producer = None if value is None else value.producer()
            if producer is not None and producer not in found:
                found.add(producer)
                pending.append(producer)
    return found


def _saturates(node: ir.Node) -> bool:
    """Whether a Clip has an upper bound, as an activation has, and no logarithm needs."""
    return node.op_type == "Clip" and len(node.inputs) > 2 and node.inputs[2] is not None


def _readers(node: ir.Node) -> set[ir.Node]:
    return {reader for output in node.outputs for reader in output.consumers()}
