"""What a key could fail to see: names made as a stage runs, functions handed on, sub-results of the same name."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.trust.lab import Lab, outputs

HEAD = """
from __future__ import annotations
import functools, importlib, os
import numpy as np
from qpipe.stage import NULL, Context, Scores, stage
from lab_stages import called
"""


def plug_in(lab: Lab, **files: str) -> None:
    """Modules beside those of the lab; every stage `own_NAME` of `lab_own` is one of the catalog."""
    for name, text in files.items():
        lab.source.with_name(f"{name}.py").write_text((HEAD if name == "lab_own" else "") + text)


def register(lab: Lab, **stages: str) -> None:
    points = lab.folder / "registered" / "toy-1.0.dist-info" / "entry_points.txt"
    points.write_text(points.read_text() + "".join(f"{name} = {value}\n" for name, value in stages.items()))


BY_PARAM = """
@stage(version=1)
def own(*, module: str) -> Scores:
    called("own")
    return Scores({"score": importlib.import_module(module).NUMBER, "metric": "toy"})
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_a_module_whose_name_comes_with_a_param_counts_all_the_same(lab: Lab, workers: int) -> None:
    """No source names it; that it was loaded is seen."""
    plug_in(
        lab,
        lab_own=BY_PARAM,
        lab_hidden="import lab_deeper\nNUMBER = lab_deeper.NUMBER",
        lab_deeper="NUMBER = 1",
    )
    register(lab, own="lab_own:own")
    stages = {"o": {"uses": "own", "module": "lab_hidden"}, "s": {"uses": "toy_sign", "scores": "o"}}
    first = outputs(lab.finish(stages, workers=workers))
    assert outputs(lab.finish(stages, workers=workers)) == first
    assert lab.calls() == ["own", "sign"]
    plug_in(lab, lab_deeper="NUMBER = 2  # another")
    record = lab.finish(stages, workers=workers)
    assert outputs(record)["o"] != first["o"]
    assert record["nodes"]["o"]["reasons"] == [
        "code changed: module lab_deeper, which it loaded by a name made as it ran"
    ]
    assert lab.calls() == ["own", "sign"]
    assert outputs(lab.finish(stages, workers=workers)) == outputs(record)
    plug_in(lab, lab_deeper="NUMBER = 1")
    assert outputs(lab.finish(stages, workers=workers)) == first
    assert lab.calls() == ["own"], "sign has seen both"


def test_a_sub_result_that_loaded_what_its_key_does_not_hold_is_not_kept(lab: Lab) -> None:
    plug_in(lab, lab_hidden="NUMBER = 1", lab_own="""
def number(module):
    called("number")
    return importlib.import_module(module).NUMBER

@stage(version=1)
def own(*, module: str, fail: bool = False, ctx: Context = NULL) -> Scores:
    found = ctx.memo("number", number, module)
    if fail:
        raise RuntimeError("half-way")
    return Scores({"score": found, "metric": "toy"})
""")  # fmt: skip
    register(lab, own="lab_own:own")
    stages = {"o": {"uses": "own", "module": "lab_hidden"}}
    assert lab.begin({"o": {**stages["o"], "fail": True}}).wait() == 1
    plug_in(lab, lab_hidden="NUMBER = 2  # another")
    record = lab.finish(stages)
    assert lab.calls() == ["number", "number"]
    assert outputs(record) == outputs(lab.finish(stages, cache=lab.folder / "other"))


def test_a_decorator_of_a_third_module_counts(lab: Lab) -> None:
    """functools.wraps says that the function comes from where the inner one was written."""
    plug_in(
        lab,
        lab_inner="from qpipe.stage import Scores\n"
        "def own(*, value: float = 1.0) -> Scores:\n    return Scores({'score': value, 'metric': 'toy'})\n",
        lab_wrap="import functools\nfrom qpipe.stage import Scores\nFACTOR = 1\n"
        "def wrap(fn):\n    @functools.wraps(fn)\n    def other(**given):\n"
        "        score = FACTOR * fn(**given).values['score']\n"
        "        return Scores({'score': score, 'metric': 'toy'})\n    return other\n",
        lab_own="from lab_wrap import wrap\nfrom lab_inner import own\nown = stage(version=1)(wrap(own))\n",
    )
    register(lab, own="lab_own:own")
    first = outputs(lab.finish({"o": {"uses": "own"}}))
    wrap = lab.source.with_name("lab_wrap.py")
    wrap.write_text(wrap.read_text().replace("FACTOR = 1", "FACTOR = 2"))
    assert outputs(lab.finish({"o": {"uses": "own"}})) != first


