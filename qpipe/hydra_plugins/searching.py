"""A search, carried out by Hydra's launchers: by `qpipe` trial after trial, each asked for when a worker has nothing
to do; by any other one in batches, as many at a time as it carries out side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.types import TaskFunction
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.qpipe.launcher import QpipeLauncher
from qpipe.report.figures import Figures
from qpipe.search.space import read_space
from qpipe.search.study import Asked, SearchOptions, Study, refuse_missing

RECORD = "record.json"


def search(own: Any, task: TaskFunction, given: Mapping[str, Any], words: list[str]) -> list[Sequence[JobReturn]]:
    """Carry the search out with the launcher of Hydra's sweeper `own`, as the options `given` say: what each trial gave
    back, in a list."""
    refuse_missing()
    options = SearchOptions(
        given["sampler"], given["max_trials"], given["budget_s"], tuple(given["objectives"] or ()),
        dict(given["within"] or {}), given["seed"],
    )  # fmt: skip
    parser = OverridesParser.create(config_loader=own.hydra_context.config_loader)
    space = read_space(parser.parse_overrides([*own._parse_config(), *words]), given["conditions"] or {})
    launcher = own.launcher
    alone = isinstance(launcher, QpipeLauncher) and hasattr(task, "qpipe_search")
    if alone:
        launcher.check([space.overrides(values) for values in space.probes()])
    folder = Path(str(own.config.hydra.sweep.dir)).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(own.config, folder / "multirun.yaml")
    study = Study(space, options, folder)
    return [launcher.search(study) if alone else list(_in_batches(study, launcher, own.config))]


def _in_batches(study: Study, launcher: Any, config: DictConfig) -> Iterator[JobReturn]:
    size = batch_size(config)
    while batch := list(_batch(study, size)):
        overrides = [each.overrides for each in batch]
        returns: Sequence[JobReturn] = launcher.launch(overrides, initial_job_idx=batch[0].number)
        for asked, job in zip(batch, returns, strict=True):
            study.tell(asked.number, _figures(job), _folder(job))
        yield from returns


def _batch(study: Study, size: int) -> Iterator[Asked]:
    """At most `size` trials whose numbers follow one another, as launchers number them."""
    for _ in range(1 if study.waits else size):  # those that were stopped have numbers of their own
        if (asked := study.ask()) is None:
            return
        yield asked


def batch_size(config: DictConfig) -> int:
    """How many trials the launcher carries out at a time, by what its options are called."""
    hydra = config.hydra
    if hydra.sweeper.get("max_batch_size"):
        return int(hydra.sweeper.max_batch_size)
    count = int(hydra.launcher.get("n_jobs") or hydra.launcher.get("array_parallelism") or 1)
    return count if count > 0 else os.cpu_count() or 1


def _folder(job: JobReturn) -> Path | None:
    return None if job.hydra_cfg is None else Path(str(job.hydra_cfg.hydra.runtime.output_dir))


def _figures(job: JobReturn) -> Figures | None:
    """Of the record that a trial of qpipe left; of another task its value is the score."""
    folder = _folder(job)
    path = None if folder is None else folder / RECORD
    if path is not None and path.exists():
        record = json.loads(path.read_text())
        figures: Figures = record["figures"]
        return None if figures.get("score") is None and record["status"] == "failed" else figures
    value = job._return_value
    return {"score": float(value)} if isinstance(value, int | float) and value == value else None
