"""The shapes of what onnxruntime's graph computes: as it computes them, and without holding the values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from qpipe.model.runtime.optimized import optimized, shapes
from tests.model.nets import normal, parsed


def test_shapes_are_those_of_the_values(tmp_path: Path) -> None:
    text = """m (float[N,3,8,8] x) => (float[A,B] y) {
        c = Conv<pads=[1,1,1,1]>(x, w)  s = SplitToSequence<axis=1>(c, two)  a = SequenceAt(s, zero)
        n = NonZero(a)  f = Cast<to=1>(n)  y = Transpose(f) }"""
    path = tmp_path / "model.onnx"
    given = {"w": normal(4, 3, 3, 3), "two": np.int64(2), "zero": np.int64(0)}
    onnx.save(parsed(text, **given), path)
    graph = optimized(path)
    feed = {"x": normal(2, 3, 8, 8)}
    found = shapes(graph, tmp_path, feed)
    (y,) = onnxruntime.InferenceSession(str(path)).run(None, feed)
    kept = {name for node in graph.graph.node if node.op_type != "SplitToSequence" for name in node.output}
    assert kept <= set(found)
    assert "s" not in found
    assert found["y"] == y.shape
    assert (2, 4, 8, 8) in found.values()
    assert (2, 2, 8, 8) in found.values()
