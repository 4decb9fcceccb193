"""Packed models: equal content gives equal bytes, and nothing is lost on the way."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import onnx
import pytest

from qpipe.errors import InputError
from qpipe.model import Model
from qpipe.numerics.grid import Encoding, same_grid
from tests.model.nets import normal, parsed

SCRIPT = """
import hashlib, json
import numpy as np
from qpipe.model import Model
from qpipe.numerics.grid import Encoding
from tests.model.nets import normal, parsed
from tests.model.network.test_packing import TEXT, tensors
model = Model.from_proto(parsed(TEXT, opset=17, **tensors()))
grid = Encoding(8, True, True, np.float32(0.5), np.int32(0))
model = model.with_encodings(dict.fromkeys(("w", "x", "c"), grid))
meta, blobs = model.with_metadata({"b": 1, "a": {"d": 2, "c": 3}}).pack()
h = hashlib.sha256(json.dumps(meta).encode())
for name, blob in blobs.items():
    h.update(name.encode()); h.update(blob)
print(h.hexdigest())
"""
TEXT = """net (float[N,3,8,8] x) => (float[N,16,8,8] y) {
    c = Conv<pads=[1,1,1,1]>(x, w, b)  k = Constant<value_float=2.0>()  i = Identity(c)  y = Mul(i, k) }"""


def tensors() -> dict[str, np.ndarray]:
    return {"w": normal(16, 3, 3, 3), "b": normal(16), "unused": normal(4)}


def blobs_of(model: Model) -> dict[str, bytes]:
    return {name: bytes(blob) for name, blob in model.pack()[1].items()}


@pytest.fixture
def model() -> Model:
    return Model.from_proto(parsed(TEXT, opset=17, **tensors()))


def test_big_tensors_have_blobs_of_their_own(model: Model) -> None:
    blobs = blobs_of(model)
    assert set(blobs) == {"graph", "tensor/w"}
    assert blobs["tensor/w"] == model.param("w").tobytes()
    graph = onnx.ModelProto.FromString(blobs["graph"])
    where = {t.name: [(e.key, e.value) for e in t.external_data] for t in graph.graph.initializer}
    assert ("location", "w") in where["w"]
    assert where["b"] == []


def test_unpacking_gives_the_model_back(model: Model) -> None:
    scale = np.arange(1, 17, dtype=np.float32)
    per_channel = Encoding(4, True, True, scale, np.zeros(16, np.int32), axis=0, frozen=True)
    packed = model.with_encodings({"w": per_channel}).with_metadata({"note": "é"})
    meta, blobs = packed.pack()
    again = Model.unpack(meta, lambda name: memoryview(blobs[name]))
    assert blobs_of(again) == blobs_of(packed)
    assert again.metadata == {"note": "é"}
    assert same_grid(again.encodings["w"], per_channel)
    assert again.encodings["w"].frozen
    x = normal(2, 3, 8, 8)
    outputs = [m.session(quantized=False).run(None, {"x": x})[0] for m in (packed, again)]
    assert np.array_equal(*outputs)


def test_bytes_are_the_same_in_any_process(model: Model) -> None:
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("0", "77")
    ]
    digests = {run.communicate()[0].strip() for run in runs}
    assert all(run.returncode == 0 for run in runs)
    assert len(digests) == 1


def test_bytes_do_not_depend_on_how_the_file_was_written() -> None:
    plain = parsed(TEXT, opset=17, **tensors())
    other = parsed(TEXT, opset=17)
    for name, array in reversed(tensors().items()):
        other.graph.initializer.append(
            onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, array.shape, array.ravel().tolist())
        )
    other.producer_name, other.doc_string, other.graph.name = "someone", "today", "elsewhere"
    other.metadata_props.add(key="path", value="/home/someone")
    other.graph.node[0].doc_string = "a comment"
    assert blobs_of(Model.from_proto(plain)) == blobs_of(Model.from_proto(other))


def test_an_edit_and_its_undoing_give_the_same_bytes(model: Model) -> None:
    w = model.param("w")
    back = model.with_params({"w": w * 2}).with_params({"w": w})
    assert blobs_of(back) == blobs_of(model)
    assert blobs_of(model.with_params({"w": w * 2})) != blobs_of(model)


def test_another_format_is_refused(model: Model) -> None:
    meta, blobs = model.pack()
    with pytest.raises(InputError, match="format 9"):
        Model.unpack({**meta, "format": 9}, lambda name: memoryview(blobs[name]))
