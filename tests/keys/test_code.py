from __future__ import annotations

import json
import os
import py_compile
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qpipe.errors import ConfigError
from qpipe.keys.code import FORMULA, CodeIndex, _brought

Write = Callable[[dict[str, str]], None]


class Notes(dict[str, Any]):
    def set(self, key: str, value: Any) -> None:
        self[key] = value


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes files below a folder that is on Python's path."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(textwrap.dedent(text))

    return write


def code(module: str) -> str:
    return CodeIndex(Notes()).digest(module)


def reached(*modules: str) -> set[str]:
    return set(CodeIndex(Notes()).modules(*modules))


def test_a_reformatted_module_is_the_same_and_a_changed_one_is_not(write: Write) -> None:
    write({"zq_one.py": "def f(x):\n    'doc'\n    return x + 1"})
    first = code("zq_one")
    write({"zq_one.py": "# why\ndef f( x ):\n    return (x +\n        1)"})
    assert code("zq_one") == first
    write({"zq_one.py": "def f(x):\n    return x + 2"})
    assert code("zq_one") != first


@pytest.mark.parametrize(
    "statement",
    [
        "import zq_lib.deep.formula",
        "import zq_lib.deep.formula as it",
        "from zq_lib.deep import formula",
        "from zq_lib.deep.formula import f",
        "from zq_lib.deep.formula import *",
        "from zq_lib import through",
        "def g():\n    import zq_lib.deep.formula",
        "class C:\n    def g(self):\n        from zq_lib.deep import formula",
        "if TYPE_CHECKING:\n    from zq_lib.deep.formula import f",
        "try:\n    import zq_lib.deep.formula\nexcept ImportError:\n    pass",
        "import importlib\nit = importlib.import_module('zq_lib.deep.formula')",
        "import importlib\nNAMES = ['zq_lib.deep.formula']\nit = importlib.import_module(NAMES[0])",
        "import zq_lib.listed",
        "from zq_lib.starred import *",
        "from importlib import import_module as load\nit = load('zq_lib.deep.formula')",
        "import importlib\ndef g(n):\n    return importlib.import_module(f'zq_lib.deep.{n}')",
        "import importlib\ndef g(n):\n    return importlib.import_module('zq_lib.deep.' + n)",
        "import importlib\ndef g(n):\n    return importlib.import_module('zq_lib.deep.%s' % n)",
        "import importlib\nit = importlib.import_module('.formula', package='zq_lib.deep')",
        "import importlib\nit = [*map(importlib.import_module, ['zq_lib.deep.formula'])]",
        "import pkgutil\nit = pkgutil.resolve_name('zq_lib.deep.formula:f')",
        "it = __import__('zq_lib.deep', fromlist=['formula'])",
        "import zq_lib.lazy\nit = zq_lib.lazy.entry",
        "import zq_lib.attached\nit = zq_lib.attached.entry",
        "import zq_space.inner.entry",
    ],
)
def test_a_change_in_any_module_it_reaches_changes_the_digest(write: Write, statement: str) -> None:
    write(
        {
            "zq_root.py": statement,
            "zq_lib/__init__.py": "",
            "zq_lib/through.py": "from .deep import formula",
            "zq_lib/listed/__init__.py": "import pkgutil\nNAMES = [*pkgutil.iter_modules(__path__)]",
            "zq_lib/listed/entry.py": "from ..deep import formula",
            "zq_lib/starred/__init__.py": "__all__ = ['entry']",
            "zq_lib/starred/entry.py": "from ..deep import formula",
            "zq_lib/lazy/__init__.py": "import importlib\ndef __getattr__(name):\n"
            "    return importlib.import_module('.' + name, __name__)",
            "zq_lib/lazy/entry.py": "from ..deep import formula",
            "zq_lib/attached/__init__.py": "import lazy_loader\n"
            "__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submodules=['entry'])",
            "zq_lib/attached/entry.py": "from ..deep import formula",
            "zq_space/inner/entry.py": "from zq_lib.deep import formula",
            "zq_lib/deep/__init__.py": "",
            "zq_lib/deep/formula.py": "from ..constants import ONE\ndef f(): return ONE",
            "zq_lib/constants.py": "ONE = 1",
            "zq_lib/other.py": "X = 1",
        }
    )
    first = code("zq_root")
    assert "zq_lib.constants" in reached("zq_root")
    write({"zq_lib/constants.py": "ONE = 2"})
    assert code("zq_root") != first
    write({"zq_lib/constants.py": "ONE = 1", "zq_lib/other.py": "X = 2"})
    assert code("zq_root") == first


