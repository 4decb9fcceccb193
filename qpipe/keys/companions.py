"""Files that belong to a file: an ONNX model may keep its tensors in others beside it.

The content of such a model is that of all of them. The names are read off the bytes of the protobuf (each is the value
of an `external_data` entry with the key `location`), because planning imports no onnx.
"""

from __future__ import annotations

import mmap
import re
from pathlib import Path

from qpipe.keys.hashing import Memo, digest, digest_file, file_identity, tree_contents
from qpipe.mapped import beside

_LOCATION = re.compile(rb"\x0a\x08location\x12")
"""StringStringEntryProto: field 1 (key) = "location", then field 2 (value), a length and the text."""


def content(path: Path, memo: Memo | None = None) -> tuple[str, dict[str, str | None]]:
    """The digest of what `path` holds, and what that is made of: {name: digest} of every file.

    A file's is that of its bytes, a folder's one of its `tree_contents`, and that of an ONNX file with external data
    one of it and of every file it names; one that is missing counts as missing, and loading refuses it. Errors:
    OSError where something cannot be read, InputError as `digest_file` and `tree_contents`.
    """
    if path.is_dir():
        contents = tree_contents(path, memo)
        return digest("tree", contents), contents
    own = digest_file(path, memo)
    if not path.is_file() or not _may_be_onnx(path):
        return own, {path.name: own}
    files = {name: beside(path, name) for name in _remembered_locations(path, memo) if _inside(path, name)}
    if not files:
        return own, {path.name: own}
    others = {name: digest_file(file, memo) if file.is_file() else None for name, file in files.items()}
    return digest("onnx", own, others), {path.name: own, **others}


def locations(path: Path) -> list[str]:
    """The files that the ONNX file at `path` says its tensors are in, relative to its folder, each once."""
    if not path.stat().st_size:
        return []
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = {_text(content, match.end()) for match in _LOCATION.finditer(content)}
    return sorted(name for name in found if name and _inside(path, name))


def _inside(path: Path, name: str) -> bool:
    """Whether the reader would open a file of that name: those elsewhere it refuses."""
    try:
        beside(path, name)
    except (ValueError, OSError):
        return False
    return True


def _may_be_onnx(path: Path) -> bool:
    """By its name, or by its first byte: writers of protobuf begin with field 1, the IR version."""
    if path.suffix == ".onnx":
        return True
    with open(path, "rb") as file:
        return file.read(1) == b"\x08"


def _remembered_locations(path: Path, memo: Memo | None) -> list[str]:
    identity = None if memo is None else file_identity(path)
    if memo is None or identity is None:
        return locations(path)
    key = f"locations {identity}"
    known = memo.get(key)
    if not isinstance(known, list):
        known = locations(path)
        memo.set(key, known)
    return [str(name) for name in known]


def _text(content: mmap.mmap, start: int) -> str:
    """The length-prefixed text at `start`; "" where it is not one."""
    size = shift = 0
    for position in range(start, min(start + 3, len(content))):
        byte = content[position]
        size |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return content[position + 1 : position + 1 + size].decode("utf-8", "replace")
    return ""
