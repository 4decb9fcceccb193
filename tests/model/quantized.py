"""A model with the grids that onnxruntime's target wants, over the ranges its values have in onnxruntime."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import yaml

from qpipe.methods.placement.calibration import constant_encodings
from qpipe.methods.placement.placement import place
from qpipe.methods.placement.target import Target
from qpipe.model import Model
from qpipe.model.qdq.writer import to_qdq
from qpipe.numerics.grid import Encoding, encoding_from_range
from qpipe.numerics.metrics import sqnr_db
from qpipe.numerics.observers import weight_encoding
from qpipe.numerics.scheme import Scheme, TensorScheme
from qpipe.param import coerce

Arrays = Mapping[str, np.ndarray[Any, Any]]
_CONF = Path(__file__).parents[2] / "conf"


@functools.cache
def shipped(kind: type[Any], group: str, name: str) -> Any:
    """What `group=name` composes: a shipped target or scheme, upon the one that its defaults name."""
    from omegaconf import OmegaConf

    table = yaml.safe_load((_CONF / group / f"{name}.yaml").read_text())
    base = [other for other in table.pop("defaults", []) if other != "_self_"]
    merged = [yaml.safe_load((_CONF / group / f"{other}.yaml").read_text()) for other in base]
    return coerce(OmegaConf.to_container(OmegaConf.merge(*merged, table), resolve=True), kind, group)


SHIPPED: Target = shipped(Target, "target", "onnxruntime")
ONNXRUNTIME: Target = replace(SHIPPED, float_outputs=(), softmax="fixed")
"""onnxruntime's target with a grid behind every layer and one for every Softmax, as other targets have it: more to
count and to compare."""


def scheme(
    weight: int = 8,
    activation: int | None = 8,
    granularity: Literal["per_tensor", "per_channel", "per_block"] = "per_channel",
    block_size: int = 0,
    signed: bool = False,
    symmetric: bool = False,
) -> Scheme:
    """Symmetric signed weights; activations as given."""
    weights = TensorScheme(weight, True, True, granularity, block_size)
    return Scheme(weights, None if activation is None else TensorScheme(activation, signed, symmetric))


def quantized(
    model: Model, arrays: Arrays, wanted: Scheme | None = None, target: Target = ONNXRUNTIME
) -> Model:
    """`model` with minmax grids where the placement wants them."""
    wanted = wanted or scheme()
    placement = place(model, target, wanted)
    if target.bias != "int32":
        model = model.with_facts(biases=target.bias)
    encodings: dict[str, Encoding] = dict(placement.fixed)
    names = list(placement.activations)
    found = model.session(quantized=False, outputs=names).run(None, dict(arrays)) if names else []
    ranges = {name: (array.min(), array.max()) for name, array in zip(names, found, strict=True)}
    groups = [*placement.shared, *((name,) for name in names)]
    for group in groups:
        counted = [ranges[name] for name in group if name not in placement.follows]
        for name in group:
            if name not in encodings:
                low, high = min(r[0] for r in counted), max(r[1] for r in counted)
                encodings[name] = encoding_from_range(low, high, placement.activations[name])
    encodings.update(constant_encodings(model, placement))
    for name, (tensor_scheme, axis) in placement.weights.items():
        encodings[name] = weight_encoding(model.param(name), tensor_scheme, axis, name)
    return model.with_encodings(encodings)


def deployed_db(model: Model, proto: onnx.ModelProto, arrays: Arrays) -> float:
    """How near the first output of the file that `model` is exported to comes to that of `proto`, the float model that
    it was made of: both in onnxruntime as it is, without an option. SQNR in dB."""
    outputs = []
    for each in (to_qdq(model), proto):
        session = onnxruntime.InferenceSession(each.SerializeToString(), providers=["CPUExecutionProvider"])
        outputs.append(session.run(None, dict(arrays))[0])
    return sqnr_db(*outputs)
