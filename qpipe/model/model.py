"""Model, the face: a Network with all that can be done with one at hand.

    model = Model.load("net.onnx")                       import: any opset, external data, checked
    model.layers(), model.to_torch(), model.to_qdq(), model.save("folder")

For people and plug-ins. Whoever takes a Model depends on the whole of `qpipe.model`; the stages here take a Network and
call the functions, so that a cached result depends on no more than it was computed with. Each method imports what it
needs when it is called: a stage that is handed a Model loads neither torch nor onnxruntime for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import onnx_ir

from qpipe.model.network.network import Editor, Network

if TYPE_CHECKING:
    import networkx as nx
    import onnx
    import onnxruntime
    import torch

    from qpipe.model.structure.blocks import Block
    from qpipe.model.structure.layers import Layer


class Model(Network):
    """An immutable model: a graph, its tensors, its encodings; what changes one returns another."""

    __slots__ = ()

    @classmethod
    def load(cls, path: str | Path, custom_ops: Sequence[str | Path] = ()) -> Self:
        """The model in an ONNX file (external data beside it), with the libraries of operators that it needs. Raises
        InputError with the reason."""
        from qpipe.model.files.onnx_reader import read_onnx, told_as_input

        with told_as_input(Path(path)):
            return cls.from_proto(read_onnx(Path(path)), custom_ops)

    @classmethod
    def from_proto(cls, proto: onnx.ModelProto | onnx_ir.Model, custom_ops: Sequence[str | Path] = ()) -> Self:
        """The model in canonical form, with the encodings that its QDQ nodes say.

        Raises InputError for what cannot be taken, all of it listed."""
        from qpipe.model.canon.form import canonical_network
        from qpipe.model.files.onnx_reader import deserialized
        from qpipe.model.runtime.options import libraries

        source = proto.clone() if isinstance(proto, onnx_ir.Model) else deserialized(proto)
        return cls.of(canonical_network(source, libraries(map(Path, custom_ops))))

    @classmethod
    def from_torch(
        cls,
        module: torch.nn.Module,
        example_inputs: Any,
        dynamic_shapes: Any = None,
        input_names: Sequence[str] | None = None,
    ) -> Self:
        """The module as it computes in eval mode; dimension 0 of every input is dynamic and called `batch`.

        `example_inputs` is a tensor, a tuple of them or a dict by argument name; `dynamic_shapes`, if given,
        goes to torch.export as it is. Raises InputError where torch cannot export the module, and where the
        import does not compute what the module does on these inputs."""
        from qpipe.model.torch_export.exporter import from_torch
        from qpipe.model.torch_export.fidelity import check

        model = from_torch(module, example_inputs, dynamic_shapes, input_names)
        check(module, example_inputs, model)
        return cls.of(model)

    def with_encodings_file(self, path: str | Path) -> Self:
        """The model with exactly the grids of an AIMET encodings file (0.6.1, 1.0.0, 2.0.0), those of weights
        frozen. Raises InputError for names that the graph lacks and grids that do not fit."""
        from qpipe.model.files.encodings_reader import with_encodings_file

        return with_encodings_file(self, Path(path))

    def edit(self) -> ModelEditor:
        """A copy to rewrite; it shares the tensors until they are set."""
        return ModelEditor(self)

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


class ModelEditor(Editor):
    """An Editor that gives back a Model."""

    def model(self) -> Model:
        """The edited model, as `Editor.model` says."""
        return Model.of(super().model())
