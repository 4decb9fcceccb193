from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qpipe.errors import ConfigError
from qpipe.keys.syntax import EVERY, Import, analyse

SOURCE = '''
"""What the module is for."""
import os  # a comment
from . import sibling
from ..above import name as other


@decorate(1, key="x")
class Grid(Base, metaclass=Meta):
    """A class."""

    bits: int = 8
    """What bits are."""

    async def scale(self, x, /, y=1.5, *rest, z=None, **more) -> float:
        """A method."""
        # why
        if x is None or y != -0.0:
            return {**more, "a": [i async for i in x if i]}
        with open(x) as f, g:
            lambda a: (yield a)
        try:
            match x:
                case {"k": [1, *_], **tail} | Grid(bits=8) | None:
                    pass
        except* ValueError as error:
            raise Error from error
        x: int
        x[1:2, ...] @= (y := 3j)
        return f"{x!r:>{y}}{{}} {z=} text" "more" f"{x:}" + b"b" + u"u"
'''
GOLDEN = "9aaf583bada0d4a43c0719ce6253406a7cdeb4e27bd806c0cf78b7ed4a129057"


def same(left: str, right: str) -> bool:
    return analyse(left.encode(), "x.py").digest == analyse(right.encode(), "x.py").digest


def test_the_normal_form_is_frozen() -> None:
    assert analyse(SOURCE.encode(), "x.py").digest == GOLDEN


ORDERED = "from qpipe.stage import stage{}\n@{}(version=1{})\ndef f(): ...\n"


def test_the_orders_that_a_stage_advises_against_are_not_in_its_form() -> None:
    plain = ORDERED.format("", "stage", "")
    assert same(plain, ORDERED.format("", "stage", ", not_after={'cle': 'why'}, not_before={'bnf': 'why'}"))
    assert same(ORDERED.format(" as s", "s", ""), ORDERED.format(" as s", "s", ", not_after={'cle': 'why'}"))
    assert same(plain, ORDERED.format("", "stage", ", resources={'gpus': 1}"))
    assert not same(plain, ORDERED.format("", "stage", ", always=True"))


def test_an_order_of_anybody_else_s_decorator_is_in_the_form() -> None:
    other = "from elsewhere import stage\n@stage(version=1{})\ndef f(): ...\n"
    assert not same(other.format(""), other.format(", not_after={'cle': 'why'}"))


_PRINT_TOKENS = """
import ast, sys, types
sys.modules["blake3"] = types.SimpleNamespace(blake3=None)  # another interpreter has none
sys.path.insert(0, sys.argv[1])
from qpipe.keys.syntax import _tokens
print(repr(list(_tokens(ast.parse(sys.stdin.buffer.read())))))
"""


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_another_python_version_writes_the_same_form(version: str) -> None:
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"no Python {version} here")
    root = Path(__file__).parents[2]
    sources = [SOURCE.encode(), *(file.read_bytes() for file in sorted((root / "qpipe").glob("*.py"))[:5])]
    for source in sources:
        found = [
            subprocess.run(
                [path, "-c", _PRINT_TOKENS, root], input=source, capture_output=True, check=True
            ).stdout
            for path in (python, sys.executable)
        ]
        assert found[0] == found[1]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("x = 1", "x=1   # a comment\n\n"),
        ("def f():\n    'doc'\n    return 1", "def f():\n\treturn 1"),
        ("'module'\nx = 1", "x = 1"),
        ("class A:\n    'doc'\n    x = 1\n    'of x'", "class A:\n    x = 1"),
        ("x = 'a' 'b'", 'x = "ab"'),
        ("x = u'a'", "x = 'a'"),
        ("x = 0x10", "x = 16"),
        ("x = (1,\n     2)", "x = 1, 2"),
        ("def f(x):  # type: (int) -> int\n    return x", "def f(x): return x"),
        ("f'a' 'b' f'{x}'", "f'ab{x}'"),
        ("f'{x:}'", "f'{x}'"),
        ("if x: pass\nelif y: pass", "if x: pass\nelse:\n    if y: pass"),
    ],
)
def test_what_is_only_written_differently_is_the_same(left: str, right: str) -> None:
    assert same(left, right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("x = 1", "x = 2"),
        ("x = 1", "x = 1.0"),
        ("x = 1", "x = True"),
        ("x = 1", "x = '1'"),
        ("x = b'a'", "x = 'a'"),
        ("x = 1", "y = 1"),
        ("x = None", "x = ..."),
        ("x = a + b", "x = a - b"),
        ("x = a, b", "x = b, a"),
        ("x = [a]", "x = a,"),
        ("def f(a): pass", "def f(*, a): pass"),
        ("def f(a, /): pass", "def f(a): pass"),
        ("def f(a=1, b=2): pass", "def f(a, b=2): pass"),
        ("def f(*, a=1, b): pass", "def f(*, a, b=1): pass"),
        ("def f(a: int): pass", "def f(a: float): pass"),
        ("x = {**a, b: c}", "x = {a: b, **c}"),
        ("for x in y: pass\nelse: z", "for x in y:\n    pass\nz"),
        ("f'{x!r}'", "f'{x!s}'"),
        ("f'{x}'", "'{x}'"),
        ("f'{x:>{y}}'", "f'{x:>}{y}'"),
        ("async def f(): pass", "def f(): pass"),
        ("import a.b as c", "import a.b"),
        ("from . import a", "from .. import a"),
        ("x = 'doc'", "'doc'"),
        ("@d\ndef f(): pass", "def f(): pass"),
        ("x = -1", "x = 1"),
        ("try: x\nexcept A: y", "try: x\nexcept* A: y"),
    ],
)
def test_what_means_something_else_differs(left: str, right: str) -> None:
    assert not same(left, right)


