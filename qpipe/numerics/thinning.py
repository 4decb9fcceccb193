"""At most so many samples, evenly spread: data sorted by class keep every class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


def spread(count: int, limit: int | None) -> list[int]:
    """Indices of at most `limit` of `count` samples."""
    kept = count if limit is None else min(count, limit)
    return [index * count // kept for index in range(kept)]


def thin(array: Array, limit: int | None) -> Array:
    """At most `limit` samples of an array, which lie on its first axis; a single number stays."""
    if limit is None or not array.ndim or len(array) <= limit:
        return array
    return array[spread(len(array), limit)]


def thinned(arrays: Mapping[str, Array], limit: int | None) -> dict[str, Array]:
    """At most `limit` samples of each array."""
    return {name: thin(array, limit) for name, array in arrays.items()}
