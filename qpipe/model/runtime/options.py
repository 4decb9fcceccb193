"""Sessions of onnxruntime as qpipe opens them, whatever they run."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime


def set_lean(options: onnxruntime.SessionOptions) -> None:
    """Take as little memory as can be: weights as they are, mapped where they lie in files."""
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = False


Mode = Literal["plain", "reference", "deploy"]
"""How much onnxruntime rewrites a graph: not at all, by its basic optimizations, by all of them."""


def session_options(mode: Mode = "reference", threads: int | None = None) -> onnxruntime.SessionOptions:
    """The options that every session of qpipe starts from."""
    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    levels = {"plain": level.ORT_DISABLE_ALL, "reference": level.ORT_ENABLE_BASIC, "deploy": level.ORT_ENABLE_ALL}
    options.graph_optimization_level = levels[mode]
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