def test_the_packages_on_the_way_count(write: Write) -> None:
    write({"zq_pkg/__init__.py": "X = 1", "zq_pkg/m.py": ""})
    first = code("zq_pkg.m")
    write({"zq_pkg/__init__.py": "X = 2"})
    assert code("zq_pkg.m") != first


def test_circles_and_long_chains_end(write: Write) -> None:
    write({f"zq_c{i}.py": f"import zq_c{(i + 1) % 1200}" for i in range(1200)})
    assert len(reached("zq_c0")) == 1200


def test_a_lazy_package_reaches_what_it_hands_out() -> None:
    assert {"qpipe.model.model", "qpipe.model.simulation.module"} <= reached("qpipe.model")


LAZY = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from zq_lazy.face import Face
__all__ = ["Face", "value"]
def __getattr__(name):
    if name == "Face":
        from zq_lazy.face import Face
        return Face
    raise AttributeError(name)
"""


@pytest.mark.parametrize(
    ("source", "reaches_face"),
    [
        ("from zq_lazy.value import VALUE", False),
        ("def f():\n    from zq_lazy.inner.deep import DEEP", False),
        ("from zq_lazy import Face", True),
        ("from zq_lazy import value", True),  # the package itself is at hand, and may be asked for more
        ("from zq_lazy import *", True),
        ("import zq_lazy.value", True),
        ("import zq_lazy", True),
        ("import importlib\nimportlib.import_module('zq_lazy.value')", True),
    ],
)
def test_what_a_package_hands_out_lazily_counts_where_it_is_asked(
    write: Write, source: str, reaches_face: bool
) -> None:
    write(
        {
            "zq_root.py": source,
            "zq_lazy/__init__.py": LAZY,
            "zq_lazy/value.py": "VALUE = 1",
            "zq_lazy/inner/__init__.py": "",
            "zq_lazy/inner/deep.py": "from ..value import VALUE\nDEEP = VALUE",
            "zq_lazy/face.py": "class Face: ...",
        }
    )
    found = reached("zq_root")
    assert "zq_lazy" in found  # its own code runs when anything in it is imported
    assert ("zq_lazy.face" in found) == reaches_face
    assert "zq_lazy.face" in reached("zq_root", "zq_lazy.face")


def test_a_module_that_asks_its_own_getattr_is_not_lazy(write: Write) -> None:
    write({"zq_root.py": "from zq_own.value import VALUE", "zq_own/value.py": "VALUE = 1"})
    write({"zq_own/face.py": "class Face: ..."})
    source = "def __getattr__(name):\n    from zq_own import face\n    return 1\nX = __getattr__('X')"
    write({"zq_own/__init__.py": source})
    assert "zq_own.face" in reached("zq_root")


def test_a_module_without_statements_is_no_ingredient_until_it_has_some(write: Write) -> None:
    write({"zq_root.py": "from zq_empty.m import x", "zq_empty/__init__.py": "", "zq_empty/m.py": "x = 1"})
    first = code("zq_root")
    assert reached("zq_root") == {"zq_root", "zq_empty.m"}
    write({"zq_empty/__init__.py": '"""Only words."""\n'})
    assert code("zq_root") == first
    write({"zq_empty/__init__.py": "import sys"})
    assert code("zq_root") != first


def test_the_engine_is_no_part_of_a_formula() -> None:
    found = reached("qpipe.model.model")
    assert {name.partition(".")[2].partition(".")[0] for name in found} <= FORMULA
    assert "qpipe" not in found


def test_all_that_results_are_made_by_is_part_of_a_formula() -> None:
    parts = {name.split(".")[1] for name in reached("qpipe.stages.adaround")}
    assert parts >= {"stages", "methods", "model", "numerics", "mapped"}
    assert {name.split(".")[1] for name in reached("qpipe.demo.net")} == {"demo"}


def test_nothing_is_imported_or_run(write: Write, tmp_path: Path) -> None:
    write({"zq_bad/__init__.py": "raise SystemExit('ran')", "zq_bad/m.py": "import torch\nraise SystemExit"})
    program = (
        "import sys; from qpipe.keys.code import CodeIndex\n"
        "class Memo(dict):\n    def set(self, k, v): self[k] = v\n"
        "index = CodeIndex(Memo()); index.digest('zq_bad.m'); index.libraries('zq_bad.m')\n"
        "assert not {'zq_bad', 'torch', 'numpy'} & set(sys.modules), sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def test_libraries_are_named_by_distribution_with_their_version(write: Write) -> None:
    import numpy
    import onnx_ir

    write(
        {
            "zq_user.py": "import json, numpy.linalg, zq_user2, not_installed_anywhere\nfrom PIL import Image",
            "zq_user2.py": "def f():\n    import onnx_ir as ir\n    import torch",
        }
    )
    found = CodeIndex(Notes()).libraries("zq_user")
    assert set(found) - {"pillow"} == {"numpy", "onnx-ir", "torch"}
    assert found["numpy"] == numpy.__version__
    assert found["onnx-ir"] == onnx_ir.__version__
    assert "+" not in found["torch"]  # the device that a build is for does not count


def test_a_distribution_of_another_name_is_found(write: Write) -> None:
    write({"zq_user.py": "import hydra"})
    assert set(CodeIndex(Notes()).libraries("zq_user")) == {"hydra-core"}


def test_an_installed_plug_in_counts_by_its_code(write: Write, tmp_path: Path, monkeypatch: Any) -> None:
    site = tmp_path / "site-packages"
    monkeypatch.syspath_prepend(site)
    files = {
        "site-packages/zq_plug/__init__.py": "",
        "site-packages/zq_plug/stage.py": "from .math import f\nimport zq_neighbour",
        "site-packages/zq_plug/math.py": "f = 1",
        "site-packages/zq_neighbour.py": "x = 1",
        "site-packages/zq_neighbour-2.0.dist-info/METADATA": "Name: zq_neighbour\nVersion: 2.0",
    }
    write(files)
    assert reached("zq_plug.stage") == {"zq_plug.stage", "zq_plug.math"}  # an empty __init__ says nothing
    assert CodeIndex(Notes()).libraries("zq_plug.stage") == {"zq_neighbour": "2.0"}


def test_what_no_version_tells_counts_by_its_code(write: Write, tmp_path: Path, monkeypatch: Any) -> None:
    """A package copied or linked into an install folder belongs to no distribution."""
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    write({"zq_user.py": "import zq_copied, zq_linked", "site-packages/zq_copied.py": "x = 1"})
    write({"dev/zq_linked/__init__.py": "x = 1"})
    (tmp_path / "site-packages" / "zq_linked").symlink_to(tmp_path / "dev" / "zq_linked")
    first = code("zq_user")
    write({"site-packages/zq_copied.py": "x = 2"})
    second = code("zq_user")
    write({"dev/zq_linked/__init__.py": "x = 2"})
    assert len({first, second, code("zq_user")}) == 3


def test_a_package_installed_from_a_folder_counts_by_its_files(
    write: Write, tmp_path: Path, monkeypatch: Any
) -> None:
    """`pip install .` again, after an edit and without a new version."""
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    info = "site-packages/zq_mine-1.0.dist-info/"
    write({
        "zq_user.py": "import zq_mine",
        "site-packages/zq_mine.py": "",
        info + "METADATA": "Name: zq_mine\nVersion: 1.0",
        info + "direct_url.json": '{"url": "file:///home/me/mine", "dir_info": {}}',
        info + "RECORD": "zq_mine.py,sha256=aaa,1\nzq_mine-1.0.dist-info/direct_url.json,sha256=x,1\n",
    })  # fmt: skip
    versions = []
    for record in ("zq_mine.py,sha256=aaa,1\nzq_mine-1.0.dist-info/direct_url.json,sha256=y,1\n",
                   "zq_mine.py,sha256=bbb,1\n"):  # fmt: skip
        versions.append(CodeIndex(Notes()).libraries("zq_user")["zq_mine"])
        write({info + "RECORD": record})
    versions.append(CodeIndex(Notes()).libraries("zq_user")["zq_mine"])
    assert versions[0] == versions[1] != versions[2]
    assert all(version.startswith("1.0 ") for version in versions)
    write({"site-packages/zq_mine.py": "x = 'edited where it is installed'"})
    assert CodeIndex(Notes()).libraries("zq_user")["zq_mine"] not in versions
    write({info + "direct_url.json": '{"url": "https://example.org/mine-1.0.whl"}'})
    assert CodeIndex(Notes()).libraries("zq_user") == {"zq_mine": "1.0"}


def test_where_a_package_came_from_belongs_to_its_version(write: Write, tmp_path: Path, monkeypatch: Any) -> None:
    """A branch installed again, a wheel at an address put in another's place: the version stays the same."""
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    info = "site-packages/zq_mine-1.0.dist-info/"
    write({"zq_user.py": "import zq_mine", "site-packages/zq_mine.py": ""})
    write({info + "METADATA": "Name: zq_mine\nVersion: 1.0"})
    origins = [
        {"url": "https://example.org/mine", "vcs_info": {"vcs": "git", "commit_id": "aaa"}},
        {"url": "https://example.org/mine", "vcs_info": {"vcs": "git", "commit_id": "bbb"}},
        {"url": "https://example.org/mine.whl", "archive_info": {"hashes": {"sha256": "ccc"}}},
        {"url": "https://example.org/mine.whl", "archive_info": {"hash": "sha256=ddd"}},
    ]
    found = []
    for origin in origins:
        write({info + "direct_url.json": json.dumps(origin)})
        found.append(CodeIndex(Notes()).libraries("zq_user")["zq_mine"])
    assert len(set(found)) == 4
    assert found[0] == "1.0 aaa"
    assert all(version.startswith("1.0 ") for version in found)


