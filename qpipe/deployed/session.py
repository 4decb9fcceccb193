"""A file as its user opens it: onnxruntime's own defaults, so all optimizations, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from qpipe.model.runtime.options import Session


def open_file(
    path: Path, threads: int | None, libraries: Sequence[str] = (), optimized: Path | None = None
) -> Session:
    """A session of the file with `threads`, None for as many as onnxruntime takes, and the libraries of custom
    operators that it needs; where `optimized` names a file, the graph that onnxruntime made of it is written there, its
    tensors beside it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # what docs/targets.md tells users of 4-bit weights to set, and what scores are computed with
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.intra_op_num_threads = threads or 0
    for library in libraries:
        options.register_custom_ops_library(library)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        entry = "session.optimized_model_external_initializers_"
        options.add_session_config_entry(f"{entry}file_name", f"{optimized.name}.data")
        options.add_session_config_entry(f"{entry}min_size_in_bytes", "1024")
    return Session(str(path), options, providers=["CPUExecutionProvider"])


def fed(session: Session, arrays: dict[str, Any]) -> list[Any]:
    """The outputs for `arrays` by input name; inputs that the graph does not read any more are left out."""
    wanted = {value.name for value in session.get_inputs()}
    outputs: list[Any] = session.run(None, {name: array for name, array in arrays.items() if name in wanted})
    return outputs
