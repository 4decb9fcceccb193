"""A module of `to_torch` run node by node over many batches: every node once, for all batches, then the next.

Methods that tune layer after layer walk the float and the quantized model side by side in this way: each stops
before a layer, hands out what goes into it, has the layer's parameters replaced, and goes on. Each batch passes
each node once, so a walk costs as much as one forward pass however many layers are tuned.

A value is held until its last reader has run, so memory is that of the widest place of the graph, times the
number of batches. What follows from parameters alone (a quantized weight) is not held: it is computed when a node
reads it, so that a replaced parameter counts from the next node on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from qpipe.model.simulation.constants import taken_in
from qpipe.model.simulation.module import value_nodes


class Stream:
    """Where a walk through `module` stands. Values are lists with one tensor per batch."""

    def __init__(self, module: fx.GraphModule, batches: Iterable[Sequence[Any]]) -> None:
        """`batches` hold arrays or tensors in the order of the module's inputs; all are taken in at once."""
        self.module = module
        self.device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._nodes = list(module.graph.nodes)
        self._value_nodes = value_nodes(module)
        self._constant = _constants(self._nodes)
        self._last = _last_readers(self._nodes, self._constant)
        self._values: dict[fx.Node, list[Any]] = {}
        self._next = 0
        self._outputs: list[Any] | None = None
        self._start([tuple(batch) for batch in batches])

    def advance(self, before: str) -> None:
        """Runs every node in front of the ONNX node `before`; nothing where that is done already."""
        stop = self._position(before)
        while self._next < stop:
            self._step()

    def fork(self) -> Stream:
        """A walk of its own from here on, through the same module: what is replaced there counts for both."""
        other = copy.copy(self)
        other._values = dict(self._values)
        return other

    def finish(self) -> list[Any]:
        """Runs the rest; the module's output for each batch: a tensor, or a tuple of them."""
        while self._next < len(self._nodes):
            self._step()
        assert self._outputs is not None
        return self._outputs

    def value(self, name: str) -> list[Tensor]:
        """The ONNX value `name` as its readers see it, per batch.

        Raises KeyError where there is none, where it has not been computed yet, or where its last reader has run.
        """
        node = self._node_of(name)
        if node in self._constant:
            return [self._evaluate(node, {})]
        if node not in self._values:
            done = self._nodes.index(node) < self._next
            state = "is not held any more" if done else "has not been computed yet"
            raise KeyError(f"the value {name!r} {state}.")
        return list(self._values[node])

    def set_parameter(self, name: str, value: Any) -> None:
        """Replaces the parameter of the initializer `name`; nodes that have run already keep what they gave."""
        attributes = self.module.meta["parameters"]
        if name not in attributes:
            raise KeyError(f"the module has no parameter {name!r}.")
        parameter = getattr(self.module, attributes[name])
        with torch.no_grad():
            parameter.copy_(torch.as_tensor(value))

    def _start(self, batches: list[tuple[Any, ...]]) -> None:
        placeholders = [node for node in self._nodes if node.op == "placeholder"]
        for i, node in enumerate(placeholders):
            if node in self._last:
                self._values[node] = [taken_in(batch[i], self.device) for batch in batches]
        self._count = len(batches)
        while self._next < len(self._nodes) and self._nodes[self._next].op == "placeholder":
            self._next += 1

    def _step(self) -> None:
        node = self._nodes[self._next]
        if node not in self._constant:
            constants: dict[fx.Node, Any] = {}
            fixed = {
                arg: self._evaluate(arg, constants) for arg in node.all_input_nodes if arg in self._constant
            }
            results = [self._run(node, {**fixed, **self._batch(node, b)}) for b in range(self._count)]
            if node.op == "output":
                self._outputs = results
            elif node in self._last:
                self._values[node] = results
        for read in node.all_input_nodes:
            if self._last.get(read) == self._next:
                self._values.pop(read, None)
        self._next += 1

    def _batch(self, node: fx.Node, batch: int) -> dict[fx.Node, Any]:
        return {arg: self._values[arg][batch] for arg in node.all_input_nodes if arg not in self._constant}

    def _evaluate(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        """What a constant node gives now; its inputs, at most a few nodes, first."""
        if node not in known:
            given = {arg: self._evaluate(arg, known) for arg in node.all_input_nodes}
            known[node] = self._run(node, given)
        return known[node]

    def _run(self, node: fx.Node, given: dict[fx.Node, Any]) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), lambda arg: given[arg])
        with torch.no_grad():
            if node.op == "get_attr":
                return _attribute(self.module, str(node.target))
            if node.op == "call_module":
                return self.module.get_submodule(str(node.target))(*args, **kwargs)
            if node.op == "output":
                return args[0]
            assert callable(node.target)
            return node.target(*args, **kwargs)

    def _node_of(self, name: str) -> fx.Node:
        if name not in self._value_nodes:
            raise KeyError(f"the module has no value {name!r}.")
        return self._value_nodes[name]

    def _position(self, onnx_name: str) -> int:
        for i, node in enumerate(self._nodes):
            if node.meta.get("onnx_name") == onnx_name:
                return i
        raise KeyError(f"the module has no node {onnx_name!r}.")


def _constants(nodes: list[fx.Node]) -> set[fx.Node]:
    """The nodes that follow from attributes of the module and literals alone."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node.op == "get_attr" or (
            node.op in ("call_function", "call_module") and all(arg in found for arg in node.all_input_nodes)
        ):
            found.add(node)
    return found


def _last_readers(nodes: list[fx.Node], constant: set[fx.Node]) -> dict[fx.Node, int]:
    """For each value that is read, the position of its last reader."""
    last: dict[fx.Node, int] = {}
    for i, node in enumerate(nodes):
        for arg in node.all_input_nodes:
            if arg not in constant:
                last[arg] = i
    return last


def _attribute(module: torch.nn.Module, target: str) -> Any:
    path, _, name = target.rpartition(".")
    return getattr(module.get_submodule(path), name)
