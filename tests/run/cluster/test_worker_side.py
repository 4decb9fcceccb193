"""What happens on a worker's machine, in this process: the cache first, the key held against what lies here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from qpipe.cache.store import Store
from qpipe.errors import CacheError, ChangedError, ConfigError
from qpipe.language.graph import build_graph
from qpipe.language.spec import read_spec
from qpipe.plan.keyring import Keyring
from qpipe.plan.verdicts import OF_STAGE, Request, request
from qpipe.plan.walk import Walk
from qpipe.run.cluster.child import carry_out
from qpipe.run.cluster.pool import lacks, refuse_unlike, refuse_unmet
from qpipe.run.cluster.survey import survey
from qpipe.run.workers import Ask
from qpipe.stage import Resources
from tests.toy import Toy

ANSWER = {"host": "far", "sees": True, "cpus": 4, "gpus": 0, "memory_gb": 8.0, "libraries": {}, "stages": []}


def asked(toy: Toy, node: dict[str, Any]) -> Request:
    """What is sent for a graph of one node, which nothing has run."""
    store = Store(toy.folder / "cache")
    spec = read_spec(OmegaConf.create({"stages": {"one": node}, "goal": {"metric": "toy", "max_drop": 0.5}}))
    (action,) = Walk(build_graph(spec), Keyring(store), store).advance()
    return {**request(action, "cpu"), "always": False, "probe": None}


def test_what_was_made_stands_in_the_cache_and_is_found_the_next_time(toy_stages: Toy) -> None:
    store, order = Store(toy_stages.folder / "cache"), asked(toy_stages, {"uses": "toy_number", "value": 3})
    assert carry_out(order, store, lambda _: None, 1) == {"stands": "made"}
    assert carry_out(order, store, lambda _: None, 1) == {"stands": "found"}
    assert toy_stages.calls() == ["number"]
    result = store.result(order["key"])
    assert result is not None
    assert result["provenance"]["threads"] == 1


def test_nothing_is_kept_under_a_key_that_this_machine_would_not_give(toy_stages: Toy) -> None:
    file = toy_stages.folder / "value.txt"
    file.write_text("1")
    store, order = Store(toy_stages.folder / "cache"), asked(toy_stages, {"uses": "toy_read", "path": str(file)})
    file.write_text("2")
    with pytest.raises(ChangedError, match=r"it would be another action .param path: its content changed"):
        carry_out(order, store, lambda _: None, 1)
    other = {**order["ingredients"], "libraries": {"numpy": "0.1"}}
    with pytest.raises(ChangedError, match=r'library numpy: "0.1" -> null'):
        carry_out({**order, "ingredients": other}, store, lambda _: None, 1)
    assert toy_stages.calls() == []
    assert store.result(order["key"]) is None


def test_a_folder_that_is_not_the_cache_of_who_asked_is_refused(toy_stages: Toy, tmp_path: Path) -> None:
    order = asked(toy_stages, {"uses": "toy_number"}) | {"probe": "ab" * 32}
    with pytest.raises(CacheError, match="is not the cache of who asked"):
        carry_out(order, Store(tmp_path / "elsewhere"), lambda _: None, 1)


def test_the_survey_tells_what_keys_depend_on(toy_stages: Toy) -> None:
    store = Store(toy_stages.folder / "cache")
    made = asked(toy_stages, {"uses": "toy_number"})["ingredients"]
    stages = {"toy_number": {name: made[name] for name in OF_STAGE}}
    question = {"root": str(store.root), "probe": store.put(b"here"), "folder": "", "stages": stages}
    same = survey(question)
    assert (same["sees"], same["libraries"], same["stages"]) == (True, {}, [])
    stages["toy_number"] |= {"libraries": {"torch": "0.1"}}
    stages["toy_sign"] = {**stages["toy_number"], "code": "another", "libraries": {}}
    stages["nobody_s"] = stages["toy_number"]
    apart = survey({**question, "root": str(toy_stages.folder / "elsewhere")})
    assert (apart["sees"], apart["libraries"], apart["stages"]) == (False, {"torch": None}, ["toy_sign", "nobody_s"])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"error": "no module named qpipe"}, "the worker w cannot run qpipe (no module named qpipe)."),
        ({"libraries": {"torch": "2.9"}}, "the worker w on far has torch 2.9 instead of 2.13,"),
        ({"libraries": {"torch": None}}, "the worker w on far has torch missing instead of 2.13,"),
        ({"stages": ["bnf"]}, "the worker w on far has other code, or none, of bnf,"),
    ],
)
def test_a_worker_that_would_give_other_keys_is_refused_in_one_line(answer: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        refuse_unlike("w", answer if "error" in answer else ANSWER | answer, {"bnf": {"libraries": {"torch": "2.13"}}})
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_no_worker_has_is_refused_and_what_one_has_is_not() -> None:
    larger = ANSWER | {"gpus": 2, "cpus": 1}
    refuse_unmet(Ask("stages.x", Resources(1, 2, 8.0), {}), [ANSWER, larger])
    with pytest.raises(ConfigError, match=r"stages.x.resources: asks for gpus=3, and no worker has that .*gpus=2"):
        refuse_unmet(Ask("stages.x", Resources(1, 3, 0.0), {}), [ANSWER, larger])
    with pytest.raises(ConfigError, match="asks for cpus=4, gpus=2"):
        refuse_unmet(Ask("stages.x", Resources(4, 2, 0.0), {}), [ANSWER, larger])  # each of them some worker has
    assert lacks(dataclasses.replace(Resources(), memory_gb=9), ANSWER) == ["memory_gb"]
