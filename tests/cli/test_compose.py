"""quick_hydra composes what Hydra composes, and leaves Hydra as it was."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from qpipe.cli.compose import quick_hydra, yaml_dumper, yaml_loader
from qpipe.cli.main import _register

CASES = (
    ["pipeline=ptq"],
    ["pipeline=autoquant", "goal.max_drop=1e-3", "+note='no'", "seed=010"],
    ["pipeline=adaround", "scheme=w4a8", "stages.adaround.iterations=7", "+hydra.job.env_set.QPIPE_X=y"],
    ["experiment=w4a8_rounding", "hydra.mode=RUN"],
)


def composed(arguments: list[str], folder: Path, quick: bool, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the task gets, what Hydra says of itself, and what it writes; `folder` is taken out of it."""
    seen: dict[str, Any] = {}

    def task(config: DictConfig) -> None:
        seen["config"] = OmegaConf.to_container(config)
        said = OmegaConf.to_yaml(HydraConfig.get()).replace(str(folder), "FOLDER")
        seen["hydra"] = yaml.safe_load(said)

    _register()
    monkeypatch.setattr(sys, "argv", ["qpipe", *arguments, f"hydra.run.dir={folder}"])
    with quick_hydra() if quick else contextlib.nullcontext():
        hydra.main(version_base="1.3", config_path="pkg://qpipe.conf", config_name="config")(task)()
    for path in sorted((folder / ".hydra").iterdir()):
        seen[path.name] = yaml.safe_load(path.read_text().replace(str(folder), "FOLDER"))
    return seen


@pytest.mark.parametrize("arguments", CASES, ids=" ".join)
def test_the_same_config_is_composed(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    plain = composed(arguments, tmp_path / "plain", False, monkeypatch)
    assert composed(arguments, tmp_path / "quick", True, monkeypatch) == plain
    assert plain["config"]["stages"]
    assert plain["hydra.yaml"]["hydra"]["mode"] == "RUN"


def test_it_is_composed_once(tmp_path, monkeypatch):
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    calls = []
    load = ConfigLoaderImpl.load_configuration
    monkeypatch.setattr(
        ConfigLoaderImpl, "load_configuration", lambda *a, **k: calls.append(1) or load(*a, **k)
    )
    composed(["pipeline=ptq"], tmp_path, True, monkeypatch)
    assert len(calls) == 1


def test_hydra_is_left_as_it_was():
    from hydra._internal import hydra as internal
    from omegaconf import _utils

    before = (internal.Hydra, _utils.get_yaml_loader)
    with contextlib.suppress(KeyError), quick_hydra():
        assert internal.Hydra is not before[0]
        raise KeyError
    assert (internal.Hydra, _utils.get_yaml_loader) == before


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

    found = yaml.load(TEXT, Loader=yaml_loader())
    assert repr(found) == repr(yaml.load(TEXT, Loader=get_yaml_loader()))
    with pytest.raises(yaml.constructor.ConstructorError, match="found duplicate key a"):
        yaml.load("{a: 1, b: 2, a: 3}", Loader=yaml_loader())


def test_a_file_is_written_as_omegaconf_writes_it():
    value = {
        "a": ["1", "1.0", "on", "null", "", "1e3", "ä: b", "x\ny", "2001-01-01"],
        "b": {"c": None, "d": 0.1},
    }
    plain = OmegaConf.to_yaml(OmegaConf.create(value))
    with quick_hydra():
        assert OmegaConf.to_yaml(OmegaConf.create(value)) == plain
    assert yaml.dump("on", Dumper=yaml_dumper()).strip() == "'on'"
