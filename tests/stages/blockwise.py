"""What the tests of the stages that learn part by part share: a small network, its data, its error in onnxruntime."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml

from qpipe.keys.hashing import digest
from qpipe.methods.placement.target import Target
from qpipe.model import Model
from qpipe.model.network.network import Network
from qpipe.numerics.grid import quantize_dequantize
from qpipe.numerics.scheme import Scheme, TensorScheme
from qpipe.param import coerce
from qpipe.stage import Context, Samples
from qpipe.stages.calibrate import calibrate

W3A8 = Scheme(
    TensorScheme(3, True, True, "per_channel", observer="mse"), TensorScheme(8, False, False, observer="minmax")
)
NET = """n (float[N,3,6,6] x) => (float[N,5] y) {
    t = Conv<pads=[1,1,1,1]>(x, w, b)  r = Relu(t)
    u = Conv<pads=[1,1,1,1]>(r, k, kb)  q = Relu(u)  p = Conv<pads=[1,1,1,1]>(q, m, mb)  s = Add(p, r)  a = Relu(s)
    g = GlobalAveragePool(a)  f = Flatten(g)  y = Gemm<transB=1>(f, v, c) }"""
PARAMS = {
    "w": (8, 3, 3, 3), "b": (8,), "k": (8, 8, 3, 3), "kb": (8,), "m": (8, 8, 3, 3), "mb": (8,), "v": (5, 8), "c": (5,),
}  # fmt: skip
QUICK: dict[str, Any] = {"iterations": 30, "batch_size": 16}


def correlated(seed: int, count: int) -> Samples:
    """Samples whose channels and neighbours depend on one another, as those inside a network do."""
    rng = np.random.default_rng(seed)
    sources = rng.normal(size=(count, 2, 8, 8))
    for axis in (2, 3):
        sources = sum(sources.take(range(i, i + 6), axis=axis) for i in range(3)) / np.sqrt(3)
    mix = np.random.default_rng(99).normal(size=(3, 2))
    x = np.einsum("cs,ns...->nc...", mix, sources) + 0.1 * rng.normal(size=(count, 3, 6, 6))
    return Samples({"x": x.astype(np.float32)})


def built(text: str, params: dict[str, tuple[int, ...]], seed: int = 0) -> Model:
    """The network of `text`, its parameters random numbers of these shapes."""
    rng = np.random.default_rng(seed)
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {text}')
    for name, shape in params.items():
        array = rng.normal(size=shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def placed() -> Target:
    """The shipped target `onnxruntime`, with a grid behind every layer."""
    table = yaml.safe_load((Path(__file__).parents[2] / "conf" / "target" / "onnxruntime.yaml").read_text())
    found = coerce({**table, "float_outputs": []}, Target, "target")
    assert isinstance(found, Target)
    return found


DATA, TEST = correlated(0, 64), correlated(1, 100)


@functools.cache
def net() -> Model:
    """A stem, a residual block and a head."""
    return built(NET, PARAMS)


@functools.cache
def calibrated() -> Network:
    """The same with 3-bit weights and 8-bit activations, not rounded yet."""
    return calibrate(net(), DATA, scheme=W3A8, target=placed())


def name_of(model: Network) -> str:
    """A digest of all that the model is."""
    meta, blobs = model.pack()
    return digest(meta, {name: np.frombuffer(blob, np.uint8) for name, blob in blobs.items()})


def same_numbers(a: Network, b: Network) -> bool:
    """Whether the parameters and the grids of both are the same, bit for bit."""
    grids = [{n: [e.scale.tobytes(), e.zero_point.tobytes()] for n, e in m.encodings.items()} for m in (a, b)]
    params = [{n: m.param(n).tobytes() for n in m.params} for m in (a, b)]
    return bool(grids[0] == grids[1] and params[0] == params[1])


def error(model: Network, reference: Network, data: Samples) -> float:
    """Squared output error over the float output's, of the deployed QDQ graph in onnxruntime."""
    y = np.asarray(Model.of(model).session(mode="reference").run(None, data.arrays)[0], np.float64)
    r = np.asarray(Model.of(reference).session(quantized=False).run(None, data.arrays)[0], np.float64)
    return float(np.sum((y - r) ** 2) / np.sum((r - r.mean(axis=0)) ** 2))


def assert_on_grid(model: Network) -> None:
    """Every weight is frozen, and its quantizer leaves it as it is."""
    for name, encoding in model.encodings.items():
        if name in model.params:
            assert encoding.frozen, name
            np.testing.assert_array_equal(quantize_dequantize(model.param(name), encoding), model.param(name))


class Killed(Exception):
    """What a Remembering context raises."""


class Remembering(Context):
    """A context whose memo remembers, as the cache does; `killed_after` parts it gives up."""

    def __init__(self, remembered: dict[str, Any] | None = None, killed_after: int | None = None) -> None:
        self.remembered = {} if remembered is None else remembered
        self.left = killed_after
        self.ran: list[str] = []
        self.notes: list[str] = []

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)

    def memo(self, name: str, fn: Any, *inputs: Any) -> Any:
        key = digest(name, *inputs)
        if key not in self.remembered:
            if name == "part" and self.left == 0:
                raise Killed
            self.left = self.left - 1 if name == "part" and self.left is not None else self.left
            self.remembered[key] = fn(*inputs)
            self.ran.append(name)
        return self.remembered[key]
