"""Model: an immutable network, that is a graph in the canonical form, its tensors and its encodings.

    model = Model.load("net.onnx")                       import: any opset, external data, checked
    editor = model.edit()                                a copy that shares the tensors
    editor.set_param("conv1.weight", model.param("conv1.weight") * 2)
    doubled = editor.model()                             validated, immutable again

The graph is an `onnx_ir.Graph` at opset 21: `canonical` describes its form, `invariants` what always holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir

from qpipe.mapped import spooled
from qpipe.model.network import packing
from qpipe.model.network.invariants import restore

if TYPE_CHECKING:
    import networkx as nx
    import onnx
    import onnxruntime
    import torch

    from qpipe.model.structure.blocks import Block
    from qpipe.model.structure.layers import Layer
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


class Model:
    """An immutable model; what changes one returns another that shares its tensors.

    `ir` and `graph` are there to be read: whoever rewrites asks for `edit()`.
    """

    __slots__ = ("_encodings", "_ir", "_metadata")

    def __init__(
        self,
        model: onnx_ir.Model,
        encodings: Mapping[str, Encoding] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Takes over a graph that is canonical already; `load`, `from_proto` and `from_torch` make it so."""
        self._ir = model
        self._encodings = MappingProxyType(dict(encodings or {}))
        self._metadata = MappingProxyType(dict(metadata or {}))

    @classmethod
    def load(cls, path: str | Path) -> Model:
        """The model in an ONNX file (external data beside it). Raises InputError with the reason."""
        from qpipe.model.files.onnx_reader import read_onnx

        return cls.from_proto(read_onnx(Path(path)))

    @classmethod
    def from_proto(cls, proto: onnx.ModelProto | onnx_ir.Model) -> Model:
        """The model in canonical form, with the encodings that its QDQ nodes say.

        Raises InputError for what cannot be taken, all of it listed."""
        from qpipe.model.canon.form import canonicalize
        from qpipe.model.files.onnx_reader import deserialized

        source = proto.clone() if isinstance(proto, onnx_ir.Model) else deserialized(proto)
        model, notes, grids = canonicalize(source)
        metadata = {"notes": notes} if notes else {}
        return cls(model, grids.encodings, {**metadata, **grids.metadata()})

    @classmethod
    def from_torch(
        cls,
        module: torch.nn.Module,
        example_inputs: Any,
        dynamic_shapes: Any = None,
        input_names: Sequence[str] | None = None,
    ) -> Model:
        """The module as it computes in eval mode; dimension 0 of every input is dynamic and called `batch`.

        `example_inputs` is a tensor, a tuple of them or a dict by argument name; `dynamic_shapes`, if given,
        goes to torch.export as it is. Raises InputError where torch cannot export the module."""
        from qpipe.model.torch_export.exporter import from_torch

        return from_torch(module, example_inputs, dynamic_shapes, input_names)

    @classmethod
    def unpack(cls, meta: Mapping[str, Any], read: Callable[[str], memoryview]) -> Model:
        """The model that `pack` took apart; its tensors are views of the buffers that `read` returns."""
        return cls(*packing.unpack(meta, read))

    def pack(self) -> tuple[dict[str, Any], dict[str, bytes | memoryview]]:
        """`(meta, blobs)` as `packing` describes; the same content gives the same bytes in any process."""
        return packing.pack(self._ir, self._encodings, self._metadata)

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

    def with_params(self, params: Mapping[str, Array]) -> Model:
        """The model with some parameters replaced."""
        editor = self.edit()
        for name, array in params.items():
            editor.set_param(name, array)
        return editor.model()

    def with_encodings(self, encodings: Mapping[str, Encoding]) -> Model:
        """The model with exactly these encodings. Raises ValueError for a name that the graph lacks."""
        unknown = sorted(set(encodings) - set(value_names(self.graph)))
        if unknown:
            raise ValueError(f"the model has no value named {', '.join(map(repr, unknown))}.")
        return Model(self._ir, encodings, self._metadata)

    def with_encodings_file(self, path: str | Path) -> Model:
        """The model with exactly the grids of an AIMET encodings file (0.6.1, 1.0.0, 2.0.0), those of weights
        frozen. Raises InputError for names that the graph lacks and grids that do not fit."""
        from qpipe.model.files.encodings_reader import read_encodings

        encodings = read_encodings(self, Path(path))
        return Model(self._ir, encodings, {**self._metadata, "quantized_source": True})

    def with_metadata(self, entries: Mapping[str, Any]) -> Model:
        """The model with these entries of its metadata added or replaced; the values must be JSON."""
        return Model(self._ir, self._encodings, _json({**self._metadata, **entries}))

    def layers(self) -> tuple[Layer, ...]:
        """The layers that have weights, in topological order, each with the activation that follows it."""
        from qpipe.model.structure.layers import find_layers

        return find_layers(self)

    def block(self, inputs: Sequence[str], outputs: Sequence[str]) -> Model:
        """The part of the model between two sets of values. Raises ValueError where they do not bound one."""
        from qpipe.model.network.parts import block

        return block(self, inputs, outputs)

    def blocks(self, by_name: bool = True) -> tuple[Block, ...]:
        """The parts that blockwise methods tune, one behind the other: by the names of torch modules, or by the
        articulation points of the graph alone. `block([b.input, *b.side_inputs], [b.output])` cuts one out."""
        from qpipe.model.structure.blocks import find_blocks

        return find_blocks(self, by_name)

    def digraph(self) -> nx.DiGraph[str]:
        """The nodes by name, with an edge for each value that one reads from another (`values`: names)."""
        from qpipe.model.network.parts import digraph

        return digraph(self)

    def to_torch(
        self,
        quantized: bool = True,
        trainable: Iterable[str] = (),
        device: str = "cpu",
        shared: bool = False,
    ) -> torch.fx.GraphModule:
        """A torch.fx module, one fx node per ONNX node; fake-quantize at the encodings if `quantized`.

        Its tensors are copies or, for a module that only runs, the model's own memory (`shared`)."""
        from qpipe.model.simulation.module import to_torch

        return to_torch(self, quantized, tuple(trainable), device, shared)

    def to_qdq(self) -> onnx.ModelProto:
        """The ONNX model with QuantizeLinear and DequantizeLinear at the encodings."""
        from qpipe.model.qdq.writer import to_qdq

        return to_qdq(self)

    def session(
        self,
        mode: Literal["reference", "deploy"] = "reference",
        quantized: bool = True,
        outputs: Sequence[str] | None = None,
        threads: int | None = None,
    ) -> onnxruntime.InferenceSession:
        """An onnxruntime session: `reference` with basic optimizations, `deploy` with all."""
        from qpipe.model.runtime.session import make_session

        return make_session(self, mode, quantized, outputs, threads)

    def save(self, folder: str | Path) -> Path:
        """Write model.onnx (QDQ where there are encodings) and encodings.json; returns the model's path."""
        from qpipe.model.files.onnx_writer import save

        return save(self, Path(folder))

    def __repr__(self) -> str:
        size = sum(value.const_value.size for value in self.graph.initializers.values() if value.const_value)
        names = ", ".join(f"{spec.name}{list(spec.shape)}" for spec in self.inputs)
        return (
            f"Model({names}; {self.graph.num_nodes()} nodes, {len(self.graph.initializers)} tensors, "
            f"{size:,} numbers, {len(self._encodings)} encodings)"
        )


