"""Plans carried out in this process: what runs, in which order, what is kept, and what is told."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from qpipe.artifacts.artifact import save
from qpipe.artifacts.kinds import Scores
from qpipe.cache.store import Store
from qpipe.language.graph import build_graph
from qpipe.language.spec import RunSpec, read_spec
from qpipe.plan.keyring import Keyring
from qpipe.plan.verdicts import Request, artifact_json
from qpipe.plan.walk import Walk
from qpipe.run.executor import _PASSED_OVER, execute, exit_code, urgency
from qpipe.run.workers import Event, InProcess
from qpipe.stage import Resources
from tests.toy import Toy


class View:
    """Keeps what it is told: (node, what)."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def started(self, node: str, stage: str) -> None:
        self.told.append((node, "started"))

    def progress(self, node: str, done: int, total: int, what: str) -> None: ...

    def finished(self, node: str, verdict: str, duration_s: float, notes: Sequence[str]) -> None:
        self.told.append((node, verdict))

    def failed(self, node: str, message: str) -> None:
        self.told.append((node, "failed"))

    def message(self, text: str) -> None: ...

    def those(self, what: str) -> list[str]:
        return [node for node, said in self.told if said == what]


class Scene:
    """A cache and pipelines of toy stages."""

    def __init__(self, toy: Toy) -> None:
        self.toy, self.store, self.view = toy, Store(toy.folder / "cache"), View()

    def walk(self, stages: dict[str, Any], label: str = "") -> Walk:
        config = OmegaConf.create({"stages": stages, "goal": {"metric": "toy", "max_drop": 0.5}})
        return Walk(build_graph(read_spec(config)), Keyring(self.store), self.store, label)

    def run(self, *walks: Walk, pool: InProcess | None = None, deadline: float | None = None, **run: Any) -> bool:
        pool = pool or InProcess(self.store, 1)
        return execute(walks, self.store, RunSpec(workers=0, **run), pool, self.view, deadline)

    def score(self, walk: Walk, node: str) -> Any:
        found = walk.scores(walk.graph.inputs[node]["scores"][0])
        return None if found is None else found["score"]


@pytest.fixture
def scene(toy_stages: Toy) -> Scene:
    return Scene(toy_stages)


def test_two_nodes_that_are_the_same_action_run_it_once(scene: Scene) -> None:
    one, two = {"uses": "toy_number", "value": 3.0}, {"uses": "toy_number", "value": 3.0}
    walk = scene.walk({"one": one, "two": two, "both": {"uses": "toy_total", "scores": ["one", "two"]}})
    assert scene.run(walk)
    assert scene.toy.calls() == ["number", "total"]
    assert sorted(walk.outcomes[name].state for name in ("one", "two")) == ["hit", "ran"]
    assert walk.outcomes["both"].good


def test_two_trials_of_a_sweep_share_what_is_the_same(scene: Scene) -> None:
    walks = []
    for amount in (1, 2):
        more = {"uses": "toy_add", "scores": "one", "amount": amount}
        walks.append(scene.walk({"one": {"uses": "toy_number"}, "more": more}, f"{amount} "))
    scene.run(*walks)
    assert scene.toy.calls() == ["number", "add", "add"]
    assert scene.view.those("ran") == ["1 one", "1 more", "2 more"]
    assert scene.view.those("hit") == ["2 one"]


def test_what_is_in_the_cache_already_is_not_run(scene: Scene) -> None:
    stages = {"one": {"uses": "toy_number"}}
    scene.run(scene.walk(stages))
    scene.toy.calls()
    walk = scene.walk(stages)
    scene.run(walk)
    assert scene.toy.calls() == []
    assert walk.outcomes["one"].state == "hit"


def test_what_another_process_published_meanwhile_is_a_hit(scene: Scene) -> None:
    stages = {"one": {"uses": "toy_number"}}
    late = scene.walk(stages)
    (action,) = late.advance()
    assert action.reasons == ("never run",)
    scene.run(scene.walk(stages))
    scene.toy.calls()
    scene.run(late)
    assert scene.toy.calls() == []
    assert late.outcomes["one"].state == "hit"


