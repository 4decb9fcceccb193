"""A Dask cluster of processes on loopback: a scheduler, and workers that can be killed."""

from __future__ import annotations

import contextlib
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

_PATIENCE_S = 60.0


class DaskCluster:
    """Its scheduler at `address`; processes are started in `folder` with `environment`."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.environment = folder, dict(environment)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{self.port}"
        self.workers: list[subprocess.Popen[bytes]] = []
        self.others: list[subprocess.Popen[bytes]] = []
        listening = ["--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard", "--no-show"]
        self.scheduler = self._run([sys.executable, "-m", "distributed.cli.dask_scheduler", *listening])
        own = ["--no-dashboard", "--no-nanny"]
        self._worker = [sys.executable, "-m", "distributed.cli.dask_worker", self.address, *own]

    def start_worker(self, *options: str) -> None:
        name = ["--name", str(len(self.workers))]
        self.workers.append(self._run([*self._worker, *name, "--nthreads", "1", *options]))

    def start_far_worker(self, hidden: Path, own: Path) -> bool:
        """A worker in a mount namespace of its own, in which the folder `own` lies at `hidden`; False where the system
        lets nobody make one."""
        own.mkdir()
        script = f"mount --bind {own} {hidden} && "
        if subprocess.run(["unshare", "-m", "sh", "-c", script + "true"], capture_output=True).returncode:
            return False
        self.others.append(self._run(["unshare", "-m", "sh", "-c", script + shlex.join(["exec", *self._worker])]))
        return True

    def wait(self, count: int) -> None:
        """Until so many workers are there."""
        from distributed import Client

        with Client(self.address, set_as_default=False, timeout=_PATIENCE_S) as client:
            client.wait_for_workers(count, timeout=_PATIENCE_S)

    def at_work(self) -> subprocess.Popen[bytes]:
        """The worker that has a task."""
        from distributed import Client

        with Client(self.address, set_as_default=False, timeout=_PATIENCE_S) as client:
            (busy,) = (worker for worker, tasks in client.processing().items() if tasks)
            return self.workers[int(client.scheduler_info(n_workers=-1)["workers"][busy]["name"])]

    def _run(self, command: list[str]) -> subprocess.Popen[bytes]:
        with open(self.folder / "dask.log", "ab") as log:
            return subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=log, stderr=log)

    def end(self) -> None:
        for process in [*self.workers, *self.others, self.scheduler]:
            process.kill()
            process.wait()


@contextlib.contextmanager
def dask_cluster(folder: Path, environment: Mapping[str, str], workers: int) -> Iterator[DaskCluster]:
    folder.mkdir()
    cluster = DaskCluster(folder, environment)
    try:
        for _ in range(workers):
            cluster.start_worker()
        if workers:
            cluster.wait(workers)
        yield cluster
    finally:
        cluster.end()


def until(what: object, seconds: float = _PATIENCE_S) -> None:
    """Wait until `what()` is true."""
    end = time.monotonic() + seconds
    while not what():  # type: ignore[operator]
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)