def test_every_import_is_found_wherever_it_stands() -> None:
    source = """
import a.b as c, d
from e import f, g as h
from . import i
from ..j.k import *
if TYPE_CHECKING:
    from l import m
def fn():
    import n
    class C:
        from o import p
"""
    assert set(analyse(source.encode(), "x.py").imports) == {
        Import(0, "a.b"),
        Import(0, "d"),
        Import(0, "e", ("f", "g")),
        Import(1, "", ("i",)),
        Import(2, "j.k", ("*",)),
        Import(0, "l", ("m",)),
        Import(0, "n"),
        Import(0, "o", ("p",)),
    }


def test_imports_by_name_are_found_in_the_strings() -> None:
    literal = b"from importlib import import_module\nimport_module('.a.b', __package__)\nx = 'other'"
    assert Import(1, "a.b") in analyse(literal, "x.py").imports
    assert Import(0, "other") not in analyse(literal, "x.py").imports
    computed = (
        b"import importlib\nTABLE = {'Conv': 'convs', 'x y': 1}\nimportlib.import_module(TABLE[n], 'p')"
    )
    assert {Import(0, "convs"), Import(1, "convs")} <= set(analyse(computed, "x.py").imports)
    things = b"get_method('a.b.f'); hydra.utils.get_class(path='c.D'); EntryPoint('n', 'e.f:g', group='h'); look('i')"
    found = {item.module for item in analyse(things, "x.py").imports}
    assert found >= {"a.b.f", "c.D", "e.f"}
    assert "i" not in found
    listed = b"import pkgutil\nfor m in pkgutil.iter_modules(__path__): pass"
    assert Import(1, "", (EVERY,)) in analyse(listed, "x.py").imports


@pytest.mark.parametrize(
    "source", [b"x = = 1", b"def f(", b"\xff\xfe\x00", b"x = '\x00'", b"(" * 2000 + b")" * 2000]
)
def test_what_is_not_python_is_refused_with_its_place(source: bytes) -> None:
    with pytest.raises(ConfigError, match=r"folder/x\.py"):
        analyse(source, "folder/x.py")


def test_a_long_chain_of_operators_does_not_recurse() -> None:
    analyse(("x = " + " + ".join(["1"] * 500)).encode(), "x.py")
    analyse(("x = b" + ".c" * 300).encode(), "x.py")


def test_other_encodings_of_source_are_read() -> None:
    latin = "# -*- coding: latin-1 -*-\nx = 'é'".encode("latin-1")
    assert analyse(latin, "x").digest == analyse("x = 'é'".encode(), "x").digest
