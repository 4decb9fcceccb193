"""The Pool that a run asks for: on this machine, or on a cluster."""

from __future__ import annotations

from pathlib import Path

from qpipe.cache.store import Store
from qpipe.language.spec import RunSpec
from qpipe.run import executor
from qpipe.run.cluster.pool import Cluster, ClusterPool
from qpipe.run.workers import Pool


def open_pool(store: Store, run: RunSpec, log: Path | None = None) -> Pool:
    """As `run.cluster` says. Errors: ConfigError where the cluster cannot be used."""
    if run.cluster is None:
        return executor.open_pool(store, run, log)
    return ClusterPool(_cluster(run), store, run, log)


def _cluster(run: RunSpec) -> Cluster:
    threads = executor.worker_count(run) * (run.threads or 1)
    if run.cluster == "ray":
        from qpipe.run.cluster.ray import Ray

        return Ray(run.address, threads)
    from qpipe.run.cluster.dask import Dask

    return Dask(run.address, threads)
