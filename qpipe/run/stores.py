"""The cache that a config names: on this machine, and the shared one behind it."""

from __future__ import annotations

import os
from pathlib import Path

from qpipe.cache.store import Store
from qpipe.errors import ConfigError
from qpipe.language.spec import PipelineSpec


def open_local_store(spec: PipelineSpec) -> Store:
    """The cache on this machine: `cache.dir`, else $QPIPE_CACHE_DIR, else the user's cache folder."""
    return Store(cache_folder(spec.cache_dir))


def open_store(spec: PipelineSpec) -> Store:
    """The cache on this machine, with `cache.remote` behind it where there is one."""
    if spec.remote is None:
        return open_local_store(spec)
    if spec.remote.url.startswith("memory:") and spec.run.workers != 0:
        raise ConfigError(
            f"cache.remote: '{spec.remote.url}' lives in one process, and workers are others. Set run.workers=0."
        )
    from qpipe.cache.shared.objects import check_url, folder_of
    from qpipe.cache.shared.remote import Remote
    from qpipe.cache.shared.tier import TieredStore

    folder = cache_folder(spec.cache_dir)
    if check_url(spec.remote.url) == "file" and folder_of(spec.remote.url).resolve() == folder.resolve():
        raise ConfigError(
            f"cache.remote: '{spec.remote.url}' is the local cache itself. Name another folder."
        )
    return TieredStore(folder, Remote(spec.remote))


def cache_folder(named: str | None) -> Path:
    """The folder of the cache on this machine, where the config names this one, or none."""
    folder = named or os.environ.get("QPIPE_CACHE_DIR")
    try:
        if not folder:
            from platformdirs import user_cache_dir

            folder = user_cache_dir("qpipe")
        return Path(folder).expanduser().absolute()
    except RuntimeError as error:  # no HOME, and nobody of this number in the system's list
        raise ConfigError(
            f"cache.dir: {folder or 'null, the cache folder of the user'}, and no home folder is known. "
            "Set cache.dir=FOLDER or QPIPE_CACHE_DIR."
        ) from error
