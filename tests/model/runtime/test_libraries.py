"""Operators of a library of somebody else's: onnxruntime-extensions, in the simulation, in sessions, in files."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from qpipe.errors import InputError
from qpipe.methods.comparison.check import verify_import
from qpipe.methods.comparison.parity import parity
from qpipe.methods.mixing.fingerprint import float_fingerprint
from qpipe.model import Model
from qpipe.model.network.facts import Library
from qpipe.model.network.network import Network
from qpipe.model.runtime.options import libraries, session_options
from qpipe.model.simulation.run import run
from qpipe.param import LIBRARIES
from tests.model.nets import normal, parsed
from tests.model.quantized import quantized


def library() -> Path:
    """The file, without an import: where Python has it loaded, a copy of it ends the process."""
    spec = importlib.util.find_spec("onnxruntime_extensions")
    assert spec is not None
    assert spec.origin is not None
    return next(file for file in Path(spec.origin).parent.glob("_extensions_pydll.*") if file.suffix != ".pyi")


LIBRARY = library()


def proto() -> onnx.ModelProto:
    """A Conv, the negative and the positive part of what it gives, and a Conv on the difference of the two."""
    text = """m (float[N,3,8,8] x) => (float[N,4,8,8] y) {
        a = Conv<pads=[1,1,1,1]>(x, w1)  neg, pos = ai.onnx.contrib.NegPos(a)  d = Sub(pos, neg)
        c = Conv<pads=[1,1,1,1]>(d, w2)  y = Relu(c) }"""
    made = parsed(text, w1=normal(6, 3, 3, 3), w2=normal(4, 6, 3, 3, seed=1))
    made.opset_import.add(domain="ai.onnx.contrib", version=1)
    return made


X = normal(8, 3, 8, 8, seed=2)


@pytest.fixture
def model() -> Model:
    return Model.from_proto(proto(), [LIBRARY])


def expected(x: np.ndarray) -> np.ndarray:
    """The model in torch alone: positive minus negative part is the absolute value."""
    weights = {name: torch.tensor(Model.from_proto(proto(), [LIBRARY]).param(name)) for name in ("w1", "w2")}
    absolute = torch.conv2d(torch.tensor(x), weights["w1"], padding=1).abs()
    return np.asarray(torch.conv2d(absolute, weights["w2"], padding=1).relu().numpy())


def test_such_a_model_computes_what_its_operators_do(model: Model) -> None:
    assert verify_import(model, proto().SerializeToString()).equal
    wanted = expected(X)
    np.testing.assert_allclose(model.to_torch()(torch.tensor(X)).numpy(), wanted, rtol=1e-4, atol=1e-4)
    for backend in ("simulation", "onnxruntime"):
        np.testing.assert_allclose(run(model, {"x": X}, backend=backend)["y"], wanted, rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]


def test_layers_around_are_quantized_and_deployed_as_simulated(model: Model) -> None:
    grids = quantized(model, {"x": X})
    assert {"x", "w1", "a", "d", "w2", "y"} <= set(grids.encodings)
    report = parity(grids, {"x": X})
    assert report.agree
    assert report.samples == len(X)


def test_what_is_derived_from_a_model_needs_the_library_too(model: Model) -> None:
    sha256 = libraries([LIBRARY])
    for each in (model.edit().model(), model.with_encodings({}), model.block(["a"], ["d"])):
        assert each.facts.custom_ops == sha256
    (part,) = (each for each in model.to_torch().modules() if type(each).__name__ == "RuntimePart")
    values = torch.tensor(normal(2, 6, 8, 8))
    for again in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        for ours, theirs in zip(again(values), part(values), strict=True):
            assert torch.equal(ours, theirs)


def test_a_packed_model_says_which_library_it_needs_and_not_where_it_lies(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "under another name"
    shutil.copyfile(LIBRARY, moved)
    meta, blobs = model.pack()
    assert (meta, blobs) == Model.from_proto(proto(), [moved]).pack()
    assert "tmp" not in str(meta)
    found = Network.unpack(meta, lambda name: memoryview(blobs[name]))
    assert found.facts.custom_ops == model.facts.custom_ops
    assert found.facts.custom_ops[0].path is None
    monkeypatch.setenv(LIBRARIES, f"{tmp_path / 'none'}\n{moved}")
    np.testing.assert_allclose(run(found, {"x": X})["y"], expected(X), rtol=1e-4, atol=1e-4)
    monkeypatch.delenv(LIBRARIES)
    with pytest.raises(InputError, match=r"a library .* not at hand \(SHA-256 \w{16}…\)\. Name its file in model"):
        run(found, {"x": X})


def test_another_library_is_another_model(model: Model, tmp_path: Path) -> None:
    other = tmp_path / "other.so"
    other.write_bytes(LIBRARY.read_bytes() + b"\0")
    edited = Model.from_proto(proto(), [other])
    assert edited.pack()[0] != model.pack()[0]
    assert float_fingerprint(edited, {"x": X}) != float_fingerprint(model, {"x": X})
    other.write_bytes(b"something else")
    with pytest.raises(InputError, match=r"other\.so is gone or has other bytes"):
        edited.to_torch()


def test_without_the_library_the_refusal_says_what_to_do() -> None:
    with pytest.raises(InputError, match=r"'neg' \(op NegPos, .*, name that in model\.custom_ops=\[FILE\]\.$"):
        Model.from_proto(proto())


def test_an_operator_that_onnxruntime_should_know_is_in_no_library() -> None:
    made = parsed("m (float[N,4] x) => (float[N,4] y) { y = com.microsoft.Nope(x) }")
    made.opset_import.add(domain="com.microsoft", version=1)
    with pytest.raises(InputError) as refused:
        Model.from_proto(made)
    assert "custom_ops" not in str(refused.value)


def test_what_is_no_library_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(InputError, match=r"^onnxruntime cannot take .*text\.so as a library of custom operators: .+$"):
        session_options(custom_ops=libraries([tmp_path / "text.so"]))
    with pytest.raises(InputError, match=r"^There is no library of custom operators .*gone\.so\. Give the path"):
        libraries([tmp_path / "gone.so"])


def test_a_library_that_is_named_twice_is_registered_once(tmp_path: Path) -> None:
    shutil.copyfile(LIBRARY, tmp_path / "copy.so")
    assert [type(each) for each in libraries([LIBRARY, tmp_path / "copy.so"])] == [Library]


def test_the_exported_file_opens_with_the_library(model: Model, tmp_path: Path) -> None:
    path = quantized(model, {"x": X}).save(tmp_path)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(LIBRARY))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": X})
    wanted = expected(X)
    assert np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()
