"""The graph that onnxruntime makes of a file, the same on every machine of a kind.

Its extended optimizations fuse roundings into integer kernels; those beyond, of all, choose memory layouts by the
processor at hand, and are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from qpipe.model.network.facts import Library
from qpipe.model.runtime.options import session_options

NAME = "optimized.onnx"
Shape = tuple[int, ...]


def optimized(path: Path, custom_ops: Iterable[Library] = ()) -> onnx.ModelProto:
    """The graph of the file at `path`, its large tensors left in a file beside it, in which it is written too."""
    options = _options(custom_ops)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path.parent / NAME)
    entry = "session.optimized_model_external_initializers_"
    options.add_session_config_entry(f"{entry}file_name", f"{NAME}.data")
    options.add_session_config_entry(f"{entry}min_size_in_bytes", "1024")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return onnx.load(path.parent / NAME, load_external_data=False)


def shapes(
    graph: onnx.ModelProto, folder: Path, feed: Mapping[str, Any], custom_ops: Iterable[Library] = ()
) -> dict[str, Shape]:
    """The shape of every tensor of the main graph of `optimized`, found by running it on `feed` once.

    An operator behind each value gives its shape alone: no value is held longer than the graph needs it."""
    names = [name for node in graph.graph.node for name in node.output if name]
    session = _session(graph, folder, names, custom_ops)
    tensors = [value.name for value in session.get_outputs() if value.type.startswith("tensor(")]
    del session
    told = onnx.ModelProto()
    told.CopyFrom(graph)
    made = {f"{_SHAPE}{i}": name for i, name in enumerate(tensors)}
    told.graph.node.extend(onnx.helper.make_node("Shape", [name], [shape]) for shape, name in made.items())
    session = _session(told, folder, made, custom_ops)
    wanted = {value.name for value in session.get_inputs()}
    found = session.run(None, {name: array for name, array in feed.items() if name in wanted})
    own = {tensor.name: tuple(tensor.dims) for tensor in graph.graph.initializer}
    own |= {name: tuple(array.shape) for name, array in feed.items()}
    return own | {name: tuple(map(int, shape)) for name, shape in zip(made.values(), found, strict=True)}


_SHAPE = "shape of value "


def _session(
    graph: onnx.ModelProto, folder: Path, outputs: Iterable[str], custom_ops: Iterable[Library]
) -> onnxruntime.InferenceSession:
    """A session of `graph`, whose tensors lie in `folder`, that gives `outputs`."""
    told = onnx.ModelProto()
    told.CopyFrom(graph)
    del told.graph.output[:]
    told.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    path = folder / "told.onnx"
    path.write_bytes(told.SerializeToString())
    return onnxruntime.InferenceSession(str(path), _options(custom_ops), providers=["CPUExecutionProvider"])


def _options(custom_ops: Iterable[Library]) -> onnxruntime.SessionOptions:
    """One thread: what is made does not depend on it, and little is run."""
    return session_options("plain", 1, custom_ops)