def test_a_distribution_that_bears_another_s_import_name_is_not_taken_for_it(
    write: Write, tmp_path: Path, monkeypatch: Any
) -> None:
    """As `attr` and `attrs`: the package comes from the distribution whose files it is among."""
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    write({
        "zq_user.py": "import zq_attr",
        "site-packages/zq_attr/__init__.py": "",
        "site-packages/zq_attr-9.0.dist-info/METADATA": "Name: zq_attr\nVersion: 9.0",
        "site-packages/zq_attr-9.0.dist-info/RECORD": "zq_other.py,sha256=a,1\n",
        "site-packages/zq_attrs-1.0.dist-info/METADATA": "Name: zq_attrs\nVersion: 1.0",
        "site-packages/zq_attrs-1.0.dist-info/RECORD": "zq_attr/__init__.py,sha256=b,1\n",
    })  # fmt: skip
    _brought.cache_clear()
    assert CodeIndex(Notes()).libraries("zq_user") == {"zq_attrs": "1.0"}
    _brought.cache_clear()


def test_a_folder_that_pip_installs_into_is_no_folder_of_the_users(write: Write, tmp_path: Path) -> None:
    write(
        {"zq_vendored.py": "x = 1", "zq_vendored-1.5.dist-info/METADATA": "Name: zq_vendored\nVersion: 1.5"}
    )
    factory = CodeIndex(Notes()).digest_factory("zq_vendored:f", tmp_path / "elsewhere")
    write({"zq_vendored.py": "x = 2"})
    assert CodeIndex(Notes()).digest_factory("zq_vendored:f", tmp_path / "elsewhere") == factory


