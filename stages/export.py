"""Files that need nothing of qpipe to be read: what an onnxruntime or a torch user takes away.

    model.onnx            QDQ form (opset 21), tensors beside it in model.onnx.data above protobuf's 2 GB
    encodings.json        every grid, in AIMET's format of the version asked for
    weights.safetensors   the float weights under torch's names and in torch's layout

The model is opened in onnxruntime once, from the file that was written, so that no file leaves that cannot be loaded.

Assumes: nothing; a model without encodings is exported in float. Source: own; the formats are AIMET's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from qpipe.stage import NULL, Context, Files, stage

if TYPE_CHECKING:
    from pathlib import Path

    from qpipe.model.network.facts import Library
    from qpipe.model.network.network import Network


def loads(path: Path, custom_ops: tuple[Library, ...] = ()) -> str:
    """A sentence that says what onnxruntime takes; it raises where the file does not load."""
    import onnxruntime

    from qpipe.model.runtime.options import register, set_lean

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    set_lean(options)
    register(options, custom_ops)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    shapes = ", ".join(f"{value.name} {value.shape}" for value in session.get_inputs())
    told = " once the session has its libraries of custom operators (register_custom_ops_library)" if custom_ops else ""
    return f"onnxruntime {onnxruntime.__version__} loads model.onnx{told}; it takes {shapes}."


@stage(version=1)
def export(
    model: Network, *, encodings_format: Literal["0.6.1", "1.0.0", "2.0.0"] = "1.0.0", ctx: Context = NULL
) -> Files:
    """model.onnx in QDQ form, encodings.json and weights.safetensors; model.onnx alone for a float model.

    `encodings_format` is the version of AIMET's format that encodings.json is written in.
    Errors: RuntimeError where onnxruntime does not load what was written.
    """
    import tempfile
    from pathlib import Path

    from qpipe.model.files.onnx_writer import save

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = save(model, folder, encodings_format)
        ctx.note(loads(path, model.facts.custom_ops))
        written = Files({file.name: file for file in sorted(folder.iterdir())})
        # Mapped, so that the content outlives the folder without being read into memory.
        return Files({file: written.read(file) for file in written.contents})
