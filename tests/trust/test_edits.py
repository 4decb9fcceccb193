"""Edits that come at a bad moment: while a run goes on, within the resolution of a clock, behind a .pyc."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from tests.trust.lab import FORMULA, Lab, blobs, flip, half_written, outputs

OTHER = FORMULA.replace("+ 1", "+ 2")
"""A formula of the same size and another meaning."""

SLOW = {
    "a": {"uses": "lab_make", "value": 2.0, "pause_s": 0.8},
    "m": {"uses": "lab_mix", "parts": ["a"], "layers": 1},
    "s": {"uses": "lab_score", "part": "m"},
}
QUICK = {**SLOW, "a": {"uses": "lab_make", "value": 2.0}}


def wait_for(lab: Lab, call: str) -> None:
    deadline = time.monotonic() + 20
    while call not in lab.seen():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("workers", [0, 1])
def test_code_edited_before_a_stage_loads_it_is_not_cached_under_the_old_key(lab: Lab, workers: int) -> None:
    """The stage imports its formula when it runs, long after the plan was made."""
    source = lab.source.read_text().replace("import lab_formula\n", "")
    lab.source.write_text(source.replace("    row = sum(", "    import lab_formula\n    row = sum(").replace(
        "def layer(row, factor, i, pause_s):\n", "def layer(row, factor, i, pause_s):\n    import lab_formula\n"
    ))  # fmt: skip
    right = outputs(lab.finish(SLOW, cache=lab.folder / "other", workers=1))
    lab.calls()
    child = lab.begin(SLOW, workers=workers)
    wait_for(lab, "make-2.0")
    lab.lab_formula.write_text(OTHER)
    assert child.wait() == 1
    assert "lab_formula was edited meanwhile" in child.text()
    lab.lab_formula.write_text(FORMULA)
    assert outputs(lab.finish(SLOW)) == right


def test_code_edited_after_it_was_loaded_costs_nothing(lab: Lab) -> None:
    right = outputs(lab.finish(SLOW, cache=lab.folder / "other"))
    lab.calls()
    child = lab.begin(SLOW, workers=1)
    wait_for(lab, "make-2.0")
    lab.lab_formula.write_text(OTHER)
    assert child.wait() == 0
    lab.lab_formula.write_text(FORMULA)
    record = lab.finish(SLOW)
    assert record["totals"]["ran"] == 0
    assert outputs(record) == right


def test_an_input_edited_while_the_run_goes_on_is_not_cached_under_the_old_key(lab: Lab) -> None:
    number = lab.folder / "number.txt"
    number.write_text("5")
    pipeline = {"w": SLOW["a"], "r": {"uses": "toy_read", "path": "number.txt"}}
    right = outputs(lab.finish(pipeline, cache=lab.folder / "other"))
    lab.calls()
    child = lab.begin(pipeline, workers=1)
    wait_for(lab, "make-2.0")
    number.write_text("6")
    assert child.wait() == 1
    assert "stages.r.path (number.txt) was written to while the run went on" in child.text()
    number.write_text("5")
    assert outputs(lab.finish(pipeline)) == right


def test_an_input_written_anew_with_what_it_held_is_not_trusted_either(lab: Lab) -> None:
    """Whoever read it in between may have seen half of it."""
    number = lab.folder / "number.txt"
    number.write_text("5")
    pipeline = {"w": SLOW["a"], "r": {"uses": "toy_read", "path": "number.txt"}}
    child = lab.begin(pipeline, workers=1)
    wait_for(lab, "make-2.0")
    number.write_text("5")
    assert child.wait() == 1
    assert lab.begin(pipeline).wait() == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stale_pyc_is_not_what_runs(lab: Lab, workers: int) -> None:
    """Same size, same second: Python itself takes the bytecode of the source before."""
    lab.environment["PYTHONDONTWRITEBYTECODE"] = ""
    right = outputs(lab.finish(QUICK, workers=workers))
    at = os.stat(lab.lab_formula)
    python = [*lab.command()[:1], "-c", "import lab_formula"]
    subprocess.run(python, env=lab.environment, check=True)
    assert list(lab.folder.glob("plugin/__pycache__/lab_formula*.pyc"))
    lab.lab_formula.write_text(OTHER)
    os.utime(lab.lab_formula, ns=(at.st_atime_ns, at.st_mtime_ns))
    assert outputs(lab.finish(QUICK, workers=workers)) != right
    lab.lab_formula.write_text(FORMULA)
    os.utime(lab.lab_formula, ns=(at.st_atime_ns, at.st_mtime_ns))
    assert outputs(lab.finish(QUICK, workers=workers, cache=lab.folder / "fresh")) == right


def test_a_same_size_edit_in_the_same_instant_with_its_time_restored_is_seen(lab: Lab) -> None:
    number = lab.folder / "number.txt"
    number.write_text("5")
    os.utime(number, ns=(0, 10**18))
    pipeline = {"r": {"uses": "toy_read", "path": "number.txt"}}
    seen = []
    for text in ("5", "6", "7", "5"):
        number.write_text(text)
        os.utime(number, ns=(0, 10**18))
        seen.append(outputs(lab.finish(pipeline))["r"])
    assert seen[0] == seen[3]
    assert seen[1] != seen[0] != seen[2] != seen[1]
    assert lab.calls() == ["read"] * 3


@pytest.mark.parametrize("mtime_ns", [0, 10**9, 4 * 10**18], ids=["zero", "past", "future"])
def test_the_time_of_a_file_neither_makes_nor_breaks_a_hit(lab: Lab, mtime_ns: int) -> None:
    number = lab.folder / "number.txt"
    number.write_text("5")
    pipeline = {"r": {"uses": "toy_read", "path": "number.txt"}, "m": {"uses": "lab_make"}}
    lab.finish(pipeline)
    for path in (number, lab.source, lab.lab_formula):
        os.utime(path, ns=(mtime_ns, mtime_ns))
    lab.calls()
    lab.finish(pipeline)
    assert lab.calls() == []
    number.write_text("6")
    os.utime(number, ns=(mtime_ns, mtime_ns))
    lab.finish(pipeline)
    assert lab.calls() == ["read"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_module_of_the_same_name_in_the_working_directory_counts_where_it_runs(
    lab: Lab, workers: int
) -> None:
    right = outputs(lab.finish(QUICK, workers=workers))
    (lab.folder / "lab_formula.py").write_text(OTHER)
    shadowed = outputs(lab.finish(QUICK, workers=workers))
    assert shadowed["m"] != right["m"]
    (lab.folder / "lab_formula.py").unlink()
    assert outputs(lab.finish(QUICK, workers=workers)) == right


def test_many_damaged_blobs_heal_in_one_run(lab: Lab) -> None:
    sources = {f"a{i}": {"uses": "lab_make", "value": float(i), "rows": 4} for i in range(12)}
    whole = {**sources, "m": {"uses": "lab_mix", "parts": list(sources), "layers": 1}}
    right = outputs(lab.finish(whole, cache=lab.folder / "other"))
    lab.finish(sources)
    for path in blobs(lab.cache):
        flip(path)
    lab.calls()
    child = lab.begin(whole, folder="healed")
    assert child.wait() == 0, child.text()
    assert outputs(lab.record_of("healed")) == right
    assert lab.calls().count("mix-1.0") == 1
    assert half_written(lab.cache) == []
