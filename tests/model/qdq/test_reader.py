"""Reading the QDQ form back: ours bit for bit, onnxruntime's and torch's own, and what is no rounding."""

from __future__ import annotations

import functools
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qpipe.methods.comparison.check import verify_import
from qpipe.model import Model
from qpipe.model.qdq.bias import effective_encodings
from qpipe.model.runtime.options import session_options
from qpipe.numerics.grid import quantize_dequantize, same_grid
from qpipe.numerics.scheme import Scheme
from tests.model.nets import Mobile, UNet, normal, parsed, randomized
from tests.model.qdq.test_writer import SCHEMES, WEIGHTS_ONLY, cnn
from tests.model.quantized import quantized, scheme

ROUND = "net (float[N,4] x) => (float[N,4] y) { q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, s, z) }"
STEP = {"s": np.float32(0.1), "z": np.uint8(128)}


def check_round_trip(model: Model, x: dict[str, Any]) -> None:
    """The same encodings, the same outputs, from the file that `model` writes."""
    found = Model.from_proto(model.to_qdq())
    wanted = effective_encodings(model)
    assert set(found.encodings) == set(wanted)
    different = [name for name, e in wanted.items() if not same_grid(e, found.encodings[name])]
    assert not different
    assert [node.op_type for node in found.graph] == [node.op_type for node in model.graph]
    for mode in ("reference", "deploy"):
        for a, b in zip(model.session(mode).run(None, x), found.session(mode).run(None, x), strict=True):  # type: ignore[arg-type]
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", SCHEMES)
def test_what_we_write_comes_back(name: str) -> None:
    x = {"x": normal(8, 3, 16, 16, seed=5)}
    check_round_trip(quantized(cnn(), x, SCHEMES[name]), x)


@pytest.mark.parametrize("name", WEIGHTS_ONLY)
def test_weights_alone_come_back_and_their_bias_stays_float(name: str) -> None:
    text = "n (float[N,5,32] x) => (float[N,5,16] y) { t = MatMul(x, w)  y = Add(t, b) }"
    x = {"x": normal(4, 5, 32)}
    model = quantized(Model.from_proto(parsed(text, w=normal(32, 16), b=normal(16))), x, WEIGHTS_ONLY[name])
    check_round_trip(model, x)
    assert Model.from_proto(model.to_qdq()).encodings["w"].frozen


OPS = ["Relu", "Sigmoid", "MaxPool", "Conv", "Depthwise", "AddSkip", "Concat", "Transpose"]


def drawn_net(ops: list[str]) -> Model:
    """A chain of `ops` on (N, 4, 8, 8), the channels always 4."""
    lines, tensors = [], {}
    last, previous = "x", "x"
    for i, op in enumerate(ops):
        out = f"v{i}"
        if op in ("Conv", "Depthwise"):
            group = 4 if op == "Depthwise" else 1
            tensors[f"w{i}"], tensors[f"b{i}"] = normal(4, 4 // group, 3, 3, seed=i), normal(4, seed=i + 50)
            call = f"Conv<pads=[1,1,1,1], group={group}>({last}, w{i}, b{i})"
        elif op == "AddSkip":
            call = f"Add({last}, {previous})"
        elif op == "Concat":
            tensors[f"w{i}"] = normal(4, 8, 1, 1, seed=i)
            lines.append(f"c{i} = Concat<axis=1>({last}, {previous})")
            call = f"Conv(c{i}, w{i})"
        elif op == "MaxPool":
            call = f"MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>({last})"
        elif op == "Transpose":
            call = f"Transpose<perm=[0,1,3,2]>({last})"
        else:
            call = f"{op}({last})"
        lines.append(f"{out} = {call}")
        last, previous = out, last
    body = "  ".join(lines)
    text = f"net (float[N,4,8,8] x) => (float[N,4,8,8] {last}) {{ {body} }}"
    return Model.from_proto(parsed(text, **tensors))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    ops=st.lists(st.sampled_from(OPS), min_size=1, max_size=6),
    bits=st.sampled_from([(8, 8), (4, 8), (3, 6), (8, 16)]),
    per=st.sampled_from(["per_tensor", "per_channel"]),
    signed=st.booleans(),
)
def test_any_small_graph_comes_back(ops: list[str], bits: tuple[int, int], per: Any, signed: bool) -> None:
    x = {"x": normal(4, 4, 8, 8, seed=7)}
    wanted: Scheme = scheme(bits[0], bits[1], per, signed=signed)
    check_round_trip(quantized(drawn_net(ops), x, wanted), x)


