"""Sessions of onnxruntime as qpipe opens them, whatever they run, with the libraries of custom operators of a model.

A model says by its bytes which library it needs; where that lies is found out when a session is opened: among what this
process loaded it from, and what the engine tells each action in the environment.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
import onnxruntime

from qpipe.errors import InputError
from qpipe.model.network.facts import Library
from qpipe.param import LIBRARIES


def set_lean(options: onnxruntime.SessionOptions) -> None:
    """Take as little memory as can be: weights as they are, mapped where they lie in files."""
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = False


Mode = Literal["plain", "reference", "deploy"]
"""How much onnxruntime rewrites a graph: not at all, by its basic optimizations, by all of them."""


def session_options(
    mode: Mode = "reference", threads: int | None = None, custom_ops: Iterable[Library] = ()
) -> onnxruntime.SessionOptions:
    """The options that every session of qpipe starts from. Raises InputError as `register` does."""
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
    register(options, custom_ops)
    return options


def libraries(paths: Iterable[Path]) -> tuple[Library, ...]:
    """What a model is to know of the files, each once. Raises InputError for one that is not there."""
    found = {}
    for path in paths:
        sha256 = _sha256_of(path)
        if sha256 is None:
            raise InputError(f"There is no library of custom operators {path}. Give the path of one.")
        found[sha256] = Library(sha256, path.absolute())
    return tuple(found.values())


def register(options: onnxruntime.SessionOptions, custom_ops: Iterable[Library]) -> None:
    """Let sessions know the operators of the libraries. Raises InputError for one that is nowhere, or is none."""
    for library in custom_ops:
        path = place(library)
        try:
            options.register_custom_ops_library(str(path))
        except Exception as error:  # onnxruntime's errors have no common type
            said = str(error).strip().splitlines()[0]
            raise InputError(f"onnxruntime cannot take {path} as a library of custom operators: {said}") from error


def place(library: Library) -> Path:
    """A file with the library's bytes. Raises InputError where none is known."""
    told = [Path(line) for line in os.environ.get(LIBRARIES, "").splitlines() if line]
    places = ([library.path] if library.path else []) + told
    for path in places:
        if _sha256_of(path) == library.sha256:
            return path
    searched = f"; {', '.join(map(str, places))} is gone or has other bytes" if places else ""
    raise InputError(
        f"The model needs a library of custom operators that is not at hand (SHA-256 {library.sha256[:16]}…{searched})."
        f" Name its file in model.custom_ops, or in the environment variable {LIBRARIES}."
    )


def _sha256_of(path: Path) -> str | None:
    """None where there is no such file."""
    try:
        status = path.stat()
        return _sha256(path, (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    except OSError:
        return None


@lru_cache(maxsize=64)
def _sha256(path: Path, _: tuple[int, ...]) -> str:
    """Remembered until the file is another: some methods open thousands of sessions."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Session(onnxruntime.InferenceSession):  # type: ignore[misc]
    """onnxruntime's, which takes bfloat16 too: as arrays of ml_dtypes' type. It gives such outputs as float32, which
    holds every number of theirs."""

    def run(
        self, names: Sequence[str] | None, fed: Mapping[str, Any], options: onnxruntime.RunOptions | None = None
    ) -> list[Any]:
        """The outputs `names`, or all where it is None or empty, in their order."""
        if not self._narrow:
            return list(super().run(names, fed, options))
        found = self.run_with_ort_values(
            names, {name: _ort_value(array) for name, array in fed.items()}, options
        )
        return [_array(value) for value in found]

    @cached_property
    def _narrow(self) -> bool:
        return any(value.type == "tensor(bfloat16)" for value in (*self.get_inputs(), *self.get_outputs()))


def _ort_value(array: np.ndarray[Any, Any]) -> onnxruntime.OrtValue:
    if array.dtype != ml_dtypes.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    bits = np.asarray(array, order="C").view(np.uint16)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, onnx.TensorProto.BFLOAT16)


def _array(value: onnxruntime.OrtValue) -> Any:
    """What `value` holds. onnxruntime makes no arrays of bfloat16, but says where the numbers lie."""
    if value.data_type() != "tensor(bfloat16)":
        return value.numpy()
    size = value.tensor_size_in_bytes()
    bits = np.frombuffer(ctypes.string_at(value.data_ptr(), size), ml_dtypes.bfloat16)
    return bits.astype(np.float32).reshape(value.shape())


def open_session(
    proto: onnx.ModelProto, arrays: dict[str, np.ndarray[Any, Any]], options: onnxruntime.SessionOptions
) -> Session:
    """A session of `proto`, whose external tensors are `arrays` by name. The session keeps them alive."""
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in contiguous.items()}
    if values:
        options.add_external_initializers(list(values), list(values.values()))
    session = Session(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    session.external_initializers = (contiguous, values)  # onnxruntime refers to their memory
    return session
