"""onnxruntime sessions of a model, with the options that its traps call for.

- `session.qdq_matmulnbits_accuracy_level=1`: a MatMul whose weight alone is quantized otherwise computes with
  activations rounded to 8 bits, silently;
- `session.disable_quant_qdq=1` where 8-bit weights have block scales: their fused MatMul fails at run time;
- tensors above 1 KB come from memory (`add_external_initializers`): no file is written, 2 GB is no limit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from qpipe.model.packing import INLINE_BYTES, graph_proto

if TYPE_CHECKING:
    from qpipe.model.model import Model


def make_session(
    model: Model,
    mode: Literal["reference", "deploy"] = "reference",
    quantized: bool = True,
    outputs: Sequence[str] | None = None,
    threads: int | None = None,
    lean: bool = False,
) -> onnxruntime.InferenceSession:
    """A session on the CPU. `reference` has basic optimizations, `deploy` all of them; `quantized` runs the
    QDQ form where the model has encodings; `outputs` names the values to return instead of the graph's.

    `lean` is for a single run: tensors that lie in files are mapped, and none is packed for speed."""
    blocks, folder = False, None
    if quantized and model.encodings:
        proto, arrays = _detached(model.to_qdq())
        blocks = any(e.block_size is not None and e.bitwidth == 8 for e in model.encodings.values())
    else:
        proto, tensors = graph_proto(model.ir)
        folder = _leave_in_files(proto, tensors) if lean else None
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    if outputs is not None:
        _set_outputs(proto, model, outputs)
    options = session_options(mode, threads)
    if blocks:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if lean:
        set_lean(options, folder)
    return open_session(proto, arrays, options)


def set_lean(options: onnxruntime.SessionOptions, folder: str | None = None) -> None:
    """Take as little memory as can be: weights as they are, in files below `folder` where the graph says so."""
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = False
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)


def _leave_in_files(proto: onnx.ModelProto, tensors: dict[str, ir.TensorProtocol]) -> str | None:
    """Let `proto` refer to the files in which tensors lie, all in one folder, and take these out of `tensors`;
    the folder, or None where there is none."""
    files = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, ir.ExternalTensor)}
    folders = {str(tensor.base_dir) for tensor in files.values()}
    if len(folders) != 1:
        return None
    for initializer in proto.graph.initializer:
        tensor = files.get(initializer.name)
        if tensor is None:
            continue
        place = {"location": str(tensor.location), "offset": tensor.offset or 0, "length": tensor.nbytes}
        del initializer.external_data[:]
        for key, entry in place.items():
            initializer.external_data.add(key=key, value=str(entry))
        del tensors[initializer.name]
    return folders.pop()


def session_options(
    mode: Literal["reference", "deploy"] = "reference", threads: int | None = None
) -> onnxruntime.SessionOptions:
    """The options that every session of qpipe starts from."""
    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if mode == "deploy" else level.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.use_deterministic_compute = True
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    return options


def open_session(
    proto: onnx.ModelProto, arrays: dict[str, np.ndarray[Any, Any]], options: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    """A session of `proto`, whose external tensors are `arrays` by name. The session keeps them alive."""
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in contiguous.items()}
    if values:
        options.add_external_initializers(list(values), list(values.values()))
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    session.external_initializers = (contiguous, values)  # onnxruntime refers to their memory
    return session


def _detached(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, np.ndarray[Any, Any]]]:
    """`proto` with its big tensors external, and those as arrays. 4-bit tensors stay: numpy does not pack."""
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for tensor in _big(proto):
        arrays[tensor.name] = onnx.numpy_helper.to_array(tensor)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", tensor.name), ("length", str(arrays[tensor.name].nbytes))):
            tensor.external_data.add(key=key, value=value)
    return proto, arrays


def _big(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for tensor in proto.graph.initializer:
        if len(tensor.raw_data) > INLINE_BYTES and ir.DataType(tensor.data_type).bitwidth >= 8:
            yield tensor


def _set_outputs(proto: onnx.ModelProto, model: Model, outputs: Sequence[str]) -> None:
    values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    del proto.graph.output[:]
    for name in outputs:
        value = values.get(name)
        if value is None or value.type is None:
            proto.graph.output.add(name=name)
        else:
            proto.graph.output.append(ir.serde.serialize_value(value))
