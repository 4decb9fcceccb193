"""Network, the value: an immutable graph in the canonical form, its tensors, its encodings and the facts about it.

    editor = network.edit()                              a copy that shares the tensors
    editor.set_param("conv1.weight", network.param("conv1.weight") * 2)
    doubled = editor.model()                             validated, immutable again

What is done with one is a function elsewhere (`find_layers`, `to_torch`, `to_qdq`, …), so that whoever takes a Network
depends on no more than he calls; `qpipe.model.Model` is the same value with these at hand. The graph is an
`onnx_ir.Graph` at opset 21: `canon` describes its form, `invariants` what always holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import onnx_ir

from qpipe.mapped import spooled
from qpipe.model.network import packing
from qpipe.model.network.facts import NAMES, Facts
from qpipe.model.network.invariants import restore
from qpipe.model.network.naming import names_of

if TYPE_CHECKING:
    from qpipe.numerics.grid import Encoding

Array = npt.NDArray[Any]
SPOOLED_BYTES = 1 << 27
"""What one editor replaces beyond this goes into files."""


@dataclass(frozen=True)
class ValueSpec:
    """An input or output of a model: `dtype` as numpy names it, a dynamic dimension as its name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def floating(self) -> bool:
        """Whether its numbers are floats; numpy does not count bfloat16, which it borrows, among them."""
        return self.dtype.startswith(("float", "bfloat"))


class Params(Mapping[str, Array]):
    """The initializers of a graph by name, sorted; an array is made, read-only, when it is asked for."""

    def __init__(self, graph: onnx_ir.Graph) -> None:
        self._initializers = graph.initializers

    def __getitem__(self, name: str) -> Array:
        value = self._initializers[name]
        if value.const_value is None:
            raise KeyError(name)
        array: Array = np.asarray(value.const_value.numpy())
        if array.flags.writeable:
            array = array.view()
            array.flags.writeable = False
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._initializers))

    def __len__(self) -> int:
        return len(self._initializers)


class Network:
    """An immutable network; what changes one returns another, of the same class, that shares its tensors.

    `ir` and `graph` are there to be read: whoever rewrites asks for `edit()`.
    """

    __slots__ = ("_encodings", "_facts", "_ir", "_metadata")

    def __init__(
        self,
        model: onnx_ir.Model,
        encodings: Mapping[str, Encoding] | None = None,
        metadata: Mapping[str, Any] | None = None,
        facts: Facts | None = None,
    ) -> None:
        """Takes over a graph that is canonical already, as `canonicalize` makes it."""
        self._ir = model
        self._encodings = MappingProxyType(dict(encodings or {}))
        self._metadata = MappingProxyType(dict(metadata or {}))
        self._facts = facts or Facts()

    @classmethod
    def of(cls, network: Network) -> Self:
        """`network` as one of this class."""
        return cls(network.ir, network.encodings, network.metadata, network.facts)

    @classmethod
    def unpack(cls, meta: Mapping[str, Any], read: Callable[[str], memoryview]) -> Self:
        """The network that `pack` took apart; its tensors are views of the buffers that `read` returns."""
        return cls(*packing.unpack(meta, read))

    def pack(self) -> tuple[dict[str, Any], dict[str, bytes | memoryview]]:
        """`(meta, blobs)` as `packing` describes; the same content gives the same bytes in any process."""
        return packing.pack(self._ir, self._encodings, self._metadata, self._facts)

    @property
    def ir(self) -> onnx_ir.Model:
        """The onnx_ir model, to be read only."""
        return self._ir

    @property
    def graph(self) -> onnx_ir.Graph:
        """The onnx_ir graph, to be read only."""
        return self._ir.graph

    @property
    def encodings(self) -> Mapping[str, Encoding]:
        """The grids by the name of the value (an activation or an initializer) that is quantized."""
        return self._encodings

    @property
    def metadata(self) -> Mapping[str, Any]:
        """JSON values that travel with the model; `notes` are sentences about its import."""
        return self._metadata

    @property
    def facts(self) -> Facts:
        """What later stages have to know, beside the graph and the grids."""
        return self._facts

    @property
    def inputs(self) -> tuple[ValueSpec, ...]:
        """The graph's inputs, in order."""
        return tuple(_spec(value) for value in self.graph.inputs)

    @property
    def outputs(self) -> tuple[ValueSpec, ...]:
        """The graph's outputs, in order."""
        return tuple(_spec(value) for value in self.graph.outputs)

    @property
    def params(self) -> Mapping[str, Array]:
        """All initializers by name: parameters, statistics and constants alike; read-only arrays."""
        return Params(self.graph)

    def param(self, name: str) -> Array:
        """The initializer `name`, read-only. Raises KeyError with a sentence where there is none."""
        if name not in self.graph.initializers:
            raise KeyError(f"the model has no parameter {name!r}.")
        return self.params[name]

    def edit(self) -> Editor:
        """A copy to rewrite; it shares the tensors until they are set."""
        return Editor(self)

    def with_params(self, params: Mapping[str, Array]) -> Self:
        """The model with some parameters replaced."""
        editor = self.edit()
        for name, array in params.items():
            editor.set_param(name, array)
        return type(self).of(editor.model())

    def with_encodings(self, encodings: Mapping[str, Encoding]) -> Self:
        """The model with exactly these encodings. Raises ValueError for a name that the graph lacks."""
        unknown = sorted(set(encodings) - set(value_names(self.graph)))
        if unknown:
            raise ValueError(f"the model has no value named {', '.join(map(repr, unknown))}.")
        return type(self)(self._ir, encodings, self._metadata, self._facts)

    def with_metadata(self, entries: Mapping[str, Any]) -> Self:
        """The model with these entries of its metadata added or replaced; the values must be JSON."""
        return type(self)(self._ir, self._encodings, _json({**self._metadata, **entries}), self._facts)

    def with_facts(self, facts: Facts | None = None, **changes: Any) -> Self:
        """The model with `facts`, or its own, of which these fields are replaced."""
        changed = replace(facts or self._facts, **changes)
        return type(self)(self._ir, self._encodings, self._metadata, changed)

    def __repr__(self) -> str:
        size = sum(value.const_value.size for value in self.graph.initializers.values() if value.const_value)
        names = ", ".join(f"{spec.name}{list(spec.shape)}" for spec in self.inputs)
        return (
            f"{type(self).__name__}({names}; {self.graph.num_nodes()} nodes, {len(self.graph.initializers)} tensors, "
            f"{size:,} numbers, {len(self._encodings)} encodings)"
        )


