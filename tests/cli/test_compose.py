"""quick_hydra composes what Hydra composes, and leaves Hydra as it was."""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from qpipe.cli.compose import (
    COMPOSING,
    READING,
    WRITING,
    parameters,
    quick_hydra,
    replacements,
    yaml_dumper,
    yaml_loader,
)
from tests.cli.composition import composed

CASES = (
    ["pipeline=ptq"],
    ["pipeline=autoquant", "goal.max_drop=1e-3", "+note='no'", "seed=010"],
    ["pipeline=adaround", "scheme=w4a8", "stages.adaround.iterations=7", "+hydra.job.env_set.QPIPE_X=y"],
    ["experiment=w4a8_rounding", "hydra.mode=RUN"],
)
ALL = [*COMPOSING, *READING, *WRITING]
REPLACED = [
    "hydra._internal.hydra:Hydra",
    "omegaconf._utils:get_yaml_loader",
    "omegaconf.basecontainer:get_yaml_loader",
    "omegaconf.omegaconf:get_omega_conf_dumper",
]


def left(name: str) -> list[str]:
    """What is replaced where `name` is not as it is known: nothing of what is replaced together with it."""
    (group,) = {
        tuple(names) for names in (COMPOSING, READING, WRITING) if name in [each for _, each in names]
    }
    gone = {f"{module}:{each}" for module, each in group}
    return [each for each in REPLACED if each not in gone]


@pytest.mark.parametrize("arguments", CASES, ids=" ".join)
def test_the_same_config_is_composed(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    plain = composed(arguments, tmp_path / "plain", False)
    assert composed(arguments, tmp_path / "quick", True) == plain
    assert plain["config"]["stages"]
    assert plain["hydra.yaml"]["hydra"]["mode"] == "RUN"


def names_replaced() -> list[str]:
    return [f"{owner.__name__}:{name}" for owner, name, _ in replacements()]


def test_it_is_composed_once_and_by_libyaml(tmp_path, monkeypatch):
    """With the Hydra that is installed: the fence does not keep it out."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    calls = {"load": 0, "read": 0, "write": 0}

    def counted(owner: type, name: str, key: str) -> None:
        plain = getattr(owner, name)

        def count(*rest: Any, **options: Any) -> Any:
            calls[key] += 1
            return plain(*rest, **options)

        monkeypatch.setattr(owner, name, count)

    counted(ConfigLoaderImpl, "load_configuration", "load")
    counted(yaml.reader.Reader, "__init__", "read")
    counted(yaml.emitter.Emitter, "__init__", "write")
    composed(["pipeline=ptq"], tmp_path / "quick", True)
    assert calls == {"load": 1, "read": 4, "write": 0}  # `composed` itself reads four
    composed(["pipeline=ptq"], tmp_path / "plain", False)
    assert calls["load"] == 3
    assert calls["read"] > 20
    assert calls["write"] > 1
    assert names_replaced() == REPLACED


def test_hydra_is_left_as_it_was():
    from hydra._internal import hydra as internal
    from omegaconf import _utils

    before = (internal.Hydra, _utils.get_yaml_loader)
    with contextlib.suppress(KeyError), quick_hydra():
        assert internal.Hydra is not before[0]
        raise KeyError
    assert (internal.Hydra, _utils.get_yaml_loader) == before


def in_a_process(folder: Path, *how: str) -> dict[str, Any]:
    """What `python -m tests.cli.composition` prints."""
    command = [sys.executable, "-m", "tests.cli.composition", str(folder), *how]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def by_plain_hydra(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return in_a_process(tmp_path_factory.mktemp("plain") / "run", "plain")


@pytest.mark.parametrize("change", ["renamed", "widened"])
@pytest.mark.parametrize("name", dict.fromkeys(name for _, name in ALL))
def test_a_hydra_whose_private_names_are_others_composes_the_same(name, change, tmp_path, by_plain_hydra):
    found = in_a_process(tmp_path / "run", "quick", change, name.rpartition(".")[2])
    assert found.pop("replaced") == left(name)
    assert found == {each: value for each, value in by_plain_hydra.items() if each != "replaced"}
    assert found["left as it was"]


@pytest.mark.parametrize(("module", "name"), ALL)
def test_what_rests_on_a_name_that_is_gone_is_not_replaced(module, name, monkeypatch):
    owner, _, last = name.rpartition(".")
    home = importlib.import_module(module)
    monkeypatch.delattr(getattr(home, owner) if owner else home, last)
    assert names_replaced() == left(name)


@pytest.mark.parametrize(("module", "name"), ALL)
def test_what_rests_on_a_module_that_is_gone_is_not_replaced(module, name, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert set(left(name)) >= set(names_replaced())


def test_two_loaders_are_not_taken_for_one(monkeypatch):
    from omegaconf import basecontainer

    monkeypatch.setattr(basecontainer, "get_yaml_loader", lambda: yaml.SafeLoader)
    assert names_replaced() == left("get_yaml_loader")


def test_what_a_function_takes():
    assert parameters("json", "JSONEncoder.encode") == "(self, o)"
    assert parameters("json", "nothing") is parameters("nothing_of_this_name", "at_all") is None
    assert parameters("os", "sep") is None


TEXT = """
numbers: [1, 010, 0x1f, 1_000, 1e3, 1e-05, 1.5, .5, .inf, -.inf, 1:30, +1]
words: [on, Off, yes, NO, true, ~, null, 2001-01-01, '1', "a\\u00e4"]
merged: {<<: {a: 1}, b: 2}
text: |
  two
  lines
anchor: &a {x: 1}
again: *a
"""


def test_a_file_is_read_as_omegaconf_reads_it():
    from omegaconf._utils import get_yaml_loader

    loader = yaml_loader(get_yaml_loader())
    assert issubclass(loader, yaml.CSafeLoader)
    assert repr(yaml.load(TEXT, Loader=loader)) == repr(yaml.load(TEXT, Loader=get_yaml_loader()))
    with pytest.raises(yaml.constructor.ConstructorError, match="found duplicate key a"):
        yaml.load("{a: 1, b: 2, a: 3}", Loader=loader)


def test_a_file_is_written_as_omegaconf_writes_it():
    value = {
        "a": ["1", "1.0", "on", "null", "", "1e3", "ä: b", "x\ny", "2001-01-01", "on", "x\ny"],
        "b": {"c": None, "d": 0.1, "on": "1"},
    }
    plain = OmegaConf.to_yaml(OmegaConf.create(value))
    with quick_hydra():
        assert OmegaConf.to_yaml(OmegaConf.create(value)) == plain


def test_a_loader_or_a_dumper_that_does_more_is_left_alone():
    from omegaconf._utils import get_omega_conf_dumper, get_yaml_loader

    for quick, plain, base in (
        (yaml_loader, get_yaml_loader(), yaml.SafeLoader),
        (yaml_dumper, get_omega_conf_dumper(), yaml.Dumper),
    ):
        body = dict(vars(plain))
        assert quick(type("Same", (base,), body)) is not None
        assert quick(type("More", (base,), body | {"construct_document": print})) is None
        assert quick(type("Other", (plain,), {})) is None
