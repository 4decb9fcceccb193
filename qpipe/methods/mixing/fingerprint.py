"""Digests of what a score depends on, computed once, so that a thousand sub-results need not hash a model each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from qpipe.model.network.facts import Facts
from qpipe.model.network.network import Network

if TYPE_CHECKING:
    from qpipe.numerics.grid import Encoding


def float_fingerprint(
    model: Network, arrays: Mapping[str, npt.NDArray[Any]], labels: npt.NDArray[Any] | None = None
) -> str:
    """A digest of what the float model computes on `arrays`, and what it is held against: its graph, its tensors,
    the samples and their labels."""
    meta, blobs = Network(model.ir, facts=Facts(biases=model.facts.biases, custom_ops=model.facts.custom_ops)).pack()
    hashed = blake3()
    _add(hashed, "model", json.dumps(meta, sort_keys=True).encode())
    for name, blob in sorted(blobs.items()):
        _add(hashed, name, blob)
    given = {f"input {name}": array for name, array in arrays.items()}
    for name, array in sorted((given if labels is None else {**given, "labels": labels}).items()):
        plain = np.ascontiguousarray(array)
        _add(hashed, f"{name} {plain.dtype.str} {plain.shape}", plain.reshape(-1).view(np.uint8).data)
    return hashed.hexdigest()


def grids_fingerprint(encodings: Mapping[str, Encoding]) -> str:
    """A digest of the grids by the names of their tensors; whether they are frozen does not count."""
    hashed = blake3()
    for name, e in sorted(encodings.items()):
        kind = f"{name} {e.bitwidth} {e.signed} {e.axis} {e.block_size} {e.scale.shape}"
        _add(hashed, kind, e.scale.tobytes() + e.zero_point.tobytes())
    return hashed.hexdigest()


def _add(hashed: blake3, name: str, content: bytes | memoryview) -> None:
    """Name and content with their lengths in front, so that no two lists of them run together alike."""
    label = name.encode()
    hashed.update(f"{len(label)} {len(memoryview(content).cast('B'))} ".encode())
    hashed.update(label)
    hashed.update(content)
