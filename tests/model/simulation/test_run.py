"""run: batches fit the model's inputs, and what comes out is the same however they are cut."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qpipe.errors import InputError
from qpipe.model import Model
from qpipe.model.simulation.run import run
from qpipe.model.simulation.samples import batches
from tests.model.nets import parsed


def network(batch: str) -> Model:
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 21]>
        n (float[{batch},3,6,6] image, int64[{batch},2] ids) => (float[{batch},4] y, float[{batch},2] z) {{
            t = Conv<pads=[1,1,1,1]>(image, w)  r = Relu(t)  m = GlobalAveragePool(r)  y = Flatten(m)
            f = Cast<to=1>(ids)  z = Neg(f) }}"""
    )
    w = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    return Model.from_proto(proto)


def samples(count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    image = rng.normal(size=(count, 3, 6, 6)).astype(np.float32)
    return {"image": image, "ids": rng.integers(0, 9, (count, 2))}


def test_the_outputs_do_not_depend_on_batches_nor_on_the_backend():
    data = samples(7)
    whole = run(network("N"), data, batch_size=7)
    assert {name: array.shape for name, array in whole.items()} == {"y": (7, 4), "z": (7, 2)}
    np.testing.assert_array_equal(whole["z"], -data["ids"])
    for model, size, backend in [
        (network("N"), 3, "simulation"), (network("2"), 5, "simulation"), (network("2"), 5, "onnxruntime"),
    ]:  # fmt: skip
        found = run(model, data, batch_size=size, backend=backend)
        np.testing.assert_allclose(found["y"], whole["y"], rtol=1e-5, atol=1e-6)


def test_a_fixed_batch_is_filled_up_with_the_first_samples():
    data = samples(5)
    found = list(batches(network("3"), data, 32))
    assert [batch.count for batch in found] == [3, 2]
    np.testing.assert_array_equal(found[1].arrays[0], data["image"][[3, 4, 0]])
    only = list(batches(network("4"), samples(1), 32))
    assert [(batch.count, len(batch.arrays[0])) for batch in only] == [(1, 4)]


def test_arrays_are_cast_within_their_kind():
    data = samples(2)
    wide = {"image": data["image"].astype(np.float64), "ids": data["ids"].astype(np.int32)}
    np.testing.assert_array_equal(run(network("N"), wide)["y"], run(network("N"), data)["y"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": None}, "The data hold no array for the model's input 'ids'; they hold 'image'."),
        ({"image": np.zeros((2, 3, 6, 5), np.float32)},
         "One sample of 'image' has shape (3, 6, 5), the model takes (3, 6, 6)."),
        ({"image": np.zeros((2, 3, 6), np.float32)},
         "One sample of 'image' has shape (3, 6), the model takes (3, 6, 6)."),
        ({"ids": np.zeros((2, 2), np.float32)}, "The model's input 'ids' is int64, the data give float32."),
    ],
)  # fmt: skip
def test_data_that_do_not_fit_are_refused_in_one_sentence(change, message):
    data = {name: array for name, array in {**samples(2), **change}.items() if array is not None}
    with pytest.raises(InputError) as caught:
        run(network("N"), data)
    assert str(caught.value) == message


def test_an_output_whose_shape_goes_by_the_sample_is_told() -> None:
    model = Model.from_proto(parsed("m (float[n,4] x) => (int64[2,k] y) { y = NonZero(x) }"))
    with pytest.raises(InputError, match="output 'y' has another shape for other samples"):
        run(model, {"x": np.array([[1, 0, 0, 0], [1, 1, 0, 0]], np.float32)})
