"""Files in operator form, as onnxruntime's own quantizers write them, against onnxruntime's run of the same file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from qpipe.errors import InputError
from qpipe.methods.comparison.check import verify_import
from qpipe.model import Model
from qpipe.model.qdq.block_form import unpacked
from qpipe.model.runtime.options import session_options
from tests.model.nets import Mobile, UNet, normal, parsed
from tests.model.qdq.test_reader import SHAPES, Encoder, Reader, float_file, static
from tests.model.qdq.test_writer import optimized

Nets = type[torch.nn.Module]


def source(path: Path | str | bytes, x: dict[str, Any]) -> Any:
    """The first output of the file in onnxruntime, whose trap with the activations of MatMulNBits is set."""
    given = path if isinstance(path, bytes) else str(path)
    return onnxruntime.InferenceSession(given, session_options()).run(None, x)[0]


def simulated(model: Model, x: dict[str, Any]) -> Any:
    with torch.no_grad():
        return model.to_torch()(*(torch.tensor(x[spec.name]) for spec in model.inputs)).numpy()


def assert_within_a_step(model: Model, path: Path, x: dict[str, Any]) -> None:
    """What onnxruntime makes of our QDQ form are the file's own numbers. The simulation sums floats where the
    file sums integers: where the sum is a tie, or all but one, its code may be the one beside."""
    wanted = source(path, x)
    np.testing.assert_array_equal(model.session("deploy").run(None, x)[0], wanted)
    steps = np.abs(simulated(model, x) - wanted) / model.encodings[model.outputs[0].name].scale
    assert steps.max() <= 1.01
    assert np.mean(steps > 0.5) <= 0.005


STATIC: list[tuple[Nets, dict[str, Any]]] = [
    (Mobile, {}),
    (Mobile, {"activation_type": QuantType.QUInt8, "per_channel": True}),
    (Encoder, {"activation_type": QuantType.QUInt8}),
]


@pytest.mark.parametrize(("net", "options"), STATIC)
def test_static_files_become_float_graphs_with_encodings(
    net: Nets, options: dict[str, Any], tmp_path: Path
) -> None:
    path = static(net, tmp_path, quant_format=QuantFormat.QOperator, **options)
    x = {"x": normal(4, *SHAPES[net], seed=3)}
    model = Model.load(path)
    assert "notes" not in model.metadata
    assert not any("Q" in node.op_type for node in model.graph)
    weights = {layer.weight for layer in model.layers()}
    assert weights <= set(model.encodings)
    wanted = source(path, x)
    np.testing.assert_array_equal(model.session("deploy").run(None, x)[0], wanted)
    # No code flips here: what is left are float32 sums behind the last quantized layer.
    np.testing.assert_allclose(simulated(model, x), wanted, rtol=1e-5, atol=1e-6)
    assert verify_import(model, path, batch=4).equal


def test_weights_are_called_as_in_the_qdq_form(tmp_path: Path) -> None:
    from_operators = Model.load(static(Mobile, tmp_path, quant_format=QuantFormat.QOperator))
    from_qdq = Model.load(static(Mobile, tmp_path))
    assert {layer.weight for layer in from_operators.layers()} == {
        layer.weight for layer in from_qdq.layers()
    }


CONV = "c = Conv(x, w)"
FORMS = {
    "pools": """a = LeakyRelu<alpha=0.1>(x)  p = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(a)
                s = Sigmoid(p)  y = GlobalAveragePool(s)""",
    "pad": f"{CONV}  p = Pad(c, pads)  d = Conv(p, w)  y = Relu(d)",
    "softmax": f"{CONV}  s = Softmax<axis=-1>(c)  y = MatMul(s, c)",
    "resize": f'{CONV}  r = Resize<mode="nearest">(c, , twice)  y = Conv(r, w)',
    "split": f"{CONV}  a, b = Split<axis=1>(c, halves)  d = Concat<axis=1>(b, a)  e = Conv(d, w)  y = Add(e, c)",
    "gemm": "f = Flatten(x)  g = Gemm<alpha=0.5, transB=1>(f, v, b)  h = Gemm(g, u, b)  y = Mul(g, h)",
}
TENSORS = {
    "w": normal(4, 4, 1, 1), "v": normal(8, 256), "u": normal(8, 8), "b": normal(8, seed=2),
    "pads": np.int64([0, 0, 1, 1, 0, 0, 1, 1]), "twice": np.float32([1, 1, 2, 2]), "halves": np.int64([2, 2]),
}  # fmt: skip


def quantized_file(text: str, folder: Path, x: Any) -> Path:
    """A network in text, (N, 4, 8, 8) -> y, in operator form."""
    used = {name: array for name, array in TENSORS.items() if any(f" {name}{end}" in text for end in ",)")}
    onnx.save(parsed(f"n (float[N,4,8,8] x) => (y) {{ {text} }}", 13, **used), folder / "float.onnx")
    quantize_static(
        str(folder / "float.onnx"), str(folder / "q.onnx"), Reader(x), quant_format=QuantFormat.QOperator,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return folder / "q.onnx"


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_onnxruntimes(name: str, tmp_path: Path) -> None:
    x = {"x": normal(4, 4, 8, 8)}
    path = quantized_file(FORMS[name], tmp_path, x["x"])
    model = Model.load(path)
    assert "notes" not in model.metadata
    assert_within_a_step(model, path, x)


def test_the_largest_code_is_where_the_largest_float_is(tmp_path: Path) -> None:
    x = {"x": normal(4, 4, 8, 8)}
    path = quantized_file(f"{CONV}  y = ArgMax<axis=1>(c)", tmp_path, x["x"])
    model = Model.load(path)
    assert [node.op_type for node in model.graph] == ["Conv", "ArgMax"]
    np.testing.assert_array_equal(simulated(model, x), source(path, x))


def test_interpolated_codes_stay_codes(tmp_path: Path) -> None:
    path = static(UNet, tmp_path, quant_format=QuantFormat.QOperator)
    x = {"x": normal(4, *SHAPES[UNet], seed=3)}
    model = Model.load(path)
    assert "2 nodes such as 'node_silu_quantize' (QuantizeLinear) compute with codes" in str(
        model.metadata["notes"]
    )
    # As the file says: optimized, onnxruntime rounds the weight of the float ConvTranspose by itself.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    (wanted,) = onnxruntime.InferenceSession(str(path), options).run(None, x)
    step = model.encodings[model.outputs[0].name].scale
    for found in (model.session("deploy").run(None, x)[0], simulated(model, x)):
        # One code of the ConvTranspose may lie beside a tie; it is interpolated and spread by a 3x3 kernel.
        steps = np.abs(found - wanted) / step
        assert steps.max() <= 1.01
        assert np.mean(steps > 0.5) <= 0.005


@pytest.mark.parametrize(("net", "kind"), [(Mobile, QuantType.QUInt8), (Encoder, QuantType.QInt8)])
def test_dynamic_files_are_computed_on_integers(net: Nets, kind: QuantType, tmp_path: Path) -> None:
    (tmp_path / "float.onnx").write_bytes(float_file(net))
    path = tmp_path / "dynamic.onnx"
    quantize_dynamic(str(tmp_path / "float.onnx"), str(path), weight_type=kind)
    x = {"x": normal(4, *SHAPES[net], seed=3)}
    model = Model.load(path)
    assert not model.encodings
    assert "DynamicQuantizeLinear) compute with codes" in model.metadata["notes"][0]
    wanted = source(path, x)
    # Integer sums are exact, and no code flips here: float32 sums remain.
    np.testing.assert_allclose(simulated(model, x), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.session("deploy").run(None, x)[0], wanted, rtol=1e-5, atol=1e-6)
    assert verify_import(model, path, batch=4).equal


def blockwise(rows: int, **options: Any) -> onnx.ModelProto:
    """Two products with 4-bit weights as onnxruntime writes them."""
    text = (
        f"n (float[N,5,{rows}] x) => (float[N,5,16] y) {{ t = MatMul(x, w)  r = Relu(t)  y = MatMul(r, v) }}"
    )
    proto = parsed(text, w=normal(rows, 48), v=normal(48, 16, seed=1))
    quantizer = MatMulNBitsQuantizer(proto, block_size=16, **options)
    quantizer.process()
    quantized: onnx.ModelProto = quantizer.model.model
    return quantized


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("rows", [64, 72])
def test_weights_in_blocks_of_every_width(bits: int, symmetric: bool, rows: int) -> None:
    proto = blockwise(rows, bits=bits, is_symmetric=symmetric)
    assert [node.op_type for node in proto.graph.node] == ["MatMulNBits", "Relu", "MatMulNBits"]
    model = Model.from_proto(proto)
    assert {name: (e.bitwidth, e.axis, e.block_size, e.frozen) for name, e in model.encodings.items()} == {
        "w": (bits, 0, 16, True),
        "v": (bits, 0, 16, True),
    }
    x = {"x": normal(4, 5, rows)}
    # The weights are the same numbers: only the order of float32 sums may differ.
    wanted = source(proto.SerializeToString(), x)
    np.testing.assert_allclose(simulated(model, x), wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.session("deploy").run(None, x)[0], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_both_of_its_formats_give_the_same_weights(symmetric: bool, tmp_path: Path) -> None:
    forms = (QuantFormat.QOperator, QuantFormat.QDQ)
    files = [blockwise(64, is_symmetric=symmetric, quant_format=form) for form in forms]
    ours, theirs = map(Model.from_proto, files)
    for name in ("w", "v"):
        np.testing.assert_array_equal(ours.param(name), theirs.param(name))
        np.testing.assert_array_equal(ours.encodings[name].scale, theirs.encodings[name].scale)
    # onnxruntime fuses no product that reads an input of the graph, not in its own file either.
    assert optimized(files[1], tmp_path / "optimized.onnx")["MatMulNBits"] == 1
    for model in (ours, theirs):
        assert optimized(model.to_qdq(), tmp_path / "optimized.onnx")["MatMulNBits"] == 1


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_tables_in_blocks(symmetric: bool, axis: int) -> None:
    text = "n (int64[N,5] i) => (float[N,5,16] y) { e = Gather(t, i)  y = MatMul(e, w) }"
    quantizer = MatMulNBitsQuantizer(
        parsed(text, t=normal(40, 64), w=normal(64, 16)), block_size=16, is_symmetric=symmetric,
        op_types_to_quantize=("MatMul", "Gather"), quant_axes=(("MatMul", 0), ("Gather", axis)),
    )  # fmt: skip
    quantizer.process()
    proto: onnx.ModelProto = quantizer.model.model
    assert [node.op_type for node in proto.graph.node] == ["GatherBlockQuantized", "MatMulNBits"]
    model = Model.from_proto(proto)
    assert [node.op_type for node in model.graph] == ["Gather", "MatMul"]
    found = {name: (e.bitwidth, e.axis, e.block_size) for name, e in model.encodings.items()}
    assert found == {"t": (4, axis, 16), "w": (4, 0, 16)}
    x = {"i": np.arange(40).reshape(8, 5)}
    # The weights are the same numbers: only the order of float32 sums may differ.
    wanted = source(proto.SerializeToString(), x)
    np.testing.assert_allclose(simulated(model, x), wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.session("deploy").run(None, x)[0], wanted, rtol=1e-5, atol=1e-5)


def test_activations_that_onnxruntime_would_round_are_told() -> None:
    model = Model.from_proto(blockwise(64, accuracy_level=4))
    (note,) = model.metadata["notes"]
    assert note.startswith("In 2 nodes such as MatMulNBits 't' accuracy_level=4")


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_unpacked_lowest_bits_first(bits: int) -> None:
    wanted = np.random.default_rng(0).integers(0, 1 << bits, (3, 21))
    packed = np.zeros((3, 21 * bits // 8 + 1), np.uint8)
    for row, column in np.ndindex(3, 21):
        place = column * bits
        packed[row, place // 8] |= np.uint8(wanted[row, column] << (place % 8))
    np.testing.assert_array_equal(unpacked(packed, bits, 21), wanted)


def microsoft(nodes: list[onnx.NodeProto], inputs: str, outputs: str, **tensors: Any) -> onnx.ModelProto:
    """A model of the given nodes, inputs and outputs (as ONNX text writes them)."""
    proto = parsed(f"n ({inputs}) => ({outputs}) {{ }}", **tensors)
    proto.graph.node.extend(nodes)
    proto.opset_import.add(domain="com.microsoft", version=1)
    return proto


def node(op_type: str, inputs: str, **attributes: Any) -> onnx.NodeProto:
    return onnx.helper.make_node(op_type, inputs.split(), ["y"], "n", domain="com.microsoft", **attributes)


GRID = {"s": np.float32(0.1), "z": np.uint8(3)}
UNREAD = {
    "attention": (
        node("QAttention", "x x x s s", num_heads=1),
        "float[N,4,4] x",
        GRID,
        "in a way that cannot be read",
    ),
    "computed": (
        node("QLinearAdd", "x s z x t z s z"),
        "uint8[N,4] x, float t",
        GRID,
        "torch cannot compute 'n' (QLinearAdd)",
    ),
    "channels last": (
        node("QLinearGlobalAveragePool", "x s z s z", channels_last=1),
        "uint8[N,4,4,4] x",
        GRID,
        "its channels come last",
    ),
    "old softmax": (
        node("QLinearSoftmax", "x s z s z", opset=11, axis=1),
        "uint8[N,4,4,4] x",
        GRID,
        "an opset before 13",
    ),
    "float zero points": (
        node("MatMulNBits", "x w s z", K=16, N=2, bits=4, block_size=16),
        "float[N,16] x",
        {"w": np.zeros((2, 1, 8), np.uint8), "s": np.ones(2, np.float32), "z": np.ones(2, np.float32)},
        "zero points are no integers",
    ),
    "packed table": (
        node("GatherBlockQuantized", "t i s", block_size=16),
        "int64[N] i",
        {"t": np.zeros((4, 8), np.uint8), "s": np.ones((4, 1), np.float32)},
        "not stored as int4 or uint4",
    ),
    "shuffled groups": (
        node("MatMulNBits", "x w s z g", K=32, N=1, bits=4, block_size=16),
        "float[N,32] x",
        {
            "w": np.zeros((1, 2, 8), np.uint8),
            "s": np.ones(2, np.float32),
            "z": np.zeros((1, 1), np.uint8),
            "g": np.arange(32, dtype=np.int32) % 2,
        },
        "grouped out of order",
    ),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_cannot_be_read_stays_as_it_is_where_onnxruntime_runs_it(name: str) -> None:
    made, inputs, tensors, message = UNREAD[name]
    floats = made.op_type in ("QAttention", "MatMulNBits", "GatherBlockQuantized")
    proto = microsoft([made], inputs, "float[N,K] y" if floats else "uint8[N,K] y", **tensors)
    try:
        model = Model.from_proto(proto)
    except InputError as error:
        assert "onnxruntime does not open the model" in str(error)  # noqa: PT017 - or it does, in another version
        with pytest.raises(Exception, match=r"QAttention|QLinear|NBits|Quantized"):
            onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        return
    assert made.op_type in [node.op_type for node in model.graph]
    note = model.metadata["notes"][-1]
    assert message in note
    assert "stays as it is, and runs through onnxruntime" in note
    assert verify_import(model, proto.SerializeToString()).equal


def test_many_nodes_of_one_kind_are_one_note() -> None:
    pool = {"channels_last": 1}
    nodes = [node("QLinearGlobalAveragePool", f"{x} s z s z", **pool) for x in ("x", "y")]
    nodes[1].output[0], nodes[1].name = "v", "m"
    model = Model.from_proto(microsoft(nodes, "uint8[N,4,4,4] x", "uint8[N,1,1,4] v", **GRID))
    note = model.metadata["notes"][-1]
    assert "'n' (QLinearGlobalAveragePool), 'm' (QLinearGlobalAveragePool): its channels come last" in note


def test_grids_that_have_to_be_folded_first_are_read_too() -> None:
    text = """n (uint8[N,4] x) => (uint8[N,3] y) {
        r = Mul(s, two)  y = QLinearMatMul(x, r, z, w_quantized, s, z, r, z) }"""
    codes = np.arange(12, dtype=np.uint8).reshape(4, 3)
    proto = parsed(text, two=np.float32(2), w_quantized=codes, **GRID)
    model = Model.from_proto(proto)
    assert [n.op_type for n in model.graph] == ["DequantizeLinear", "MatMul", "QuantizeLinear"]
    assert set(model.encodings) == {"w"}
    x = {"x": np.random.default_rng(0).integers(0, 256, (6, 4), np.uint8)}
    # Sums of floats fall beside a tie where sums of integers fall on it: one code, and seldom.
    off = np.abs(simulated(model, x).astype(int) - source(proto.SerializeToString(), x))
    assert off.max() <= 1
    assert np.mean(off > 0) < 0.1


def test_a_choice_between_codes_is_a_choice_between_floats() -> None:
    made = node("QLinearWhere", "c x s z x t z s z")
    proto = microsoft([made], "bool[N,4] c, uint8[N,4] x", "uint8[N,4] y", t=np.float32(0.2), **GRID)
    model = Model.from_proto(proto)
    assert Counter(n.op_type for n in model.graph) == {"DequantizeLinear": 2, "Where": 1, "QuantizeLinear": 1}
    x = np.random.default_rng(0).integers(0, 256, (6, 4), np.uint8)
    c = x % 3 == 0
    np.testing.assert_array_equal(
        simulated(model, {"c": c, "x": x}), source(proto.SerializeToString(), {"c": c, "x": x})
    )
