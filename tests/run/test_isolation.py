"""What an action leaves behind in its process does not reach the next one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from qpipe.artifacts.artifact import Artifact, load
from qpipe.cache.store import Store
from qpipe.run.isolation import Isolation
from tests.toy import Toy

DEED = '''
import os, random, signal, sys, threading, time
import numpy as np

COUNTED: list[int] = []

class Table:
    rows: dict[str, int] = {}

def collect(item, into=[]):
    into.append(item)
    return list(into)

def nothing(): ...
def cwd(): os.chdir(os.path.join(os.path.dirname(__file__), os.pardir, "elsewhere"))
def path(): sys.path.insert(0, "/left_behind")
def whole_path(): sys.path = ["/left_behind", *sys.path]
def errors(): np.seterr(all="raise")
def environment(): os.environ.update(LEFT_BEHIND="yes")
def draws(): random.seed(7), np.random.seed(7)
def handler(): signal.signal(signal.SIGUSR1, signal.SIG_IGN)
def thread(): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
def module(): COUNTED.append(1)
def attribute(): Table.rows.update(a=1)
def default(): collect("y")

def counted():
    """A factory that keeps something from call to call."""
    collect("z")
    return len(collect("z")) + len(COUNTED) + len(Table.rows)

def around():
    """What the process is like, and what is drawn from its global random states."""
    return {
        "cwd": os.path.basename(os.getcwd()), "path": [entry for entry in sys.path if "left_behind" in entry],
        "errors": np.geterr()["divide"], "usr1": str(signal.getsignal(signal.SIGUSR1)),
        "environment": os.environ.get("LEFT_BEHIND", ""), "drawn": [random.random(), float(np.random.rand())],
    }
'''
TORCH_DEED = '''
import torch
import hostile_deed
from hostile_deed import counted

def dtype(): torch.set_default_dtype(torch.float64)
def grad(): torch.set_grad_enabled(False)
def seed(): torch.manual_seed(7)

def around():
    """What else the process is like where torch is loaded, which takes ten times as long as all the rest."""
    before = hostile_deed.around()
    drawn = [*before.pop("drawn"), float(torch.rand(1, dtype=torch.float64))]
    return {**before, "dtype": str(torch.zeros(1).dtype), "grad": torch.is_grad_enabled(), "drawn": drawn}
'''
HOSTILE = '''
from pathlib import Path
from qpipe.stage import Factory, Scores, stage
from qpipe.param import load_factory

@stage(version=1)
def look(
    scores: Scores, *, path: Path = "w.txt", seen: list[str] = [], by: Factory, around: Factory, deed: str = ""
) -> Scores:
    seen.append("x")
    kept = [load_factory(by)() for _ in range(2)]
    read = {"text": path.read_text(), "absolute": path.is_absolute(), "seen": seen, "kept": kept}
    return Scores({"score": 1.0, "metric": "toy", **load_factory(around)(), **read})

@stage(version=1)
def spoil(scores: Scores, *, by: Factory) -> Scores:
    \"\"\"Leaves something behind.\"\"\"
    load_factory(by)()
    return scores

@stage(version=1)
def use(*, by: Factory, turn: int = 0) -> Scores:
    return Scores({"score": 1.0, "metric": "toy", **load_factory(by)()})
'''
TORCH_DEEDS = ("dtype", "grad", "seed")
DEEDS = (
    *("cwd", "path", "whole_path", "errors", "environment", "draws", "handler", "thread"),
    *("module", "attribute", "default"),
)
ABOUT_THE_PROCESS = (*DEEDS[:-3], *TORCH_DEEDS)


@pytest.fixture
def hostile(toy: Toy) -> Toy:
    """Stages and factories that leave something behind: `hostile_deed:DEED` when it is called, `hostile_torch:DEED`
    with torch loaded, `top_DEED` when it is loaded."""
    plug_in = toy.folder / "plugin"
    (plug_in / "hostile.py").write_text(HOSTILE)
    (plug_in / "hostile_deed.py").write_text(DEED)
    (plug_in / "hostile_torch.py").write_text(TORCH_DEED)
    for deed in ABOUT_THE_PROCESS:
        module = module_of(deed)
        top = f"import {module}\n{module}.{deed}()\nbuild = {module}.around\n"
        (plug_in / f"top_{deed}.py").write_text(top)
    points = toy.folder / "registered" / "toy-1.0.dist-info" / "entry_points.txt"
    names = ("look", "spoil", "use")
    points.write_text(points.read_text() + "".join(f"hostile_{name} = hostile:{name}\n" for name in names))
    (toy.folder / "w.txt").write_text("here")
    (toy.folder / "elsewhere").mkdir()
    (toy.folder / "elsewhere" / "w.txt").write_text("elsewhere")
    return toy


def module_of(deed: str) -> str:
    return "hostile_torch" if deed in TORCH_DEEDS else "hostile_deed"


def scores_of(toy: Toy, stages: dict[str, Any], name: str, workers: int) -> dict[str, dict[str, Any]]:
    """Node -> its scores, and under "key" its key, in a run with a cache of its own."""
    toy.pipeline(stages)
    run = toy.run("run", "run.threads=1", f"run.workers={workers}", f"cache.dir={toy.folder / name}")
    assert run.returncode == 0, run.stdout + run.stderr
    found = {}
    with Store(toy.folder / name, readonly=True) as store:
        for node, made in toy.record()["nodes"].items():
            found[node] = {**load(Artifact(**made["outputs"]["scores"]), store).values, "key": made["key"]}
    return found


def looks_after(toy: Toy, deeds: tuple[str, ...], name: str, workers: int) -> list[dict[str, Any]]:
    """What `look` sees behind each of the deeds, all of them in one run; what it draws is what its key says."""
    stages: dict[str, Any] = {"first": {"uses": "toy_number"}}
    for deed in deeds:
        module = module_of(deed)
        stages[f"spoil_{deed}"] = {"uses": "hostile_spoil", "scores": "first", "by": f"{module}:{deed}"}
        look = {"uses": "hostile_look", "path": "w.txt", "seen": ["a"], "by": f"{module}:counted"}
        look["around"] = f"{module}:around"
        stages[f"look_{deed}"] = {**look, "scores": f"spoil_{deed}", "deed": deed}
    scores = scores_of(toy, stages, name, workers)
    found = [{**scores[node], "deed": node} for node in scores if node.startswith("look")]
    for one in found:
        assert one["drawn"] == drawn(one.pop("key"))[: len(one.pop("drawn"))], one
        del one["deed"]
    return found


def drawn(key: str) -> list[float]:
    """What an action of this key draws first."""
    import random

    import numpy as np
    import torch

    with Isolation().of(key):
        return [random.random(), float(np.random.rand()), float(torch.rand(1, dtype=torch.float64))]


def test_what_is_simple_is_put_back_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    import torch

    monkeypatch.chdir(tmp_path)
    isolation = Isolation()
    path = list(sys.path)
    with isolation.of("ab" * 32):
        os.chdir("/")
        sys.path.insert(0, "/left_behind")
        os.environ["LEFT_BEHIND"] = "yes"
        np.seterr(divide="raise")
        torch.set_default_dtype(torch.float64)
        signal.signal(signal.SIGUSR1, lambda *_: None)
    assert Path.cwd() == tmp_path
    assert sys.path == path
    assert "LEFT_BEHIND" not in os.environ
    assert np.geterr()["divide"] == "warn"
    assert torch.get_default_dtype() is torch.float32
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    assert isolation.spent == []


def test_random_states_follow_from_the_key_alone() -> None:
    assert drawn("ab" * 32) == drawn("ab" * 32) != drawn("ac" * 32)


def test_the_callers_own_random_states_go_on() -> None:
    import random

    random.seed(3)
    wanted = [random.random(), random.random()]
    random.seed(3)
    found = [random.random()]
    with Isolation().of("ab" * 32):
        random.random()
    assert [*found, random.random()] == wanted


def test_a_library_that_an_action_imports_first_is_seeded_too() -> None:
    program = """
