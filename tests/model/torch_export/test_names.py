"""Names after torch's modules, for nodes, values and constants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qpipe.errors import InputError
from qpipe.model.network.naming import SCOPE
from qpipe.model.torch_export.names import rename
from tests.model.nets import normal, parsed


def renamed(text: str, scopes: Sequence[str], names: Sequence[str] | None = None, **tensors: Any) -> ir.Graph:
    graph = ir.from_proto(parsed(text, **tensors)).graph
    for node, scope in zip(graph, scopes, strict=True):
        node.metadata_props[SCOPE] = scope
    rename(graph, {name for name in tensors if "." in name}, names)
    return graph


def test_a_module_that_is_one_node_gives_it_its_name() -> None:
    text = "m (float[N,4] a) => (float[N,4] d) { b = Relu(a)  c = Exp(b)  d = Abs(c) }"
    graph = renamed(text, ["act", "layer", "layer"])
    assert [node.name for node in graph] == ["act", "layer.Exp", "layer.Abs"]
    assert [node.outputs[0].name for node in graph] == ["act.output", "layer.Exp.output", "output"]


def test_the_node_that_has_a_modules_weight_has_its_name() -> None:
    proto = parsed("m (float[N,4] x) => (float[N,4] y) { t = MatMul(x, w)  y = Exp(t) }", w=normal(4, 4))
    graph = ir.from_proto(proto).graph
    graph.initializers["w"].name = "fc.weight"
    for node in graph:
        node.metadata_props[SCOPE] = "fc"
    rename(graph, {"fc.weight"}, None)
    assert [node.name for node in graph] == ["fc", "fc.Exp"]
    assert "fc.weight" in graph.initializers


def test_nodes_of_no_module_are_called_after_their_operators() -> None:
    text = "m (float[N,4] x) => (float[N,4] y) { a = Exp(x)  b = Exp(a)  y = Abs(b) }"
    graph = renamed(text, ["", "", "block.inner"])
    assert [node.name for node in graph] == ["Exp", "Exp_1", "block.inner"]


def test_a_module_with_modules_below_it_shares_its_name_with_none_of_its_nodes() -> None:
    text = "m (float[N,4] x) => (float[N,4] y) { a = Exp(x)  y = Abs(a) }"
    assert [node.name for node in renamed(text, ["block", "block.act"])] == ["block.Exp", "block.act"]


def test_constants_are_called_after_their_first_reader_and_their_place() -> None:
    text = "m (float[N,4] x) => (float[N,4] y) { a = Clip(x, lo, hi)  y = Add(a, hi) }"
    graph = renamed(text, ["act", "sum"], lo=np.float32(0), hi=np.float32(6))
    assert sorted(graph.initializers) == ["act.max", "act.min"]


def test_several_outputs_are_numbered() -> None:
    graph = renamed("m (float[N,4] x) => (float[N,4] y, float[N,4] z) { y = Exp(x)  z = Abs(x) }", ["a", "b"])
    assert [value.name for value in graph.outputs] == ["output_0", "output_1"]


def test_inputs_take_the_names_that_are_given_where_these_fit() -> None:
    text = "m (float[N,4] x, float[N,4] z) => (float[N,4] y) { y = Add(x, z) }"
    assert [value.name for value in renamed(text, [""], ["image", "mask"]).inputs] == ["image", "mask"]
    for names in (["image"], ["same", "same"]):
        with pytest.raises(InputError, match="need 2 different names"):
            renamed(text, [""], names)
