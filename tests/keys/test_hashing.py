from __future__ import annotations

import dataclasses
import enum
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from qpipe.errors import InputError
from qpipe.keys.hashing import digest, digest_bytes, digest_file, file_identity, is_digest, tree_contents


@dataclasses.dataclass(frozen=True)
class Grid:
    bitwidth: int
    signed: bool = True


@dataclasses.dataclass(frozen=True)
class OtherGrid:
    bitwidth: int
    signed: bool = True


class Colour(enum.Enum):
    RED = 1


GOLDEN: dict[str, tuple[Any, str]] = {
    "none": (None, "0b2592dc4360a602b26f3bbd0f978c801dd0b7a0289a7df87018a5e65ffe8295"),
    "true": (True, "f99c568e6ecf8be375e0f6a8d9b82cbb205513ac1af6c8c28137a87991d91055"),
    "int": (1, "30867723beb25eb86ebf771dfa5d48b9b32ebff7ac6e1910e1b3de05337a3aa5"),
    "big": (-(1 << 100), "b094028f3f3e4254a06b296eb7c8d4fb12ead071a5be4ec9c02b5154e068f9f5"),
    "float": (1.5, "ef01f176dd2e7024e0f589dbb10ce0ebd60a3799ea7f0561d987affdaef9418b"),
    "nan": (float("nan"), "978594b1aefc6d826187322ed50292952ff62718cc3aa888217e33fa0f2205d8"),
    "str": ("äδ\ud800", "eb66a975789ae22e729463d44e34836f51a17ef6bf4ef19dd8b0fd4382270d36"),
    "bytes": (b"\x00\xff", "f0e6684126b4bb1bcce99c4d2bf179240a077149f4708e9238ba7a1cc66f84da"),
    "list": ([1, [2, "3"]], "c05278635236f7609e4b8327f44c2a9cf38d5f7a2b63a0b11a46a3391db83387"),
    "tuple": ((1, (2, "3")), "341e44fefaa8f9283542033be4975fdde1e8add6b4cb8766b3c5df6b8b20f7b3"),
    "dict": ({"b": 1, "a": {}}, "c313aef5d5d156684a734117543fa0fb27a7b51ab0f00678bc28787a7f073f35"),
    "array": (
        np.arange(6, dtype=np.float32).reshape(2, 3),
        "c0b070eeb79a2a776e2071ccc71484d49e0d6e37f2c71bb8b194fc326d93b6f0",
    ),
    "scalar": (np.float64(1.5), "6b67e63a554dc4c96069ae302dde46f7e8cd820dce015648108c77dfd3bd8e4a"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_format_is_frozen(name: str) -> None:
    value, expected = GOLDEN[name]
    assert digest(value) == expected


def test_digests_are_the_same_in_another_process_and_without_numpy() -> None:
    program = (
        "from qpipe.keys.hashing import digest; import sys;"
        "print(digest({'b': [1, 2.5], 'a': ('x', None)})); assert 'numpy' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.strip() == digest({"a": ("x", None), "b": [1, 2.5]})


def test_equal_looking_values_of_different_types_differ() -> None:
    values: list[Any] = [
        1,
        1.0,
        True,
        "1",
        b"1",
        [1],
        (1,),
        {"1": 1},
        None,
        "",
        b"",
        [],
        (),
        {},
        [None],
        [[]],
    ]
    values += [np.array(1), np.array(1.0), np.array([1]), np.array([1], np.int32), Colour.RED]
    assert len({digest(value) for value in values}) == len(values)
    assert digest(np.float64(1)) == digest(np.array(1.0))
    assert len({digest(), digest(1), digest(1, 1), digest([1, 1]), digest((1, 1))}) == 5


_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.lists(inner).map(tuple),
    max_leaves=12,
)


def _plain(value: Any) -> Any:
    """An independent canonical form: nested tuples, compared by Python itself."""
    if isinstance(value, float):
        return ("float", b"nan" if value != value else struct.pack("<d", value or 0.0))
    if isinstance(value, list | tuple):
        return (type(value).__name__, tuple(_plain(item) for item in value))
    if isinstance(value, dict):
        return ("dict", frozenset((key, _plain(item)) for key, item in value.items()))
    return (type(value).__name__, value)


@given(_VALUES, _VALUES)
@settings(max_examples=300, deadline=None)
def test_digests_agree_exactly_where_the_values_do(left: Any, right: Any) -> None:
    assert (digest(left) == digest(right)) == (_plain(left) == _plain(right))


@given(st.lists(st.text(alphabet="ab[]{}(),1\"' ", max_size=4), max_size=4))
@settings(max_examples=200, deadline=None)
def test_text_that_looks_like_structure_stays_text(parts: list[str]) -> None:
    joined = ["".join(parts)]
    assert (digest(parts) == digest(joined)) == (parts == joined)
    assert digest(parts) != digest(str(parts)) != digest(repr(parts).encode())


def test_text_that_looks_like_a_tag_stays_text() -> None:
    """A text is written behind its tag, s, and its length: without the length these run together alike."""
    assert digest(["as", "b"]) != digest(["a", "sb"])
    assert digest({"as": "b"}) != digest({"a": "sb"})
    assert digest("a" * 300 + "s", "b") != digest("a" * 300, "sb")


def test_negative_zero_is_zero_and_all_nans_are_one() -> None:
    other_nan = struct.unpack("<d", struct.pack("<Q", 0xFFF8_0000_0000_0001))[0]
    assert digest(-0.0) == digest(0.0)
    assert digest(float("nan")) == digest(-float("nan")) == digest(other_nan)
    assert digest(0.1 + 0.2) != digest(0.3)


def test_the_order_of_a_dict_does_not_count_and_that_of_a_list_does() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest([1, 2]) != digest([2, 1])


def test_dataclasses_count_by_class_and_fields() -> None:
    assert digest(Grid(8)) == digest(Grid(8, True)) != digest(Grid(8, False))
    assert digest(Grid(8)) != digest(OtherGrid(8)) != digest({"bitwidth": 8, "signed": True})


def test_arrays_count_by_dtype_shape_and_bytes_not_by_memory_layout() -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert digest(array) == digest(np.asfortranarray(array)) == digest(np.repeat(array, 2, axis=0)[::2])
    assert digest(array) == digest(array.astype(">f4"))
    assert digest(array) != digest(array.reshape(6, 4))
    assert digest(array) != digest(array.view(np.int32))
    assert digest(np.zeros((0, 3))) != digest(np.zeros((3, 0))) != digest(np.zeros(0))
    assert digest(np.array(-0.0)) != digest(np.array(0.0))


def test_bfloat16_and_uint16_of_the_same_bits_differ() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = np.arange(3, dtype=np.uint16)
    assert digest(array) != digest(array.view(ml_dtypes.bfloat16)) != digest(array.view(np.float16))


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({1, 2}, "builtins.set"),
        (object(), "builtins.object"),
        (Path("x"), "Path"),
        ({1: 2}, "builtins.int"),
        (np.array([object()]), "object"),
        (dataclasses.make_dataclass("Loose", ["x"])(1), "Loose"),
        (Grid, "builtins.type"),
        (type("Words", (str,), {})("x"), "Words"),
        ([[{"deep": {3}}]], "builtins.set"),
    ],
)
def test_anything_else_is_refused_by_the_name_of_its_type(value: Any, named: str) -> None:
    with pytest.raises(TypeError, match=named):
        digest(value)