class Encoder(torch.nn.Module):
    """One transformer layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
        self.head = torch.nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.layer(x)).mean(1)
        return y


SHAPES: dict[type[torch.nn.Module], tuple[int, ...]] = {
    Mobile: (3, 16, 16),
    UNet: (3, 16, 16),
    Encoder: (6, 16),
}


class Reader:
    """Calibration data as onnxruntime wants them."""

    def __init__(self, x: np.ndarray[Any, Any]) -> None:
        self.batches = iter([{"x": x[i : i + 4]} for i in range(0, len(x), 4)])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.batches, None)


@functools.cache
def float_file(net: type[torch.nn.Module]) -> bytes:
    """A network with random weights as torch exports it and onnxruntime prepares it, for four samples."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    torch.manual_seed(0)
    example = (torch.zeros(4, *SHAPES[net]),)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path, ready = f"{folder}/float.onnx", f"{folder}/ready.onnx"
        torch.onnx.export(randomized(net()), example, path, dynamo=True, input_names=["x"], verbose=False)
        quant_pre_process(path, ready)
        return Path(ready).read_bytes()


def static(net: type[torch.nn.Module], folder: Path, **options: Any) -> Path:
    """The file that onnxruntime.quantization makes of a network."""
    from onnxruntime.quantization import QuantFormat, quantize_static

    shape, ready, path = SHAPES[net], folder / "ready.onnx", folder / "quantized.onnx"
    ready.write_bytes(float_file(net))
    options.setdefault("quant_format", QuantFormat.QDQ)
    quantize_static(str(ready), str(path), Reader(normal(8, *shape)), **options)
    return path


def check_file(path: Path, x: dict[str, Any]) -> Model:
    """The file computes in onnxruntime what its import does, bit for bit, with and without optimization."""
    model = Model.load(path)
    for mode in ("reference", "deploy"):
        options = session_options(mode)  # type: ignore[arg-type]
        source = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for a, b in zip(source.run(None, x), model.session(mode).run(None, x), strict=True):  # type: ignore[arg-type]
            np.testing.assert_array_equal(a, b)
    assert verify_import(model, path, batch=2).equal
    return model


KINDS: dict[str, dict[str, Any]] = {
    "u8s8 per channel": {"activation_type": "QUInt8", "weight_type": "QInt8", "per_channel": True},
    "s8s8": {"activation_type": "QInt8", "weight_type": "QInt8"},
    "u16s8": {"activation_type": "QUInt16", "weight_type": "QInt8"},
    "u8s4": {"activation_type": "QUInt8", "weight_type": "QInt4", "per_channel": True},
    "a pair per reader, float weights": {
        "activation_type": "QUInt8",
        "weight_type": "QUInt8",
        "extra_options": {"DedicatedQDQPair": True, "AddQDQPairToWeight": True},
    },
}


CASES = [
    *((Mobile, kind) for kind in ("u8s8 per channel", "a pair per reader, float weights")),
    *((UNet, kind) for kind in ("u16s8", "u8s4")),
    *((Encoder, kind) for kind in KINDS),
]


