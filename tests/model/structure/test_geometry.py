"""unfold_of: rows times weight are what onnxruntime computes, pads that depend on the input included."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from qpipe.model import Model
from qpipe.model.structure.geometry import unfold_of


@pytest.mark.parametrize(
    ("layer", "weight", "x_shape"),
    [
        ("Conv<pads=[1,1,1,1]>", (4, 3, 3, 3), (2, 3, 6, 5)),
        ('Conv<auto_pad="SAME_UPPER", strides=[2,3]>', (4, 3, 3, 4), (2, 3, 6, 7)),
        ('Conv<auto_pad="SAME_LOWER", group=3, dilations=[1,2]>', (6, 1, 2, 2), (2, 3, 6, 7)),
        ('Conv<auto_pad="VALID">', (4, 3, 3), (2, 3, 6)),
        ("ConvTranspose<strides=[2,2], pads=[1,0,0,1], output_padding=[1,0]>", (3, 4, 3, 3), (2, 3, 4, 5)),
        ('ConvTranspose<auto_pad="SAME_UPPER", strides=[2,2]>', (3, 4, 3, 3), (2, 3, 4, 5)),
        ('ConvTranspose<auto_pad="SAME_LOWER", strides=[3,2], group=3>', (3, 2, 4, 3), (2, 3, 4, 5)),
        ("ConvTranspose<output_shape=[9,11], strides=[2,2]>", (3, 4, 4, 4), (2, 3, 4, 5)),
        ("Gemm<transB=1>", (4, 3), (2, 3)),
        ("Gemm", (3, 4), (2, 3)),
        ("MatMul", (3, 4), (2, 5, 3)),
    ],
)
def test_rows_times_weight_are_the_layer(layer, weight, x_shape):
    rng = np.random.default_rng(0)
    # Dynamic sizes: the import cannot turn auto_pad into numbers.
    names = ",".join("NCABD"[i] if i != 1 else str(x_shape[1]) for i in range(len(x_shape)))
    out = ",".join("NOPQR"[i] for i in range(len(x_shape)))
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]>'
        f" n (float[{names}] x) => (float[{out}] y) {{ y = {layer}(x, w) }}"
    )
    w = rng.normal(size=weight).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    model = Model.from_proto(proto)
    (found,) = model.layers()
    x = rng.normal(size=x_shape).astype(np.float32)
    unfold = unfold_of(found, x_shape[2:])
    rows, matrix = unfold.rows(torch.tensor(x)), unfold.weight_rows(torch.tensor(model.param("w")))
    flat = rows @ matrix.transpose(1, 2)  # (groups, samples * positions, O/g)
    expected = np.asarray(model.session(quantized=False).run(None, {"x": x})[0])
    if unfold.kind == "linear":
        result = flat[0].reshape(expected.shape)
    else:
        split = flat.permute(1, 0, 2).reshape(x_shape[0], -1, expected.shape[1])
        result = split.transpose(1, 2).reshape(expected.shape)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-4, atol=1e-5)
    back = unfold.weight_from_rows(matrix, tuple(found.weight_shape)).numpy()
    np.testing.assert_array_equal(back, model.param("w"))
