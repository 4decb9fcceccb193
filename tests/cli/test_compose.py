"""quick_hydra composes what Hydra composes, and leaves Hydra as it was."""

from __future__ import annotations

import contextlib
import importlib
import json
import random
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
    SWEEPING,
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
ALL = [*COMPOSING, *SWEEPING, *READING, *WRITING]
REPLACED = [
    "hydra._internal.hydra:Hydra",
    "ConfigLoaderImpl:_parse_overrides_and_create_caching_repo",
    "hydra._internal.config_loader_impl:create_defaults_list",
    "ConfigLoaderImpl:_compose_config_from_defaults_list",
    "omegaconf._utils:get_yaml_loader",
    "omegaconf.basecontainer:get_yaml_loader",
    "omegaconf.omegaconf:get_omega_conf_dumper",
]


def left(name: str) -> list[str]:
    """What is replaced where `name` is not as it is known: nothing of what is replaced together with it."""
    (group,) = {
        tuple(names) for names in (COMPOSING, SWEEPING, READING, WRITING) if name in [each for _, each in names]
    }
    gone = {f"{module}:{each}" for module, each in group} | {each.replace(".", ":") for _, each in group}
    return [each for each in REPLACED if each not in gone]


@pytest.mark.parametrize("arguments", CASES, ids=" ".join)
def test_the_same_config_is_composed(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    plain = composed(arguments, tmp_path / "plain", False)
    assert composed(arguments, tmp_path / "quick", True) == plain
    assert plain["config"]["stages"]
    assert plain["hydra.yaml"]["hydra"]["mode"] == "RUN"


GROUPS = (
    *("scheme=w4a8", "scheme=xint8", "target=tensorrt", "pipeline=adaround", "pipeline=nope", "~data", "~cache"),
    *("experiment=w4a8_rounding", "+model@other=onnx_file", "stage@stages.more=bnf", "+stage@stages.more=bnf"),
)
VALUES = (
    *("seed=3", "seed=x", "goal.max_drop=0.5", "+note=[1,{a: 2}]", "note=1", "~targets", "~nope", "++goal.metric=mse"),
    *("stages.cle.norms=false", "stages.cle.nope=1", "scheme.weight={bitwidth: 2}", "scheme.weight.bitwidth=two"),
    *("goal=null", "goal.metric=${scheme.name}", "hydra.job.chdir=true", "run.threads=2", "a b", "hydra.nope=1"),
    *("+scheme={extra: 1}", "scheme={name: mine}"),
)


def swept(jobs: list[list[str]], quick: bool) -> list[Any]:
    """What Hydra makes of each job of a sweep, or how it refuses it."""
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    found: list[Any] = []
    quickly = quick_hydra() if quick else contextlib.nullcontext()
    with quickly, initialize_config_module("qpipe.conf", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration("config", ["hydra.mode=MULTIRUN"], RunMode.MULTIRUN)
        for job in jobs:
            try:
                config = loader.load_sweep_config(master, job)
            except Exception as error:
                found.append((type(error).__name__, str(error), str(error.__cause__)))
                continue
            found.append(OmegaConf.to_container(config, resolve=False))
            config.seed = "changed"  # of this job alone
            config.scheme = {}
    return found


def test_jobs_of_a_sweep_are_composed_as_by_plain_hydra():
    """Groups, values, mistakes in both, in any order, the same again: six jobs, drawn."""
    from qpipe.cli.main import _register

    _register()
    draw = random.Random(0)
    jobs = []
    for _ in range(6):
        jobs.append(draw.choices(GROUPS, k=draw.choice((0, 0, 1, 2))) + draw.choices(VALUES, k=draw.randrange(4)))
        draw.shuffle(jobs[-1])
    jobs = [*jobs, *jobs[:2], ["hydra.searchpath=[file:///nowhere]", "scheme=w4a8"], ["scheme=w4a8"]]
    plain = swept(jobs, quick=False)
    assert swept(jobs, quick=True) == plain
    assert 2 < sum(isinstance(each, dict) for each in plain) < 10


def test_files_are_read_once_for_each_choice_of_groups(monkeypatch):
    from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource

    from qpipe.cli.main import _register

    _register()
    read: list[str] = []
    plain = ImportlibResourcesConfigSource.load_config

    def counted(self: Any, config_path: str) -> Any:
        read.append(config_path)
        return plain(self, config_path)

    monkeypatch.setattr(ImportlibResourcesConfigSource, "load_config", counted)
    swept([["scheme=w4a8", "seed=0"]], quick=True)
    once = len(read)
    read.clear()
    swept([["scheme=w4a8", f"seed={n}"] for n in range(20)], quick=True)
    assert len(read) == once > 10


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


@pytest.mark.parametrize(
    ("change", "group"),
    [("renamed", COMPOSING), ("renamed", SWEEPING), ("widened", READING), ("widened", WRITING)],
    ids=["once", "sweep", "read", "write"],
)
def test_a_hydra_whose_private_names_are_others_composes_the_same(group, change, tmp_path, by_plain_hydra):
    """One name of each group; of every other the next two tests say that nothing of its group is replaced."""
    name = list(group)[-1][1]
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
def test_what_rests_on_a_name_that_takes_more_is_not_replaced(module, name, monkeypatch):
    owner, _, last = name.rpartition(".")
    home = importlib.import_module(module)

    def widened(*, added: None = None) -> None: ...

    monkeypatch.setattr(getattr(home, owner) if owner else home, last, widened)
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
