"""A lab for every test."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nursery import Nursery
from tests.trust.lab import Lab


@pytest.fixture
def lab(tmp_path: Path, nursery: Nursery) -> Iterator[Lab]:
    """A lab in memory where there is such a folder: hundreds of runs wait for no disk. A kill is no power cut, so what
    it leaves does not depend on the disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield Lab(tmp_path / "lab", nursery)
        return
    with tempfile.TemporaryDirectory(prefix="qpipe-", dir=memory) as folder:
        yield Lab(Path(folder) / "lab", nursery)
