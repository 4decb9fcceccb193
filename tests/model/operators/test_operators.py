"""The operators with many forms against onnxruntime; test_conformance.py holds all against ONNX's cases."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from qpipe.model.operators.table import OPERATORS
from qpipe.model.simulation.module import build
from tests.model.nets import normal, parsed


def both(proto: onnx.ModelProto, *arrays: np.ndarray[Any, Any]) -> tuple[Any, Any]:
    """The first output by the operators, and by onnxruntime without optimizations."""
    graph = ir.from_proto(proto).graph
    for i, node in enumerate(graph):
        node.name = f"node_{i}"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    feed = {entry.name: array for entry, array in zip(session.get_inputs(), arrays, strict=True)}
    with torch.no_grad():
        ours = build(graph)(*(torch.tensor(array) for array in arrays))
    return ours.numpy(), session.run(None, feed)[0]


def assert_same(proto: onnx.ModelProto, *arrays: np.ndarray[Any, Any], tolerance: float = 2e-5) -> None:
    """Equal shapes, and values up to the order of float32 sums."""
    ours, theirs = both(proto, *arrays)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


CONV_FORMS = [
    "pads=[1,1,1,1]",
    "pads=[0,1,2,0], strides=[2,1]",
    "dilations=[2,1], pads=[2,1,2,1]",
    'auto_pad="SAME_UPPER", strides=[2,2]',
    'auto_pad="SAME_LOWER", strides=[2,2]',
    'auto_pad="SAME_UPPER", strides=[3,2]',
    'auto_pad="VALID"',
]


@pytest.mark.parametrize(("form", "group"), list(itertools.product(CONV_FORMS, (1, 2, 4))))
def test_conv_in_every_form(form: str, group: int) -> None:
    proto = parsed(
        f"n (float[N,4,7,9] x) => (float[N,8,H,W] y) {{ y = Conv<group={group}, {form}>(x, w, b) }}",
        w=normal(8, 4 // group, 3, 3),
        b=normal(8),
    )
    assert_same(proto, normal(2, 4, 7, 9))


@pytest.mark.parametrize("rank", [1, 3])
def test_conv_over_one_and_three_dimensions(rank: int) -> None:
    dims = ",".join(["6"] * rank)
    proto = parsed(
        f"n (float[N,4,{dims}] x) => (float y) {{ t = Conv(x, w)  y = ConvTranspose(t, v) }}",
        w=normal(6, 4, *[3] * rank),
        v=normal(6, 2, *[2] * rank),
    )
    assert_same(proto, normal(2, 4, *[6] * rank))


TRANSPOSED_FORMS = [
    "strides=[2,2]",
    "strides=[2,3], output_padding=[1,2]",
    "strides=[2,2], pads=[1,0,0,1]",
    "strides=[2,2], pads=[1,1,1,1], output_padding=[1,1]",
    "strides=[2,2], dilations=[2,2], pads=[1,1,1,1]",
    "strides=[2,2], output_shape=[13,14]",
    'strides=[2,2], auto_pad="SAME_UPPER"',
    'strides=[2,2], auto_pad="SAME_LOWER"',
    'strides=[3,3], auto_pad="SAME_UPPER", output_shape=[17,16]',
]


@pytest.mark.parametrize(("form", "group"), list(itertools.product(TRANSPOSED_FORMS, (1, 2, 4))))
def test_conv_transpose_in_every_form(form: str, group: int) -> None:
    proto = parsed(
        f"n (float[N,4,6,7] x) => (float[N,C,H,W] y) {{ y = ConvTranspose<group={group}, {form}>(x, w, b) }}",
        w=normal(4, 2, 3, 3),
        b=normal(2 * group),
    )
    assert_same(proto, normal(2, 4, 6, 7))


POOL_FORMS = [
    "kernel_shape=[3,3], strides=[2,2]",
    "kernel_shape=[3,2], strides=[2,2], pads=[1,0,0,1]",
    "kernel_shape=[3,3], strides=[2,2], ceil_mode=1",
    "kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1], ceil_mode=1",
    'kernel_shape=[3,3], strides=[2,2], auto_pad="SAME_UPPER"',
    'kernel_shape=[2,2], strides=[2,2], auto_pad="SAME_LOWER"',
    "kernel_shape=[2,2], dilations=[2,2]",
]


@pytest.mark.parametrize("form", POOL_FORMS)
@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "AveragePool counting the padding"])
def test_pools_in_every_form(op: str, form: str) -> None:
    name, _, counting = op.partition(" ")
    attributes = f"{form}, count_include_pad=1" if counting else form
    proto = parsed(f"n (float[N,2,8,9] x) => (float[N,2,H,W] y) {{ y = {name}<{attributes}>(x) }}")
    assert_same(proto, normal(2, 2, 8, 9))


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_layers(op: str, gates: int, direction: str) -> None:
    d = 2 if direction == "bidirectional" else 1
    before = ", linear_before_reset=1" if op == "GRU" else ""
    proto = parsed(
        f"n (float[T,N,3] x) => (float y) {{ "
        f'y = {op}<hidden_size=5, direction="{direction}"{before}>(x, w, r, b) }}',
        w=normal(d, gates * 5, 3, seed=1),
        r=normal(d, gates * 5, 5, seed=2),
        b=normal(d, 2 * gates * 5, seed=3),
    )
    assert_same(proto, normal(4, 2, 3))


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("coordinates", ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"])
def test_resize_up_and_down(mode: str, coordinates: str) -> None:
    proto = parsed(
        "n (float[1,2,6,6] x) => (float[1,2,H,W] y) { y = Resize<"
        f'mode="{mode}", coordinate_transformation_mode="{coordinates}">(x, , , sizes) }}',
        sizes=np.array([1, 2, 15, 4], np.int64),
    )
    assert_same(proto, normal(1, 2, 6, 6))


GRADIENTS = {
    "Conv": "y = Conv<pads=[1,0,1,2], strides=[2,1], group=2>(x, w, b)",
    "ConvTranspose": "y = ConvTranspose<strides=[2,2], pads=[1,0,0,1]>(x, v)",
    "MaxPool": "y = MaxPool<kernel_shape=[2,2], pads=[0,1,1,0]>(x)",
    "AveragePool": "y = AveragePool<kernel_shape=[2,2], ceil_mode=1, strides=[3,3]>(x)",
    "Resize": 'y = Resize<mode="linear">(x, , s)',
    "LayerNormalization": "y = LayerNormalization(x, g)",
    "Softmax": "a = Softmax(x)  y = Mul(a, a)",
    "Gelu": "y = Gelu(x)",
    "HardSwish": "y = HardSwish(x)",
    "Clip": "y = Clip(x, low, high)",
    "Pad": 'y = Pad<mode="reflect">(x, p)',
    "Slice": "y = Slice(x, i, j, k, st)",
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    proto = parsed(
        f"n (double[1,4,5,5] x) => (double y) {{ {GRADIENTS[name]} }}",
        w=normal(4, 2, 3, 3).astype(np.float64),
        b=normal(4).astype(np.float64),
        v=normal(4, 2, 3, 3).astype(np.float64),
        g=normal(5).astype(np.float64),
        s=np.array([1, 1, 1.5, 0.7], np.float32),
        low=np.float64(-0.5),
        high=np.float64(0.9),
        p=np.array([0, 0, 1, 2, 0, 0, 2, 1], np.int64),
        i=np.array([4, -1], np.int64),
        j=np.array([0, -9], np.int64),
        k=np.array([2, 3], np.int64),
        st=np.array([-2, -1], np.int64),
    )
    graph = ir.from_proto(proto).graph
    for i, node in enumerate(graph):
        node.name = f"node_{i}"
    x = torch.tensor(normal(1, 4, 5, 5).astype(np.float64), requires_grad=True)
    assert torch.autograd.gradcheck(build(graph), (x,), eps=1e-6, atol=1e-5)


def test_every_operator_is_documented() -> None:
    ours = {name: op.function for name, op in OPERATORS.items() if op.function.__module__.startswith("qpipe")}
    assert len(ours) > 90
    assert [name for name, function in ours.items() if not function.__doc__] == []


@pytest.mark.parametrize("centred", [0, 1])
@pytest.mark.parametrize("least", [0.0, 0.5])
def test_non_max_suppression(centred: int, least: float) -> None:
    boxes = np.abs(normal(2, 12, 4)) if centred else normal(2, 12, 4)
    proto = parsed(
        "n (float[2,12,4] boxes, float[2,3,12] scores) => (int64[K,3] y) { y = NonMaxSuppression"
        f"<center_point_box={centred}>(boxes, scores, most, iou, least) }}",
        most=np.int64(5),
        iou=np.float32(0.3),
        least=np.float32(least),
    )
    ours, theirs = both(proto, boxes, normal(2, 3, 12, seed=1))
    assert len(ours) > 4
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("corner", ["half_pixel", "output_half_pixel"])
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align(mode: str, corner: str, ratio: int) -> None:
    proto = parsed(
        "n (float[2,3,9,8] x, float[4,4] rois) => (float y) { y = RoiAlign<"
        f'mode="{mode}", coordinate_transformation_mode="{corner}", sampling_ratio={ratio}, '
        "output_height=3, output_width=2, spatial_scale=0.5>(x, rois, which) }",
        which=np.array([0, 1, 1, 0], np.int64),
    )
    rois = np.array([[0, 0, 9, 12], [3, 2, 15, 17], [-4, -3, 8, 9], [5, 5, 6, 6]], np.float32)
    assert_same(proto, normal(2, 3, 9, 8), rois)


@pytest.mark.parametrize("onesided", [0, 1])
def test_short_time_spectra(onesided: int) -> None:
    proto = parsed(
        f"n (float[2,40,1] x) => (float y) {{ y = STFT<onesided={onesided}>(x, step, window) }}",
        step=np.int64(6),
        window=np.abs(normal(16)),
    )
    assert_same(proto, normal(2, 40, 1), tolerance=1e-4)


def test_blocks_are_added_up_where_they_lie() -> None:
    proto = parsed(
        "n (float[2,12,L] x) => (float y) { "
        "y = Col2Im<pads=[1,0,0,1], strides=[2,1], dilations=[1,2]>(x, image, block) }",
        image=np.array([7, 6], np.int64),
        block=np.array([2, 3], np.int64),
    )
    assert_same(proto, normal(2, 12, 4 * 3))


def test_a_deformable_convolution_without_offsets_is_a_convolution() -> None:
    w, b = normal(4, 2, 3, 3), normal(4, seed=1)
    form = "group=2, pads=[1,1,1,1], strides=[2,1], dilations=[1,1]"
    plain = parsed(f"n (float[2,4,7,6] x) => (float y) {{ y = Conv<{form}>(x, w, b) }}", w=w, b=b)
    moved = parsed(
        "n (float[2,4,7,6] x, float[2,36,4,6] o) => (float y) { "
        f"y = DeformConv<{form}, offset_group=2>(x, w, o, b) }}",
        w=w,
        b=b,
    )
    x = normal(2, 4, 7, 6, seed=2)
    theirs = both(plain, x)[1]
    graph = ir.from_proto(moved).graph
    graph[0].name = "conv"
    zeros = torch.zeros(2, 36, 4, 6)
    assert np.allclose(build(graph)(torch.tensor(x), zeros).detach(), theirs, atol=1e-5)


@pytest.mark.parametrize("form", ["", "<sorted=0>", "<axis=0>", "<axis=1, sorted=0>"])
def test_unique_elements(form: str) -> None:
    proto = parsed(
        f"n (float[5,4] x) => (float y, int64 i, int64 j, int64 k) {{ y, i, j, k = Unique{form}(x) }}"
    )
    x = np.random.default_rng(0).integers(0, 2, (5, 4)).astype(np.float32)
    graph = ir.from_proto(proto).graph
    graph[0].name = "unique"
    theirs = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": x})
    for a, b in zip(build(graph)(torch.tensor(x)), theirs, strict=True):
        assert np.array_equal(a.numpy(), b)


@pytest.mark.parametrize("length", [None, 6, 11])
def test_the_inverse_transform_has_the_gradient_of_torch_s(length: int | None) -> None:
    from qpipe.model.operators.signal import dft

    x = torch.randn(3, 8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: dft(v, length, 1, inverse=1), (x,))
    wanted = torch.view_as_real(torch.fft.ifft(torch.view_as_complex(x), length, 1))
    assert torch.allclose(dft(x, length, 1, inverse=1), wanted)


UNSIGNED = [
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Mod",
    "Min",
    "Max",
    "Less",
    "Greater",
    "LessOrEqual",
    "GreaterOrEqual",
]


@pytest.mark.parametrize("op", UNSIGNED)
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
def test_unsigned_numbers_of_every_size(op: str, dtype: type[np.unsignedinteger[Any]]) -> None:
    kind = np.dtype(dtype).name
    proto = parsed(f"n ({kind}[N] a, {kind}[N] b) => (y) {{ y = {op}(a, b) }}")
    rng = np.random.default_rng(0)
    most = np.iinfo(dtype).max
    a = rng.integers(0, most, 400, dtype=dtype, endpoint=True)
    b = np.maximum(
        rng.integers(0, most, 400, dtype=dtype, endpoint=True) >> dtype(rng.integers(0, 9)), dtype(1)
    )
    a[:3], b[:3] = (most, most, 0), (1, most, most)
    graph = ir.from_proto(proto).graph
    graph[0].name = "n"
    with np.errstate(over="ignore"):
        wanted = {
            "Add": a + b, "Sub": a - b, "Mul": a * b, "Div": a // b, "Mod": a % b,
            "Min": np.minimum(a, b), "Max": np.maximum(a, b), "Less": a < b, "Greater": a > b,
            "LessOrEqual": a <= b, "GreaterOrEqual": a >= b,
        }[op]  # fmt: skip
    found = build(graph)(torch.tensor(a), torch.tensor(b)).numpy()
    assert found.dtype == wanted.dtype
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("threshold", [0.0, 100.0])
@pytest.mark.parametrize("reduction", ["none", "add"])
def test_a_mask_may_choose_nothing(threshold: float, reduction: str) -> None:
    """What torch makes of `x[mask] = 2` and `x[mask]`: for some data there is no index at all."""
    proto = parsed(
        "n (float[N,4] x) => (float[N,4] y) { s = ReduceMax<keepdims=0>(x, one)  m = Greater(s, t) "
        "i = NonZero(m)  p = Transpose(i)  g = GatherND(x, p)  v = Mul(g, two) "
        f'y = ScatterND<reduction="{reduction}">(x, p, v) }}',
        one=np.array([1]),
        t=np.float32(threshold),
        two=np.float32(2),
    )
    assert_same(proto, normal(5, 4))
