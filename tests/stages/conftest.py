"""Small networks for the tests of the stages: a graph as text, its parameters as arrays, its outputs by onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import yaml
from numpy.typing import NDArray

from qpipe.methods.placement.target import Target
from qpipe.model import Model
from qpipe.param import coerce
from qpipe.stage import Context

Arrays = Mapping[str, NDArray[Any]]
Network = Callable[..., Model]
Run = Callable[[Model, Arrays], list[NDArray[Any]]]


@pytest.fixture
def network() -> Network:
    """`network(text, {name: array or shape})`: shapes become random parameters, positive where a name ends in `var`."""

    def build(text: str, params: Mapping[str, Any] | None = None, seed: int = 0) -> Model:
        rng = np.random.default_rng(seed)
        proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {text}')
        for name, given in (params or {}).items():
            array = given if isinstance(given, np.ndarray) else rng.normal(size=given).astype(np.float32)
            array = np.abs(array) + np.float32(0.1) if name.endswith("var") else array
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        return Model.from_proto(proto)

    return build


@pytest.fixture
def run() -> Run:
    """`run(model, feeds)`: the float outputs, by onnxruntime without optimizations."""

    def outputs(model: Model, feeds: Arrays) -> list[NDArray[Any]]:
        import onnx_ir as ir

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        blob = ir.to_proto(model.ir).SerializeToString()
        session = onnxruntime.InferenceSession(blob, options, providers=["CPUExecutionProvider"])
        found: list[NDArray[Any]] = session.run(None, dict(feeds))
        return found

    return outputs


class Notes(Context):
    """A context that keeps its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def target() -> Target:
    """The shipped target `onnxruntime`, read as a pipeline reads it, with a grid behind every layer."""
    table = yaml.safe_load((Path(__file__).parents[2] / "conf" / "target" / "onnxruntime.yaml").read_text())
    found = coerce({**table, "float_outputs": []}, Target, "target")
    assert isinstance(found, Target)
    return found
