"""What runs in this process against what a key was made of."""

from __future__ import annotations

import importlib
import os
import py_compile
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qpipe.keys import loaded
from qpipe.keys.code import CodeIndex


class Memo(dict[str, Any]):
    def set(self, key: str, value: Any) -> None:
        self[key] = value


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path, of whose modules the bytes are kept until the test ends."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    loaded.watch(frozenset())
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("zq_")]:
        del sys.modules[name]


def planned(folder: Path, name: str) -> dict[str, str]:
    """The module as a plan made now would name it."""
    made = CodeIndex(Memo()).module(name, folder)
    assert made is not None
    return {name: made[:16]}


def test_a_module_that_runs_as_planned_does_not_differ(folder: Path) -> None:
    (folder / "zq_same.py").write_text("x = 1")
    importlib.import_module("zq_same")
    assert loaded.differing("same", planned(folder, "zq_same"), Memo()) == []
    (folder / "zq_same.py").write_text("x = 1  # a comment")
    assert loaded.differing("comment", planned(folder, "zq_same"), Memo()) == []


def test_a_module_that_was_edited_after_it_was_loaded_runs_as_what_it_was(folder: Path) -> None:
    (folder / "zq_edited.py").write_text("x = 1")
    before = planned(folder, "zq_edited")
    importlib.import_module("zq_edited")
    (folder / "zq_edited.py").write_text("x = 2")
    after = planned(folder, "zq_edited")
    assert loaded.differing("before", before, Memo()) == []
    assert loaded.differing("after", after, Memo()) == ["zq_edited"]


def test_what_is_not_loaded_cannot_differ_and_is_looked_at_once_it_is(folder: Path) -> None:
    (folder / "zq_late.py").write_text("x = 1")
    expected = {"zq_late": "0" * 16}
    assert loaded.differing("late", expected, Memo()) == []
    importlib.import_module("zq_late")
    assert loaded.differing("late", expected, Memo()) == ["zq_late"]


def test_modules_loaded_since_are_those_with_something_in_them(folder: Path) -> None:
    (folder / "zq_package").mkdir()
    (folder / "zq_package" / "__init__.py").write_text('"""Nothing."""')
    (folder / "zq_package" / "inner.py").write_text("x = 1")
    before = loaded.count()
    importlib.import_module("zq_package.inner")
    assert list(loaded.loaded_since(before, Memo())) == ["zq_package.inner"]
    assert loaded.loaded_since(loaded.count(), Memo()) == {}


def test_bytecode_that_may_be_of_the_source_before_is_not_run(folder: Path) -> None:
    """An edit of the same size within one second: the .pyc says that it is of this source."""
    source = folder / "zq_quick.py"
    source.write_text("x = 1")
    py_compile.compile(str(source))
    status = source.stat()
    source.write_text("x = 2")
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert importlib.import_module("zq_quick").x == 2