def test_what_most_depends_on_is_begun_first(scene: Scene) -> None:
    stages: dict[str, Any] = {"alone": {"uses": "toy_number", "value": 1.0}}
    stages["root"] = {"uses": "toy_number", "value": 2.0}
    stages["next"] = {"uses": "toy_add", "scores": "root"}
    stages["last"] = {"uses": "toy_sign", "scores": "next"}
    walk = scene.walk(stages)
    steps = {"alone": 1, "root": 3, "next": 2, "last": 1}
    assert urgency(walk.graph) == {name: (0.0, count) for name, count in steps.items()}
    took = {"alone": 5.0, "root": 1.0, "next": 0.5, "last": 2.0}
    found = {name: seconds for name, (seconds, _) in urgency(walk.graph, took.__getitem__).items()}
    assert found == {"alone": 5.0, "root": 3.5, "next": 2.5, "last": 2.0}
    scene.run(walk)
    assert scene.view.those("started")[:2] == ["root", "next"]


class Crowded(InProcess):
    """Has room for what takes much memory only when nothing else is left, or nothing else begins any more."""

    held_back = 0

    def room(self, needs: Resources) -> bool:
        return needs.memory_gb != 50 or self.held_back > 0

    def events(self, timeout_s: float) -> Iterator[tuple[str, Event]]:
        self.held_back += not self._waiting
        return super().events(0.001 if not self._waiting else timeout_s)


def test_smaller_ones_begin_before_what_there_is_no_room_for_but_not_for_ever(scene: Scene) -> None:
    stages: dict[str, Any] = {f"n{i}": {"uses": "toy_number", "value": i} for i in range(12)}
    stages["large"] = {"uses": "toy_number", "value": 50, "resources": {"memory_gb": 50}}
    stages["on_it"] = {"uses": "toy_sign", "scores": "large"}
    scene.run(scene.walk(stages), pool=Crowded(scene.store, 1))
    order = scene.view.those("started")
    assert order.index("large") == _PASSED_OVER, "the most urgent of all"
    assert sorted(order) == sorted(stages)


class Pairs(InProcess):
    """Two actions at a time, whose results come together."""

    @property
    def idle(self) -> int:
        return 2 - len(self._waiting)

    def events(self, timeout_s: float) -> Iterator[tuple[str, Event]]:
        while self._waiting and timeout_s:
            yield from super().events(timeout_s)


