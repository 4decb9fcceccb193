"""The canonical form of a value, and its digest: what keys and content names are made of.

`digest` names a value: every element is written with a type tag and its length, so that two values share a
digest only when they are of the same types and equal (`1`, `1.0`, `True` and `"1"` differ, `["ab"]` and
`["a", "b"]` too). `digest_bytes` and `digest_file` name content: they are plain BLAKE3, so that `b3sum` can
check a store by hand. Rejected as canonical forms: pickle is not stable between processes, `repr` is not
injective, JSON has neither bytes nor tuples.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from blake3 import blake3

from qpipe.errors import InputError
from qpipe.mapped import let_go

if TYPE_CHECKING:
    from typing_extensions import Buffer

DIGEST_LENGTH = 64
_DOMAIN = b"qpipe value 1\n"  # changes with the encoding below, so that digests of two formats never meet
_DEPTH_LIMIT = 100_000  # a value nested deeper than this contains itself
_PLAIN_DEPTH = 50
_LENGTH = struct.Struct(">Q").pack
_THREADED_SIZE = 1 << 20  # below 1 MiB threads cost more than they save
_CHUNK = 1 << 23  # 8 MiB: large enough for threads, small beside a model even when eight are hashed at once
_RACY_NS = 2_000_000_000  # file systems stamp times as coarsely as 2 s: a younger file may change unseen


class Memo(Protocol):
    """A lossy map from text to JSON values: what it forgets is computed again."""

    def get(self, key: str) -> Any:
        """The value set under `key`, or None."""

    def set(self, key: str, value: Any) -> None:
        """Remember `value`, perhaps."""


def digest(*values: object) -> str:
    """64 hex characters that name `values`.

    Takes None, bool, int, float, str, bytes, list, tuple, dict with str keys, frozen dataclass, Enum member,
    numpy array and scalar, nested to any depth. Floats count by their bits, except that -0.0 is 0.0 and all
    nans are one; a dict's order does not count; arrays count by dtype, shape and their exact bytes. Anything
    else, subclasses of these types included, is a TypeError that names the type.
    """
    parts = [_DOMAIN]
    if _write_plain(values, parts, 0):
        return str(blake3(b"".join(parts)).hexdigest())
    return _digest_any(values)


def _write_plain(value: Any, parts: list[bytes], depth: int) -> bool:
    """Append the canonical form of a value of plain types, as `_Encoder` writes it; False where it is none, or
    deep. What a key is made of is plain, and a plan makes thousands of keys: this is three times as fast."""
    kind = type(value)
    if kind is str:
        parts.append(_known_text(value) if len(value) < 256 else _text(value))
    elif kind is dict:
        if depth > _PLAIN_DEPTH or not set(map(type, value)) <= _TEXT_ALONE:
            return False
        parts.append(b"{" + _LENGTH(len(value)))
        for name in sorted(value):
            parts.append(_known_text(name) if len(name) < 256 else _text(name))
            if not _write_plain(value[name], parts, depth + 1):
                return False
    elif kind is list or kind is tuple:
        if depth > _PLAIN_DEPTH:
            return False
        parts.append((b"[" if kind is list else b"(") + _LENGTH(len(value)))
        for item in value:
            if not _write_plain(item, parts, depth + 1):
                return False
    elif (scalar := _SCALARS.get(kind)) is not None and kind is not bytes:  # which may be large
        tag, payload = scalar(value)
        parts.append(tag + _LENGTH(len(payload)) + payload)
    else:
        return False
    return True


_TEXT_ALONE = {str}


def _text(value: str) -> bytes:
    payload = value.encode("utf-8", "surrogatepass")
    return b"s" + _LENGTH(len(payload)) + payload


_known_text = lru_cache(1 << 14)(_text)
"""For names and digests, which come again and again."""


def _digest_any(values: tuple[object, ...]) -> str:
    """The digest of any values; what they hold goes to the hasher as it comes, however large."""
    hasher = blake3(_DOMAIN)
    encoder = _Encoder(hasher.update)
    stack: list[Iterator[object]] = [iter(encoder.open_sequence(b"(", values))]
    while stack:
        for value in stack[-1]:
            children = encoder.encode(value)
            if children is not None:
                stack.append(iter(children))
                break
        else:
            stack.pop()
        if len(stack) > _DEPTH_LIMIT:
            raise ValueError(f"the value is nested more than {_DEPTH_LIMIT} deep, or contains itself")
    encoder.flush()
    return str(hasher.hexdigest())


def is_digest(value: object) -> bool:
    """Whether `value` is a digest as this module writes them (and so safe as a file name)."""
    return type(value) is str and len(value) == DIGEST_LENGTH and not value.strip("0123456789abcdef")


class _Encoder:
    """Writes the canonical form: a tag, a length or count, then the bytes or the children."""

    def __init__(self, write: Callable[[Any], object]) -> None:
        self._write = write
        self._pending = bytearray()

    def flush(self) -> None:
        self._write(bytes(self._pending))
        self._pending.clear()

    def encode(self, value: object) -> Iterable[object] | None:
        """Write `value`; the children still to be written, in order, where it has any."""
        kind = type(value)
        scalar = _SCALARS.get(kind)
        if scalar is not None:
            tag, payload = scalar(value)
            self._put(tag, payload)
            return None
        if kind is list or kind is tuple:
            return self.open_sequence(b"[" if kind is list else b"(", cast("list[object]", value))
        if kind is dict:
            return self._open_dict(cast("dict[object, object]", value))
        if isinstance(value, Enum):
            return self._open_named(b"e", kind, [value.value])
        if is_dataclass(value) and not isinstance(value, type):
            return self._open_dataclass(value)
        numpy = sys.modules.get("numpy")  # a numpy value exists only where numpy is loaded
        if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
            self._put_array(numpy, value)
            return None
        raise TypeError(f"a value of type {_qualified_name(kind)} has no canonical form, so no digest")

    def open_sequence(self, tag: bytes, values: list[object] | tuple[object, ...]) -> Iterable[object]:
        self._pending += tag + struct.pack(">Q", len(values))
        return values

    def _put(self, tag: bytes, payload: Any) -> None:
        self._pending += tag + struct.pack(">Q", len(payload))
        if len(payload) < 4096:
            self._pending += payload
        else:
            self.flush()
            self._write(payload)

    def _open_dict(self, value: dict[object, object]) -> Iterable[object]:
        for key in value:
            if type(key) is not str:
                raise TypeError(f"a dict key of type {_qualified_name(type(key))} has no digest, only str")
        self._pending += b"{" + struct.pack(">Q", len(value))
        names = sorted(cast("dict[str, object]", value))
        return [part for name in names for part in (name, value[name])]

    def _open_named(self, tag: bytes, kind: type, children: list[object]) -> Iterable[object]:
        self._put(tag, _qualified_name(kind).encode())
        return self.open_sequence(b"(", children)

    def _open_dataclass(self, value: Any) -> Iterable[object]:
        kind = type(value)
        if not kind.__dataclass_params__.frozen:
            raise TypeError(f"{_qualified_name(kind)} is a dataclass that is not frozen, so it has no digest")
        names = sorted(field.name for field in fields(value))
        return self._open_named(b"c", kind, [part for name in names for part in (name, getattr(value, name))])

    def _put_array(self, numpy: Any, value: Any) -> None:
        array = numpy.asarray(value)
        if array.dtype.hasobject or array.dtype.fields is not None:
            raise TypeError(f"an array of dtype {array.dtype} has no canonical form, so no digest")
        little = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
        self._put(b"a", f"{array.dtype.name} {array.shape}".encode())
        self._put(b"d", memoryview(little.reshape(-1).view(numpy.uint8)))


def _encode_float(value: Any) -> tuple[bytes, bytes]:
    if value != value:
        return b"f", b"nan"
    return b"f", struct.pack(">d", value + 0.0)  # -0.0 + 0.0 is 0.0


_SCALARS: dict[type, Callable[[Any], tuple[bytes, bytes]]] = {
    type(None): lambda value: (b"n", b""),
    bool: lambda value: (b"t" if value else b"u", b""),
    int: lambda value: (b"i", value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True)),
    float: _encode_float,
    str: lambda value: (b"s", value.encode("utf-8", "surrogatepass")),
    bytes: lambda value: (b"b", value),
}


def _qualified_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def digest_bytes(buffer: Buffer) -> str:
    """The BLAKE3 of a contiguous buffer's bytes, in hex; large ones are hashed on all cores. Of a mapped file no more
    than a chunk is resident at a time."""
    view = memoryview(buffer)
    view = view.cast("B") if view.nbytes else memoryview(b"")  # an empty view of several axes cannot be cast
    if view.nbytes < _THREADED_SIZE:
        found = str(blake3(view).hexdigest())
        if view.nbytes >= mmap.PAGESIZE:
            let_go(view)
        return found
    hasher = blake3(max_threads=blake3.AUTO)
    for start in range(0, view.nbytes, _CHUNK):
        hasher.update(view[start : start + _CHUNK])
        let_go(view)
    return str(hasher.hexdigest())


def digest_chunks(chunks: Iterable[Buffer]) -> str:
    """The BLAKE3 of bytes that come piece by piece: that of all of them together."""
    hasher = blake3()
    for chunk in chunks:
        hasher.update(chunk)
    return str(hasher.hexdigest())


def file_identity(path: Path | str) -> str | None:
    """What stands for a file's content between two looks at it: path, size, times and inode.

    None where it cannot: a file modified in the last two seconds may change again under the same time stamp.
    """
    status = os.stat(path)
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) < _RACY_NS:
        return None
    name = os.path.abspath(path).encode("utf-8", "backslashreplace").decode()  # a file name need not be text
    where = f"{name}|{status.st_dev}|{status.st_ino}"
    return f"{where}|{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}"


def digest_file(path: Path, memo: Memo | None = None) -> str:
    """The BLAKE3 of a file's content, in hex; with a `memo`, an untouched file is not read again.

    OSError where the file cannot be read; InputError for a pipe, a device or a socket, which may have no end.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise InputError(f"{path} is neither a file nor a folder: its content has no digest.")
    identity = file_identity(path) if memo is not None else None
    if memo is not None and identity is not None and is_digest(known := memo.get(identity)):
        return str(known)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < _THREADED_SIZE:
            found = digest_bytes(file.read())
        else:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
                found = digest_bytes(view)
    if memo is not None and identity is not None and file_identity(path) == identity:
        memo.set(identity, found)
    return found


