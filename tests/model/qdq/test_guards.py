"""Each guard twice: where it stands, and for which onnxruntime it is needed, so that one that none needs any more goes.

The table was measured by running the unguarded graphs below in onnxruntime 1.23.0, 1.23.2, 1.24.1, 1.24.4, 1.25.0,
1.25.1, 1.26.0, 1.27.0, 1.28.0, 1.29.0, 1.30.0, 1.31.0, 1.31.1 and 1.32.0 on x86-64.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime
import pytest

from qpipe.model.network.naming import Names
from qpipe.model.qdq.guards import guard_float_layers
from tests.model.nets import normal, parsed

Array = np.ndarray[Any, Any]

NEEDED_UP_TO = {
    "a Gemm with a float weight": "1.32.0",
    "a Conv with a float weight": "1.32.0",
    "a ConvTranspose with a float weight": "1.32.0",
    "a float layer behind a mask of zeros": "1.32.0",
    "a Gemm with scales along its inputs": "1.32.0",
    "a transposed Gemm with scales along its inputs": "1.32.0",
    "a Conv with scales along its inputs": "1.32.0",
    "an AveragePool with dilations": "1.32.0",
    "a GlobalAveragePool onto a far finer grid": "1.32.0",
    "a GlobalAveragePool onto a far coarser grid": "1.32.0",
    "a Softmax over one element": "1.31.1",
    "a Softmax whose grid ends before 1": "1.31.1",
}
"""The newest onnxruntime in which the unguarded graph is seen to go wrong; 1.32.0 is the newest that was tried."""

UNIT = 1 / 256
OUTLIER = np.where(np.arange(16).reshape(4, 4) == 0, 100, normal(4, 4) / 10).astype(np.float32)
"""One large weight: in 8 bits per tensor, as onnxruntime rounds, the others are gone."""


def qdq(between: str, shape: str, out: str, scale: float = 0.03, zero_point: int = 128, **more: Any) -> onnx.ModelProto:
    """x -> Q -> DQ -> d, what is `between` d and o, o -> Q -> DQ -> y; `scale` and `zero_point` are those of o."""
    text = f"""m (float[{shape}] x) => (float[{out}] y) {{
        q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  {between}
        p = QuantizeLinear(o, t, u)  y = DequantizeLinear(p, t, u) }}"""
    grids = {"s": np.float32(0.03), "z": np.uint8(128), "t": np.float32(scale), "u": np.uint8(zero_point)}
    return onnx.shape_inference.infer_shapes(parsed(text, **grids, **more))


def wider(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with 16 bits for 8, and a sixteenth of the step."""
    found = onnx.ModelProto()
    found.CopyFrom(proto)
    for tensor in found.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if tensor.name in ("s", "t"):
            tensor.CopyFrom(onnx.numpy_helper.from_array(array / np.float32(16), tensor.name))
        elif tensor.name in ("z", "u"):
            tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.uint16) * np.uint16(256), tensor.name))
    del found.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(found)


def softmax(size: int, scale: float = UNIT, zero_point: int = 0) -> onnx.ModelProto:
    return qdq("o = Softmax(d)", f"N,{size}", f"N,{size}", scale, zero_point)


def pool(of: str, scale: float = 0.03, zero_point: int = 128) -> onnx.ModelProto:
    return qdq(f"o = {of}(d)", "N,4,8,8", "N,4,a,b", scale, zero_point)


def gemm(between: str) -> onnx.ModelProto:
    """n is nought, i one, f a bound, k a weight in codes."""
    nought, one = np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32)
    more = {"n": nought, "i": one, "f": np.float32(-2), "k": np.ones((4, 4), np.int8)}
    return qdq(between, "N,4", "N,4", w=OUTLIER, **more)


def conv(between: str) -> onnx.ModelProto:
    return qdq(between, "N,4,3,3", "N,4,3,3", w=OUTLIER.reshape(4, 4, 1, 1))


