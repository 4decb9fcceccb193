"""Other toolkits' names: told with ours where the stage has it."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from qpipe.errors import ConfigError
from qpipe.language.catalog import catalog
from qpipe.language.elsewhere import TOOLKITS, called_here
from qpipe.language.spec import read_spec

ADAROUND = (*catalog()["adaround"].params, *catalog()["adaround"].ports)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("NumIterations", " Quark's NumIterations is 'iterations' here."),
        ("num_iterations", " Quark's NumIterations is 'iterations' here."),
        ("LRAdjust", " Quark's LRAdjust is 'lr_adjust' here."),
        ("default_reg_param", " AIMET's default_reg_param is 'reg_param' here."),
        ("nsamples", " AutoRound's nsamples is 'limit' here."),
        ("subset_size", " NNCF's subset_size is 'limit' here."),
        ("MemOptLevel", ""),
        ("iterations", ""),
        ("amout", ""),
    ],
)
def test_a_name_of_another_toolkit_is_told_with_ours_where_the_stage_has_that(name: str, told: str) -> None:
    assert called_here(name, ADAROUND) == told


def test_a_config_that_has_it_is_refused_with_ours() -> None:
    body = {"uses": "adaround", "model": "m", "data": "d", "DropRatio": 0.5}
    rest = {"seed": 0, "tuning": "d", "goal": {"metric": "top1", "max_drop": 0.1}}
    config = OmegaConf.create({"stages": {"a": body}, **rest})
    message = r"stages.a: 'adaround' has no param 'DropRatio'. Quark's DropRatio is 'drop_ratio' here. Its ports: data"
    with pytest.raises(ConfigError, match=message):
        read_spec(config)


def test_no_toolkit_has_a_name_twice() -> None:
    for names in TOOLKITS.values():
        plain = [name.replace("_", "").lower() for name in names]
        assert len(set(plain)) == len(plain)
