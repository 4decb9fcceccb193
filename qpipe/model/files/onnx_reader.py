"""Reading ONNX files: every way in which a file can be bad ends in one sentence."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from qpipe.errors import InputError
from qpipe.model.files.soundness import refuse_broken


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
    model: ir.Model = ir.from_proto(proto)
    return model


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
    """Look beside the file for what it refers to, now rather than at first use."""
    folder = path.resolve().parent
    ir.external_data.set_base_dir(model.graph, folder)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        file = folder / str(tensor.location)
        if not file.resolve().is_relative_to(folder):
            raise InputError(f"{path}: the data of tensor {name!r} lie outside its folder, in {file}.")
        if not file.is_file():
            raise InputError(
                f"{path}: the data of tensor {name!r} are missing; expected the file {file}. "
                "Copy it beside the model."
            )
        needed = (tensor.offset or 0) + tensor.nbytes
        if file.stat().st_size < needed:
            raise InputError(
                f"{path}: the data file {file} is cut off: tensor {name!r} ends at byte {needed}, "
                f"the file has {file.stat().st_size}."
            )
