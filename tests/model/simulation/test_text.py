"""Text that goes into a model reaches the nodes that torch cannot compute as it is, and nothing else of the graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from qpipe.errors import InputError
from qpipe.methods.comparison.check import verify_import
from qpipe.methods.comparison.parity import parity
from qpipe.model import Model
from qpipe.model.network.network import Network
from qpipe.model.simulation.run import run
from qpipe.model.simulation.stream import Stream
from qpipe.stage import Samples
from qpipe.stages.adaround import adaround
from tests.model.nets import normal, parsed
from tests.model.quantized import quantized, scheme

TEXT = """m (string[N] words, float[N,4] x) => (float[N,3] y) {
    both = StringConcat(words, ending)
    i = ai.onnx.ml.LabelEncoder<keys_strings = ["one!", "two!"], values_int64s = [1, 2], default_int64 = 0>(both)
    e = Gather(table, i)  a = Add(e, x)  h = MatMul(a, w)  r = Relu(h)  y = MatMul(r, v) }"""
GIVEN: dict[str, Any] = {"words": np.array(["one", "two", "three", "one"] * 4), "x": normal(16, 4, seed=4)}


def proto() -> onnx.ModelProto:
    made = parsed(TEXT, table=normal(3, 4), w=normal(4, 5, seed=1), v=normal(5, 3, seed=2))
    made.graph.initializer.append(onnx.helper.make_tensor("ending", onnx.TensorProto.STRING, [1], [b"!"]))
    made.opset_import.add(domain="ai.onnx.ml", version=4)
    return made


@pytest.fixture
def model() -> Model:
    return Model.from_proto(proto())


def expected() -> np.ndarray:
    session = onnxruntime.InferenceSession(proto().SerializeToString(), providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, GIVEN)
    return np.asarray(wanted)


def test_text_goes_in_as_numpy_has_it(model: Model) -> None:
    assert [(spec.name, spec.dtype) for spec in model.inputs] == [("words", "object"), ("x", "float32")]
    wanted = expected()
    assert np.abs(wanted[0] - wanted[2]).max() > 0  # the words count
    for words in (GIVEN["words"], GIVEN["words"].astype(object)):
        for backend in ("simulation", "onnxruntime"):
            found = run(model, {**GIVEN, "words": words}, batch_size=5, backend=backend)["y"]  # type: ignore[arg-type]
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arrays", [GIVEN, None], ids=["samples", "made up"])
def test_the_import_is_held_against_its_source(model: Model, arrays: dict[str, Any] | None) -> None:
    check = verify_import(model, proto().SerializeToString(), arrays=arrays)
    assert check.inputs is not None
    assert check.equal


def test_layers_behind_it_are_quantized_and_deployed_as_simulated(model: Model) -> None:
    grids = quantized(model, GIVEN)
    assert {"a", "w", "r", "v", "y"} <= set(grids.encodings)
    assert "words" not in grids.encodings
    assert parity(grids, GIVEN).agree


def test_a_walk_layer_by_layer_takes_it_along(model: Model) -> None:
    stream = Stream(model.to_torch(), [(GIVEN["words"], GIVEN["x"])])
    stream.advance("y")
    assert stream.value("r")[0].shape == (16, 5)
    np.testing.assert_allclose(stream.finish()[0].numpy(), expected(), rtol=1e-5, atol=1e-5)


def test_texts_of_the_graph_travel_with_it(model: Model) -> None:
    long = proto()
    del long.graph.initializer[-1]
    endings = [b"!"] + [b"#" * 200] * 15  # more than stands in a graph otherwise
    long.graph.initializer.append(onnx.helper.make_tensor("ending", onnx.TensorProto.STRING, [16], endings))
    meta, blobs = Model.from_proto(long).pack()
    again = Network.unpack(meta, lambda name: memoryview(blobs[name]))
    assert list(again.params["ending"]) == endings


def test_numbers_in_the_place_of_text_are_refused(model: Model) -> None:
    with pytest.raises(InputError, match=r"^The model's input 'words' is text, the data give float32\.$"):
        run(model, {"words": normal(16), "x": GIVEN["x"]})


def test_text_that_comes_out_is_refused_with_the_way_out() -> None:
    made = parsed("m (float[N,4] x) => (float[N,4] y, string[N,4] s) { y = Relu(x)  s = Cast<to=8>(y) }")
    with pytest.raises(InputError, match=r"output 's': it holds strings; .* Leave it out of the model's outputs\."):
        Model.from_proto(made)


def test_weights_are_rounded_on_what_text_brings_about(model: Model) -> None:
    samples = Samples({name: np.asarray(array) for name, array in GIVEN.items()})
    float_y, nearest = expected(), quantized(model, GIVEN, scheme(weight=4))
    rounded = adaround(nearest, samples)
    errors = [np.abs(run(each, GIVEN)["y"] - float_y).mean() for each in (rounded, nearest)]
    assert errors[0] < errors[1]
