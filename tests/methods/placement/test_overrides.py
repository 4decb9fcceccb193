"""Overrides of a scheme: the matched part alone changes, and every mistake is one line."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from qpipe.errors import ConfigError, InputError
from qpipe.methods.placement.placement import Placement, place
from qpipe.methods.placement.target import Limits
from qpipe.model import Model
from qpipe.numerics.scheme import Override, Scheme, TensorChange, TensorScheme
from qpipe.param import coerce
from tests.model.nets import normal, parsed
from tests.model.quantized import ONNXRUNTIME

SCHEME = Scheme(TensorScheme(4, True, True, "per_channel"), TensorScheme(8, False, False))
NET = """n (float[N,3,6,6] x) => (float[N,5] y) {
    t = Conv<pads=[1,1,1,1]>(x, w, b)  r = Relu(t)  g = GlobalAveragePool(r)  f = Flatten(g)
    z = Gemm<transB=1>(f, v)  s = Softmax(z)  y = MatMul(s, m) }"""


@pytest.fixture
def model() -> Model:
    tensors = {"w": normal(4, 3, 3, 3), "b": normal(4), "v": normal(6, 4), "m": normal(6, 5)}
    return Model.from_proto(parsed(NET, **tensors))


def placed(model: Model, *overrides: dict[str, Any]) -> Placement:
    """The placement under overrides as YAML writes them."""
    written = coerce(list(overrides), tuple[Override, ...], "scheme.overrides")
    return place(model, ONNXRUNTIME, replace(SCHEME, overrides=written))


def bitwidths(placement: Placement) -> dict[str, int]:
    found = {name: scheme.bitwidth for name, (scheme, _) in placement.weights.items()}
    found |= {name: scheme.bitwidth for name, scheme in placement.activations.items()}
    return found | {name: encoding.bitwidth for name, encoding in placement.fixed.items()}


def changed(model: Model, *overrides: dict[str, Any]) -> dict[str, int]:
    plain = bitwidths(placed(model))
    return {name: bits for name, bits in bitwidths(placed(model, *overrides)).items() if bits != plain[name]}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ({"nodes": ["type:Gemm"], "weight": {"bitwidth": 8}}, {"v": 8}),
        ({"nodes": ["type:Gemm"], "activation": {"bitwidth": 16}}, {"f": 16, "g": 16}),
        ({"nodes": ["w", "value:m"], "weight": {"bitwidth": 8}}, {"w": 8, "m": 8}),
        ({"nodes": ["value:g"], "activation": {"bitwidth": 16}}, {"f": 16, "g": 16}),
        ({"nodes": ["value:s"], "activation": {"bitwidth": 16}}, {"s": 16}),
        ({"nodes": ["between:r..y"], "weight": {"bitwidth": 8}, "activation": {"bitwidth": 16}},
         {"v": 8, "m": 8, "r": 16, "g": 16, "f": 16, "z": 16, "s": 16}),
    ],
)  # fmt: skip
def test_what_is_matched_changes_with_what_shares_its_grid(
    model: Model, override: dict[str, Any], expected: dict[str, int]
) -> None:
    found = changed(model, override)
    assert {name: found[name] for name in found if name != "z"} == {
        name: bits for name, bits in expected.items() if name != "z"
    }


def test_a_softmax_keeps_the_scale_of_its_own_bitwidth(model: Model) -> None:
    fixed = placed(model, {"nodes": ["value:s"], "activation": {"bitwidth": 16}}).fixed["s"]
    assert float(fixed.scale) == 2.0**-16


def test_the_last_override_wins_field_by_field(model: Model) -> None:
    every = {"nodes": [".*"], "weight": {"bitwidth": 8, "observer": "mse"}}
    placement = placed(model, every, {"nodes": ["v"], "weight": {"bitwidth": 2, "granularity": "per_tensor"}})
    weights = {name: scheme for name, (scheme, _) in placement.weights.items()}
    assert (weights["v"].bitwidth, weights["v"].observer, weights["v"].granularity) == (2, "mse", "per_tensor")
    assert (weights["w"].bitwidth, weights["w"].observer, weights["w"].granularity) == (8, "mse", "per_channel")


def test_a_block_size_goes_with_its_granularity() -> None:
    blocks = TensorScheme(4, True, True, "per_block", 32)
    assert TensorChange(granularity="per_channel").applied(blocks).block_size == 0
    assert TensorChange(granularity="per_block", block_size=16).applied(SCHEME.weight).block_size == 16


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"nodes": [], "weight": {"bitwidth": 8}}, "scheme.overrides[0]: an override names no nodes."),
        ({"nodes": ["w"]}, "scheme.overrides[0]: the override of w changes neither weight nor activation."),
        ({"nodes": ["w"], "weight": {"bitwidht": 8}}, "no field 'bitwidht' here. Did you mean 'bitwidth'?"),
        ({"nodes": ["w"], "weight": {"bitwidth": 9}}, "bitwidth must be one of"),
        ({"nodes": ["w"], "activation": {"granularity": "per_channel"}}, "activations are quantized per_tensor"),
    ],
)  # fmt: skip
def test_an_override_that_means_nothing_is_one_line(override: dict[str, Any], message: str) -> None:
    written = {
        "weight": {"bitwidth": 4, "signed": True, "symmetric": True},
        "activation": {"bitwidth": 8, "signed": False, "symmetric": False},
        "overrides": [override],
    }
    with pytest.raises(ConfigError, match=re.escape(message)):
        coerce(written, Scheme, "scheme") if "[0]" not in message else coerce(
            written["overrides"], tuple[Override, ...], "scheme.overrides"
        )


def test_overrides_of_activations_need_activations() -> None:
    override = Override(("w",), activation=TensorChange(bitwidth=16))
    with pytest.raises(ValueError, match="an override changes activations, which the scheme leaves in float"):
        Scheme(SCHEME.weight, None, overrides=(override,))


def test_filters_that_match_nothing_are_refused(model: Model) -> None:
    with pytest.raises(InputError, match=r"^scheme\.overrides\[0\]\.nodes: 'type:Gem' matches nothing"):
        placed(model, {"nodes": ["type:Gem"], "weight": {"bitwidth": 8}})
    with pytest.raises(InputError, match="type:Softmax matches no layer with a weight"):
        placed(model, {"nodes": ["type:Softmax"], "weight": {"bitwidth": 8}})


def test_the_target_checks_each_override() -> None:
    narrow = replace(ONNXRUNTIME, name="narrow", weight=Limits(bitwidths=(4, 8)))
    override = Override(("w",), TensorChange(bitwidth=16))
    with pytest.raises(InputError, match="The target 'narrow' takes weights with 4 or 8 bits, not 16"):
        narrow.check(replace(SCHEME, overrides=(override,)))
    with pytest.raises(ValueError, match=r"scheme\.overrides\[0\]\.nodes: '\(' is no regular expression"):
        narrow.check(replace(SCHEME, overrides=(Override(("(",), TensorChange(bitwidth=8)),)))
