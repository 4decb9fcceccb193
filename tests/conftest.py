"""Fixtures that every test may use."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import logging
import os
import secrets
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: the tensors are tiny, and tests run side by side

from tests.nursery import Nursery
from tests.once import once
from tests.s3_server import ENVIRONMENT
from tests.toy import Toy, in_this_process

if TYPE_CHECKING:
    from qpipe.model import Model

settings.register_profile("suite", derandomize=True, deadline=None)  # the same examples in every run
settings.register_profile("search", derandomize=False, deadline=None, max_examples=2000, print_blob=True)
settings.load_profile("suite")
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell starts in the background
MEMORY = Path("/dev/shm")
ROOM = 4 << 30  # bytes; what the largest test writes, and others beside it


def pytest_configure() -> None:
    """Temporary folders lie in memory where there is room: there a thousand small writes wait for no disk, and since a
    kill is no power cut, what it leaves is the same."""
    if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


@pytest.fixture(scope="session", autouse=True)
def exporter_with_a_memory() -> None:
    """Small networks are exported in half the time."""
    if "torch" in sys.modules:
        from tests.quick_export import remember

        remember()


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Where runs of the command line are forked from; started with the first test that wants it."""
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="session")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """By name, what the import makes of a network of the zoo: kept in a store, as between two nodes of a run."""
    from qpipe.artifacts.artifact import Artifact, load, save
    from qpipe.cache.store import Store
    from qpipe.model import Model
    from tests.zoo import built, inputs

    def make(name: str, folder: Path) -> None:
        module, example = built(name)
        artifact = save(Model.from_torch(module, inputs(example)), Store(folder))
        (folder / "artifact.json").write_text(json.dumps(dataclasses.asdict(artifact)))

    @functools.cache
    def imported(name: str) -> Model:
        folder = once(tmp_path_factory, f"zoo-{name}", functools.partial(make, name))
        artifact = Artifact(**json.loads((folder / "artifact.json").read_text()))
        return Model.of(load(artifact, Store(folder, readonly=True)))

    return imported


@pytest.fixture(scope="session")
def bare_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for commands that run nothing. What it learns is what the code of the built-in stages is made of, which
    takes half of the time of the first plan."""
    return tmp_path_factory.mktemp("bare")


@pytest.fixture
def toy(tmp_path: Path, nursery: Nursery) -> Toy:
    """A folder with the toy plug-in, its own cache and the command line."""
    return Toy(tmp_path, nursery)


@pytest.fixture
def toy_stages(tmp_path: Path) -> Iterator[Toy]:
    """The toy plug-in inside this process: `catalog()` knows its stages until the test ends."""
    with in_this_process(Toy(tmp_path)) as toy:
        yield toy


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    """An S3 server on loopback."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def moto(moto_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty bucket; the environment says how to reach it."""
    import boto3

    for name, value in (ENVIRONMENT | {"AWS_ENDPOINT_URL": moto_endpoint}).items():
        monkeypatch.setenv(name, value)
    bucket = f"cache-{secrets.token_hex(4)}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}/team"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line that sums up what the crash tests tried; they hand their counts over as a property."""
    counts: Counter[str] = Counter()
    for report in terminalreporter.getreports(""):  # teardowns: only they know what a fixture counted
        counts.update(dict(report.user_properties).get("crash", {}))
    if counts:
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        terminalreporter.write_line(f"crash tests: {told}")


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is loaded by now stays, and tests make many objects: looking through all of them so often takes 4 % of the
    processor time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
