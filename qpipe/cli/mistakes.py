"""What Hydra and OmegaConf found wrong in a command line, in one line: the address, what was found, what there is."""

from __future__ import annotations

from importlib.resources import files

from hydra.errors import MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from qpipe.param import listed, nearest

_TECHNICAL = ("full_key:", "object_type=", "reference_type=")


def one_line(error: BaseException) -> str:
    """An error of Hydra's or OmegaConf's in one line."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        return _unknown_option(error.missing_cfg_file, error.options)
    cause = error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and isinstance(cause.parent_node, DictConfig):
        return _unknown_key(str(cause.full_key), str(cause.key), cause.parent_node)
    lines = (line.strip() for line in str(error).splitlines())
    return " ".join(line for line in lines if line and not line.startswith(_TECHNICAL))


def _unknown_option(path: str, options: list[str]) -> str:
    group, _, name = path.rpartition("/")
    return f"{group}: there is no '{name}'.{nearest(name, options)} There are: {listed(options)}."


def _unknown_key(address: str, key: str, parent: DictConfig) -> str:
    place = address.rpartition(".")[0]
    known = {str(name) for name in parent} - {"hydra"}
    if not place:
        known |= _groups()
    return f"{place or 'config'}: there is no '{key}'.{nearest(key, known)} There are: {listed(known)}."


def _groups() -> set[str]:
    """The groups of the config, `pipeline` and the like."""
    return {each.name for each in files("qpipe.conf").iterdir() if each.is_dir()} - {"hydra", "__pycache__"}
