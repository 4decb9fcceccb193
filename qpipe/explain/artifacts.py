"""Where two artifacts of one kind differ first, and by how much: for people, once their digests say that they do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qpipe.artifacts.kinds import Encodings, Files, Samples, Scores, Statistics

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[Any]


def first_difference(old: Any, new: Any) -> str:
    """A sentence on two values of the same kind; bits count, so that a nan equals itself and 0.0 is not -0.0."""
    if type(old) is not type(new):
        return f"a {type(old).__name__} before, a {type(new).__name__} now"
    if isinstance(old, Scores):
        return json_difference(old.values, new.values) or "the values are equal, their order is not"
    if isinstance(old, Samples):
        return arrays_difference("array", _named(old), _named(new)) or "the labels differ"
    if isinstance(old, Statistics):
        found = arrays_difference("array", old.arrays, new.arrays)
        return found or json_difference(old.values, new.values) or "nothing that can be named"
    if isinstance(old, Encodings):
        return _encodings_difference(old.encodings, new.encodings) or "nothing that can be named"
    if isinstance(old, Files):
        return _files_difference(old, new)
    return _model_difference(old, new)


def arrays_difference(what: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first of the arrays that differs, its first value that does, and how many and how far; "" for none."""
    only = sorted(old.keys() ^ new.keys())
    if only:
        return f"{what} '{only[0]}' is there {'before only' if only[0] in old else 'now only'}"
    first, count = "", 0
    for name in old:
        found = array_difference(old[name], new[name])
        count += bool(found)
        first = first or (f"{what} '{name}': {found}" if found else "")
    return f"{first}; {count} of {len(old)} {what}s differ" if count > 1 else first


def array_difference(old: Array, new: Array) -> str:
    """What differs between two arrays, bit by bit; "" for nothing."""
    import numpy as np

    if old.shape != new.shape or old.dtype != new.dtype:
        return f"{old.dtype} {old.shape} -> {new.dtype} {new.shape}"
    unequal: Array = np.asarray(_bits(old) != _bits(new))
    if unequal.ndim > old.ndim:
        unequal = np.asarray(unequal.any(axis=-1))
    count = int(np.count_nonzero(unequal))
    if not count:
        return ""
    at = tuple(int(i) for i in np.unravel_index(int(np.argmax(unequal)), unequal.shape))
    where = f" at {at if len(at) != 1 else at[0]}" if at else ""
    largest = ""
    if old.dtype.kind in "fiu" and old.dtype.itemsize <= 8:
        distance = np.abs(old[unequal].astype(np.float64) - new[unequal].astype(np.float64))
        finite = distance[np.isfinite(distance)]
        largest = f", at most {finite.max():.3g} apart" if finite.size else ", not finite"
    return f"{count:,} of {old.size:,} values differ, first{where}: {old[at]!s} -> {new[at]!s}{largest}"


def json_difference(old: Any, new: Any) -> str:
    """The address of the first leaf that differs, and its two values; "" for none."""
    pending: list[tuple[str, Any, Any]] = [("", old, new)]
    while pending:
        address, left, right = pending.pop()
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            names = [*left, *(name for name in right if name not in left)]
            inner = [
                (f"{address}.{name}".lstrip("."), left.get(name), right.get(name)) for name in reversed(names)
            ]
            pending += inner
        elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
            inner = [(f"{address}[{i}]", a, b) for i, (a, b) in enumerate(zip(left, right, strict=True))]
            pending += inner[::-1]
        elif (shown := _shown(left, right)) is not None:
            apart = ""
            if isinstance(left, int | float) and isinstance(right, int | float):
                apart = f", {abs(left - right):.3g} apart"
            return f"{address}: {shown[0]} -> {shown[1]}{apart}"
    return ""


def _shown(left: Any, right: Any) -> tuple[str, str] | None:
    """Both as JSON, cut to a line; None where they are the same."""
    texts = json.dumps(left), json.dumps(right)
    if texts[0] == texts[1]:
        return None
    return texts[0][:60], texts[1][:60]


def _bits(array: Array) -> Array:
    """The array as unsigned integers of its width, or as bytes along a new last axis."""
    import numpy as np

    plain = np.ascontiguousarray(array).reshape(array.shape)
    if plain.dtype.kind in "fiub" and plain.dtype.itemsize in (1, 2, 4, 8):
        return plain.view(f"u{plain.dtype.itemsize}")
    return plain[..., None].view(np.uint8)


def _named(samples: Samples) -> dict[str, Any]:
    return samples.arrays if samples.labels is None else {**samples.arrays, "labels": samples.labels}


def _encodings_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    import numpy as np

    arrays: list[dict[str, np.ndarray[Any, Any]]] = []
    fields: list[dict[str, Any]] = []
    for encodings in (old, new):
        arrays.append(
            {
                f"{name}.{part}": np.asarray(getattr(encoding, part))
                for name, encoding in encodings.items()
                for part in ("scale", "zero_point")
            }
        )
        named = ("bitwidth", "signed", "symmetric", "axis", "block_size", "frozen", "free_sign")
        fields.append(
            {name: {field: getattr(grid, field) for field in named} for name, grid in encodings.items()}
        )
    return arrays_difference("encoding", *arrays) or json_difference(*fields)


def _files_difference(old: Files, new: Files) -> str:
    only = sorted(old.contents.keys() ^ new.contents.keys())
    if only:
        return f"file '{only[0]}' is there {'before only' if only[0] in old.contents else 'now only'}"
    for name in old.contents:
        left, right = old.read(name), new.read(name)
        if left != right:
            sizes = f"{left.nbytes:,} -> {right.nbytes:,} bytes"
            return f"file '{name}': {sizes}, first different byte at {_first_byte(left, right):,}"
    return "nothing that can be named"


def _first_byte(left: memoryview, right: memoryview) -> int:
    import numpy as np

    size = min(left.nbytes, right.nbytes)
    unequal = np.frombuffer(left[:size], np.uint8) != np.frombuffer(right[:size], np.uint8)
    return int(np.argmax(unequal)) if unequal.any() else size


def _model_difference(old: Any, new: Any) -> str:
    return (
        arrays_difference("tensor", old.params, new.params)
        or _encodings_difference(old.encodings, new.encodings)
        or json_difference({**old.facts.to_json(), **old.metadata}, {**new.facts.to_json(), **new.metadata})
        or "the graph: its nodes, attributes or names"
    )