def other_axis(node: str, axis: int, *shape: int) -> onnx.ModelProto:
    """e is a weight whose scales c run along `axis`."""
    codes, scales = np.rint(40 * normal(4, 4, seed=8)).astype(np.int8), np.array([0.001, 0.003, 0.01, 0.03], np.float32)
    zeros, size = np.zeros(4, np.int8), ",".join(map(str, ("N", 4, *shape)))
    codes = codes.reshape(4, 4, *(1 for _ in shape))
    return qdq(f"e = DequantizeLinear<axis={axis}>(k, c, j)  o = {node}(d, e)", size, size, k=codes, c=scales, j=zeros)


UNGUARDED = {
    "a Gemm with a float weight": gemm("o = Gemm(d, w)"),
    "a Conv with a float weight": conv("c = Conv(d, w)  o = Relu(c)"),
    "a ConvTranspose with a float weight": conv("o = ConvTranspose(d, w)"),
    "a float layer behind a mask of zeros": gemm("m = Add(d, n)  o = Gemm(m, w)"),
    "a Gemm with scales along its inputs": other_axis("Gemm", 0),
    "a transposed Gemm with scales along its inputs": other_axis("Gemm<transB=1>", 1),
    "a Conv with scales along its inputs": other_axis("Conv", 1, 3, 3),
    "an AveragePool with dilations": pool("AveragePool<kernel_shape=[2,2], dilations=[2,2]>"),
    "a GlobalAveragePool onto a far finer grid": pool("GlobalAveragePool", 1e-7),
    "a GlobalAveragePool onto a far coarser grid": pool("GlobalAveragePool", 0.03 * 2.0**33),
    "a Softmax over one element": softmax(1),
    "a Softmax whose grid ends before 1": softmax(8, 0.0005),
}


