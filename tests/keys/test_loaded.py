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
    since = loaded.loaded_since(before)
    assert since == ["zq_package", "zq_package.inner"]
    assert list(loaded.digests(since, Memo())) == ["zq_package.inner"]
    assert loaded.loaded_since(loaded.count()) == []


def test_bytecode_that_may_be_of_the_source_before_is_not_run(folder: Path) -> None:
    """An edit of the same size within one second: the .pyc says that it is of this source."""
    source = folder / "zq_quick.py"
    source.write_text("x = 1")
    py_compile.compile(str(source))
    status = source.stat()
    source.write_text("x = 2")
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert importlib.import_module("zq_quick").x == 2


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        file = folder / f"{name.replace('__', '/').replace('/init', '/__init__')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_a_module_that_is_laid_aside_is_given_back_to_whoever_imports_it_and_that_is_seen(folder: Path) -> None:
    write(folder, zq_key="x = 1", zq_other="class C: pass", zq_third="x = 1")
    key, other, third = (importlib.import_module(name) for name in ("zq_key", "zq_other", "zq_third"))
    asked: set[str] = set()
    with loaded.apart({"zq_key"}, asked):
        assert sys.modules["zq_key"] is key
        assert not {"zq_other", "zq_third"} & set(sys.modules)
        assert importlib.import_module("zq_key") is key
        assert importlib.import_module("zq_other") is other
        from zq_other import C  # type: ignore[import-not-found]
    assert asked == {"zq_other"}
    assert C is other.C
    assert [sys.modules[name] for name in ("zq_key", "zq_other", "zq_third")] == [key, other, third]
    assert other.__spec__.loader.path == str(folder / "zq_other.py")


def test_a_package_is_without_its_modules_that_were_laid_aside_until_they_are_imported(folder: Path) -> None:
    """`hydra.utils.get_method` asks the package for an attribute first."""
    write(folder, zq_in__init="", zq_in__one="x = 1", zq_in__two="x = 2")
    package, one = (importlib.import_module(name) for name in ("zq_in", "zq_in.one"))
    two = importlib.import_module("zq_in.two")
    with loaded.apart({"zq_in"}, asked := set[str]()):
        assert not hasattr(package, "one")
        assert importlib.import_module("zq_in.two") is package.two is two
    assert asked == {"zq_in.two"}
    assert (package.one, package.two) == (one, two)


def test_what_a_module_imported_comes_back_with_it(folder: Path) -> None:
    """Types of a base class are looked up in the module that it says it comes from."""
    write(folder, zq_base="import os\nclass Base:\n    at: 'os.PathLike[str]'\n", zq_mid="from zq_base import Base\n")
    write(folder, zq_top="import typing, zq_mid\nclass Top(zq_mid.Base): ...\nHINTS = typing.get_type_hints(Top)\n")
    importlib.import_module("zq_mid")
    assert list(importlib.import_module("zq_top").HINTS) == ["at"]
    assert loaded.belonging({"zq_top"}) >= {"zq_mid", "zq_base"}


def test_a_name_that_a_package_binds_over_its_module_stays(folder: Path) -> None:
    write(folder, zq_over__init="from .deep import deep", zq_over__deep="def deep(): return 1")
    write(folder, zq_user="import zq_over.deep\nfrom zq_over import deep\nfound = deep()")
    importlib.import_module("zq_over")
    assert importlib.import_module("zq_user").found == 1
    with loaded.apart({"zq_user"}, set()):
        assert importlib.import_module("zq_over").deep() == 1
    with loaded.apart({"nothing"}, set()):
        importlib.import_module("zq_over.deep")
        assert importlib.import_module("zq_over").deep() == 1


def test_modules_that_import_one_another_are_loaded_as_ever(folder: Path) -> None:
    write(folder, zq_round="x = 1\nimport zq_about\ny = zq_about.z\n", zq_about="import zq_round\nz = zq_round.x + 1\n")
    assert importlib.import_module("zq_round").y == 2
    assert loaded.belonging({"zq_about"}) == loaded.belonging({"zq_round"}) == {"zq_about", "zq_round"}


def test_a_module_that_fails_leaves_the_others_where_they_were(folder: Path) -> None:
    write(folder, zq_fine="x = 1", zq_fails="import zq_fine\nraise RuntimeError")
    fine = importlib.import_module("zq_fine")
    with loaded.apart({"nothing"}, set()), pytest.raises(RuntimeError):
        importlib.import_module("zq_fails")
    assert "zq_fails" not in sys.modules
    assert importlib.import_module("zq_fine") is fine


def test_what_a_module_puts_on_the_path_is_there_for_who_uses_it(folder: Path) -> None:
    write(folder, zq_paths="import sys\nsys.path[:0] = ['/zq/a', '/zq/b']\nsys.path.append('/zq/c')")
    path = list(sys.path)
    importlib.import_module("zq_paths")
    with_it = list(sys.path)
    assert with_it != path
    for take in ({"zq_paths"}, {"nothing"}):
        sys.path[:] = path
        with loaded.apart(take, set()):
            importlib.import_module("zq_paths")
            assert sys.path == with_it


def test_another_file_of_the_name_is_loaded_and_makes_the_process_spent(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded, "_twice", set())
    write(folder, zq_double="x = 1")
    write(folder / "other", zq_double="x = 2")
    importlib.import_module("zq_double")
    assert "zq_double" not in loaded.changed_modules()
    with loaded.apart({"nothing"}, set()):
        sys.path.insert(0, str(folder / "other"))
        assert importlib.import_module("zq_double").x == 2
    assert "zq_double" in loaded.changed_modules()
