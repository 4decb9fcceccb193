"""prepare, bnf and cle on random networks: groups, transposed and depthwise layers, pads, bounds, residual branches."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qpipe.stages.bnf import bnf
from qpipe.stages.cle import cle
from qpipe.stages.prepare import prepare

ACTIVATIONS = (
    "Relu({})", "Clip({}, zero, six)", "Clip({}, , six)", "Clip({}, minus, six)", "LeakyRelu<alpha=0.2>({})",
    "PRelu({}, slope)", "Sigmoid({})", "Identity({})", "MaxPool<kernel_shape=[2,2], pads=[0,0,1,1]>({})",
)  # fmt: skip
WIDTH = 8


class Writer:
    """Writes a network as ONNX text, one block after another; every value has `WIDTH` channels."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.lines: list[str] = []
        self.params = {
            "zero": np.array(0, np.float32), "six": np.array(0.8, np.float32),
            "minus": np.array(-0.4, np.float32), "slope": self.spread(WIDTH).reshape(WIDTH, 1, 1),
        }  # fmt: skip
        self.last = "x"

    def spread(self, *shape: int) -> np.ndarray:
        """Numbers whose sizes differ by a factor of a hundred along the first axis."""
        factors = np.exp(self.rng.normal(size=shape[0]) * 1.2).reshape(-1, *(1,) * (len(shape) - 1))
        return (self.rng.normal(size=shape) * factors / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    def param(self, array: np.ndarray) -> str:
        name = f"p{len(self.params)}"
        self.params[name] = array
        return name

    def emit(self, text: str) -> str:
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        self.last = name
        return name

    def layer(self, kind: str, groups: int, biased: bool) -> None:
        shape = {
            "same": (WIDTH, WIDTH // groups, 3, 3), "point": (WIDTH, WIDTH // groups, 1, 1),
            "auto": (WIDTH, WIDTH // groups, 3, 3), "transposed": (WIDTH, WIDTH // groups, 3, 3),
        }[kind]  # fmt: skip
        attributes = {
            "same": "pads=[1,1,1,1]", "point": "strides=[1,1]", "auto": 'auto_pad="SAME_UPPER"',
            "transposed": "pads=[1,1,1,1]",
        }[kind]  # fmt: skip
        names = [self.last, self.param(self.spread(*shape))]
        names += [self.param(self.spread(WIDTH))] if biased else []
        op_type = "ConvTranspose" if kind == "transposed" else "Conv"
        self.emit(f"{op_type}<group={groups}, {attributes}>({', '.join(names)})")

    def normalization(self) -> None:
        arrays = [self.spread(WIDTH) for _ in range(3)] + [np.abs(self.spread(WIDTH)) + np.float32(0.05)]
        self.emit(f"BatchNormalization({self.last}, {', '.join(self.param(array) for array in arrays)})")

    def head(self) -> None:
        self.emit(f"GlobalAveragePool({self.last})")
        self.emit(f"Flatten({self.last})")
        self.emit(
            f"Gemm<alpha=0.5>({self.last}, {self.param(self.spread(WIDTH, 5))}, {self.param(self.spread(5))})"
        )


BLOCK = st.tuples(
    st.sampled_from(["same", "point", "auto", "transposed"]),
    st.sampled_from([1, 2, WIDTH]),
    st.booleans(),
    st.sampled_from(["none", "behind", "before"]),
    st.sampled_from(ACTIVATIONS),
    st.booleans(),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), blocks=st.lists(BLOCK, min_size=2, max_size=5))
def test_random_networks_compute_what_they_did(network, run, seed, blocks):
    writer = Writer(seed)
    for kind, groups, biased, normalization, activation, residual in blocks:
        start = writer.last
        if normalization == "before":
            writer.normalization()
        writer.layer(kind, groups, biased)
        if normalization == "behind":
            writer.normalization()
        writer.emit(activation.format(writer.last))
        if residual and "MaxPool" not in activation:
            writer.emit(f"Add({start}, {writer.last})")
    writer.head()
    text = "\n".join(writer.lines).replace(f"{writer.last} =", "y =")
    used = {name: array for name, array in writer.params.items() if f"{name})" in text or f"{name}," in text}
    model = network(f"n (float[N,{WIDTH},6,6] x) => (float[N,5] y) {{ {text} }}", used)
    feeds = {"x": np.random.default_rng(seed).normal(size=(3, WIDTH, 6, 6)).astype(np.float32)}
    (expected,) = run(model, feeds)
    for changed in (prepared := prepare(model), folded := bnf(prepared), cle(folded)):
        (found,) = run(changed, feeds)
        assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max() + 1e-7
    assert not any(node.op_type == "BatchNormalization" for node in folded.graph)
