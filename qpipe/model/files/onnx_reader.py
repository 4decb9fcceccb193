"""Reading ONNX files: every way in which a file can be bad ends in one sentence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir

from qpipe.errors import InputError, QpipeError
from qpipe.mapped import beside, map_file
from qpipe.model.files.soundness import refuse_broken
from qpipe.model.network.packing import attached


def read_onnx(path: Path) -> ir.Model:
    """The model in the file as it is, its external data mapped and checked. Raises InputError."""
    if path.is_dir():
        raise InputError(f"{path} is a folder. Give the ONNX file itself.")
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist. Give the path of an ONNX file.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not data:
        raise InputError(f"{path} is empty (0 bytes). Export the model again.")
    model = deserialized(_parsed(path, data))
    _attach_external(model, path)
    return model


def deserialized(proto: onnx.ModelProto) -> ir.Model:
    """`proto` as an onnx_ir model. Raises InputError for a graph that is none, its defects listed."""
    refuse_broken(proto)
    try:
        model: ir.Model = ir.from_proto(proto)
    except Exception as error:  # onnx_ir's SerdeError, around whatever else
        raise InputError(f"The model's graph cannot be read ({_root(error)}). {_EXPORT}") from error
    return model


@contextmanager
def told_as_input(path: Path) -> Iterator[None]:
    """Within, whatever a file that nobody thought of makes fail is an InputError: files come from anywhere."""
    try:
        yield
    except QpipeError:
        raise
    except Exception as error:
        raise InputError(
            f"{path} cannot be taken ({_root(error)}). If onnxruntime runs it, that is qpipe's fault: please report it."
        ) from error


def _root(error: BaseException) -> str:
    """The kind and the first line of what an error goes back to."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:200]}" if said else type(error).__name__


def _parsed(path: Path, data: bytes) -> onnx.ModelProto:
    if data[:2] == b"PK":
        raise InputError(f"{path} is a zip archive (as torch.save writes), not an ONNX file. {_EXPORT}")
    try:
        proto = onnx.ModelProto.FromString(data)
    except Exception as error:  # DecodeError, of whichever protobuf is installed
        raise InputError(f"{path} is not an ONNX file, or it is cut off or damaged. {_EXPORT}") from error
    if not proto.HasField("graph") or not proto.ir_version or not proto.opset_import:
        raise InputError(f"{path} holds no ONNX model (no graph, IR version or opset). {_EXPORT}")
    return proto


_EXPORT = "Export the model to ONNX again."


def _attach_external(model: ir.Model, path: Path) -> None:
    """Map what the file refers to, now rather than at first use: each file beside it once."""
    mapped: dict[Path, memoryview] = {}

    def read(name: str, tensor: ir.ExternalTensor) -> ir.TensorProtocol:
        file = _beside(path, name, str(tensor.location))
        if file not in mapped:
            mapped[file] = _mapped(path, name, file)
        return _part(path, name, file, tensor, mapped[file])

    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = read(name, value.const_value)
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                    node.attributes[name] = ir.AttrTensor(name, read(str(node.outputs[0].name), attribute.value))


def _beside(path: Path, name: str, location: str) -> Path:
    """The file of a tensor's data, which has to lie in the model's folder."""
    if "\0" in location:
        raise InputError(f"{path}: the data of tensor {name!r} are in no file, but in {location!r}.")
    try:
        return beside(path, location)
    except ValueError as error:
        raise InputError(f"{path}: the data of tensor {name!r} lie outside its folder, in {error}.") from error
    except OSError as error:
        raise InputError(f"{path}: the data of tensor {name!r} are in no file, but in {location!r}.") from error


def _mapped(path: Path, name: str, file: Path) -> memoryview:
    if not file.is_file():
        raise InputError(
            f"{path}: the data of tensor {name!r} are missing; expected the file {file}. Copy it beside the model."
        )
    try:
        with open(file, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            return map_file(opened.fileno(), size, file) if size else memoryview(b"")
    except OSError as error:
        raise InputError(f"{path}: {file} cannot be read: {error.strerror or error}.") from error


def _part(path: Path, name: str, file: Path, tensor: ir.ExternalTensor, data: memoryview) -> ir.TensorProtocol:
    offset = tensor.offset or 0
    end = offset + tensor.nbytes
    if offset < 0 or len(data) < end:
        raise InputError(
            f"{path}: the data file {file} is cut off: tensor {name!r} ends at byte {end}, the file has {len(data)}."
        )
    return attached(tensor, data[offset:end])