class Editor:
    """A copy of a model that may be rewritten; `model()` validates it and gives it back as a Model."""

    def __init__(self, source: Model) -> None:
        self.ir: onnx_ir.Model = source.ir.clone()
        self.encodings: dict[str, Encoding] = dict(source.encodings)
        self.metadata: dict[str, Any] = json.loads(json.dumps(dict(source.metadata)))
        self._known = set(value_names(source.graph))
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
        from qpipe.model.network.invariants import fresh_initializer_name

        value = onnx_ir.Value(name=fresh_initializer_name(self.graph, name))
        _set(value, np.array(array, order="C"))
        self.graph.register_initializer(value)
        return value

    def model(self) -> Model:
        """The edited model. Encodings of values that the edit removed go with them.

        Raises ValueError where the graph is broken or an encoding names what never was a value."""
        restore(self.ir)
        names = set(value_names(self.graph))
        unknown = sorted(set(self.encodings) - names - self._known)
        if unknown:
            raise ValueError(f"encodings name no value of the model: {', '.join(map(repr, unknown))}.")
        encodings = {name: encoding for name, encoding in self.encodings.items() if name in names}
        return Model(self.ir.clone(), encodings, _json(self.metadata))


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
    """A deep copy of `metadata` as JSON has it; raises TypeError for what JSON cannot hold."""
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
