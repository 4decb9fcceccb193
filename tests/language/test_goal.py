"""What cannot be judged is refused before anything runs; no goal is a goal, too."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from qpipe.errors import ConfigError
from qpipe.keys.syntax import bound_names
from qpipe.language.graph import build_graph
from qpipe.numerics.metric_names import least_score
from qpipe.report.facts import goal_sentence
from tests.inprocess import carry_out, job
from tests.language.test_labels import composing, spec_of
from tests.nursery import Nursery
from tests.toy import Toy

__all__ = ["composing"]  # a fixture that spec_of needs


def test_a_drop_that_is_no_number_is_refused_and_null_is_no_goal() -> None:
    for pipeline, address in (("ptq", "goal.max_drop"), ("autoquant", "stages.best.max_drop")):
        with pytest.raises(ConfigError, match=f"^{address}: expected a number, got nan."):
            spec_of(f"pipeline={pipeline}", f"{address}=nan")
    spec = spec_of("pipeline=ptq", "goal.max_drop=null")
    assert spec.goal.max_drop is None
    with pytest.raises(ConfigError, match=r"^stages.amp: set max_drop, min_score or budget"):
        spec_of("pipeline=autoquant", "goal.max_drop=null")


def test_a_score_may_be_asked_for_itself_and_in_decibels_it_is() -> None:
    """A drop from float says nothing where float counts as 300 dB."""
    assert least_score("top1", 0.9, 0.01, None) == pytest.approx(0.89)
    assert least_score("sqnr_db", 300.0, 0.01, None) == 30
    assert least_score("sqnr_db", 300.0, 0.01, 35.0) == least_score("cosine", 1.0, None, 35.0) == 35
    assert least_score("sqnr_db", 300.0, None, None) is None
    spec = spec_of("pipeline=autoquant", "goal.metric=sqnr_db", "goal.min_score=35")
    assert (spec.goal.absolute, spec.nodes["best"].min_score) == (35, 35)
    assert spec_of("pipeline=ptq").goal.absolute is None
    with pytest.raises(ConfigError, match=r"^goal\.min_score: expected a number, got nan"):
        spec_of("pipeline=ptq", "goal.min_score=nan")


@pytest.fixture
def samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    images = np.zeros((4, 3, 32, 32), np.float32)
    np.savez("without.npz", image=images)
    np.savez("with.npz", image=images, labels=np.zeros(4, np.int64))
    (tmp_path / "no.npz").write_text("no zip file")
    for place in ("flat", "by_class/cat"):
        (tmp_path / place).mkdir(parents=True)
    return tmp_path


DATA = {
    "npz without": (["data=npz", "data.calibration=without.npz", "data.evaluation=without.npz"], False),
    "npz with": (["data=npz", "data.calibration=without.npz", "data.evaluation=with.npz"], True),
    "no npz": (["data=npz", "data.calibration=no.npz", "data.evaluation=no.npz"], True),  # told by who loads it
    "no file": (["data=npz", "data.calibration=x.npz", "data.evaluation=x.npz"], True),
    "images": (["data=images", "data.calibration=flat", "data.evaluation=flat"], False),
    "images by class": (["data=images", "data.calibration=flat", "data.evaluation=by_class"], True),
    "images with a CSV": (
        ["data=images", "data.calibration=flat", "data.evaluation=flat", "data.evaluation_labels=a.csv"], True,
    ),
    "a function": (["data=demo"], True),
}  # fmt: skip


@pytest.mark.parametrize("data", DATA)
def test_labels_that_are_surely_missing_are_told_before_anything_runs(samples: Path, data: str) -> None:
    overrides, there = DATA[data]
    for metric in ("top1", "top5"):
        spec = spec_of("pipeline=ptq", f"goal.metric={metric}", *overrides)
        if there:
            build_graph(spec)
        else:
            with pytest.raises(ConfigError, match=f"^stages.score_float: The metric '{metric}' needs labels, and "):
                build_graph(spec)
    build_graph(spec_of("pipeline=ptq", "goal.metric=cosine", *overrides))
    with pytest.raises(ConfigError, match=r"^stages.score: The metric 'mse' compares with the float model"):
        build_graph(spec_of("pipeline=ptq", "goal.metric=mse", "stages.score.float_model=null", *overrides))


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("top2", "expected one of 'top1'"),
        ("own:scor", "module 'own' has no 'scor'. Did you mean 'score'?"),
        ("gone:score", "no module 'gone' was found"),
    ],
)
def test_a_metric_that_there_is_not_is_refused_before_anything_runs(
    tmp_path: Path, nursery: Nursery, metric: str, said: str
) -> None:
    (tmp_path / "own.py").write_text("def score(outputs, labels):\n    return 1.0\n")
    words = ["pipeline=ptq", f"goal.metric={metric}"]
    for command in ("plan", "run"):
        done = nursery.run(tmp_path, [command, *words], os.environ | {"QPIPE_CACHE_DIR": str(tmp_path / "cache")})
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert done.stderr.startswith("qpipe: stages.score_float.metric: ")
        assert said in done.stderr
    assert not (tmp_path / "cache" / "actions").exists()
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("source", "bound"),
    [
        ("def a(): b = 1\nclass C:\n  def d(self): ...\n", {"a", "C"}),
        ("import a.b, c as d\nfrom e import f as g, h\n", {"a", "d", "g", "h"}),
        ("try:\n  from a import b\nexcept ImportError:\n  b, c = None, 1\nelse:\n  def d(): ...\n", {"b", "c", "d"}),
        ("if x:\n  y = lambda: z\nfor i in (): ...\nwith o as p: ...\n", {"x", "y", "z", "i", "o", "p"}),
        ("from a import *\n", None),
        ("def __getattr__(name): ...\n", None),
        ("globals()['a'] = 1\n", None),
        ("import sys\nsys.modules[__name__].a = 1\n", None),
        ("import sys\ndef f():\n  global a\n  a = sys\n", {"sys", "f", "a"}),
        ("def (:\n", None),
    ],
)
def test_what_a_module_binds_is_read_off_its_source(source: str, bound: set[str] | None) -> None:
    found = bound_names(source.encode())
    assert found is None if bound is None else bound <= (found or set())
    assert found is None or not {"nothing", "d" if bound == {"a", "C"} else "nothing"} & found


def test_without_a_goal_all_candidates_run_and_the_best_is_taken(toy_stages: Toy, tmp_path: Path) -> None:
    stages = {
        "f": {"uses": "toy_number", "value": 10},
        "low": {"uses": "toy_number", "value": 9},
        "high": {"uses": "toy_number", "value": 12},
        "best": {
            "uses": "first_within", "reference": "f", "max_drop": None,
            "candidates": [{"model": "m", "scores": "low"}, {"model": "m", "scores": "high"}],
        },
        "m": {"uses": "load_model", "path": str(Path(__file__).parents[2] / "qpipe/demo/mobilenet.onnx"), "data": None},
    }  # fmt: skip
    goal = {"metric": "toy", "max_drop": None, "reference": "f", "scores": "best.scores"}
    status, watch = carry_out(job(tmp_path, stages, goal=goal))
    (record,) = watch.records
    assert status == 0
    assert record["goal"]["met"] is None
    assert record["goal"]["reached"] == 12
    assert record["nodes"]["best"]["reasons"] == ["there is no goal; m is the best"]


@pytest.mark.parametrize(("deployed", "status", "met"), [(9.5, 0, True), (8.5, 3, False), (None, 0, True)])
def test_what_ships_has_to_be_within_the_goal(
    toy_stages: Toy, tmp_path: Path, deployed: float | None, status: int, met: bool
) -> None:
    stages = {"f": {"uses": "toy_number", "value": 10}, "simulated": {"uses": "toy_number", "value": 9.75}}
    if deployed is not None:
        stages["ships"] = {"uses": "toy_number", "value": deployed}
    goal = {"metric": "toy", "max_drop": 1, "reference": "f", "scores": "simulated"}
    goal |= {"deployed": "ships"} if deployed is not None else {}
    found, watch = carry_out(job(tmp_path, stages, goal=goal))
    (record,) = watch.records
    assert (found, record["goal"]["met"], record["goal"]["deployed"]) == (status, met, deployed)
    said = goal_sentence(record)
    assert said is not None
    if not met:
        assert said.startswith("goal missed by 0.5000 in onnxruntime: toy 8.5000 there; simulated, toy 9.7500 with")
