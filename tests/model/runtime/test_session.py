"""Sessions: what they run, which values they return, and the options that onnxruntime's traps call for."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from qpipe.model import Model
from qpipe.model.runtime.options import session_options
from qpipe.numerics.grid import Encoding, quantize_dequantize
from qpipe.numerics.scheme import TensorScheme
from tests.model.nets import normal, parsed


@pytest.fixture
def model() -> Model:
    return Model.from_proto(
        parsed("net (float[N,64] x) => (float[N,32] y) { m = MatMul(x, w)  y = Relu(m) }", w=normal(64, 32))
    )


def test_any_value_can_be_returned(model: Model) -> None:
    x = normal(3, 64)
    m, y = model.session(outputs=["m", "y"]).run(None, {"x": x})
    assert np.allclose(m, x @ normal(64, 32), atol=1e-5)
    assert np.array_equal(y, np.maximum(m, 0))


def test_a_session_keeps_the_tensors_it_reads(model: Model) -> None:
    meta, blobs = model.pack()
    session = Model.unpack(meta, lambda name: memoryview(bytearray(blobs[name]))).session()
    gc.collect()
    scrap = [np.full((64, 32), 7.0, np.float32) for _ in range(50)]  # takes memory that was given back
    x = normal(2, 64)
    wanted = np.maximum(x @ normal(64, 32), 0)
    assert np.allclose(session.run(None, {"x": x})[0], wanted, atol=1e-5)
    assert len(scrap) == 50


@pytest.mark.parametrize("mode", ["reference", "deploy"])
def test_a_weight_of_4_bits_leaves_the_activations_float(model: Model, mode: str) -> None:
    """At onnxruntime's default accuracy level the product would be computed from 8-bit activations."""
    w = model.param("w")
    scale = np.abs(w).max(0) / 7
    grid = Encoding(4, True, True, scale.astype(np.float32), np.zeros(32, np.int32), axis=1)
    x = normal(8, 64, seed=1)
    wanted = np.maximum(x.astype(np.float64) @ quantize_dequantize(w, grid), 0)
    found = model.with_encodings({"w": grid}).session(mode=mode).run(None, {"x": x})[0]  # type: ignore[arg-type]
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("mode", ["reference", "deploy"])
def test_block_scaled_weights_of_8_bits_run(model: Model, mode: str) -> None:
    from qpipe.numerics.grid import encoding_from_range

    w = model.param("w")
    scale = (np.abs(w).reshape(4, 16, 32).max(1) / 127).astype(np.float32)
    grid = Encoding(8, True, True, scale, np.zeros((4, 32), np.int32), axis=0, block_size=16)
    x = normal(8, 64, seed=1)
    u8 = TensorScheme(bitwidth=8, signed=False, symmetric=False)
    encodings = {"w": grid, "x": encoding_from_range(np.float32(x.min()), np.float32(x.max()), u8)}
    found = model.with_encodings(encodings).session(mode=mode).run(None, {"x": x})[0]  # type: ignore[arg-type]
    wanted = np.maximum(quantize_dequantize(x, encodings["x"]) @ quantize_dequantize(w, grid), 0)
    assert np.allclose(found, wanted, atol=1e-4)


def test_quantized_can_be_left_out(model: Model) -> None:
    grid = Encoding(8, True, True, np.ones((), np.float32), np.zeros((), np.int32))
    x = normal(2, 64)
    found = model.with_encodings({"x": grid, "w": grid}).session(quantized=False).run(None, {"x": x})[0]
    assert np.array_equal(found, model.session().run(None, {"x": x})[0])


def test_threads_are_set() -> None:
    assert session_options(threads=3).intra_op_num_threads == 3
