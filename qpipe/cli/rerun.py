"""`qpipe rerun RUN`: the config that a run recorded, composed again, with further overrides; `qpipe --resume FOLDER`:
the words of a sweep, again.

`.hydra/config.yaml` of the run has its interpolations still: `scheme.weight.bitwidth=4` reaches every node that took
the scheme, as it did then. Where there is none (`hydra.output_subdir=null`), the resolved `config.yaml` has the values
that the nodes hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore

from qpipe.cli.config_files import shipped_folder
from qpipe.errors import ConfigError
from qpipe.explain.past_runs import find_record
from qpipe.param import listed

NAME = "qpipe_rerun"
"""The recorded config among Hydra's."""

REPLACED = ("scheme", "target", "run", "cache")
"""Groups of which another option can be taken: all of it lies below its name."""
_WOVEN = ("pipeline", "experiment", "model", "data")
"""Groups whose options put nodes into `stages`: they cannot be taken out again."""
_HELD = ("stages", "run", "cache", "targets", "ladder", "baselines", "hydra", "allow_discouraged")
"""What an override reaches where the interpolations are resolved."""


def recorded(run: str, rest: Sequence[str]) -> list[str]:
    """The arguments with which Hydra composes the config that `run` recorded, under the overrides in `rest`.
    Errors: ConfigError."""
    folder = find_record(run, "rerun").parent
    written, path = folder / ".hydra" / "config.yaml", folder / "config.yaml"
    resolved = not written.is_file()
    path = path if resolved else written
    config = _read(path)
    own = _read(shipped_folder() / "config.yaml")
    arguments = []
    for word in rest:
        name = word.lstrip("+~").partition("=")[0]
        if "=" in word and (name in _WOVEN or "@" in name):
            raise ConfigError(
                f"rerun: {word} chooses other nodes, and the run in '{folder}' recorded its own. "
                f"Say `qpipe {word} …`, or override values: stages.NODE.PARAM=…"
            )
        if "=" in word and resolved and name.partition(".")[0] not in _HELD:
            raise ConfigError(
                f"rerun: '{folder}' has no .hydra/config.yaml, only the values, so {word} reaches no node. "
                f"Override what the nodes hold: {listed(_HELD)}."
            )
        if name in REPLACED and word.startswith(f"{name}=") and "/" not in word:
            config.pop(name, None)
            word = f"+{word}"
        arguments.append(word)
    forced = [{name: value} for each in own["defaults"] if isinstance(each, dict) for name, value in each.items()]
    defaults = ["qpipe_base", "_self_", *(each for each in forced if next(iter(each)).startswith("override "))]
    ConfigStore.instance().store(name=NAME, node={"defaults": defaults, **config, "hydra": own["hydra"]})
    return ["--config-name", NAME, *arguments]


def resumed(folder: str, rest: Sequence[str]) -> list[str]:
    """The arguments with which the sweep, or the search, that lies in `folder` goes on, with the overrides in `rest`.
    Errors: ConfigError."""
    path = Path(folder) / "multirun.yaml"
    try:
        hydra = yaml.load(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["hydra"]
        words = [*hydra["overrides"]["task"], *hydra["overrides"]["hydra"]]
        sources = [each["path"] for each in hydra["runtime"]["config_sources"] if each["provider"] == "command-line"]
    except FileNotFoundError as error:
        raise ConfigError(f"--resume: there is no '{path}', the config of a sweep. Name the folder of one.") from error
    except (OSError, KeyError, TypeError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--resume: '{path}' is not the config of a sweep. Name the folder of one.") from error
    folders = [word for source in sources for word in ("--config-dir", source)]
    words = [word for word in words if not word.startswith(("hydra.sweep.dir=", "hydra.mode="))]
    return [*folders, "-m", *words, *rest, f"hydra.sweep.dir='{Path(folder)}'"]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = yaml.load(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except FileNotFoundError as error:
        raise ConfigError(f"rerun: there is no '{path}', the config that it recorded. Give another run.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"rerun: '{path}' cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(found, Mapping) or not {"stages", "defaults"} & set(found):
        raise ConfigError(f"rerun: '{path}' is not the config of a run: it has no stages. Give another run.")
    return dict(found)
