"""Peak memory is that of a process that opens the file and runs it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest

from qpipe.deployed.memory import peak_bytes

MB = 1 << 20


def file(folder: Path, features: int) -> Path:
    """x [1, 64] times a matrix of `features` columns; its feed beside it."""
    graph = f"main (float[1, 64] x) => (float[1, {features}] y) {{ y = MatMul(x, w) }}"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]>\n{graph}')
    weight = np.random.default_rng(0).standard_normal((64, features)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(model, folder / f"{features}.onnx")
    np.savez(folder / "feed.npz", x=np.ones((1, 64), np.float32))
    return folder / f"{features}.onnx"


def test_a_weight_of_64_mb_takes_at_least_that(tmp_path: Path) -> None:
    small, large = (peak_bytes(file(tmp_path, n), tmp_path / "feed.npz", 1, ()) for n in (64, 64 * MB // 256))
    assert small < 48 * MB  # onnxruntime's own, without Python and the libraries
    assert 64 * MB < large - small < 4 * 64 * MB  # the file as it is read, the weight, and the weight as it is packed


def test_a_file_that_does_not_open_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "none.onnx").write_bytes(b"no model")
    with pytest.raises(OSError, match=r"a process that opens none\.onnx ended with status 1"):
        peak_bytes(tmp_path / "none.onnx", tmp_path / "feed.npz", 1, ())