def test_a_factory_counts_by_its_code_its_name_and_the_versions_below_it(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text("import numpy\nfrom layers import conv\ndef build(): return conv")
    (tmp_path / "layers.py").write_text("conv = 1")

    def named(factory: str = "nets:build") -> str:
        return CodeIndex(Notes()).digest_factory(factory, tmp_path)

    first = named()
    assert named() == first != named("nets:other")
    (tmp_path / "layers.py").write_text("conv = 2")
    assert named() != first
    (tmp_path / "layers.py").write_text("conv = (1)")
    assert named() == first


def test_a_factory_may_bear_the_name_of_a_standard_module(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("def build(): return 1")
    first = CodeIndex(Notes()).digest_factory("code:build", tmp_path)
    (tmp_path / "code.py").write_text("def build(): return 2")
    assert CodeIndex(Notes()).digest_factory("code:build", tmp_path) != first


def test_a_module_that_goes_before_the_standard_one_of_its_name_counts(write: Write) -> None:
    write({"zq_user.py": "import sched, queue", "sched.py": "import zq_below", "zq_below.py": "x = 1"})
    write({"queue/data.txt": "a mere folder goes before nothing"})
    assert reached("zq_user") == {"zq_user", "sched", "zq_below"}
    first = code("zq_user")
    write({"sched.py": "import zq_below\nx = 2"})
    assert code("zq_user") != first


def test_a_module_without_a_source_counts_by_its_bytes(write: Write, tmp_path: Path) -> None:
    write({"zq_user.py": "import zq_bare"})
    found = set()
    for text in ("x = 1", "x = 2", "x = 1"):
        write({"zq_bare.py": text})
        py_compile.compile(str(tmp_path / "zq_bare.py"), str(tmp_path / "zq_bare.pyc"), "zq_bare.py",
                           invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)  # fmt: skip
        (tmp_path / "zq_bare.py").unlink()
        assert reached("zq_user") == {"zq_user", "zq_bare"}
        found.add(code("zq_user"))
    assert len(found) == 2


def test_a_mere_folder_does_not_hide_an_installed_package(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "nets.py").write_text("import onnx")
    index = CodeIndex(Notes())
    assert "onnx" in index._reach("nets", tmp_path, own=False).libraries


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("nets", "expected 'module:function'"),
        ("nets:", "expected 'module:function'"),
        (":build", "expected 'module:function'"),
        ("../nets:build", "expected 'module:function'"),
        ("missing:build", "no module 'missing' was found in"),
        ("nets.inner:build", r"no module 'nets\.inner'"),
        ("broken:build", r"broken\.py:1: not Python"),
    ],
)
def test_a_factory_that_cannot_be_read_is_refused_in_one_line(
    tmp_path: Path, factory: str, said: str
) -> None:
    (tmp_path / "nets.py").write_text("")
    (tmp_path / "broken.py").write_text("x = = 1")
    with pytest.raises(ConfigError, match=said) as caught:
        CodeIndex(Notes()).digest_factory(factory, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_warm_index_parses_nothing(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qpipe.keys.hashing._RACY_NS", 0)
    write({"zq_a.py": "import zq_b, numpy", "zq_b.py": "from importlib import import_module"})
    memo = Notes()
    cold = CodeIndex(memo)
    first, libraries = cold.digest("zq_a"), cold.libraries("zq_a")

    def refuse(*arguments: object) -> None:
        raise AssertionError("parsed again")

    monkeypatch.setattr("qpipe.keys.code.analyse", refuse)
    warm = CodeIndex(memo)
    assert (warm.digest("zq_a"), warm.libraries("zq_a")) == (first, libraries)
    write({"zq_b.py": "X = 1"})
    with pytest.raises(AssertionError, match="parsed again"):
        CodeIndex(memo).digest("zq_a")


def test_what_a_memo_made_up_is_analysed_again(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qpipe.keys.hashing._RACY_NS", 0)
    write({"zq_a.py": "import numpy"})
    memo = Notes()
    first = CodeIndex(memo).digest("zq_a")
    for made_up in (7, "x", [], [1, 2], ["d", [[0]]], ["d", 3], {"digest": 1}, None):
        for key in memo:
            memo[key] = made_up
        assert CodeIndex(memo).digest("zq_a") == first


def test_a_file_written_just_now_is_not_memoised(write: Write) -> None:
    write({"zq_a.py": "x = 1"})
    memo = Notes()
    CodeIndex(memo).digest("zq_a")
    assert not memo


def test_moving_a_checkout_changes_nothing(tmp_path: Path) -> None:
    digests = set()
    for place in ("one", "other/deeper"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "nets.py").write_text("import layers\ndef build(): pass")
        (tmp_path / place / "layers.py").write_text("x = 1")
        digests.add(CodeIndex(Notes()).digest_factory("nets:build", tmp_path / place))
    assert len(digests) == 1
