"""The pieces that `graphs` grows random models from: a layer, an activation, a reshape, a block of attention.

Each is a function (net, value) that writes nodes behind `value`; `PIECES` lists them with the ranks and the opset that
they need, the simple ones first, since hypothesis shrinks towards the front.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from tests.model.graphs import BATCH, Net, Value
from tests.model.recent_pieces import attention_of_heads, attention_operator, rms_norm, rotary

Write = Callable[[Net, Value], object]


@dataclass(frozen=True)
class Piece:
    """A piece called `name`, for values of these `ranks`, from `opset` on."""

    name: str
    write: Write
    ranks: tuple[int, ...] = (2, 3, 4, 5)
    opset: int = 13


def fits(piece: Piece, value: Value, opset: int) -> bool:
    """Whether the piece can go behind `value`."""
    return value.rank in piece.ranks and opset >= piece.opset


def _conv(net: Net, x: Value) -> Value:
    channels, spatial = x.shape[1], x.shape[2:]
    groups = net.of(*(g for g in (1, channels, 2, 3) if channels % g == 0))
    out = groups * net.int(1, max(1, 6 // groups))
    kernel = [net.int(1, 3) for _ in spatial]
    strides = [net.int(1, 2) for _ in spatial]
    auto = net.of("NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")
    dilations = [1 if auto.startswith("SAME") else net.int(1, 2) for _ in spatial]
    begins, ends = ([net.int(0, 2) if auto == "NOTSET" else 0 for _ in spatial] for _ in range(2))
    sizes = []
    for i, size in enumerate(spatial):
        reach = dilations[i] * (kernel[i] - 1) + 1
        if reach > size + begins[i] + ends[i] and auto[:4] != "SAME":
            kernel[i] = reach = 1
        padded = size + begins[i] + ends[i]
        sizes.append(-(-size // strides[i]) if auto[:4] == "SAME" else (padded - reach) // strides[i] + 1)
    inputs = [x.name, net.weight(out, channels // groups, *kernel), *_bias(net, out)]
    return net.add(
        "Conv", inputs, (BATCH, out, *sizes), group=_unless(net, groups, 1), strides=_unless(net, strides, 1),
        dilations=_unless(net, dilations, 1), auto_pad=None if auto == "NOTSET" else auto,
        pads=_unless(net, [*begins, *ends], 0) if auto == "NOTSET" else None,
        kernel_shape=kernel if net.flag() else None,
    )  # fmt: skip


def _conv_transpose(net: Net, x: Value) -> Value:
    channels, spatial = x.shape[1], x.shape[2:]
    groups = net.of(*(g for g in (1, channels, 2) if channels % g == 0))
    out = net.int(1, max(1, 6 // groups))
    kernel = [net.int(1, 3) for _ in spatial]
    strides = [net.int(1, 2) for _ in spatial]
    dilations = [net.int(1, 2) for _ in spatial]
    extra = [net.int(0, stride - 1) for stride in strides]
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    full = [(n - 1) * s + r + e for n, s, r, e in zip(spatial, strides, reach, extra, strict=True)]
    auto = net.of("NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")
    pads = [net.int(0, 1) if size > 2 and auto == "NOTSET" else 0 for size in full * 2]
    sizes = [size - a - b for size, a, b in zip(full, pads, pads[len(full) :], strict=False)]
    if auto[:4] == "SAME":
        # ONNX asks for n * s. onnxruntime gives less where the kernel does not reach over a stride, and onnx's shape
        # inference adds output_padding.
        strides, extra = [min(s, r) for s, r in zip(strides, reach, strict=True)], [0] * len(spatial)
        sizes = [n * s for n, s in zip(spatial, strides, strict=True)]
    # Below the input's size onnx infers a shape without spatial dimensions, so that onnxruntime refuses what reads it.
    asked = net.flag() and auto != "VALID" and all(size >= n for size, n in zip(sizes, spatial, strict=True))
    inputs = [x.name, net.weight(channels, out, *kernel), *_bias(net, out * groups)]
    return net.add(
        "ConvTranspose", inputs, (BATCH, out * groups, *sizes), group=_unless(net, groups, 1),
        strides=_unless(net, strides, 1), dilations=_unless(net, dilations, 1),
        pads=_unless(net, pads, 0) if auto == "NOTSET" and not asked else None, output_padding=_unless(net, extra, 0),
        auto_pad=None if auto == "NOTSET" else auto, output_shape=sizes if asked else None,
    )  # fmt: skip


def _bias(net: Net, channels: int) -> list[str]:
    kind = net.of("vector", "none", "empty")
    return [net.vector(channels)] if kind == "vector" else [""] if kind == "empty" else []


def _unless(net: Net, given: int | list[int], default: int) -> int | list[int] | None:
    """`given`, or nothing where it says the default and the exporter left that out."""
    same = given == default if isinstance(given, int) else all(item == default for item in given)
    return None if same and net.flag() else given


def _batch_norm(net: Net, x: Value) -> Value:
    size = x.shape[1]
    gamma, beta, mean = (net.rng.standard_normal(size).astype(np.float32) for _ in range(3))
    var = net.rng.uniform(0.3, 2.0, size).astype(np.float32)
    kind = net.of("usual", "tiny variance", "zero gamma", "high bias", "wide")
    if kind == "tiny variance":
        var[0] = net.of(1e-12, 0.0, 1e-6)
        gamma *= np.float32(0.1)
    elif kind == "zero gamma":
        gamma[0] = 0.0
    elif kind == "high bias":
        beta, gamma = np.abs(beta) * np.float32(8), gamma * np.float32(0.5)
    elif kind == "wide":
        gamma *= np.exp(net.rng.standard_normal(size) * 2).astype(np.float32)
    names = [net.param(gamma, "g"), net.param(beta, "b"), net.param(mean, "m"), net.param(var, "var")]
    return net.add("BatchNormalization", [x.name, *names], x.shape, epsilon=net.of(None, 1e-3, 1e-5))


def _gemm(net: Net, x: Value) -> Value:
    size, out = x.shape[1], net.int(1, 6)
    alpha, beta = net.of(None, 0.5, 1.0), net.of(None, 2.0, 1.0)
    turned, transposed = net.of(0, 0, 1), net.of(1, 0)
    name = x.name
    if turned:
        (name,) = net.emit("Transpose", [name], perm=[1, 0])
    shapes = {"vector": (out,), "row": (1, out), "scalar": (), "one": (1,), "none": None}
    shape = shapes[net.of(*shapes)]
    bias = [] if shape is None else [net.vector(*shape)]
    weight = net.weight(*((out, size) if transposed else (size, out)))
    return net.add(
        "Gemm", [name, weight, *bias], (x.shape[0], out), alpha=alpha, beta=beta, transA=turned or None,
        transB=transposed,
    )  # fmt: skip


def _linear(net: Net, x: Value) -> Value:
    shape = (*x.shape[:-1], net.int(1, 6))
    (name,) = net.emit("MatMul", [x.name, net.weight(x.shape[-1], shape[-1])])
    kind = net.of("after", "before", "none", "one")
    if kind == "none":
        return net.keep(name, shape)
    bias = net.vector(shape[-1]) if kind != "one" else net.vector(1)
    return net.add("Add", [bias, name] if kind == "before" else [name, bias], shape)


def _clip(net: Net, x: Value) -> Value:
    low = net.of(0.0, None, -0.4, 0.2)
    high = net.of(6.0, None, 0.5, 1.5)
    inputs = [x.name, "" if low is None else net.scalar(low), *([] if high is None else [net.scalar(high)])]
    return net.add("Clip", inputs if inputs[-1] else inputs[:1], x.shape)


def _prelu(net: Net, x: Value) -> Value:
    shapes = [(1,), (x.shape[1], *(1,) * (x.rank - 2)), (1, x.shape[1], *(1,) * (x.rank - 2)), (x.shape[-1],)]
    slope = net.rng.uniform(-0.3, 1.2, net.of(*shapes)).astype(np.float32)
    return net.add("PRelu", [x.name, net.param(slope, "s")], x.shape)


def _smooth(net: Net, x: Value) -> Value:
    op = net.of("Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu", "Softplus", "Selu", "Abs", "Neg", "Erf")
    return net.add(op if net.opset >= 14 or op != "HardSwish" else "Sigmoid", [x.name], x.shape)


def _gelu(net: Net, x: Value) -> Value:
    if net.opset >= 20 and net.flag():
        return net.add("Gelu", [x.name], x.shape, approximate=net.of(None, "tanh", "none"))
    (a,) = net.emit("Div", [x.name, net.scalar(math.sqrt(2))])
    (b,) = net.emit("Erf", [a])
    (c,) = net.emit("Add", [b, net.scalar(1)])
    (d,) = net.emit("Mul", [x.name, c])
    return net.add("Mul", [d, net.scalar(0.5)], x.shape)


def _swish(net: Net, x: Value) -> Value:
    if net.flag():
        (gate,) = net.emit("Sigmoid", [x.name])
        return net.add("Mul", [x.name, gate] if net.flag() else [gate, x.name], x.shape)
    (a,) = net.emit("Add", [x.name, net.scalar(3)])
    (b,) = net.emit("Clip", [a, net.scalar(0), net.scalar(6)])
    (c,) = net.emit("Mul", [x.name, b])
    return net.add("Div", [c, net.scalar(6)], x.shape)


def _nothing(net: Net, x: Value) -> Value:
    if net.flag():
        return net.add("Identity", [x.name], x.shape)
    extra = [net.scalar(0.3), net.param(np.array(False), "t")] if net.flag() else []
    return net.add("Dropout", [x.name, *extra], x.shape)


def _pad(net: Net, x: Value) -> Value:
    mode = net.of("constant", "edge", "reflect")
    begins, ends = [0] * x.rank, [0] * x.rank
    for axis in range(1 if mode == "constant" and net.int(0, 3) == 3 else 2, x.rank):
        most = x.shape[axis] - 1 if mode == "reflect" else 2
        least = -1 if x.shape[axis] > 2 and mode == "constant" else 0
        begins[axis], ends[axis] = (
            net.of(*sorted(range(least, min(most, 2) + 1), key=abs)) for _ in range(2)
        )
    shape = [size + a + b for size, a, b in zip(x.shape, begins, ends, strict=True)]
    some = net.opset >= 18 and net.flag()
    pads = [*begins[1:], *ends[1:]] if some else [*begins, *ends]
    inputs = [x.name, net.ints(*pads)]
    value = net.scalar(net.of(0.0, -0.5)) if mode == "constant" and net.flag() else ""
    inputs += [value] if value or some else []
    inputs += [net.ints(*range(1, x.rank))] if some else []
    return net.add("Pad", inputs, shape, mode=None if mode == "constant" and net.flag() else mode)


def _flatten(net: Net, x: Value) -> Value:
    shape = (x.shape[0], math.prod(x.shape[1:]))
    if net.flag():
        return net.add("Flatten", [x.name], shape, axis=net.of(None, 1, 1 - x.rank))
    return net.add("Reshape", [x.name, net.ints(*net.of((0, -1), (-1, shape[1])))], shape)


def _reshape(net: Net, x: Value) -> Value:
    size = math.prod(x.shape[1:])
    factors = [f for f in range(1, size + 1) if size % f == 0]
    first = net.of(*factors)
    shapes = {(first, size // first), (*x.shape[1:], 1), (first, 1, size // first), (1, *x.shape[1:])}
    shape = net.of(*sorted(s for s in shapes if len(s) < 5))
    return net.add("Reshape", [x.name, net.ints(net.of(0, -1), *shape)], (x.shape[0], *shape))


def _transpose(net: Net, x: Value) -> Value:
    order = net.draw(st.permutations(range(1, x.rank)))
    return net.add("Transpose", [x.name], [x.shape[0], *(x.shape[a] for a in order)], perm=[0, *order])


def _squeeze(net: Net, x: Value) -> Value:
    axes = [axis for axis in range(1, x.rank) if x.shape[axis] == 1]
    if axes and x.rank > 2:
        axis = net.of(*axes)
        shape = [size for a, size in enumerate(x.shape) if a != axis]
        return net.add("Squeeze", [x.name, net.ints(net.of(axis, axis - x.rank))], shape)
    if x.rank == 5:
        return x
    axis = net.int(1, x.rank)
    return net.add("Unsqueeze", [x.name, net.ints(axis)], [*x.shape[:axis], 1, *x.shape[axis:]])


def _pool(net: Net, x: Value) -> Value:
    op = net.of("MaxPool", "AveragePool")
    spatial = x.shape[2:]
    kernel = [net.int(1, min(3, size)) for size in spatial]
    auto = net.of("NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")
    strides = [net.int(1, 2 if auto[:4] != "SAME" else min(2, k)) for k in kernel]
    begins, ends = ([net.int(0, k - 1) if auto == "NOTSET" else 0 for k in kernel] for _ in range(2))
    full = [size + a + b - k for size, k, a, b in zip(spatial, kernel, begins, ends, strict=True)]
    ceil = net.of(0, 1) if auto == "NOTSET" else 0
    # onnx's shape inference and onnxruntime disagree about a window that would start in the padding at the end.
    ceil &= all(-(-n // s) * s < size + a for n, s, size, a in zip(full, strides, spatial, begins, strict=True))
    sizes = [(-(-n // s) if ceil else n // s) + 1 for n, s in zip(full, strides, strict=True)]
    if auto[:4] == "SAME":
        sizes = [-(-size // s) for size, s in zip(spatial, strides, strict=True)]
    return net.add(
        op, [x.name], [*x.shape[:2], *sizes], kernel_shape=kernel, strides=_unless(net, strides, 1),
        pads=_unless(net, [*begins, *ends], 0) if auto == "NOTSET" else None, ceil_mode=ceil or None,
        auto_pad=None if auto == "NOTSET" else auto, count_include_pad=net.of(None, 1) if op == "AveragePool" else None,
    )  # fmt: skip


def _global_pool(net: Net, x: Value) -> Value:
    op = net.of("GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax")
    if op.startswith("Global"):
        return net.add(op, [x.name], [*x.shape[:2], *(1,) * (x.rank - 2)])
    axes, kept = list(range(2, x.rank)), net.of(1, 0)
    shape = [*x.shape[:2], *((1,) * len(axes) if kept else ())]
    if net.opset >= 18:
        return net.add(op, [x.name, net.ints(*axes)], shape, keepdims=kept)
    return net.add(op, [x.name], shape, keepdims=kept, axes=axes)


def _constant_arithmetic(net: Net, x: Value) -> Value:
    op = net.of("Mul", "Add", "Sub", "Div", "Max", "Min")
    channels = (x.shape[1], *(1,) * (x.rank - 2))
    shape = net.of((), channels, (1, *channels), (1,), (x.shape[-1],))
    array = net.rng.uniform(0.5, 2.0, shape).astype(np.float32)
    name = net.param(array, "k")
    return net.add(op, [name, x.name] if op in ("Mul", "Add", "Sub") and net.flag() else [x.name, name], x.shape)


def _join(net: Net, x: Value) -> Value:
    """With an earlier value of the same shape: a residual branch."""
    others = [value for value in net.values if value.shape == x.shape]
    other = net.of(*others)
    op = net.of("Add", "Mul", "Sub", "Max", "Concat")
    if op != "Concat":
        return net.add(op, [other.name, x.name], x.shape)
    axis = net.int(1, x.rank - 1)
    shape = [size * 2 if a == axis else size for a, size in enumerate(x.shape)]
    return net.add("Concat", [x.name, other.name], shape, axis=net.of(axis, axis - x.rank))


def _split(net: Net, x: Value) -> object:
    axis = net.int(1, x.rank - 1)
    size = x.shape[axis]
    if size < 2:
        return x
    first = net.int(1, size - 1)
    names = net.emit("Split", [x.name, net.ints(first, size - first)], 2, axis=axis)
    for name, part in zip(names, (first, size - first), strict=True):
        net.keep(name, [part if a == axis else n for a, n in enumerate(x.shape)])
    return None


def _slice(net: Net, x: Value) -> Value:
    axis = net.int(1, x.rank - 1)
    start = net.int(0, x.shape[axis] - 1)
    shape = [x.shape[axis] - start if a == axis else n for a, n in enumerate(x.shape)]
    return net.add("Slice", [x.name, net.ints(start), net.ints(net.of(2**31 - 1, 2**63 - 1)), net.ints(axis)], shape)


def _layer_norm(net: Net, x: Value) -> Value:
    size = x.shape[-1]
    scale, bias = net.vector(size), net.vector(size)
    if net.opset >= 17 and net.flag():
        return net.add("LayerNormalization", [x.name, scale, *([bias] if net.flag() else [])], x.shape, axis=-1)
    axes = {"axes": [-1]} if net.opset < 18 else {}
    last = [] if net.opset < 18 else [net.ints(-1)]
    (mean,) = net.emit("ReduceMean", [x.name, *last], **axes)
    (centred,) = net.emit("Sub", [x.name, mean])
    (square,) = net.emit("Pow", [centred, net.scalar(2)])
    (var,) = net.emit("ReduceMean", [square, *last], **axes)
    (safe,) = net.emit("Add", [var, net.scalar(1e-5)])
    (deviation,) = net.emit("Sqrt", [safe])
    (normal,) = net.emit("Div", [centred, deviation])
    (scaled,) = net.emit("Mul", [normal, scale])
    return net.add("Add", [scaled, bias], x.shape)


def _other_norm(net: Net, x: Value) -> Value:
    size = x.shape[1]
    op = net.of("InstanceNormalization", "GroupNormalization")
    if op == "GroupNormalization" and net.opset >= 21:
        groups = net.of(1, size)
        return net.add(op, [x.name, net.vector(size), net.vector(size)], x.shape, num_groups=groups, epsilon=1e-2)
    return net.add("InstanceNormalization", [x.name, net.vector(size), net.vector(size)], x.shape, epsilon=1e-2)


def _softmax(net: Net, x: Value) -> Value:
    return net.add(net.of("Softmax", "LogSoftmax"), [x.name], x.shape, axis=net.of(-1, 1, x.rank - 1))


def _attention(net: Net, x: Value) -> Value:
    """Two heads over axis 1, written out as exporters do; a residual around it."""
    length, size = x.shape[1:]
    heads, width = 2, net.int(1, 3)
    parts = []
    for order in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
        (y,) = net.emit("MatMul", [x.name, net.weight(size, heads * width)])
        if net.flag():
            (y,) = net.emit("Add", [y, net.vector(heads * width)])
        (y,) = net.emit("Reshape", [y, net.ints(0, length, heads, width)])
        parts += net.emit("Transpose", [y], perm=order)
    (scores,) = net.emit("MatMul", parts[:2])
    (scores,) = net.emit("Mul", [scores, net.scalar(width**-0.5)])
    if net.flag():
        mask = np.triu(np.full((length, length), net.of(-1e4, -np.inf), np.float32), 1)
        (scores,) = net.emit("Add", [scores, net.param(mask, "mask")])
    (weights,) = net.emit("Softmax", [scores], axis=-1)
    (y,) = net.emit("MatMul", [weights, parts[2]])
    (y,) = net.emit("Transpose", [y], perm=[0, 2, 1, 3])
    (y,) = net.emit("Reshape", [y, net.ints(0, 0, heads * width)])
    (y,) = net.emit("MatMul", [y, net.weight(heads * width, size)])
    return net.add("Add", [x.name, y], x.shape)


def _resize(net: Net, x: Value) -> Value:
    factor = net.of(2, 1)
    scales = net.param(np.array([1, 1, *(factor,) * (x.rank - 2)], np.float32), f"scales{factor}_")
    shape = [*x.shape[:2], *(size * factor for size in x.shape[2:])]
    mode = net.of("nearest", "linear") if x.rank == 4 else "nearest"
    return net.add("Resize", [x.name, "", scales], shape, mode=mode)


def _one(op_type: str) -> Write:
    return lambda net, x: net.add(op_type, [x.name], x.shape)


def _leaky(net: Net, x: Value) -> Value:
    return net.add("LeakyRelu", [x.name], x.shape, alpha=net.of(None, 0.2, -0.5, 1.5))


SPATIAL = (3, 4, 5)
PIECES = (
    Piece("relu", _one("Relu")), Piece("conv", _conv, SPATIAL), Piece("gemm", _gemm, (2,)), Piece("linear", _linear),
    Piece("batch_norm", _batch_norm), Piece("clip", _clip), Piece("leaky", _leaky), Piece("prelu", _prelu),
    Piece("conv_again", _conv, SPATIAL), Piece("conv_transpose", _conv_transpose, SPATIAL), Piece("join", _join),
    Piece("batch_norm_again", _batch_norm), Piece("nothing", _nothing), Piece("constant", _constant_arithmetic),
    Piece("pad", _pad, SPATIAL), Piece("flatten", _flatten), Piece("pool", _pool, SPATIAL),
    Piece("global_pool", _global_pool, SPATIAL), Piece("transpose", _transpose, SPATIAL), Piece("reshape", _reshape),
    Piece("squeeze", _squeeze), Piece("slice", _slice), Piece("split", _split), Piece("smooth", _smooth),
    Piece("gelu", _gelu), Piece("swish", _swish), Piece("softmax", _softmax), Piece("layer_norm", _layer_norm),
    Piece("other_norm", _other_norm, SPATIAL), Piece("attention", _attention, (3,)), Piece("resize", _resize, (3, 4)),
    Piece("attention_operator", attention_operator, (3,), 23), Piece("rms_norm", rms_norm, opset=23),
    Piece("attention_of_heads", attention_of_heads, (4,), 23), Piece("rotary", rotary, (3, 4), 23),
)  # fmt: skip
FOLDABLE = frozenset({
    "relu", "conv", "gemm", "linear", "batch_norm", "clip", "leaky", "prelu", "conv_again", "conv_transpose", "join",
    "batch_norm_again", "nothing", "pad", "flatten", "pool", "global_pool", "transpose", "reshape", "squeeze",
    "constant", "layer_norm", "split", "resize",
})  # fmt: skip
"""What bnf, cle and hbf move channels through, or have to refuse."""
RECENT = frozenset({
    "attention_operator", "attention_of_heads", "rms_norm", "rotary", "linear", "reshape", "transpose", "join",
})  # fmt: skip
"""What opset 23 brought, and what leads to it."""