@pytest.mark.parametrize(("net", "kind"), CASES)
def test_onnxruntimes_own_files(net: type[torch.nn.Module], kind: str, tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantType

    options = {k: QuantType[v] if k.endswith("_type") else v for k, v in KINDS[kind].items()}
    path = static(net, tmp_path, **options)
    model = check_file(path, {"x": normal(4, *SHAPES[net], seed=3)})
    assert not any("DequantizeLinear" in name or name.endswith("_quantized") for name in model.encodings)
    weights = [name for name in model.encodings if name in model.params]
    assert weights
    assert all(model.encodings[name].frozen for name in weights)


@pytest.mark.filterwarnings("ignore")
def test_torch_fx_quantization_exported_to_onnx(tmp_path: Path) -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import _convert_to_reference_decomposed_fx, prepare_fx

    torch.manual_seed(0)
    x = torch.tensor(normal(4, 3, 16, 16))
    prepared = prepare_fx(randomized(Mobile()), get_default_qconfig_mapping("x86"), (x,))
    prepared(x)
    path = tmp_path / "fx.onnx"
    module = _convert_to_reference_decomposed_fx(prepared)
    torch.onnx.export(module, (x,), str(path), dynamo=True, input_names=["x"], verbose=False)
    model = check_file(path, {"x": x.numpy()})
    assert model.facts.biases == "float"
    step = float(model.encodings[model.outputs[0].name].scale)
    found = model.session().run(None, {"x": x.numpy()})[0]
    np.testing.assert_allclose(found, module(x).detach().numpy(), atol=2.01 * step)
    direct = Model.from_torch(module, x)
    assert len(direct.encodings) == len(model.encodings)
    again = direct.session().run(None, {direct.inputs[0].name: x.numpy()})[0]
    np.testing.assert_allclose(again, found, atol=1.01 * step)


def test_a_value_rounded_for_one_reader_only_gets_an_identity() -> None:
    proto = parsed(
        """net (float[N,4] x) => (float[N,4] y) {
            r = Relu(x)  q = QuantizeLinear(r, s, z)  d = DequantizeLinear(q, s, z)  y = Add(r, d) }""",
        **STEP,
    )
    model = Model.from_proto(proto)
    assert sorted(node.op_type for node in model.graph) == ["Add", "Identity", "Relu"]
    assert list(model.encodings) == ["r_rounded"]
    x = {"x": normal(5, 4)}
    source = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, x)[0]
    np.testing.assert_array_equal(model.session().run(None, x)[0], source)
    np.testing.assert_array_equal(model.to_torch()(torch.tensor(x["x"])).numpy(), source)
    check_round_trip(model, x)


def test_integers_that_are_only_moved_become_floats_that_are() -> None:
    proto = parsed(
        """net (float[N,4] x) => (float[4,N] y) {
            q = QuantizeLinear(x, s, z)  t = Transpose<perm=[1,0]>(q)  y = DequantizeLinear(t, s, z) }""",
        **STEP,
    )
    model = Model.from_proto(proto)
    x = {"x": normal(5, 4)}
    source = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, x)[0]
    np.testing.assert_array_equal(model.session().run(None, x)[0], source)
    assert set(model.encodings) == {"x", "y"}


def test_a_transposed_weight_takes_its_grid_along() -> None:
    proto = parsed(
        """net (float[N,4] x) => (float[N,3] y) {
            d = DequantizeLinear<axis=0>(w_quantized, s)  t = Transpose<perm=[1,0]>(d)  y = MatMul(x, t) }""",
        w_quantized=np.arange(12, dtype=np.int8).reshape(3, 4),
        s=np.float32([0.1, 0.2, 0.3]),
    )
    model = Model.from_proto(proto)
    assert model.encodings["w"].axis == 1
    x = {"x": normal(5, 4)}
    # Without these options, onnxruntime rounds the activations of a product whose weight alone is quantized.
    source = onnxruntime.InferenceSession(proto.SerializeToString(), session_options()).run(None, x)[0]
    np.testing.assert_allclose(model.session().run(None, x)[0], source, rtol=1e-6)