def test_deep_nesting_does_not_recurse_and_a_circle_is_refused() -> None:
    deep: Any = 0
    for _ in range(5_000):
        deep = {"x": [deep]}
    assert is_digest(digest(deep))
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(ValueError, match="contains itself"):
        digest(circle)


def test_content_is_named_by_plain_blake3(tmp_path: Path) -> None:
    for size in (0, 1, 70_000, 3 << 20):
        content = os.urandom(size)
        (tmp_path / "x").write_bytes(content)
        assert digest_bytes(content) == digest_file(tmp_path / "x") == blake3(content).hexdigest()
    assert (
        digest_bytes(np.ones((2, 3), np.float32).data) == blake3(np.ones(6, np.float32).tobytes()).hexdigest()
    )
    assert digest_bytes(np.ones((0, 3)).data) == digest_bytes(b"")


class Notes(dict[str, Any]):
    """A memo that counts what it is told."""

    def set(self, key: str, value: Any) -> None:
        self[key] = value


def test_a_memo_spares_reading_an_untouched_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qpipe.keys.hashing._RACY_NS", 0)
    file = tmp_path / "x"
    file.write_bytes(b"one")
    memo = Notes()
    first = digest_file(file, memo)
    assert list(memo.values()) == [first]
    memo[next(iter(memo))] = "f" * 64  # what the memo says is believed
    assert digest_file(file, memo) == "f" * 64
    file.write_bytes(b"two")
    assert digest_file(file, memo) == digest_bytes(b"two")
    memo[str(file_identity(file))] = "no digest"  # a damaged memo is not
    assert digest_file(file, memo) == digest_bytes(b"two")