import json, sys
from qpipe.run.isolation import Isolation
assert "numpy" not in sys.modules
with Isolation().of("ab" * 32):
    import numpy as np
    first = np.random.rand()
with Isolation().of("ab" * 32):
    second = np.random.rand()
print(json.dumps([first, second]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    first, second = json.loads(done.stdout)
    assert first == second


def test_a_thread_that_goes_on_makes_the_process_spent() -> None:
    isolation, done = Isolation(), threading.Event()
    with isolation.of("ab" * 32):
        threading.Thread(target=done.wait, name="left", daemon=True).start()
    assert isolation.spent == ["its thread 'left' still runs"]
    done.set()


@pytest.mark.slow
def test_an_action_gives_the_same_in_a_used_worker_and_in_a_fresh_one(hostile: Toy) -> None:
    (alone,) = looks_after(hostile, ("nothing",), "alone", 1)
    assert alone["text"] == "here"
    with_torch = alone | {"dtype": "torch.float32", "grad": True}
    wanted = [alone] * len(DEEDS) + [with_torch] * len(TORCH_DEEDS)
    for name, workers in (("one", 1), ("many", 4)):
        assert looks_after(hostile, (*DEEDS, *TORCH_DEEDS), name, workers) == wanted


@pytest.mark.slow
def test_what_a_module_does_to_its_process_when_it_is_loaded_holds_for_all_that_use_it(hostile: Toy) -> None:
    """It is loaded once in a process, in the first of the actions that use it."""

    def uses(*turns: int, deeds: tuple[str, ...] = ABOUT_THE_PROCESS) -> dict[str, Any]:
        return {
            f"{deed}_{turn}": {"uses": "hostile_use", "by": f"top_{deed}:build", "turn": turn}
            for deed in deeds
            for turn in turns
        }

    fresh: dict[str, Any] = {}
    for deed in ABOUT_THE_PROCESS:
        fresh |= scores_of(hostile, uses(1, deeds=(deed,)), f"fresh_{deed}", 1)
    for name, workers in (("one", 1), ("many", 4)):
        found = scores_of(hostile, uses(0, 1), name, workers)
        assert {node: found[node] for node in fresh} == fresh


def test_a_thread_that_watches_progress_is_let_be() -> None:
    from tqdm import tqdm

    isolation = Isolation()
    with isolation.of("ab" * 32):
        list(tqdm(range(3), disable=False, file=open(os.devnull, "w")))  # noqa: SIM115
        assert any("tqdm" in thread.name for thread in threading.enumerate())
    assert isolation.spent == []