@pytest.mark.parametrize("when", ["finished", "started"])
def test_an_interruption_keeps_what_was_done_by_then(scene: Scene, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    stages: dict[str, Any] = {"one": {"uses": "toy_number"}, "two": {"uses": "toy_number", "value": 2}}
    stages["three"] = {"uses": "toy_add", "scores": "one"}
    walk = scene.walk(stages)
    monkeypatch.setattr(scene.view, when, interrupted)
    with pytest.raises(KeyboardInterrupt):
        scene.run(walk, pool=Pairs(scene.store, 1))
    assert [walk.outcomes[name].good for name in sorted(walk.outcomes)] == ([True, True] if when == "finished" else [])
    assert "three" not in walk.outcomes


def test_what_took_long_before_is_begun_first(scene: Scene) -> None:
    """Of two that nothing else tells apart, by what they took; by the steps behind them where they never ran."""
    stages: dict[str, Any] = {"one": {"uses": "toy_number"}}
    for name, seconds in (("quick", 0.0), ("slow", 0.2)):
        stages[name] = {"uses": "toy_add", "scores": "one", "seconds": seconds}
    scene.run(scene.walk(stages))
    for name in ("quick", "slow"):
        stages[name]["amount"] = 2
    scene.run(scene.walk(stages))
    assert scene.view.those("started")[3:] == ["slow", "quick"]


def test_an_action_is_as_urgent_as_the_pipeline_that_needs_it_most(scene: Scene) -> None:
    """Two that are one action stand in the queue once for each rank, and run once."""
    one = {"one": {"uses": "toy_number"}}
    deep = {**one, "more": {"uses": "toy_add", "scores": "one"}, "last": {"uses": "toy_add", "scores": "more"}}
    other = {"two": {"uses": "toy_number", "value": 2.0}, "then": {"uses": "toy_sign", "scores": "two"}}
    scene.run(scene.walk(one, "0 "), scene.walk(other, "1 "), scene.walk(deep, "2 "))
    assert scene.view.those("started") == ["0 one", "1 two", "2 more", "1 then", "2 last"]


def failing() -> dict[str, Any]:
    return {
        "one": {"uses": "toy_number", "value": 5.0},
        "bad": {"uses": "toy_boom", "scores": "one"},
        "behind": {"uses": "toy_sign", "scores": "bad"},
        "beside": {"uses": "toy_sign", "scores": "one"},
    }


def test_a_failure_skips_what_needs_it_and_nothing_else(scene: Scene) -> None:
    walk = scene.walk(failing())
    scene.run(walk)
    states = {name: outcome.state for name, outcome in walk.outcomes.items()}
    assert states == {"one": "ran", "bad": "failed", "behind": "skipped", "beside": "ran"}
    assert exit_code([walk]) == 1


def test_without_keep_going_nothing_begins_after_a_failure(scene: Scene) -> None:
    walk = scene.walk(failing())
    scene.run(walk, keep_going=False)
    assert walk.outcomes["bad"].state == "failed"
    assert "beside" not in scene.view.those("started")


def test_bad_input_ends_a_single_run_and_has_a_status_of_its_own(scene: Scene) -> None:
    refused = {"one": {"uses": "toy_number", "value": 5.0}, "bad": {"uses": "toy_refuse", "scores": "one"}}
    walk, other = scene.walk(refused), scene.walk({"two": {"uses": "toy_number", "value": 6.0}})
    scene.run(walk)
    assert exit_code([walk]) == 2
    assert exit_code([walk, other]) == 2
    boom = scene.walk(failing())
    scene.run(boom)
    assert exit_code([walk, boom]) == 1
    assert exit_code([other]) == 0


def test_after_the_deadline_nothing_begins(scene: Scene) -> None:
    walk = scene.walk({"one": {"uses": "toy_number"}})
    assert not scene.run(walk, deadline=time.monotonic() - 1)
    assert scene.toy.calls() == []
    assert scene.run(walk, deadline=time.monotonic() + 1000)


def test_a_made_up_result_is_replaced_by_what_the_stage_makes(scene: Scene) -> None:
    walk = scene.walk({"one": {"uses": "toy_number", "value": 4.0}, "sign": {"uses": "toy_sign", "scores": "one"}})
    (action,) = walk.advance()
    lie = artifact_json(save(Scores({"score": -1.0}), scene.store))
    scene.store.publish(action.key, {"outputs": {"lie": lie}, "ingredients": dict(action.ingredients)})
    scene.run(walk)
    assert scene.score(walk, "sign") == 4.0
    assert set(scene.store.result(action.key)["outputs"]) == {"scores"}  # type: ignore[index]  # it is there


class Meddling(InProcess):
    """Writes to a file when an action begins."""

    def __init__(self, store: Store, file: Path, text: str) -> None:
        super().__init__(store, 1)
        self._file, self._text = file, text

    def submit(self, request: Request) -> None:
        self._file.write_text(self._text)
        os.utime(self._file, ns=(1, 1))
        super().submit(request)


@pytest.mark.parametrize("text", ["8", "7"])
def test_what_was_made_of_a_file_that_was_written_to_meanwhile_is_not_kept(scene: Scene, text: str) -> None:
    file = scene.toy.folder / "number.txt"
    file.write_text("7")
    walk = scene.walk({"one": {"uses": "toy_read", "path": str(file)}})
    scene.run(walk, pool=Meddling(scene.store, file, text))
    outcome = walk.outcomes["one"]
    assert outcome.state == "failed"
    assert "was written to while the run went on" in outcome.error["message"]  # type: ignore[index]
    assert list(scene.store.keys()) == []


def test_a_stage_that_reads_the_world_replaces_what_it_read_last(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in = scene.toy.folder / "plugin" / "toy_stages.py"
    source = plug_in.read_text().replace("@stage(version=1)\ndef number", "@stage(version=1, always=True)\ndef number")
    plug_in.write_text(source.replace('{"score": value,', '{"score": float(os.environ["OUTSIDE"]),'))
    stages = {"one": {"uses": "toy_number"}, "sign": {"uses": "toy_sign", "scores": "one"}}
    found = []
    for outside in ("3", "5", "-3"):
        monkeypatch.setenv("OUTSIDE", outside)
        walk = scene.walk({**stages, "out": {"uses": "toy_add", "scores": "sign"}})
        scene.run(walk)
        found.append((scene.score(walk, "sign"), scene.score(walk, "out"), scene.toy.calls()))
    assert found[0] == (3.0, 1.0, ["number", "sign", "add"])
    assert found[1] == (5.0, 1.0, ["number", "sign"])
    assert found[2] == (-3.0, -1.0, ["number", "sign", "add"])