LEFT = {
    "computed": (
        "net (float[N,4] x, float s) => (float[N,4] y) { q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, s, z) }",
        {"z": np.uint8(3)},
    ),
    "another grid": (
        "net (float[N,4] x) => (float[N,4] y) { q = QuantizeLinear(x, s)  y = DequantizeLinear(q, t) }",
        {"s": np.float32(0.1), "t": np.float32(0.2)},
    ),
    "a constant on another grid": (
        """net (float[N,4] x) => (float[N,4] y) {
            q = QuantizeLinear(w, s)  d = DequantizeLinear(q, t)  y = Add(x, d) }""",
        {"s": np.float32(0.1), "t": np.float32(0.2), "w": np.float32([1, 2, 3, 4])},
    ),
    "integer input": (
        "net (uint8[N,4] x) => (float[N,4] y) { y = DequantizeLinear(x, s) }",
        {"s": np.float32(0.1)},
    ),
    "integer output": (
        "net (float[N,4] x) => (uint8[N,4] y) { y = QuantizeLinear(x, s) }",
        {"s": np.float32(0.1)},
    ),
    "per channel": (
        "net (float[N,4] x) => (float[N,4] y) { q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, s, z) }",
        {"s": np.float32([1, 2, 3, 4]), "z": np.zeros(4, np.int8)},
    ),
    "codes": (
        "net (float[N,4] x) => (int32[N,4] y) { q = QuantizeLinear(x, s)  y = Cast<to=6>(q) }",
        {"s": np.float32(0.1)},
    ),
    "codes and floats": (
        """net (float[N,4] x) => (float[N,4] y, int32[N,4] c) {
            q = QuantizeLinear(x, s)  y = DequantizeLinear(q, s)  c = Cast<to=6>(q) }""",
        {"s": np.float32(0.1)},
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_rounding_onto_one_constant_grid_stays_as_it_is(name: str) -> None:
    text, tensors = LEFT[name]
    proto = parsed(text, **tensors)
    model = Model.from_proto(proto)
    assert not model.encodings
    assert "compute with codes" in model.metadata["notes"][-1]
    drawn: dict[str, Any] = {"x": normal(5, 4), "s": np.array(0.05, np.float32)}
    if model.inputs[0].dtype == "uint8":
        drawn["x"] = np.random.default_rng(0).integers(0, 256, (5, 4), np.uint8)
    x = {spec.name: drawn[spec.name] for spec in model.inputs}
    wanted = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, x)
    computed = model.to_torch()(*(torch.as_tensor(x[spec.name]) for spec in model.inputs))
    found = computed if isinstance(computed, tuple) else (computed,)
    for a, b, c in zip(wanted, found, model.session("deploy").run(None, x), strict=True):
        np.testing.assert_array_equal(b.numpy(), a)
        np.testing.assert_array_equal(c, a)


def test_a_negative_scale_is_the_mirrored_grid_and_the_same_weights() -> None:
    codes = np.arange(-8, 8, dtype=np.int8).reshape(4, 4)
    proto = parsed(
        "net (float[N,4] x) => (float[N,4] y) { w = DequantizeLinear<axis=1>(c, s)  y = MatMul(x, w) }",
        c=codes,
        s=np.float32([0.5, -0.5, -0.25, 0]),
    )
    model = Model.from_proto(proto)
    (encoding,) = model.encodings.values()
    (name,) = model.encodings
    np.testing.assert_array_equal(encoding.zero_point, [0, -1, -1, 0])
    np.testing.assert_array_equal(model.param(name), codes * np.float32([0.5, -0.5, -0.25, 0]))
    np.testing.assert_array_equal(quantize_dequantize(model.param(name), encoding), model.param(name))


def test_inputs_that_are_outputs_keep_both_names() -> None:
    model = Model.from_proto(parsed(ROUND, **STEP))
    assert [v.name for v in model.inputs] == ["x"]
    assert [v.name for v in model.outputs] == ["y"]
    x = {"x": normal(5, 4)}
    wanted = onnxruntime.InferenceSession(parsed(ROUND, **STEP).SerializeToString()).run(None, x)[0]
    np.testing.assert_array_equal(model.session().run(None, x)[0], wanted)


def test_wide_files_keep_their_external_data(tmp_path: Path) -> None:
    x = {"x": normal(4, 32)}
    text = "n (float[N,32] x) => (float[N,64] y) { y = MatMul(x, w) }"
    model = quantized(Model.from_proto(parsed(text, w=normal(32, 64))), x)
    onnx.save(model.to_qdq(), tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0)
    found = Model.load(tmp_path / "m.onnx")
    np.testing.assert_array_equal(found.session().run(None, x)[0], model.session().run(None, x)[0])