def test_functions_made_by_one_function_are_told_apart_by_their_names(lab: Lab) -> None:
    plug_in(lab, lab_own="""
def made(factor):
    @stage(version=1)
    def own(*, value: float = 1.0) -> Scores:
        return Scores({"score": factor * value, "metric": "toy"})
    return own

single, double = made(1), made(2)
""")  # fmt: skip
    register(lab, own="lab_own:single")
    first = outputs(lab.finish({"o": {"uses": "own"}}))
    points = lab.folder / "registered" / "toy-1.0.dist-info" / "entry_points.txt"
    points.write_text(points.read_text().replace("lab_own:single", "lab_own:double"))
    assert outputs(lab.finish({"o": {"uses": "own"}})) != first


def test_two_plug_ins_with_one_name_are_refused(lab: Lab) -> None:
    info = lab.folder / "registered" / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[qpipe.stages]\ntoy_sign = other_stages:sign\n")
    child = lab.begin({"a": {"uses": "lab_make"}})
    assert child.wait() == 2
    assert "two plug-ins bring 'toy_sign'" in child.text()
    assert "toy_stages:sign" in child.text()


MEMO = """
def one(x):
    called("one")
    return {"kept": x, "pair": (1, 2), "array": np.ones(2), "by": {3: "three"}}

def two(x):
    called("two")
    return {"kept": -x, "pair": [1, 2], "array": np.ones(2)}

@stage(version=1)
def own(*, fail: bool = False, how: str = "names", ctx: Context = NULL) -> Scores:
    first = ctx.memo("part", one, 1)
    if how == "names":
        second = ctx.memo("part", two, 1)
    else:
        second = [ctx.memo("part", fn, 1) for fn in (lambda x: x, lambda x: -x)]
    if fail:
        raise RuntimeError("half-way")
    seen = [type(first["pair"]).__name__]
    seen += [[type(name).__name__ for name in first["by"]], bool(first["array"].flags.writeable)]
    return Scores({"score": float(first["kept"] - second["kept"]), "metric": "toy", "seen": seen})
"""


def test_two_functions_under_one_name_are_two_sub_results(lab: Lab) -> None:
    plug_in(lab, lab_own=MEMO)
    register(lab, own="lab_own:own")
    child = lab.begin({"o": {"uses": "own", "how": "lambdas"}})
    assert child.wait() == 1
    assert "two functions share the name 'part'" in child.text()
    lab.calls()
    assert scores(lab, lab.finish({"o": {"uses": "own"}}))["score"] == 2.0
    assert lab.calls() == ["two"]


def test_a_sub_result_is_the_same_made_and_found(lab: Lab) -> None:
    """Tuples, names that are no text, arrays that can be written to: what is not kept is not given out either."""
    plug_in(lab, lab_own=MEMO)
    register(lab, own="lab_own:own")
    fresh = outputs(lab.finish({"o": {"uses": "own"}}))
    assert lab.begin({"o": {"uses": "own", "fail": True}}, cache=lab.folder / "other").wait() == 1
    assert outputs(lab.finish({"o": {"uses": "own"}}, cache=lab.folder / "other")) == fresh


def scores(lab: Lab, record: dict[str, Any]) -> dict[str, Any]:
    from qpipe.artifacts.artifact import Artifact, load
    from qpipe.cache.store import Store

    found = record["nodes"]["o"]["outputs"]["scores"]
    return dict(load(Artifact(**found), Store(lab.cache, readonly=True)).values)


def test_what_a_user_edits_under_a_factory_by_name_counts(lab: Lab) -> None:
    """A factory of factories: the name stands in a file that is no code."""
    (lab.folder / "mine.py").write_text(
        "import importlib, pathlib\n"
        "def load():\n    return importlib.import_module(pathlib.Path('which.txt').read_text()).number()\n"
    )
    (lab.folder / "which.txt").write_text("mine_helper")
    (lab.folder / "mine_helper.py").write_text("def number():\n    return 1\n")
    stages = {"f": {"uses": "lab_factory", "function": "mine:load"}}
    first = outputs(lab.finish(stages, workers=1))
    (lab.folder / "mine_helper.py").write_text("def number():\n    return 2\n")
    assert outputs(lab.finish(stages, workers=1)) != first


def test_a_folder_whose_names_are_no_text_counts_like_any_other(lab: Lab) -> None:
    folder = lab.folder / "folder"
    folder.mkdir()
    name = os.path.join(os.fsencode(folder), b"\xff\xfe\nx")
    lab.pipeline({"d": {"uses": "lab_folder", "path": "folder"}})
    for content, ran in ((b"1", 1), (b"1", 0), (b"2", 1)):
        with open(name, "wb") as file:
            file.write(content)
        os.utime(folder, (0, 0))
        child = lab.words("run", "run.workers=0")
        assert child.wait() == 0, child.text()
        assert lab.record()["totals"]["ran"] == ran
    child = lab.words("why", "d", "--against", "last~2")
    assert child.wait() == 0, child.text()
    assert "damaged" not in child.text()
    assert "its content changed: file" in child.text()