class Editor:
    """A copy of a model that may be rewritten; `model()` validates it and gives it back as what it was."""

    def __init__(self, source: Network) -> None:
        self._class = type(source)
        self.ir: onnx_ir.Model = source.ir.clone()
        self.encodings: dict[str, Encoding] = dict(source.encodings)
        self.metadata: dict[str, Any] = json.loads(json.dumps(dict(source.metadata)))
        self.facts: Facts = source.facts
        self._known = set(value_names(source.graph))
        self.names = names_of(source.graph)
        """Hands out names for new values."""
        self._replaced_bytes = 0

    @property
    def graph(self) -> onnx_ir.Graph:
        """The graph of the copy."""
        return self.ir.graph

    def node(self, name: str) -> onnx_ir.Node:
        """The node called `name`. Raises KeyError."""
        return self.ir.graph.node(name)

    def value(self, name: str) -> onnx_ir.Value:
        """The value called `name`: an input, an initializer or a node's output. Raises KeyError."""
        found = onnx_ir.convenience.create_value_mapping(self.graph, include_subgraphs=False).get(name)
        if found is None:
            raise KeyError(f"the model has no value {name!r}.")
        return found

    def param(self, name: str) -> Array:
        """The initializer `name` as it is now, read-only."""
        if name not in self.graph.initializers:
            raise KeyError(f"the model has no parameter {name!r}.")
        return Params(self.graph)[name]

    def set_param(self, name: str, array: npt.ArrayLike) -> None:
        """Replace the initializer `name`; the array is copied, and cast to the type that it replaces. Where much is
        replaced the rest of it is kept in files without names, so that memory holds one tensor of a large model."""
        value = self.graph.initializers.get(name)
        if value is None or value.const_value is None:
            raise KeyError(f"the model has no parameter {name!r}.")
        copy = np.array(array, dtype=value.const_value.dtype.numpy(), order="C")
        self._replaced_bytes += copy.nbytes
        _set(value, spooled(copy) if self._replaced_bytes > SPOOLED_BYTES else copy)

    def add_param(self, name: str, array: npt.ArrayLike) -> onnx_ir.Value:
        """A new initializer under `name`, or under `name_1`, … where that is taken; the array is copied."""
        value = onnx_ir.Value(name=self.names.fresh(name))
        _set(value, np.array(array, order="C"))
        self.graph.register_initializer(value)
        return value

    def model(self) -> Network:
        """The edited model. Encodings of values that the edit removed go with them.

        Raises ValueError where the graph is broken or an encoding names what never was a value."""
        restore(self.ir)
        names = set(value_names(self.graph))
        unknown = sorted(set(self.encodings) - names - self._known)
        if unknown:
            raise ValueError(f"encodings name no value of the model: {', '.join(map(repr, unknown))}.")
        encodings = {name: encoding for name, encoding in self.encodings.items() if name in names}
        return self._class(self.ir.clone(), encodings, _json(self.metadata), self.facts)


def value_names(graph: onnx_ir.Graph) -> Iterator[str]:
    """The names of all inputs, initializers and node outputs of `graph`, without those of subgraphs."""
    yield from onnx_ir.convenience.create_value_mapping(graph, include_subgraphs=False)


def _set(value: onnx_ir.Value, array: Array) -> None:
    array.flags.writeable = False
    tensor = onnx_ir.Tensor(array, name=value.name)
    value.const_value = tensor
    value.type = onnx_ir.TensorType(tensor.dtype)
    value.shape = onnx_ir.Shape(array.shape)


def _json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of `metadata` as JSON has it. Raises TypeError for what JSON cannot hold, ValueError for the names
    under which facts are packed."""
    if reserved := sorted(set(metadata) & set(NAMES)):
        raise ValueError(
            f"{', '.join(map(repr, reserved))} are facts of a model: set them with `with_facts`."
        )
    copied: dict[str, Any] = json.loads(json.dumps(dict(metadata), allow_nan=False))
    return copied


def _spec(value: onnx_ir.Value) -> ValueSpec:
    if value.dtype is None or value.shape is None:
        raise ValueError(f"the type or the shape of {value.name!r} is not known.")
    shape = tuple(
        dim if isinstance(dim, int) else dim.value or f"{value.name}_dim{axis}"
        for axis, dim in enumerate(value.shape)
    )
    return ValueSpec(str(value.name), np.dtype(value.dtype.numpy()).name, shape)