def guarded(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """The graph after `guard_float_layers`, and the operators that read a Clip without bounds."""
    model = ir.from_proto(proto)
    guard_float_layers(model.graph, Names(ir.convenience.create_value_mapping(model.graph)))
    bare = [node for node in model.graph if node.op_type == "Clip" and len(node.inputs) == 1]
    return ir.to_proto(model), [reader.op_type for node in bare for reader in node.outputs[0].consumers()]


def goes_wrong(proto: onnx.ModelProto) -> bool:
    """Whether onnxruntime refuses the graph, or is more than a step away from what onnx's reference computes."""
    shape = [dim.dim_value or 64 for dim in proto.graph.input[0].type.tensor_type.shape.dim]
    x = {"x": 4 * normal(*shape)}
    (wanted,) = onnx.reference.ReferenceEvaluator(proto).run(None, x)
    step = next(float(onnx.numpy_helper.to_array(t)) for t in proto.graph.initializer if t.name == "t")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
        (found,) = session.run(None, x)
    except Exception:  # its errors have no common type
        return True
    return bool(np.abs(found - wanted).max() > 1.5 * step)


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")[:3]))


def oldest_allowed() -> tuple[int, ...]:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    (bound,) = [line for line in project["dependencies"] if line.startswith("onnxruntime")]
    return version(bound.removeprefix("onnxruntime>="))


@pytest.mark.parametrize("name", UNGUARDED)
def test_a_guard_is_needed_by_some_onnxruntime_that_is_allowed(name: str) -> None:
    shows, last = goes_wrong(UNGUARDED[name]), version(NEEDED_UP_TO[name])
    if version(onnxruntime.__version__) <= last:
        assert shows, f"{onnxruntime.__version__} does not need the guard of {name}: the table is wrong"
    assert shows or oldest_allowed() <= last, f"no onnxruntime that is allowed needs the guard of {name}: remove it"


@pytest.mark.parametrize("name", UNGUARDED)
def test_with_its_guard_onnxruntime_computes_what_the_graph_says(name: str) -> None:
    proto, readers = guarded(UNGUARDED[name])
    assert readers == [next((op for op in name.split() if op[0].isupper()), "Gemm")]
    assert not goes_wrong(proto)


@pytest.mark.parametrize("name", UNGUARDED)
def test_of_16_bits_weights_alone_are_rounded(name: str) -> None:
    """Measured so in onnxruntime 1.23.0, 1.27.0, 1.31.1 and 1.32.0."""
    proto = wider(UNGUARDED[name])
    rounds = "float" in name
    assert goes_wrong(proto) == rounds
    assert bool(guarded(proto)[1]) == rounds


@pytest.mark.parametrize(
    "between",
    [
        *("c = Gemm(d, w)  o = Relu(c)", "c = Gemm(d, w)  e = Mul(c, i)  o = Relu(e)"),
        *(f"c = {taken}  o = Gemm(c, w)" for taken in ("Identity(d)", "Dropout(d)", "Add(n, d)", "Sub(d, n)")),
        *(f"c = {taken}  o = Gemm(c, w)" for taken in ("Mul(d, i)", "Div(d, i)")),
        *("e = Add(d, n)  c = Mul(e, i)  o = Gemm(c, w)", "c = Gemm(d, w)  o = Clip(c, f)"),
    ],
)
def test_onnxruntime_sees_a_float_layer_through_what_it_takes_out(between: str) -> None:
    proto = gemm(between)
    assert goes_wrong(proto) or version(onnxruntime.__version__) > version("1.32.0")
    assert guarded(proto)[1] == ["Gemm"]


@pytest.mark.parametrize(
    "between",
    [
        "o = MatMul(d, w)",
        "c = DequantizeLinear(k, s)  o = Gemm(d, c)",
        "c = Tanh(d)  o = Gemm(c, w)",
        "c = Gemm(d, w)  o = Tanh(c)",
    ],
)
def test_what_onnxruntime_leaves_in_float_has_no_guard(between: str) -> None:
    proto = gemm(between)
    assert guarded(proto)[1] == []
    assert not goes_wrong(proto)


@pytest.mark.parametrize(("more", "reads"), [("float[N,4] o", ""), ("float[N,4] e", "e = Neg(o)")])
def test_a_value_that_others_see_too_is_not_taken_into_an_integer_kernel(more: str, reads: str) -> None:
    text = f"""m (float[N,4] x) => (float[N,4] y, {more}) {{
        q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  o = Gemm(d, w)
        p = QuantizeLinear(o, s, z)  y = DequantizeLinear(p, s, z)  {reads} }}"""
    proto = parsed(text, s=np.float32(0.03), z=np.uint8(128), w=OUTLIER)
    assert guarded(proto)[1] == []


@pytest.mark.parametrize(
    "proto",
    [
        *(other_axis("Gemm", 1), other_axis("Gemm<transB=1>", 0), other_axis("Conv", 0, 3, 3)),
        *(other_axis("MatMul", axis) for axis in (0, 1)),
        *(softmax(2), softmax(8), softmax(8, 1 / 255), pool("AveragePool<kernel_shape=[2,2]>")),
        *(pool("GlobalAveragePool", scale) for scale in (0.03, 0.0301 / 256, 0.03 * 2.0**16)),
    ],
)
def test_integer_kernels_that_are_right_are_used(proto: onnx.ModelProto) -> None:
    assert guarded(proto)[1] == []
    assert not goes_wrong(proto)


@pytest.mark.parametrize(
    "proto",
    [
        *(softmax(8, 1 / 257), softmax(8, UNIT, 1), qdq("o = Softmax<axis=1>(d)", "N,1,4", "N,1,4", UNIT, 0)),
        *(pool("GlobalAveragePool", scale) for scale in (0.0299 / 256, 0.03 * 2.0**16.1)),
    ],
)
def test_a_guard_stands_from_the_first_step_beyond_on(proto: onnx.ModelProto) -> None:
    assert len(guarded(proto)[1]) == 1
