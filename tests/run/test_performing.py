"""An action as a worker performs it: what the stage's function is handed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qpipe.artifacts.artifact import Artifact, load, save
from qpipe.cache.store import Store
from qpipe.language.catalog import catalog
from qpipe.model import Model
from qpipe.run.performing import perform
from tests.model.nets import parsed

NET = "n (float[N,2] x) => (float[N,3] y) { y = MatMul(x, w) }"


@pytest.mark.usefixtures("toy_stages")
def test_a_stage_is_handed_a_model_or_a_network_as_it_asks(tmp_path: Path) -> None:
    model = Model.from_proto(parsed(NET, w=np.ones((2, 3), np.float32)))
    store = Store(tmp_path)
    kept = save(model, store)
    assert type(load(kept, store)).__name__ == "Network"
    artifact = [kept.kind, kept.digest, kept.size_bytes]
    stage = catalog()["toy_handed"]
    request = {
        "node": "n",
        "stage": "toy_handed",
        "key": "0" * 64,
        "ingredients": {
            "format": 1, "stage": stage.name, "version": 1, "function": stage.origin, "code": "", "libraries": {},
            "params": {},
        },
        "written": {},
        "inputs": {"model": [artifact], "networks": [artifact, artifact]},
        "device": "cpu",
    }  # fmt: skip
    result = perform(request, store, lambda _: None, 1)
    scores = load(Artifact(**result["outputs"]["scores"]), store).values
    assert scores["types"] == ["Model", "Network", "Network"]
    assert scores["score"] == 1.0
