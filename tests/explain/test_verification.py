"""Recomputing what is cached: stages that repeat themselves, stages that do not, and what is said of each."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest

from qpipe.artifacts.kinds import Files, Samples, Scores, Statistics
from qpipe.cache.store import sealed
from qpipe.explain.artifacts import array_difference, first_difference
from qpipe.explain.verification import remove_rooms
from qpipe.model import Model
from tests.toy import Toy
from tests.whole.test_bad_inputs import net

NOISE = '''

import random
from qpipe.stage import Statistics

def draw(i):
    return random.SystemRandom().random()

@stage(version=1)
def noise(scores: Scores, *, how: str = "none", ctx: Context = NULL) -> Statistics:
    import numpy as np
    called("noise")
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    words = ["even"]
    if how == "time":
        words = [time.time()]
    if how == "random":
        values[1, 2] += random.SystemRandom().random() + 1
    if how == "seeded":  # the global state begins with the key
        values[1, 2] += random.random() + np.random.rand()
    if how == "memo":
        values[0, 0] = 100 * ctx.memo("draw", draw, 1)
    if how == "order":
        words = list({f"word {i}" for i in range(40)})
    if how == "threads":
        words = [ctx.threads, os.environ["OMP_NUM_THREADS"], ctx.device]
    if how == "late" and os.environ.get("LATE"):
        raise InputError("it is too late.")
    return Statistics({"fixed": np.ones(3), "values": values}, {"words": words})

@stage(version=1, always=True)
def outside(*, path: str) -> Scores:
    called("outside")
    return Scores({"score": float(Path(path).read_text()), "metric": "toy"})
'''


@pytest.fixture
def noisy(toy: Toy) -> Toy:
    """The toy plug-in with a stage that is as reproducible as it is told to be."""
    plug_in = toy.folder / "plugin" / "toy_stages.py"
    plug_in.write_text(plug_in.read_text() + NOISE)
    points = next((toy.folder / "registered").glob("*/entry_points.txt"))
    points.write_text(points.read_text() + "toy_noise = toy_stages:noise\ntoy_outside = toy_stages:outside\n")
    return toy


def pipeline(toy: Toy, *ways: str) -> None:
    noisy = {way: {"uses": "toy_noise", "scores": "a", "how": way} for way in ways}
    toy.pipeline({"a": {"uses": "toy_number"}, **noisy, "e": {"uses": "toy_add", "scores": "a"}})


def snapshot(folder: Path) -> dict[str, bytes]:
    found = {path: path.read_bytes() for part in ("blobs", "actions") for path in (folder / part).rglob("*/*")}
    return {str(path.relative_to(folder)): content for path, content in found.items()}


def test_what_repeats_itself_and_what_does_not(noisy: Toy) -> None:
    pipeline(noisy, "time", "random", "memo", "order", "seeded")
    assert noisy.run("run", "run.workers=1").returncode == 0
    noisy.calls()
    before = snapshot(noisy.folder / "cache")
    found = noisy.run("verify", "all", "--repeat", "2")
    assert found.returncode == 1, found.stderr
    text = found.stdout
    assert sorted(set(noisy.calls())) == ["add", "noise", "number"]
    for node, output in (("a", "scores"), ("e", "scores"), ("seeded", "statistics")):
        assert re.search(rf"^same +{node} +{output}", text, re.M), text
    assert re.search(r"^differs  time .*\n +statistics: words\[0\]: [\d.]+ -> [\d.]+, [\d.e+-]+ apart", text, re.M)
    assert re.search(
        r"array 'values': 1 of 12 values differ, first at \(1, 2\): 7\.\d+ -> 7\.\d+, at most [\d.e-]+ apart", text
    )
    assert re.search(r"^differs  memo .*\n +statistics: array 'values': 1 of 12 values differ, first", text, re.M)
    assert re.search(r'^differs  order .*\n +statistics: words\[\d+\]: "word', text, re.M)
    assert "the repeats differ from one another: the stage is not reproducible" in text
    assert "3 of 7 nodes reproducible: not " in text
    assert snapshot(noisy.folder / "cache") == before, "the cached results are as they were"
    assert not list((noisy.folder / "cache" / "tmp").glob("verify-*"))


def test_one_node_under_the_recorded_threads_and_one_that_fails(noisy: Toy) -> None:
    pipeline(noisy, "threads", "late")
    noisy.run("run", "run.workers=2", "run.threads=3")
    noisy.calls()
    found = noisy.run("verify", "threads", "--repeat=3", "run.threads=1")
    assert found.returncode == 0, found.stdout
    assert noisy.calls() == ["noise"] * 3
    assert "1 node, each computed 3 times" in found.stdout
    noisy.environment["LATE"] = "1"
    found = noisy.run("verify", "late", "--repeat", "1")
    assert found.returncode == 1
    assert re.search(r"^failed +late.*\n +it is too late.", found.stdout, re.M)


def test_a_source_is_held_against_what_it_brought_back_last(noisy: Toy) -> None:
    number = noisy.folder / "n.txt"
    number.write_text("1")
    stages = {"o": {"uses": "toy_outside", "path": str(number)}, "e": {"uses": "toy_add", "scores": "o"}}
    noisy.pipeline(stages)
    noisy.run("run", "run.workers=1")
    assert noisy.run("verify", "all", "--repeat", "1").returncode == 0
    number.write_text("2")
    found = noisy.run("verify", "all", "--repeat", "1")
    assert found.returncode == 1
    assert re.search(r"^differs +o .*\n +scores: score: 1.0 -> 2.0, 1 apart", found.stdout, re.M)
    assert re.search(r"^same +e ", found.stdout, re.M), "from the cached input it is the same"


def test_another_machine_is_told(noisy: Toy) -> None:
    pipeline(noisy, "time")
    noisy.run("run", "run.workers=1")
    for path in (noisy.folder / "cache" / "actions").rglob("*.json"):
        content = json.loads(path.read_bytes())
        content["result"]["provenance"]["instruction_set"] = "abacus"
        os.chmod(path, 0o644)
        path.write_bytes(sealed(path.stem, content["result"]))
    found = noisy.run("verify", "all", "--repeat", "1")
    assert "not as it was when the results were made: instruction set: abacus then," in found.stdout
    assert found.stdout.count("abacus") == 2, "with the node that differs, and at the end"


def test_mistakes_are_one_line(toy: Toy) -> None:
    toy.pipeline({"a": {"uses": "toy_number"}})
    for words, said in (
        (("verify", "a"), "verify: the result of a is not in the cache, so there is nothing to compare with."),
        (("verify", "b"), "verify: no node 'b'."),
        (("verify", "a", "--repeat", "0"), "--repeat: how often to compute each node, at least 1, got '0'."),
    ):
        run = toy.run(*words)
        assert run.returncode == 2
        assert len(run.stderr.splitlines()) == 1
        assert said in run.stderr


def test_only_rooms_that_nobody_uses_are_removed(tmp_path: Path) -> None:
    for name in ("verify-used", "verify-left", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    owner = os.open(tmp_path / "verify-used", os.O_RDONLY)
    fcntl.flock(owner, fcntl.LOCK_EX)
    remove_rooms(tmp_path)
    os.close(owner)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "verify-used"]


def test_bits_decide_where_two_arrays_differ() -> None:
    a = np.array([0.0, math.nan, 1.0], np.float32)
    assert array_difference(a, a.copy()) == ""
    assert array_difference(a, np.array([-0.0, math.nan, 1.0], np.float32)) == (
        "1 of 3 values differ, first at 0: 0.0 -> -0.0, at most 0 apart"
    )
    b = np.array([0.0, 2.0, 1.5], np.float32)
    assert array_difference(a, b) == "2 of 3 values differ, first at 1: nan -> 2.0, at most 0.5 apart"
    assert array_difference(a, a.astype(np.float64)) == "float32 (3,) -> float64 (3,)"
    assert array_difference(np.array(["ab"]), np.array(["ac"])) == "1 of 1 values differ, first at 0: ab -> ac"
    assert array_difference(np.array(3), np.array(4)) == "1 of 1 values differ, first: 3 -> 4, at most 1 apart"


def test_every_kind_says_where_it_differs(tmp_path: Path) -> None:
    one = np.ones((2, 2), np.float32)
    assert first_difference(Scores({"a": {"b": [1, 2.5]}}), Scores({"a": {"b": [1, 3.0]}})) == (
        "a.b[1]: 2.5 -> 3.0, 0.5 apart"
    )
    assert first_difference(Samples({"x": one}, np.array([0, 1])), Samples({"x": one}, np.array([0, 2]))) == (
        "array 'labels': 1 of 2 values differ, first at 1: 1 -> 2, at most 1 apart"
    )
    assert first_difference(Statistics({"m": one}, {"n": 1}), Statistics({"m": one}, {"n": 2})) == (
        "n: 1 -> 2, 1 apart"
    )
    assert first_difference(Files({"f": b"abc"}), Files({"f": b"abd!"})) == (
        "file 'f': 3 -> 4 bytes, first different byte at 2"
    )
    assert first_difference(Files({"f": b"a"}), Files({"g": b"a"})) == "file 'f' is there before only"
    net(tmp_path / "net.onnx")
    model = Model.load(tmp_path / "net.onnx")
    name = next(name for name, value in model.params.items() if value.ndim == 4)
    changed = model.param(name).copy()
    changed.flat[5] += 0.25
    assert re.match(
        rf"tensor '{re.escape(name)}': 1 of [\d,]+ values differ, first at \(.*\): .*, at most 0.25 apart",
        first_difference(model, model.with_params({name: changed})),
    )
