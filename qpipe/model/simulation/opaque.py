"""A part of a graph that torch cannot compute, as a torch module: it runs in a session of onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from qpipe.model.network.facts import Library
from qpipe.model.network.invariants import IR_VERSION
from qpipe.model.network.packing import graph_proto
from qpipe.model.runtime.options import open_session, place, session_options
from qpipe.model.simulation.constants import array_of, tensor_of
from qpipe.model.structure.opaque import Part

Array = npt.NDArray[Any]


class RuntimePart(torch.nn.Module):
    """Opaque nodes: tensors in, in the order of the part's inputs; a tuple of tensors out, on the device of the module.

    What it computes has no gradient. It can be copied and pickled; the session is opened when it first runs."""

    _anchor: torch.Tensor

    def __init__(self, graph: ir.Graph, part: Part, custom_ops: tuple[Library, ...] = ()) -> None:
        super().__init__()
        for library in custom_ops:  # that it is gone is said before torch.fx adds where it was
            place(library)
        extracted = ir.convenience.extract(graph, list(part.inputs), list(part.outputs))
        for domain, version in graph.opset_imports.items():
            extracted.opset_imports.setdefault(domain, version)
        extracted.name = "part"
        proto, tensors = graph_proto(ir.Model(extracted, ir_version=IR_VERSION))
        self._proto, self._arrays = proto, {name: tensor.numpy() for name, tensor in tensors.items()}
        self._inputs = [str(value.name) for value in part.inputs]
        self._custom_ops = custom_ops
        self._session: Any = None
        self.register_buffer("_anchor", torch.empty(0), persistent=False)

    def forward(self, *values: torch.Tensor | Array) -> tuple[torch.Tensor, ...]:
        """The values that the rest of the graph reads of this part; text comes as an array."""
        if self._session is None:
            self._session = open_session(
                self._proto, self._arrays, session_options(custom_ops=self._custom_ops)
            )
        arrays = (v if isinstance(v, np.ndarray) else array_of(v.detach().cpu()) for v in values)
        fed = dict(zip(self._inputs, arrays, strict=True))
        found = self._session.run(None, fed)
        return tuple(tensor_of(array).to(self._anchor.device) for array in found)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> RuntimePart:
        copy = type(self).__new__(type(self))
        torch.nn.Module.__init__(copy)
        copy.__dict__.update({**self.__dict__, "_session": None, "_buffers": {"_anchor": self._anchor.clone()}})
        return copy
