"""Scores that are taken once: under what they are kept, and what they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qpipe.errors import InputError
from qpipe.keys.hashing import digest
from qpipe.methods.mixing.judge import Judge
from qpipe.model import Model
from tests.model.nets import normal, parsed
from tests.model.quantized import quantized, scheme

X, LABELS = {"x": normal(40, 4)}, np.arange(40) % 3
MODEL = Model.from_proto(parsed("m (float[N,4] x) => (float[N,3] y) { y = MatMul(x, w) }", w=normal(4, 3)))
GRIDS = quantized(MODEL, X, scheme(weight=4)).encodings


class Memo:
    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}
        self.made: list[str] = []

    def __call__(self, name: str, fn: Callable[..., Any], *inputs: Any) -> Any:
        key = digest(name, list(inputs))
        if key not in self.kept:
            self.kept[key] = fn(*inputs)
            self.made.append(name)
        return self.kept[key]


def judge(memo: Memo, metric: str = "sqnr_db", model: Model = MODEL, **options: Any) -> Judge:
    return Judge(model, X, options.pop("labels", None), metric, memo, **options)


def test_the_score_is_that_of_the_outputs_in_onnxruntime_against_those_in_float() -> None:
    rounded, plain = (MODEL.with_encodings(e).session().run(None, X)[0].astype(np.float64) for e in (GRIDS, {}))
    wanted = 10 * np.log10((plain**2).sum() / ((rounded - plain) ** 2).sum())
    assert judge(Memo()).score(GRIDS) == pytest.approx(wanted, abs=1e-3)


def test_accuracy_is_judged_by_the_labels() -> None:
    rounded = MODEL.with_encodings(GRIDS).session().run(None, X)[0]
    found = judge(Memo(), "top1", labels=LABELS).score(GRIDS)
    assert found == pytest.approx(float((rounded.argmax(1) == LABELS).mean()))
    with pytest.raises(InputError, match="labels"):
        judge(Memo(), "top1")


def test_no_score_is_taken_twice_whoever_asks() -> None:
    memo = Memo()
    first = judge(memo).score(GRIDS)
    assert judge(memo).score(dict(GRIDS)) == first
    assert judge(memo, model=MODEL.with_encodings(GRIDS)).score(GRIDS) == first
    assert memo.made == ["score"]


def test_other_grids_models_metrics_batches_and_names_are_other_scores() -> None:
    memo = Memo()
    judge(memo).score(GRIDS)
    judge(memo).float_score()
    judge(memo).score({**GRIDS, "w": replace(GRIDS["w"], scale=2 * GRIDS["w"].scale)})
    judge(memo, model=MODEL.with_params({"w": 2 * MODEL.param("w")})).score(GRIDS)
    judge(memo, "mse").score(GRIDS)
    judge(memo, batch_size=7).score(GRIDS)
    judge(memo, name="other").score(GRIDS)
    assert len(memo.made) == 7


def test_of_a_function_the_outputs_are_kept_and_not_what_it_says() -> None:
    memo, said = Memo(), [0.25]
    own = judge(memo, "mine:score", function=lambda outputs, labels: said[-1])
    assert own.score(GRIDS) == 0.25
    said.append(0.75)
    assert own.score(GRIDS) == 0.75
    assert memo.made == ["outputs of score"]
