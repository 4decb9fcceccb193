"""Pieces of random graphs with the operators of opset 23: attention, rotary embedding, RMS normalization."""

from __future__ import annotations

import numpy as np

from tests.model.graphs import Net, Value


def attention_operator(net: Net, x: Value) -> Value:
    """Attention over axis 1 with projections, the heads split by the operator; fewer heads of keys, now and then."""
    length, size = x.shape[1:]
    heads, width, wide = net.of(2, 4), net.int(1, 3), net.int(1, 3)
    shared = net.of(heads, 2, 1)
    sizes = (heads * width, shared * width, shared * wide)
    inputs = [net.emit("MatMul", [x.name, net.weight(size, s)])[0] for s in sizes]
    inputs += _mask(net, length)
    (y,) = net.emit(
        "Attention", inputs, q_num_heads=heads, kv_num_heads=shared, is_causal=net.of(None, 1),
        scale=net.of(None, 0.3), softcap=net.of(None, 2.0),
    )  # fmt: skip
    (y,) = net.emit("MatMul", [y, net.weight(heads * wide, size)])
    return net.add("Add", [x.name, y], x.shape)


def attention_of_heads(net: Net, x: Value) -> Value:
    """Attention of four dimensions, the channels being heads, over an axis that is split already."""
    (keys,) = net.emit("MatMul", [x.name, net.weight(x.shape[3], x.shape[3])])
    inputs = [x.name, keys, net.of(keys, x.name), *_mask(net, x.shape[2])]
    return net.add("Attention", inputs, x.shape, is_causal=net.of(None, 1))


def _mask(net: Net, length: int) -> list[str]:
    """Nothing, numbers to add, or what may be seen; a row always sees itself."""
    seen = np.tril(np.ones((length, length), bool)) | (net.rng.uniform(size=(length, length)) > 0.5)
    kind = net.of("none", "added", "seen", "infinite")
    if kind == "none":
        return []
    if kind == "seen":
        return [net.param(seen, "mask")]
    if kind == "infinite":
        return [net.param(np.where(seen, 0, -np.inf).astype(np.float32), "mask")]
    return [net.param(net.rng.standard_normal((length, length)).astype(np.float32), "mask")]


def rotary(net: Net, x: Value) -> Value:
    """Rotary embedding of the last axis, or of the first part of it, at given positions."""
    heads = 1 if x.rank == 4 else net.of(*(h for h in (1, 2, 3, 4) if x.shape[2] % h == 0))
    length, size = x.shape[-2], x.shape[-1] // heads
    if size < 2 or size % 2:
        return x
    part = net.of(size, *range(2, size, 2)) if x.rank == 4 else size
    angles = net.rng.uniform(-3, 3, (length + 2, part // 2))
    tables = [net.param(np.float32(f(angles)), "angles") for f in (np.cos, np.sin)]
    at = net.rng.integers(0, length + 2, (x.shape[0], length))
    return net.add(
        "RotaryEmbedding", [x.name, *tables, net.param(at, "at")], x.shape, interleaved=net.of(None, 1),
        num_heads=heads if x.rank == 3 else None, rotary_embedding_dim=None if part == size else part,
    )  # fmt: skip


def rms_norm(net: Net, x: Value) -> Value:
    """Over the last axes, with a scale for each place."""
    axis = net.int(1, x.rank - 1)
    return net.add(
        "RMSNormalization", [x.name, net.vector(*x.shape[axis:])], x.shape, axis=net.of(axis, axis - x.rank),
        epsilon=net.of(None, 1e-3),
    )  # fmt: skip
