"""The runs that were left in a folder: found by path or name, read as their records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qpipe.errors import ConfigError
from qpipe.param import listed
from qpipe.run.record import RECORD, SCHEMA

OUTPUTS = Path("outputs")
LAST = "last"


def find_record(run: str, purpose: str) -> Path:
    """The record.json that `run` names: a run folder, a record, a name (or the end of one) below outputs/, `last`, or
    `last~1`, the one before. Errors: ConfigError that begins with `purpose`."""
    path = Path(run)
    if path.is_file():
        return path
    if (path / RECORD).is_file():
        return path / RECORD
    found = records()
    if run == LAST or run.startswith(f"{LAST}~"):
        back = run.removeprefix(LAST).removeprefix("~") or "0"
        if back.isdecimal() and int(back) < len(found):
            return found[int(back)]
        raise ConfigError(f"{purpose}: no run '{run}': outputs/ holds {len(found)}. Run `qpipe` first.")
    named = [record for record in found if _is_called(record.parent, run)]
    if len(named) == 1:
        return named[0]
    if named:
        names = listed(str(record.parent) for record in named[:6])
        raise ConfigError(f"{purpose}: '{run}' names {len(named)} runs. Say more: {names}.")
    names = listed(record.parent.name for record in found[:6]) if found else "none"
    raise ConfigError(
        f"{purpose}: no run '{run}'. Give the folder of a run, its record.json, its name below outputs/, or "
        f"last~1. The last runs: {names}."
    )


def records(folder: Path = OUTPUTS) -> list[Path]:
    """Every record below a folder, the newest first."""
    found = [(path.stat().st_mtime_ns, path) for path in folder.glob(f"**/{RECORD}")]
    return [path for _, path in sorted(found, reverse=True)]


def read_record(path: Path, purpose: str) -> dict[str, Any]:
    """The record at `path`. Errors: ConfigError for a file that is none, or of a newer schema."""
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"{purpose}: no record at '{path}'. Give the folder of a run.") from error
    except (OSError, ValueError, RecursionError) as error:
        said = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise ConfigError(f"{purpose}: '{path}' is not a record: {said}. Give the folder of a run.") from error
    if not isinstance(record, Mapping) or not isinstance(record.get("nodes"), Mapping):
        raise ConfigError(f"{purpose}: '{path}' is not the record of a run. Give the folder of a run.")
    if not isinstance(record.get("schema"), int) or record["schema"] > SCHEMA:
        raise ConfigError(
            f"{purpose}: '{path}' is of schema {record.get('schema')}, and this qpipe reads up to {SCHEMA}. Update it."
        )
    from qpipe.explain.shape import wrong  # only where a record is read

    if found := wrong(record):
        raise ConfigError(f"{purpose}: '{path}' is not as a run left it: {found}. Mend it, or give another run.")
    return dict(record)


def _is_called(folder: Path, name: str) -> bool:
    """Whether `name` is the folder's path below outputs/, the end of it, or the id at its end."""
    parts = folder.relative_to(OUTPUTS).parts
    wanted = Path(name).parts
    if not wanted:
        return False
    return parts[-len(wanted) :] == wanted or (len(wanted) == 1 and parts[-1].endswith(f"-{name}"))
