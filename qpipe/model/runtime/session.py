"""onnxruntime sessions of a model, with the options that its traps call for.

- `session.qdq_matmulnbits_accuracy_level=1`: a MatMul whose weight alone is quantized otherwise computes with
  activations rounded to 8 bits, silently;
- `session.disable_quant_qdq=1` where 8-bit weights have block scales: their fused MatMul fails at run time;
- tensors above 1 KB come from memory (`add_external_initializers`): no file is written, 2 GB is no limit. Codes of 4
  bits, which Python's arrays do not pack, stand in the graph;
- onnxruntime copies what it is given in memory, and packs weights a second time. A large model is mapped from the files
  that its tensors lie in, or from one that is written for the while; in float its weights are not packed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir

from qpipe.mapped import place_of
from qpipe.model.network.packing import graph_proto, set_place, tensor_bytes, write_data
from qpipe.model.qdq.writer import qdq_model
from qpipe.model.runtime.options import Mode, Session, open_session, session_options, set_lean

if TYPE_CHECKING:
    from qpipe.model.network.network import Network

LARGE_BYTES = 1 << 28
"""A model with tensors of more than this is large."""


def make_session(
    model: Network,
    mode: Mode = "reference",
    quantized: bool = True,
    outputs: Sequence[str] | None = None,
    threads: int | None = None,
    lean: bool | None = None,
) -> Session:
    """A session on the CPU. `plain` has no optimizations, `reference` basic ones, `deploy` all; `quantized` runs the
    QDQ form where the model has encodings; `outputs` names the values to return instead of the graph's.

    `lean` is for a single run: no weight is packed for speed; None: for a float model that is large."""
    quantized = quantized and bool(model.encodings)
    blocks = any(e.block_size is not None and e.bitwidth == 8 for e in model.encodings.values())
    proto, tensors = graph_proto(qdq_model(model, outputs or ()) if quantized else model.ir)
    if lean is None:
        lean = not quantized and _large(tensors.values())
    if outputs is not None:
        _set_outputs(proto, model, outputs)
    options = session_options(mode, threads, model.facts.custom_ops)
    if quantized and blocks:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if lean:
        set_lean(options)
    with ExitStack() as stack:
        if lean or _large(tensors.values()):
            folder = _leave_in_files(proto, tensors, stack)
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        _write_narrow(proto, tensors)
        return open_session(proto, {name: tensor.numpy() for name, tensor in tensors.items()}, options)


def _large(tensors: Iterable[ir.TensorProtocol]) -> bool:
    return sum(tensor.nbytes for tensor in tensors) > LARGE_BYTES


def _leave_in_files(proto: onnx.ModelProto, tensors: dict[str, ir.TensorProtocol], stack: ExitStack) -> str:
    """Let `proto` refer to the files in which tensors lie, and take these out of `tensors`; the folder that all of them
    are in. Where the others are large together they are written to a file, which lasts as long as `stack`:
    onnxruntime has mapped it when the session is open. It copies what it is given in memory."""
    places = {name: place for name, tensor in tensors.items() if (place := _place(tensor)) is not None}
    others = {name: tensor for name, tensor in tensors.items() if name not in places}
    if _large(others.values()):
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))) / "tensors"
        offsets = write_data(others, path)
        places |= {name: (os.path.realpath(path), offset) for name, offset in offsets.items()}
    try:
        folder = os.path.commonpath({os.path.dirname(path) for path, _ in places.values()} or {os.getcwd()})
    except ValueError:  # on several drives
        folder = os.path.dirname(next(iter(places.values()))[0])
        places = {name: place for name, place in places.items() if os.path.dirname(place[0]) == folder}
    for initializer in proto.graph.initializer:
        if initializer.name in places:
            path_of, offset = places[initializer.name]
            length = tensors.pop(initializer.name).nbytes
            set_place(initializer, os.path.relpath(path_of, folder), offset, length)
    return folder


def _place(tensor: ir.TensorProtocol) -> tuple[str, int] | None:
    """The file that `tensor` lies in, and where in it."""
    if isinstance(tensor, ir.ExternalTensor):
        return os.path.realpath(tensor.path), tensor.offset or 0
    if isinstance(tensor, ir.Tensor) and isinstance(tensor.raw, np.ndarray):
        return place_of(tensor.raw)
    return None


def _write_narrow(proto: onnx.ModelProto, tensors: dict[str, ir.TensorProtocol]) -> None:
    """Take the tensors of less than 8 bits out of `tensors` and write them into `proto`."""
    for initializer in proto.graph.initializer:
        if initializer.name in tensors and tensors[initializer.name].dtype.bitwidth < 8:
            initializer.ClearField("external_data")
            initializer.ClearField("data_location")
            initializer.raw_data = bytes(tensor_bytes(tensors.pop(initializer.name)))


def _set_outputs(proto: onnx.ModelProto, model: Network, outputs: Sequence[str]) -> None:
    values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    del proto.graph.output[:]
    for name in outputs:
        value = values.get(name)
        if value is None or value.type is None:
            proto.graph.output.add(name=name)
        else:
            proto.graph.output.append(ir.serde.serialize_value(value))
