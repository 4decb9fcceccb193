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

from qpipe.run.isolation import Isolation
from tests.toy import Toy

HOSTILE = '''
import os, random, signal, sys, threading, time
from pathlib import Path
import numpy as np
import torch
from qpipe.stage import NULL, Context, Factory, Scores, stage
from qpipe.param import load_factory

@stage(version=1)
def look(*, path: Path = "w.txt", seen: list[str] = [], by: Factory | None = None, ctx: Context = NULL) -> Scores:
    """What the process is like, and what is drawn from its global random states."""
    seen.append("x")
    kept = [load_factory(by)() for _ in range(2)] if by else []
    return Scores({
        "score": 1.0, "metric": "toy", "cwd": os.getcwd(), "text": path.read_text(), "absolute": path.is_absolute(),
        "path": [entry for entry in sys.path if "left_behind" in entry], "dtype": str(torch.zeros(1).dtype),
        "errors": np.geterr()["divide"], "environment": os.environ.get("LEFT_BEHIND", ""), "seen": seen,
        "drawn": [random.random(), float(np.random.rand()), float(torch.rand(1, dtype=torch.float64))],
        "usr1": str(signal.getsignal(signal.SIGUSR1)), "grad": torch.is_grad_enabled(), "kept": kept,
    })

@stage(version=1)
def spoil(scores: Scores, *, how: str, folder: str) -> Scores:
    """Leaves something behind."""
    deeds = {
        "cwd": lambda: os.chdir(folder),
        "path": lambda: sys.path.insert(0, "/left_behind"),
        "whole path": lambda: setattr(sys, "path", ["/left_behind", *sys.path]),
        "dtype": lambda: torch.set_default_dtype(torch.float64),
        "grad": lambda: torch.set_grad_enabled(False),
        "errors": lambda: np.seterr(all="raise"),
        "environment": lambda: os.environ.update(LEFT_BEHIND="yes"),
        "random": lambda: (random.seed(7), np.random.seed(7), torch.manual_seed(7)),
        "signal": lambda: signal.signal(signal.SIGUSR1, lambda *_: None),
        "thread": lambda: threading.Thread(target=time.sleep, args=(60,), daemon=True).start(),
        "module": lambda: COUNTED.append(1),
        "class": lambda: Table.rows.update(a=1),
        "default": lambda: collect("y"),
    }
    deeds[how]()
    return scores

COUNTED: list[int] = []

class Table:
    rows: dict[str, int] = {}

def collect(item, into=[]):
    into.append(item)
    return list(into)

def counted():
    """A factory that keeps something from call to call."""
    collect("z")
    return len(collect("z")) + len(COUNTED) + len(Table.rows)
'''
DEEDS = (
    *("cwd", "path", "whole path", "dtype", "grad", "errors", "environment", "random", "signal", "thread"),
    *("module", "class", "default"),
)


@pytest.fixture
def hostile(toy: Toy) -> Toy:
    (toy.folder / "plugin" / "hostile.py").write_text(HOSTILE)
    points = toy.folder / "registered" / "toy-1.0.dist-info" / "entry_points.txt"
    points.write_text(points.read_text() + "hostile_look = hostile:look\nhostile_spoil = hostile:spoil\n")
    (toy.folder / "w.txt").write_text("here")
    (toy.folder / "elsewhere").mkdir()
    (toy.folder / "elsewhere" / "w.txt").write_text("elsewhere")
    return toy


def scores_after(toy: Toy, deeds: tuple[str, ...], *words: str) -> dict[str, Any]:
    """What `look` sees behind each of the deeds, all of them in one run, by the deed."""
    stages: dict[str, Any] = {"first": {"uses": "toy_number"}}
    for index, deed in enumerate(deeds):
        spoil = {"uses": "hostile_spoil", "scores": "first", "how": deed, "folder": str(toy.folder / "elsewhere")}
        stages[f"spoil{index}"] = spoil
        stages[f"look{index}"] = {"uses": "hostile_look", "path": "w.txt", "seen": ["a"], "by": "hostile:counted"}
    toy.pipeline(stages)
    run = toy.run("run", "run.threads=1", *words)
    assert run.returncode == 0, run.stdout + run.stderr
    record = toy.record()
    return {deed: record["nodes"][f"look{i}"]["outputs"]["scores"]["digest"] for i, deed in enumerate(deeds)}


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
    import random

    import numpy as np
    import torch

    def drawn(key: str) -> list[float]:
        with Isolation().of(key):
            return [random.random(), float(np.random.rand()), float(torch.rand(1))]

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
    alone: set[str] = set()
    for deed in DEEDS[:2]:  # each in a worker that did nothing before
        alone |= set(scores_after(hostile, (deed,), "run.workers=2", f"cache.dir=alone{len(alone)}").values())
    one = scores_after(hostile, DEEDS, "run.workers=1", "cache.dir=one")
    many = scores_after(hostile, DEEDS, "run.workers=4", "cache.dir=many")
    assert set(one.values()) == set(many.values()) == alone
    assert len(alone) == 1


def test_a_thread_that_watches_progress_is_let_be() -> None:
    from tqdm import tqdm

    isolation = Isolation()
    with isolation.of("ab" * 32):
        list(tqdm(range(3), disable=False, file=open(os.devnull, "w")))  # noqa: SIM115
        assert any("tqdm" in thread.name for thread in threading.enumerate())
    assert isolation.spent == []