def tree_contents(path: Path, memo: Memo | None = None) -> dict[str, str | None]:
    """{relative name: digest} of every file below the folder `path`, and {name/: None} of every folder, empty ones too.

    Neither the name of `path` itself nor times and permissions count. Links are followed where they stay inside the
    folder. InputError for a link that leads outside or to a folder above itself, and for anything that is neither file
    nor folder: what they hold cannot be named.
    """
    contents: dict[str, str | None] = {}
    root = path.resolve()
    pending: list[tuple[str, tuple[Path, ...]]] = [("", (root,))]
    while pending:
        prefix, chain = pending.pop()  # chain: the folders passed on the way, links resolved
        for entry in os.scandir(chain[-1]):
            name, target = prefix + entry.name, Path(entry.path)
            if entry.is_symlink():
                target = _follow(target, root)
            mode = target.stat().st_mode
            if target in chain:
                raise InputError(f"{entry.path} is a link to a folder above itself: no end. Remove the link.")
            if stat.S_ISDIR(mode):
                contents[name + "/"] = None
                pending.append((name + "/", (*chain, target)))
            elif stat.S_ISREG(mode):
                contents[name] = digest_file(target, memo)
            else:
                raise InputError(f"{entry.path} is neither a file nor a folder: its content has no digest.")
    return contents


def stamp(path: Path) -> str:
    """A digest that differs once any file at or below `path` was written to, be it with what it held before.

    Made of names, inodes, sizes and times of modification; nothing is read. OSError where there is nothing.
    """
    folders = os.walk(path) if path.is_dir() else [(str(path.parent), [], [path.name])]
    files = [os.path.join(folder, name) for folder, _, names in folders for name in names]
    looks = [(file, os.stat(file)) for file in sorted(files)]
    return digest("stamp", [(file, look.st_ino, look.st_size, look.st_mtime_ns) for file, look in looks])


def _follow(link: Path, root: Path) -> Path:
    """Where a link leads; InputError where that is nowhere or not inside `root`."""
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{link} is a link that leads nowhere. Remove it, or restore its target.") from error
    if target != root and root not in target.parents:
        raise InputError(f"{link} is a link to {target}, outside of {root}. Put a copy there instead.")
    return target