def test_a_file_that_was_just_written_is_not_memoised(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"one")
    memo = Notes()
    digest_file(tmp_path / "x", memo)
    assert file_identity(tmp_path / "x") is None
    assert not memo


def test_a_file_that_is_written_while_it_is_read_is_not_memoised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, memo = tmp_path / "x", Notes()
    file.write_bytes(b"one")

    def meddle(content: bytes) -> str:
        file.write_bytes(b"others")
        return digest_bytes(content)

    monkeypatch.setattr("qpipe.keys.hashing._RACY_NS", 0)
    monkeypatch.setattr("qpipe.keys.hashing.digest_bytes", meddle)
    assert digest_file(file, memo) == blake3(b"one").hexdigest()
    assert not memo


def _tree(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_a_tree_counts_by_relative_names_and_contents(tmp_path: Path) -> None:
    files = {"a.txt": "1", "sub/b.txt": "2", "sub/deep/c.txt": "3"}
    base = tree_contents(_tree(tmp_path / "one", files))
    assert tree_contents(_tree(tmp_path / "two", dict(reversed(files.items())))) == base
    assert tree_contents(_tree(tmp_path / "three", {**files, "a.txt": "9"})) != base
    renamed = {"z.txt": "1", "sub/b.txt": "2", "sub/deep/c.txt": "3"}
    assert tree_contents(_tree(tmp_path / "four", renamed)) != base
    assert tree_contents(_tree(tmp_path / "five", {"a.txt": "1", "sub": "x"})) != base
    crossed = [{"a/x": "1", "b/y": "2"}, {"a/y": "2", "b/x": "1"}]
    one, other = (tree_contents(_tree(tmp_path / f"crossed{i}", each)) for i, each in enumerate(crossed))
    assert one != other
    (tmp_path / "two" / "empty").mkdir()
    assert tree_contents(tmp_path / "two") != base


def test_a_single_file_counts_by_content_and_not_by_name(tmp_path: Path) -> None:
    _tree(tmp_path, {"a": "same", "b": "same"})
    assert digest_file(tmp_path / "a") == digest_file(tmp_path / "b") == digest_bytes(b"same")


def test_links_inside_a_tree_are_followed(tmp_path: Path) -> None:
    plain = _tree(tmp_path / "plain", {"a": "1", "real/x": "2", "alias/x": "2", "b": "1"})
    linked = _tree(tmp_path / "linked", {"a": "1", "real/x": "2"})
    (linked / "alias").symlink_to("real")
    (linked / "b").symlink_to("a")
    assert tree_contents(linked) == tree_contents(plain)
    (tmp_path / "door").symlink_to("linked")
    assert tree_contents(tmp_path / "door") == tree_contents(plain)


@pytest.mark.parametrize(
    ("link", "target", "said"),
    [
        ("out", "../secret", "outside"),
        ("out", "/etc", "outside"),
        ("gone", "nothing", "leads nowhere"),
        ("self", "self", "leads nowhere"),
        ("up", ".", "no end"),
        ("sub/up", "..", "no end"),
        ("sub/up", "../other", "no end"),  # other/down leads back to sub
    ],
)
def test_a_link_that_cannot_be_followed_is_refused(tmp_path: Path, link: str, target: str, said: str) -> None:
    (tmp_path / "secret").write_text("s")
    folder = _tree(tmp_path / "folder", {"a": "1", "sub/b": "2", "other/c": "3"})
    if target == "../other":
        (folder / "other" / "down").symlink_to("../sub")
    (folder / link).symlink_to(target)
    with pytest.raises(InputError, match=said):
        tree_contents(folder)


@pytest.mark.parametrize("given", ["/dev/zero", "pipe"])
def test_what_may_have_no_end_is_refused(tmp_path: Path, given: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        digest_file(tmp_path / given)


def test_a_pipe_in_a_tree_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        tree_contents(tmp_path)
